"""jsonl rows → supervised token sequences → batches. Knows neither the model nor DeepSpeed.

A row is `{"messages": [{"role": …, "content": …}, …]}`, rendered by the tokenizer's own chat template. The loss is on
what the assistant says and on the token that ends its turn, nothing else.

Refused (exit code 2, with file:line): a file that is missing, empty or a directory, a line that is not a JSON object
with messages, a message with an unknown role or without text, a conversation without an assistant's turn or that
begins with one, a row that the template does not render. No message shows a row's text.
"""

import functools
import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from console import Refused

IGNORE_INDEX = -100  # the label of a token that is not supervised
ROLES = ("system", "user", "assistant", "tool")
BAD_ROWS_SHOWN = 20


# ---------------------------------------------------------------------------------------------------------------- rows


class BadRow(ValueError):
    """What is wrong with one row, without its text."""


def data_files(patterns: list[str]) -> list[Path]:
    """The files that paths and globs name, in their order; refused where one is missing, empty or a directory."""
    if not patterns:
        raise Refused("--train_data_file is not given: one or more jsonl files")
    files = []
    for pattern in patterns:
        found = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not found:
            raise Refused(f"--train_data_file {pattern}: no such file")
        for file in found:
            if file.is_dir():
                raise Refused(f"--train_data_file {file}: is a directory: name the files in it, e.g. '{file}/*.jsonl'")
            if file.stat().st_size == 0:
                raise Refused(f"--train_data_file {file}: is empty")
        files += found
    return files


def read_rows(file: Path) -> Iterator[tuple[int, dict | BadRow]]:
    """Yield (line number from 1, row or what is wrong with it) for each line that is not blank."""
    number = 0
    with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, parse_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except (EOFError, OSError, zlib.error) as error:
            raise Refused(
                f"{file}:{number + 1}: cannot be read ({type(error).__name__}): is the file whole?"
            ) from error


def parse_row(line: bytes) -> dict | BadRow:
    """The row that a line holds, or what is wrong with it."""
    try:
        return check_row(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRow("nested too deep")
    except BadRow as error:
        return error


def check_row(row: object) -> dict:
    """Return the row if its messages are a conversation that can be trained on, else raise BadRow."""
    if not isinstance(row, dict):
        raise BadRow(f"a JSON object is expected, not {type(row).__name__}")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRow('no "messages", or none in it')
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRow(f"messages[{i}] is not an object")
        if message.get("role") not in ROLES:
            raise BadRow(f"messages[{i}] has no role of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise BadRow(f'messages[{i}] has no "content" that is a text')
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    if "assistant" not in spoken:
        raise BadRow("no message of the assistant: nothing to learn")
    if spoken[0] == "assistant":
        raise BadRow("begins with the assistant: there is nothing to answer")
    return row


# ------------------------------------------------------------------------------------------------------------- tokens


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[dict[str, list[int]]]:
    """Render a conversation and find what the model has to say in it.

    An assistant's turn begins where the render of what came before, with the generation prompt, stops agreeing with
    the render of the turn itself; it ends where the render up to the turn ends. No special token is searched for: rows
    may quote them.

    Returns one sequence, or, where the template rewrites earlier turns once a later one is there, a sequence for each
    state that inference would see. `labels` equal `input_ids` where supervised, else IGNORE_INDEX.
    """
    # an empty system message is none: the released A13B template refuses to render it
    messages = [m for m in messages if m["role"] != "system" or m["content"]]

    @functools.cache
    def render(upto: int, prompt: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=prompt, return_dict=False)

    def blank(ids: list[int]) -> dict[str, list[int]]:
        return {"input_ids": list(ids), "labels": [IGNORE_INDEX] * len(ids)}

    sequences, current = [], blank(render(len(messages)))
    for i in reversed([i for i, message in enumerate(messages) if message["role"] == "assistant"]):
        asked, said = render(i, prompt=True), render(i + 1)
        start = next((k for k, (a, b) in enumerate(zip(asked, said)) if a != b), min(len(asked), len(said)))
        if current["input_ids"][: len(said)] != said:
            current = blank(said)
        current["labels"][start : len(said)] = said[start:]
        if not sequences or current is not sequences[0]:
            sequences.insert(0, current)
    return sequences


@dataclass
class Examples(torch.utils.data.Dataset):
    """Token sequences in memory, with the counts that the results report."""

    sequences: list[dict[str, list[int]]] = field(default_factory=list)
    num_rows: int = 0
    num_rows_skipped: int = 0
    num_rows_unsupervised: int = 0

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.sequences[index]


def load_examples(patterns: list[str], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Examples:
    """Tokenize all rows, cut at `max_seq_length` tokens. Refused with the first bad rows and their number."""
    examples, bad = Examples(), []
    for file in data_files(patterns):
        for number, row in read_rows(file):
            examples.num_rows += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                try:
                    sequences = encode(tokenizer, row["messages"])
                except Exception as error:  # a template may raise anything, its message may quote the row
                    raise BadRow(f"the chat template does not render it ({type(error).__name__})") from error
            except BadRow as error:
                bad.append(f"{file}:{number}: {error}")
                continue
            cut = [{name: ids[:max_seq_length] for name, ids in s.items()} for s in sequences]
            cut = [s for s in cut if any(label != IGNORE_INDEX for label in s["labels"][1:])]
            examples.num_rows_unsupervised += not cut
            examples.sequences += cut
    if bad:
        more = f"\n… {len(bad) - BAD_ROWS_SHOWN} more" if len(bad) > BAD_ROWS_SHOWN else ""
        raise Refused(f"{len(bad)} of {examples.num_rows} rows are bad:\n" + "\n".join(bad[:BAD_ROWS_SHOWN]) + more)
    if not examples.sequences:
        raise Refused(f"--train_data_file {' '.join(patterns)}: no row has a token to learn within --max_seq_length")
    return examples


# ------------------------------------------------------------------------------------------------------------ batches


@dataclass
class Collator:
    """Sequences → one batch, padded to its longest or laid end to end.

    With `supervised_head` the model computes logits at the supervised positions alone: `logits_to_keep` is the boolean
    mask (batch, length) of positions whose next token is supervised, `labels` and `shift_labels` (supervised,) are
    those next tokens. Without it `labels` is (batch, length), for a model that shifts them itself.
    """

    pad_token_id: int
    packing: str = "none"
    supervised_head: bool = True

    def __call__(self, sequences: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(s["input_ids"]) for s in sequences]
        labels = [torch.tensor(s["labels"]) for s in sequences]
        for row in labels:
            row[0] = IGNORE_INDEX  # nothing comes before it that could predict it
        if self.packing == "none":
            batch = {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
                "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            }
        else:  # positions that restart keep the rows apart, but only without an attention mask
            batch = {
                "input_ids": torch.cat(ids)[None],
                "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
                "labels": torch.cat(labels)[None],
            }
        if self.supervised_head:
            targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
            batch["logits_to_keep"] = targets != IGNORE_INDEX
            batch["labels"] = batch["shift_labels"] = targets[batch["logits_to_keep"]]
        return batch
