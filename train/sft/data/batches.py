"""Sequences → batches: padded, laid end to end, or in bins of at most `capacity` tokens, as full as they get.

`--packing bin` is best fit, longest first (Johnson 1973: at most 11/9 of the fewest bins, and nearly all full where
there are short rows). Rows of one length and bins with one space left are handled together, so that the plan takes as
many steps as there are pairs of them, whatever the number of rows.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from sft.data.examples import IGNORE_INDEX, Examples, Options, load_examples
from sft.messages import Refused, note


@dataclass
class Data:
    """What is trained and evaluated on.

    Attributes:
        examples: the sequences of all training rows.
        train: the same, or bins of them.
        figures: the counts for train_results.json.
    """

    examples: Examples
    train: "Examples | Bins"
    evaluation: Examples | None
    figures: dict[str, Any]


def load_data(args: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    """The rows to train on and to evaluate on, tokenized, as arguments.DataArguments says. Refuses bad rows and a
    split that leaves none."""
    options = Options(args.max_seq_length, args.train_on, args.overlong, args.history)
    how = (tokenizer, options, args.bad_rows, args.preprocessing_num_workers)
    examples, evaluation = load_examples(args.train_data_file, *how), None
    if args.eval_data_file:
        evaluation = load_examples(args.eval_data_file, *how, flag="--eval_data_file")
    elif args.eval_split:
        examples, evaluation = examples.split(args.eval_split)
        if not len(examples) or not len(evaluation):
            purpose = "evaluate" if len(examples) else "train"
            raise Refused(f"--eval_split {args.eval_split}: leaves no row to {purpose} on")
    to_evaluate = f", {len(evaluation)} to evaluate on" if evaluation else ""
    note(f"{examples.report.counts['rows']} rows: {len(examples)} sequences to train on{to_evaluate}")
    figures: dict[str, Any] = examples.figures() | {
        "num_examples": len(examples),
        "num_eval_examples": len(evaluation or ()),
    }
    if args.packing != "bin":
        return Data(examples, examples, evaluation, figures)
    bins = Bins(examples, args.max_seq_length, seed)
    note(f"{len(examples)} sequences in {len(bins)} bins, which are {bins.fill:.1%} full")
    return Data(examples, bins, evaluation, figures | {"num_bins": len(bins), "bin_fill": bins.fill})


FILLING = 2  # tokens of a sequence that fills a batch up
NO_ROW = -1  # and its number


@dataclass
class Filled(torch.utils.data.Dataset):
    """Examples, filled up to a multiple of `multiple` by sequences without a supervised token.

    Every rank then has as many batches as the others, and no example is taken twice.
    """

    examples: Examples
    multiple: int

    def __len__(self) -> int:
        return math.ceil(len(self.examples) / self.multiple) * self.multiple

    def __getitem__(self, i: int) -> Any:
        if i < len(self.examples):
            return self.examples[i]
        first = self.examples[0]
        ids = (first[0] if isinstance(first, list) else first)["input_ids"][:FILLING]
        filling = {"input_ids": ids, "labels": np.full_like(ids, IGNORE_INDEX), "number": NO_ROW}
        return [filling] if isinstance(first, list) else filling


class FilledAtTheEnd(torch.utils.data.Sampler):
    """What a sampler of the examples gives, and behind it what Filled has added."""

    def __init__(self, sampler: torch.utils.data.Sampler, filled: Filled):
        self.sampler, self.filled = sampler, filled

    def __len__(self) -> int:
        return len(self.filled)

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(len(self.filled.examples), len(self.filled))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


@dataclass
class Collator:
    """Sequences, or bins of them → one batch, padded to its longest or laid end to end.

    With `supervised_head` the model computes logits at the supervised positions alone: `logits_to_keep` is the boolean
    mask (batch, length) of positions whose next token is supervised, `labels` and `shift_labels` (supervised,) are
    those next tokens. Without it `labels` is (batch, length), for a model that shifts them itself. `numbers` is for
    Examples.places(), not for the model.
    """

    pad_token_id: int
    packing: str = "none"
    supervised_head: bool = True

    def __call__(self, sequences: list[dict[str, np.ndarray]] | list[list[dict]]) -> dict[str, torch.Tensor]:
        if isinstance(sequences[0], list):
            sequences = [sequence for one_bin in sequences for sequence in one_bin]
        ids = [torch.as_tensor(s["input_ids"], dtype=torch.long) for s in sequences]
        labels = [torch.tensor(s["labels"], dtype=torch.long) for s in sequences]
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
                **row_boundaries([len(row) for row in ids]),
            }
        if self.supervised_head:
            targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
            batch["logits_to_keep"] = targets != IGNORE_INDEX
            batch["labels"] = batch["shift_labels"] = targets[batch["logits_to_keep"]]
        return batch | {"numbers": [s.get("number", NO_ROW) for s in sequences]}


class RowLengths:
    """Tokens of each row of a packed batch. Not a plain list, for whose every length torch.compile would compile
    anew."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths


def row_boundaries(lengths: list[int]) -> dict[str, Any]:
    """What attention needs to know of rows that lie end to end, under the names of transformers' variable-length
    kernels, and `row_lengths` for ours; whole numbers, so that no layer has to wait for a device."""
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    found = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return found | {"row_lengths": RowLengths(lengths)}


def plan_bins(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Put rows into bins. Which of the rows of one length go where is drawn by the seed.

    Args:
        lengths: tokens of each row (rows,), from 1 to `capacity`.

    Returns:
        order (rows,): the rows, bin by bin; starts (bins + 1,): bin b holds order[starts[b] : starts[b + 1]].

    O(n log n) for the sort; about 30 bytes a row.
    """
    rows = np.random.default_rng(seed).permutation(len(lengths)).astype(np.int32)
    rows = rows[np.argsort(-lengths[rows].astype(np.int64), kind="stable")]
    sorted_lengths = lengths[rows]
    begins = np.flatnonzero(np.diff(sorted_lengths, prepend=-1)).tolist() + [len(rows)]
    bin_of: np.ndarray = np.empty(len(rows), np.int32)  # of the row at the same place in `rows`
    free: dict[int, list[np.ndarray]] = defaultdict(list)  # groups of bins by the space that they have left
    occupied: np.ndarray = np.zeros(capacity + 1, bool)  # whether there are any
    bins = 0
    for begin, end in zip(begins, begins[1:]):  # rows of one length
        length = int(sorted_lengths[begin])
        while begin < end:
            space = length + int(occupied[length:].argmax())  # the least that holds a row
            if occupied[space]:
                chosen = free[space].pop()
                occupied[space] = bool(free[space])
            else:
                space = capacity
                needed = math.ceil((end - begin) / (space // length))
                chosen = np.arange(bins, bins + needed, dtype=np.int32)
                bins += needed
            each = space // length  # rows that a bin takes
            used = min(len(chosen), math.ceil((end - begin) / each))
            count = min(end - begin, used * each)
            bin_of[begin : begin + count] = np.repeat(chosen[:used], each)[:count]
            begin += count
            full, rest = divmod(count, each)  # bins that took `each` rows; rows in one more bin
            groups = {space - each * length: chosen[:full], space - rest * length: chosen[full:used]}
            for left, group in (groups | {space: chosen[used:]}).items():
                if left and len(group):
                    free[left].append(group)
                    occupied[left] = True
    order = rows[np.argsort(bin_of, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=bins))])
    return order, starts


class Bins(torch.utils.data.Dataset):
    """Examples in bins: item b is the list of the sequences in bin b."""

    def __init__(self, examples, capacity: int, seed: int):
        self.examples, self.capacity = examples, capacity
        self.order, self.starts = plan_bins(examples.lengths, capacity, seed)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def places(self, numbers: list[int]) -> list[str]:
        return self.examples.places(numbers)

    def __getitem__(self, b: int) -> list[dict]:
        return [self.examples[int(i)] for i in self.order[self.starts[b] : self.starts[b + 1]]]

    @property
    def fill(self) -> float:
        """Share of all bins' places that hold a token."""
        return float(self.examples.lengths.sum()) / (len(self) * self.capacity)


class GroupedByLength(LengthGroupedSampler):
    """Groups rows of similar length, in another order each epoch. The order depends on the seed alone: it is the same
    on every rank and after a resume."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)
