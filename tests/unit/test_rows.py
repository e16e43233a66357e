"""Texts to rows: what is no JSON is said; mutated rows are trained as written or reported, nothing else happens."""

import json
import random
from collections import Counter

import pytest

from mutations import mutated
from sft.data.chat_format import ChatFormat
from sft.data.examples import Options, encode_rows
from sft.data.lines import BadRow
from sft.data.report import Report
from sft.data.rows import read_row
from sft.data.shapes import parse_row

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def with_(**more):
    return GOOD | more


def messages(*pairs, **more):
    return {"messages": [{"role": role, "content": content, **more} for role, content in pairs]}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"messages": [', "not JSON: Expecting value at column 15"),
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"{'messages': [{'role': 'user'}]}", "not JSON: written as Python prints it; json.dumps"),
        (b"question,answer", "not JSON: a line of a csv table"),
        ('{"a": "\u4f60\u597d"}'.encode("gbk"), "not UTF-8; it is GBK: iconv -f GB18030 -t UTF-8"),
        (b"\xff{}", "not UTF-8"),
        ('{"messages": []}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": 1, "a": 2}', "the same key twice"),
        (b'{"messages": [{"role": "user", "role": "user"}]}', "the same key twice"),
        (b'{"x": NaN}', "not JSON: NaN"),
        (b'{"x": ' + b"9" * 5000 + b"}", "a number is too long"),
        (b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deep"),
        (b"[" * 100_000, "nested too deep"),
        (json.dumps(with_(note="\0")).encode(), "a NUL character"),
        (json.dumps(with_(**{"\0": 1})).encode(), "a NUL character"),
        (json.dumps(messages(("user", "\ud83d"), ("assistant", "a"))).encode(), "half a surrogate pair"),
        (b'{"messages": "a\0b"}', "not JSON: Invalid control character"),
    ],
)
def test_what_is_not_a_row(line, says):
    with pytest.raises(BadRow) as bad:
        read_row(line)
    assert says in str(bad.value)


@pytest.mark.parametrize(
    "row", [messages(("user", "\\u0000 and 🙂"), ("assistant", "\\ud83d")), with_(note=[[[]]] * 200)]
)
def test_unusual_but_good(row):
    assert read_row(json.dumps(row).encode()) == row


def test_reports_add_up_and_keep_the_first_lines():
    first, second = Report(), Report()
    for i in range(15):
        first.found("bad", i, "x")
        second.found("bad", 100 + i, "y")
    first.add(second)
    assert first.counts["bad"] == 30
    assert [line for line, _ in first.lines["bad"]] == [*range(15), *range(100, 105)]


@pytest.mark.parametrize("name", ["dense", "hy3"])
@pytest.mark.parametrize("number", [1000, pytest.param(5000, marks=pytest.mark.campaign)])
def test_mutated_rows_are_trained_as_written_or_reported(number, name, format_tokenizer, example_rows):
    """Each is one of the two, and what is trained is what the template gives for what JSON says."""
    tokenizer, draw = format_tokenizer(name), random.Random(number)
    chat, good = ChatFormat(tokenizer), example_rows.read_bytes().splitlines()
    seen = {"trained": 0, "bad": 0, "unsupervised": 0}
    for i in range(number):
        line = mutated(draw.choice(good), draw)
        if not line.strip():
            continue
        table, report = encode_rows([(i, line)], chat, Options())
        outcome = "trained" if table.num_rows else "bad" if report.counts["bad"] else "unsupervised"
        assert outcome == "trained" or report.lines[outcome][0][0] == i
        seen[outcome] += 1
        if outcome == "trained":
            row = parse_row(line)
            given = [m for m in row["messages"] if m != {"role": "system", "content": ""}]
            given = chat.prepare({"messages": given}, Counter()).messages
            ids = tokenizer.apply_chat_template(
                given, tools=row.get("tools"), return_dict=False, is_training=given[-1]["role"] == "assistant"
            )
            assert table["input_ids"][-1].as_py() == ids[:4096]
    assert min(seen["trained"], seen["bad"]) > number / 5, seen
