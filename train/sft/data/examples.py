"""Rows → supervised token sequences. Knows neither the model nor DeepSpeed.

A row is `{"messages": [{"role": …, "content": …}, …]}`, rendered by the tokenizer's own chat template. The loss is on
what the assistant says and on the token that ends its turn, nothing else (chat_format.py finds it).

Refused: what lines.py refuses, and with `file:line` what rows.py, shapes.py, thinking.py and chat_format.py call a bad
row.
"""

import functools
import hashlib
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from sft.data.chat_format import ChatFormat, Rendered
from sft.data.lines import BadRow, data_files
from sft.data.report import Report, report_findings
from sft.data.shapes import parse_row
from sft.messages import Refused, note

IGNORE_INDEX = -100  # the label of a token that is not supervised
INTS = pa.list_(pa.int32())
SCHEMA = pa.schema({"input_ids": INTS, "spans": INTS, "row_hash": pa.uint32(), "line": pa.uint32()})


@dataclass(frozen=True)
class Options:
    """What decides, beside the tokenizer, which tokens of a row are trained on."""

    max_seq_length: int = 4096
    train_on: str = "all"
    overlong: str = "truncate"
    history: str = "as_written"


def encode_rows(
    lines: list[tuple[int, bytes | None]], chat: ChatFormat, options: Options, shape: str | None = None
) -> tuple[pa.Table, Report]:
    """Rows of a shape (see shapes.py) → token sequences, cut as the options say, and what was found on the way.

    Returns a table of `input_ids`, `spans` (first token and end of each supervised stretch, flat), `row_hash` and
    `line` (both the same for all sequences of a row).
    """
    report, rendered, texts = Report(), [], []
    for number, line in lines:
        report.counts["rows"] += 1
        try:
            if line is None:
                raise BadRow("is longer than 16 MB")
            sequences, counts = render_row(line, chat, options, shape)
            row_hash = int.from_bytes(hashlib.blake2b(line.strip(), digest_size=4).digest(), "little")
        except BadRow as error:
            report.found("bad", number, str(error))
        else:
            report.counted(counts, number)
            rendered.append((number, row_hash, sequences))
            texts += [text for text, _ in sequences]
    all_ids = iter(chat.encoder.encode_each(texts))
    encoded = []
    for number, row_hash, sequences in rendered:
        ids_of_row = [ids for _ in sequences if (ids := next(all_ids)) is not None]
        if len(ids_of_row) < len(sequences):
            report.found("bad", number, "the tokenizer raised an error")
            continue
        kept, answer_cut = cut_row(sequences, ids_of_row, chat, options)
        longest = max(map(len, ids_of_row))
        report.longest = max(report.longest, longest)
        if answer_cut:
            report.found("answer_cut", number)
        if longest > options.max_seq_length:
            report.found("overlong", number, f"{longest} tokens")
        if not kept and (longest <= options.max_seq_length or options.overlong == "truncate"):
            report.found("unsupervised", number)
        report.counts["split"] += len(kept) > 1
        of_row = {"row_hash": row_hash, "line": number}
        encoded += [{"input_ids": ids, "spans": spans, **of_row} for ids, spans in kept]
    return pa.Table.from_pylist(encoded, SCHEMA), report


def render_row(
    line: bytes, chat: ChatFormat, options: Options, shape: str | None
) -> tuple[list[Rendered], Counter[str]]:
    """The texts that a row becomes, and counts of what was found in it. Raises BadRow."""
    counts: Counter[str] = Counter()
    try:
        row = parse_row(line, shape, counts)
    except BadRow:
        raise
    except Exception as error:  # a value of a kind that is not foreseen
        raise BadRow(f"cannot be read ({type(error).__name__})") from error
    try:
        return chat.sequences(row, options.train_on, counts, options.history), counts
    except BadRow:
        raise
    except Exception as error:  # a template may raise anything, and its message may quote the row
        raise BadRow(f"the chat template does not render it ({type(error).__name__})") from error


def cut_row(
    sequences: list[Rendered], ids_of_row: list[list[int]], chat: ChatFormat, options: Options
) -> tuple[list[tuple[np.ndarray, np.ndarray]], bool]:
    """(ids, spans) of the row's sequences that have a supervised token within max_seq_length, and whether one is cut
    off there."""
    limit, kept, answer_cut = options.max_seq_length, [], False
    for (text, spans), ids in zip(sequences, ids_of_row):
        if len(ids) > limit and options.overlong != "truncate":
            continue
        ids = np.array(ids, np.int32)
        places = chat.encoder.tokens_before(text, ids, [place for span in spans for place in span])
        starts = [max(start, 1) for start in places[::2]]  # nothing before the first token could predict it
        answer_cut = answer_cut or max(places, default=0) > limit
        ends = [min(end, limit) for end in places[1::2]]
        spans = [(start, end) for start, end in zip(starts, ends) if start < end]
        if spans:
            kept.append((ids[:limit], np.array(spans, np.int32).ravel()))
    return kept, answer_cut


class Examples(torch.utils.data.Dataset):
    """Token sequences, memory-mapped, with the counts that the results report.

    Args:
        rows: a datasets.Dataset with the columns of SCHEMA.
        files: of each file, in order, the first of its sequences in `rows`, and its path.
        index: which of `rows`, default all.
    """

    def __init__(self, rows: Any, report: Report, files: list[tuple[int, Path]], index: np.ndarray | None = None):
        self.report, self.files = report, files
        self.rows, self.sequences = rows, rows.select_columns(["input_ids", "spans"]).with_format("numpy")
        self.index = np.arange(len(rows)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """`input_ids` and `labels` (length,): the label of a supervised token is its id, else IGNORE_INDEX. `number`:
        see places()."""
        number = int(self.index[i])
        row = self.sequences[number]
        labels = np.full_like(row["input_ids"], IGNORE_INDEX)
        for start, end in row["spans"].reshape(-1, 2):
            labels[start:end] = row["input_ids"][start:end]
        return {"input_ids": row["input_ids"], "labels": labels, "number": number}

    def places(self, numbers: list[int]) -> list[str]:
        """The places of sequences by their `number`, each once: `file:line`, and `line` for the next of one file."""
        lines, places, before = self.rows.data.column("line"), [], None
        files = [self.files[bisect_right(self.files, n, key=itemgetter(0)) - 1][1] for n in numbers]
        for file, line in dict.fromkeys(zip(files, (lines[n].as_py() for n in numbers))):
            places.append(f"{line}" if file == before else f"{file}:{line}")
            before = file
        return places

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        return pc.list_value_length(self.rows.data.column("input_ids")).to_numpy()[self.index]

    def split(self, share: float) -> tuple["Examples", "Examples"]:
        """Part `share` of the rows off, by a hash of the row: the same on every rank and run, equal rows together."""
        hashes = self.rows.data.column("row_hash").to_numpy()[self.index]
        apart = hashes < share * 2**32
        return (
            Examples(self.rows, self.report, self.files, self.index[~apart]),
            Examples(self.rows, self.report, self.files, self.index[apart]),
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

    files = data_files(patterns, flag)
    workers = workers or workers_for(files)
    encode = functools.partial(encode_rows, chat=ChatFormat(tokenizer), options=options)
    key = [fingerprint(tokenizer), repr(options)]
    parts, starts, report = [], [0], Report()
    for file in files:
        rows, found = tokenized(file, key, encode, workers)
        if found.notes:
            note(f"{file}: accepted: {', '.join(found.notes)}")
        report.add(found, file)
        parts.append(rows)
        starts.append(starts[-1] + len(rows))
    report_findings(report, bad_rows, options.overlong, options.max_seq_length)
    rows = datasets.concatenate_datasets(parts)
    if not len(rows):
        raise Refused(f"{flag} {' '.join(patterns)}: no row has a token to learn within --max_seq_length")
    return Examples(rows, report, list(zip(starts, files)))
