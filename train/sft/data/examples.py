"""Rows → supervised token sequences. Knows neither the model nor DeepSpeed.

A row is `{"messages": [{"role": …, "content": …}, …]}`, rendered by the tokenizer's own chat template. The loss is on
what the assistant says and on the token that ends its turn, nothing else (chat_format.py finds it).

Refused (exit code 2): what rows.py refuses, and with `file:line` what it and chat_format.py call a bad row.
"""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from sft.data.chat_format import WARNINGS, ChatFormat
from sft.data.rows import ALPACA, NEEDED, SHAREGPT, SHOWN, BadRow, Report, data_files, parse_row
from sft.messages import Refused, note

IGNORE_INDEX = -100  # the label of a token that is not supervised


# -------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Options:
    """What decides, beside the tokenizer, which tokens of a row are trained on."""

    max_seq_length: int = 4096
    train_on: str = "all"
    overlong: str = "truncate"


def encode_rows(lines: list[tuple[int, bytes | None]], chat: ChatFormat, options: Options) -> tuple[pa.Table, Report]:
    """Lines → token sequences, cut as the options say, and what was found on the way.

    Returns a table of `input_ids`, `spans` (first token and end of each supervised stretch, flat) and `row_hash` (the
    same for all sequences of a row).
    """
    report, rows, texts = Report(), [], []
    for number, line in lines:
        report.counts["rows"] += 1
        counts = dict.fromkeys(("turns", "turns_not_trained_on", *WARNINGS), 0)
        try:
            if line is None:
                raise BadRow("is longer than 16 MB")
            row = parse_row(line)
            try:
                sequences = chat.sequences(row, options.train_on, counts)
            except BadRow:
                raise
            except Exception as error:  # a template may raise anything, and its message may quote the row
                raise BadRow(f"the chat template does not render it ({type(error).__name__})") from error
        except BadRow as error:
            report.found("bad", number, str(error))
            continue
        report.counts.update(counts)
        row_hash = int.from_bytes(hashlib.blake2b(line.strip(), digest_size=4).digest(), "little")
        rows.append((number, row_hash, sequences))
        texts += [text for text, _ in sequences]
    all_ids = iter(chat.tokenize_all(texts))
    columns = {"input_ids": [], "spans": [], "row_hash": []}
    for number, row_hash, sequences in rows:
        kept, too_long, row_ids = 0, 0, [next(all_ids) for _ in sequences]
        if None in row_ids:
            report.found("bad", number, "the tokenizer does not take it")
            continue
        for (text, spans), ids in zip(sequences, row_ids):
            ids = np.array(ids, np.int32)
            cuts = chat.tokens_before(text, ids, [place for span in spans for place in span])
            limit = options.max_seq_length
            too_long = max(too_long, len(ids) if len(ids) > limit else 0)
            if len(ids) > limit and options.overlong != "truncate":
                continue
            # nothing comes before the first token that could predict it
            spans = [(max(a, 1), min(b, limit)) for a, b in zip(cuts[::2], cuts[1::2]) if max(a, 1) < min(b, limit)]
            if spans:
                kept += 1
                columns["input_ids"].append(ids[:limit])
                columns["spans"].append(np.array(spans, np.int32).ravel())
                columns["row_hash"].append(row_hash)
        report.counts["split"] += kept > 1
        if too_long:
            report.found("overlong", number, f"{too_long} tokens")
        if not kept and not (too_long and options.overlong != "truncate"):
            report.found("unsupervised", number)
    return pa.table(
        {
            "input_ids": lists(columns["input_ids"]),
            "spans": lists(columns["spans"]),
            "row_hash": pa.array(columns["row_hash"], pa.uint32()),
        }
    ), report


def lists(arrays: list[np.ndarray]) -> pa.ListArray:
    """int32 arrays as one Arrow column."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays) if arrays else np.zeros(0, np.int32))


class Examples(torch.utils.data.Dataset):
    """Token sequences, memory-mapped, with the counts that the results report."""

    def __init__(self, rows: "datasets.Dataset", report: Report, index: np.ndarray | None = None):  # noqa: F821
        self.report = report
        self.rows = rows.with_format("numpy", columns=["input_ids", "spans"])
        self.index = np.arange(len(rows)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """`input_ids` and `labels` (length,): the label of a supervised token is its id, else IGNORE_INDEX."""
        row = self.rows[int(self.index[i])]
        labels = np.full_like(row["input_ids"], IGNORE_INDEX)
        for start, end in row["spans"].reshape(-1, 2):
            labels[start:end] = row["input_ids"][start:end]
        return {"input_ids": row["input_ids"], "labels": labels}

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        return pc.list_value_length(self.rows.data.column("input_ids")).to_numpy()[self.index]

    def split(self, share: float) -> tuple["Examples", "Examples"]:
        """Part `share` of the rows off, by a hash of the row: the same on every rank and run, equal rows together."""
        hashes = self.rows.data.column("row_hash").to_numpy()[self.index]
        apart = hashes < share * 2**32
        return (
            Examples(self.rows, self.report, self.index[~apart]),
            Examples(self.rows, self.report, self.index[apart]),
        )

    def figures(self) -> dict[str, int]:
        """The counts for train_results.json."""
        counts = self.report.counts
        return {
            "num_rows": counts["rows"],
            "num_rows_skipped": counts["bad"],
            "num_rows_unsupervised": counts["unsupervised"],
            "num_rows_overlong": counts["overlong"],
            "num_rows_split": counts["split"],
            "num_turns": counts["turns"],
            "num_turns_not_trained_on": counts["turns_not_trained_on"],
        }


def load_data(args, tokenizer: PreTrainedTokenizerBase, options: Options) -> tuple["Examples", "Examples | None"]:
    """The rows to train on and to evaluate on, as arguments.DataArguments says."""
    how = (tokenizer, options, args.bad_rows, args.preprocessing_num_workers)
    examples, evaluation = load_examples(args.train_data_file, *how), None
    if args.eval_data_file:
        evaluation = load_examples(args.eval_data_file, *how, flag="--eval_data_file")
    elif args.eval_split:
        examples, evaluation = examples.split(args.eval_split)
        if not len(examples) or not len(evaluation):
            raise Refused(
                f"--eval_split {args.eval_split}: leaves no row to {'evaluate' if len(examples) else 'train'} on"
            )
    note(
        f"{examples.report.counts['rows']} rows: {len(examples)} sequences to train on"
        + (f", {len(evaluation)} to evaluate on" if evaluation else "")
    )
    return examples, evaluation


def load_examples(
    patterns: list[str],
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    bad_rows: str = "error",
    workers: int | None = None,
    flag: str = "--train_data_file",
) -> Examples:
    """Tokenize all rows, or take what an earlier run made of the same rows, tokenizer and options.

    Every rank calls; on a node one does the work, the others wait for its file. Says what was found. Refused with the
    first bad rows and their number, unless `bad_rows` is "skip".
    """
    import datasets

    from sft.data.tokenized import fingerprint, tokenized, workers_for

    chat, parts, report = ChatFormat(tokenizer), [], Report()
    print_tokenizer, encode = fingerprint(tokenizer), functools.partial(encode_rows, chat=chat, options=options)
    named: dict[str, list[str]] = {}
    files = data_files(patterns, flag)
    workers = workers or workers_for(files)
    for file in files:
        rows, found = tokenized(file, [print_tokenizer, repr(options)], encode, workers)
        parts.append(rows)
        for kind, lines in found.lines.items():
            named[kind] = named.get(kind, []) + [f"{file}:{n}" + (f": {what}" if what else "") for n, what in lines]
        if found.notes:
            note(f"{file}: accepted: {', '.join(found.notes)}")
        report.add(found)
    say(report, named, options, bad_rows)
    rows = datasets.concatenate_datasets(parts)
    if not len(rows):
        raise Refused(f"{flag} {' '.join(patterns)}: no row has a token to learn within --max_seq_length")
    return Examples(rows, report)


def say(report: Report, named: dict[str, list[str]], options: Options, bad_rows: str) -> None:
    """Refuse bad rows, or name them; say what else was found."""
    counts = report.counts

    def listed(kind: str) -> str:
        more = counts[kind] - SHOWN
        return "\n".join(named[kind][:SHOWN] + ([f"… {more} more"] if more > 0 else []))

    if counts["bad"]:
        text = f"{counts['bad']} of {counts['rows']} rows are bad:\n" + listed("bad")
        if any(what.endswith((ALPACA, SHAREGPT)) for what in named["bad"]):
            text += f"\n{NEEDED}"
        if bad_rows == "error":
            raise Refused(text + "\nMend them, or leave them out with --bad_rows skip")
        note(f"--bad_rows skip: {text}")
    if counts["overlong"]:
        text = f"{counts['overlong']} rows are longer than --max_seq_length {options.max_seq_length}"
        if options.overlong == "error":
            raise Refused(f"{text} (--overlong error):\n" + listed("overlong"))
        note(
            f"{text}: " + ("cut at the right" if options.overlong == "truncate" else f"left out\n{listed('overlong')}")
        )
    if counts["unsupervised"]:
        note(f"{counts['unsupervised']} rows are left out: no supervised token\n" + listed("unsupervised"))
    if counts["split"]:
        note(f"{counts['split']} rows become several sequences: the template rewrites earlier turns")
    if counts["turns_not_trained_on"]:
        note(f"{counts['turns_not_trained_on']} of {counts['turns']} assistant turns are not trained on")
    for kind, text in WARNINGS.items():
        if counts[kind]:
            note(f"warning: {counts[kind]} {text}")
