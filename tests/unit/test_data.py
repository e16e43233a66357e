"""Rows to tokens to batches, on the example's tokenizer (the A13B format)."""

import gzip
import json

import pytest
import torch
from transformers import AutoTokenizer

from console import Refused
from data import IGNORE_INDEX, BadRow, Collator, check_row, data_files, encode, load_examples, read_rows


@pytest.fixture(scope="module")
def tokenizer(example_tokenizer_dir):
    return AutoTokenizer.from_pretrained(example_tokenizer_dir)


def conversation(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def supervised(tokenizer, sequence):
    """The text of each supervised stretch."""
    stretches, current = [], []
    for token, label in zip(sequence["input_ids"] + [0], sequence["labels"] + [IGNORE_INDEX]):
        if label != IGNORE_INDEX:
            assert label == token
            current.append(token)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return stretches


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (conversation("1+1=?", "2"), ["2<|eos|>"]),
        (conversation("1+1=?", "2", system="math"), ["2<|eos|>"]),
        (conversation("1+1=?", "2", system=""), ["2<|eos|>"]),
        (conversation("a", "b", "c", "d"), ["b<|eos|>", "d<|eos|>"]),
        (conversation("a", "", "c", "d"), ["<|eos|>", "d<|eos|>"]),
        (conversation("<|eos|> and <|extra_0|>", "say <|eos|>"), ["say <|eos|><|eos|>"]),
        (
            conversation("/no_think 7", "<think>\n\n</think>\n<answer>\n七\n</answer>"),
            ["<think>\n\n</think>\n<answer>\n七\n</answer><|eos|>"],
        ),
        (conversation("🙂 שלום", "    def f():\n\treturn 1\n"), ["    def f():\n\treturn 1\n<|eos|>"]),
    ],
)
def test_supervised_is_what_the_assistant_says_and_the_end_of_its_turn(tokenizer, messages, said):
    (sequence,) = encode(tokenizer, messages)
    assert supervised(tokenizer, sequence) == said
    rendered = [m for m in messages if m["role"] != "system" or m["content"]]
    assert sequence["input_ids"] == tokenizer.apply_chat_template(rendered, return_dict=False)


def test_a_template_that_rewrites_earlier_turns_gives_a_sequence_for_each(tokenizer):
    """The small dense models drop the thinking of earlier turns: each turn is trained as inference would see it."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|startoftext|>{{ m.content }}<|extra_0|>{% else %}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|eos|>{% endif %}{% endfor %}"
    )
    forgetful = AutoTokenizer.from_pretrained(tokenizer.name_or_path, chat_template=template)
    sequences = encode(forgetful, conversation("a", "<think>x</think>b", "c", "<think>y</think>d"))
    assert [supervised(forgetful, s) for s in sequences] == [
        ["<think>x</think>b<|eos|>"],
        ["<think>y</think>d<|eos|>"],
    ]
    assert "<think>x" not in forgetful.decode(sequences[1]["input_ids"])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([], "a JSON object is expected, not list"),
        ({}, 'no "messages"'),
        ({"messages": []}, 'no "messages"'),
        ({"messages": ["x"]}, "messages[0] is not an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0] has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, 'messages[0] has no "content"'),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "begins with the assistant"),
    ],
)
def test_bad_rows_are_named_without_their_text(row, says):
    with pytest.raises(BadRow) as bad:
        check_row(row)
    assert says in str(bad.value)


def test_bad_rows_are_listed_with_their_lines_and_the_first_twenty_shown(tokenizer, tmp_path):
    good = json.dumps({"messages": conversation("q", "a")})
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([good.encode(), b"{secret", b"", b"\xff\xfe"] + [b"{}"] * 30))
    with pytest.raises(Refused) as refusal:
        load_examples([str(file)], tokenizer, 100)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "32 of 33 rows are bad:"
    assert lines[1].startswith(f"{file}:2: not JSON")
    assert lines[2] == f"{file}:4: not UTF-8"
    assert len(lines) == 22 and lines[-1] == "… 12 more"
    assert "secret" not in str(refusal.value)


def test_files_globs_and_gz_are_read_and_missing_ones_named(tokenizer, tmp_path):
    good = json.dumps({"messages": conversation("q", "a")})
    (tmp_path / "a.jsonl").write_text("\ufeff" + good + "\r\n\r\n" + good, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write(good)
    assert load_examples([str(tmp_path / "*.jsonl*")], tokenizer, 100).num_rows == 3
    assert [number for number, _ in read_rows(tmp_path / "a.jsonl")] == [1, 3]
    (tmp_path / "empty.jsonl").touch()
    for name, says in (("none.jsonl", "no such file"), ("empty.jsonl", "is empty"), (".", "is a directory")):
        with pytest.raises(Refused, match=says):
            data_files([str(tmp_path / name)])


def test_long_rows_are_cut_and_rows_without_supervision_left_out_and_counted(tokenizer, tmp_path):
    rows = [conversation("q", "a" * 50), conversation("q" * 50, "a")]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    examples = load_examples([str(file)], tokenizer, 20)
    assert (len(examples), examples.num_rows, examples.num_rows_unsupervised) == (1, 2, 1)
    assert len(examples[0]["input_ids"]) == 20
    with pytest.raises(Refused, match="no row has a token to learn"):
        load_examples([str(file)], tokenizer, 2)


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
