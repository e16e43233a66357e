"""Rows to examples to batches, on the example's tokenizer (the A13B format)."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from sft.data.batches import Bins, Collator, Filled, GroupedByLength, plan_bins
from sft.data.examples import IGNORE_INDEX, Options, load_examples
from sft.data.tokens import TextEncoder
from sft.messages import Refused


@pytest.fixture(scope="module")
def tokenizer(example_tokenizer_dir):
    return AutoTokenizer.from_pretrained(example_tokenizer_dir)


def conversation(*texts, **more):
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts)], **more}


@pytest.fixture
def rows_file(tmp_path):
    def write(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return write


# ------------------------------------------------------------------------------------------------------------ examples


def test_bad_rows_are_listed_with_their_lines_and_the_first_twenty_shown(tokenizer, rows_file):
    file = rows_file([conversation("q", "a"), b"{secret", b"", b"\xff\xfe"] + [b"{}"] * 30)
    with pytest.raises(Refused) as refusal:
        load_examples([file], tokenizer, Options())
    lines = str(refusal.value).splitlines()
    assert lines[0] == "32 of 33 rows are bad:"
    assert lines[1].startswith(f"{file}:2: not JSON")
    assert lines[2] == f"{file}:4: not UTF-8"
    assert lines[21] == "… 12 more" and len(lines) == 23
    assert "secret" not in str(refusal.value)


def test_bad_rows_of_several_files_are_one_list(tokenizer, rows_file, capsys):
    files = [
        rows_file([conversation("q", "a"), b"{"], "a.jsonl"),
        rows_file([b"3", conversation("q", "b")], "b.jsonl"),
    ]
    with pytest.raises(Refused) as refusal:
        load_examples(files, tokenizer, Options())
    assert [line.split(": ")[0] for line in str(refusal.value).splitlines()[1:3]] == [f"{files[0]}:2", f"{files[1]}:1"]
    examples = load_examples(files, tokenizer, Options(), bad_rows="skip")
    assert (len(examples), examples.figures()["num_rows"], examples.figures()["num_rows_skipped"]) == (2, 4, 2)
    assert f"{files[0]}:2: not JSON" in capsys.readouterr().out


def test_a_row_at_which_the_tokenizer_raises_is_bad(tokenizer, rows_file, monkeypatch):
    encode = TextEncoder.encode

    def refusing(self, texts):
        if any("Z" in text for text in texts):
            raise ValueError("secret")
        return encode(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", refusing)
    file = rows_file([conversation("q", text) for text in "abZcdZe"])
    with pytest.raises(
        Refused, match=f"2 of 7 rows are bad:\n{file}:3: the tokenizer raised an error\n{file}:6"
    ) as bad:
        load_examples([file], tokenizer, Options())
    assert "secret" not in str(bad.value)


def test_a_file_has_one_shape_and_says_which(tokenizer, rows_file, capsys):
    alpaca = [{"instruction": "q", "output": "a", "id": i} for i in range(3)]
    file = rows_file([json.dumps(alpaca, indent=1).encode()])
    examples = load_examples([file], tokenizer, Options())
    direct = load_examples([rows_file([conversation("q", "a")] * 3, "direct.jsonl")], tokenizer, Options())
    assert [e["input_ids"].tolist() for e in examples] == [e["input_ids"].tolist() for e in direct]
    out = capsys.readouterr().out
    assert f"{file}: accepted: JSON array, no newline" not in out and f"{file}: accepted: JSON array, Alpaca\n" in out
    assert 'keys that are not used: "id" (3 rows)\n' in out
    file = rows_file([conversation("secret", "a"), alpaca[0], {"text": "secret"}])
    with pytest.raises(Refused) as refusal:
        load_examples([file], tokenizer, Options())
    message = str(refusal.value)
    assert (
        f"2 of 3 rows are bad:\n{file}:2: in the shape Alpaca, and the file's first row in the shape messages"
        in message
    )
    assert "secret" not in message


def test_warnings_name_the_first_lines(tokenizer, rows_file, capsys):
    rows = [conversation("q", "a" * (30 if i % 2 else 1)) for i in range(14)]
    file = rows_file(rows)
    load_examples([file], tokenizer, Options(20))
    places = ", ".join(f"{file}:{line}" for line in (2, 4, 6, 8, 10))
    expected = "warning: 7 rows lose an answer, or its end, at --max_seq_length 20; the longest row has 34 tokens. "
    assert f"{expected}The first: {places}\n" in capsys.readouterr().out


def test_long_rows_are_cut_dropped_or_refused(tokenizer, rows_file, capsys):
    file = rows_file([conversation("q", "a" * 50), conversation("q" * 50, "a"), conversation("q", "a")])
    cut = load_examples([file], tokenizer, Options(20))
    assert [len(example["input_ids"]) for example in cut] == [20, 5] == cut.lengths.tolist()
    figures = cut.figures()
    assert (figures["num_rows"], figures["num_rows_unsupervised"], figures["num_rows_overlong"]) == (3, 1, 2)
    assert f"no supervised token\n{file}:2\n" in capsys.readouterr().out
    dropped = load_examples([file], tokenizer, Options(20, overlong="drop"))
    assert len(dropped) == 1 and dropped.figures()["num_rows_unsupervised"] == 0
    out = capsys.readouterr().out
    assert f"{file}:1: " in out and f"{file}:2: " in out
    with pytest.raises(Refused, match=f"(?s)2 rows are longer.*{file}:1: 5[0-9] tokens"):
        load_examples([file], tokenizer, Options(20, overlong="error"))
    with pytest.raises(Refused, match="no row has a token to learn"):
        load_examples([file], tokenizer, Options(2))


def test_the_split_is_by_row_and_stays(tokenizer, rows_file):
    rows = [conversation(f"q{i}", f"a{i}") for i in range(300)]
    examples = load_examples([rows_file(rows + rows[:50])], tokenizer, Options())
    train, held_out = examples.split(0.2)
    assert len(train) + len(held_out) == 350 and 40 < len(held_out) < 100

    def said(part):
        return {tokenizer.decode(example["input_ids"]) for example in part}

    assert not said(train) & said(held_out), "the same row stands on both sides"
    again = load_examples([rows_file(rows[::-1], "other.jsonl")], tokenizer, Options()).split(0.2)[1]
    assert said(again) == said(held_out), "another order, another file: the same rows"
    assert said(examples.split(0.1)[1]) < said(held_out)


def test_a_sequence_knows_its_file_and_line(tokenizer, rows_file):
    """Behind bad rows and files without a sequence, in both parts of a split."""
    rows = [conversation(f"q{i}", f"a{i}") for i in range(9)]
    files = [rows_file(part, f"{i}.jsonl") for i, part in enumerate([[b"{", *rows[:3]], [b"{"], rows[3:]])]
    examples = load_examples(files, tokenizer, Options(), bad_rows="skip")
    numbers = [examples[i]["number"] for i in range(9)]
    first, last = files[0], files[2]
    assert examples.places(numbers) == [f"{first}:2", "3", "4", f"{last}:1", "2", "3", "4", "5", "6"]
    assert examples.places([3, 1, 3]) == [f"{last}:1", f"{first}:3"]
    question = {f"{first}:{line}": f"q{line - 2}" for line in (2, 3, 4)}
    question |= {f"{last}:{line}": f"q{line + 2}" for line in range(1, 7)}
    for part in examples.split(0.5):
        assert 0 < len(part) < 9
        for i in range(len(part)):
            assert question[part.places([part[i]["number"]])[0]] in tokenizer.decode(part[i]["input_ids"])


def test_filled_up_for_the_ranks_without_taking_an_example_twice(tokenizer, rows_file):
    examples = load_examples([rows_file([conversation("q", "abc"[i % 3]) for i in range(5)])], tokenizer, Options())
    filled = Filled(examples, 4)
    assert len(filled) == 8 and len(Filled(examples, 5)) == 5
    assert [(filled[i]["labels"] != IGNORE_INDEX).any() for i in range(8)] == [True] * 5 + [False] * 3


def test_rows_of_similar_length_another_way_each_epoch():
    sampler = GroupedByLength(4, [1, 9] * 50, seed=3)
    orders = []
    for epoch in (0, 1, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] == orders[2] and sorted(orders[0]) == list(range(100))
    assert sum(len({i % 2 for i in orders[0][k : k + 4]}) == 1 for k in range(0, 100, 4)) >= 18


# ---------------------------------------------------------------------------------------------------------------- bins


@pytest.mark.parametrize(("number", "capacity"), [(1, 10), (1000, 64), (5000, 512), (3, 100)])
def test_every_row_stands_in_one_bin_that_holds_it(number, capacity):
    draw = np.random.default_rng(number)
    lengths = np.minimum(capacity, 1 + draw.gamma(2.0, capacity / 10, number)).astype(np.int32)
    order, starts = plan_bins(lengths, capacity, seed=1)
    assert sorted(order.tolist()) == list(range(number))
    sums = np.add.reduceat(lengths[order], starts[:-1])
    assert sums.max() <= capacity and (np.diff(starts) > 0).all()
    assert len(sums) <= 1.01 * -(-lengths.sum() // capacity) + 1


def test_bins_are_best_fit_and_drawn_by_the_seed():
    # the 3 goes where 3 places are left, not where 4 are
    order, starts = plan_bins(np.array([7, 6, 3]), 10, 0)
    assert {frozenset(order[a:b].tolist()) for a, b in zip(starts, starts[1:])} == {frozenset({0, 2}), frozenset({1})}
    lengths = np.array([5] * 20 + [3] * 20)
    first, again, other = (plan_bins(lengths, 8, seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_a_bin_is_laid_end_to_end(tokenizer, rows_file):
    examples = load_examples([rows_file([conversation("q" * i, "a") for i in range(1, 9)])], tokenizer, Options())
    bins = Bins(examples, 16, seed=0)
    assert bins.fill == examples.lengths.sum() / (16 * len(bins))
    batch = Collator(pad_token_id=0, packing="bin")([bins[0], bins[1]])
    sequences = bins[0] + bins[1]
    assert batch["input_ids"].tolist() == [np.concatenate([s["input_ids"] for s in sequences]).tolist()]
    assert batch["position_ids"].tolist() == [[i for s in sequences for i in range(len(s["input_ids"]))]]
    assert "attention_mask" not in batch


# ------------------------------------------------------------------------------------------------------------- batches

SEQUENCES = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [9, 10], "labels": [-100, 10]},
]


def test_padded_batch_keeps_logits_before_supervised_tokens():
    batch = Collator(pad_token_id=0)(SEQUENCES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["logits_to_keep"].tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch["labels"].tolist() == batch["shift_labels"].tolist() == [7, 8, 10]


def test_packed_batch_restarts_positions_and_has_no_mask():
    batch = Collator(pad_token_id=0, packing="batch")(SEQUENCES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert "attention_mask" not in batch
    assert batch["logits_to_keep"].tolist() == [[False, True, True, False, True, False]]
    assert batch["labels"].tolist() == [7, 8, 10]


def test_without_the_supervised_head_labels_stay_in_place():
    batch = Collator(pad_token_id=0, supervised_head=False)(SEQUENCES)
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 10, -100, -100]]
    assert "logits_to_keep" not in batch
    first = [{"input_ids": [1, 2], "labels": [1, 2]}] * 2
    packed = Collator(pad_token_id=0, packing="batch", supervised_head=False)(first)
    assert packed["labels"].tolist() == [[-100, 2, -100, 2]], "a row's first token is predicted by the row before it"
    assert torch.equal(Collator(0)(first)["labels"], torch.tensor([2, 2]))
