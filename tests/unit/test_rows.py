"""Lines to rows: what is accepted, what is said of what is not, and that nothing else happens."""

import gzip
import json
import random
from collections import Counter

import pytest

from mutations import mutated
from sft.data import rows
from sft.data.chat_format import ChatFormat
from sft.data.examples import Options, encode_rows
from sft.data.report import Report
from sft.data.rows import ALPACA, ARRAY, NEEDED, SHAREGPT, BadRow, data_files, parse_row, read_lines
from sft.messages import Refused

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def with_(**more):
    return GOOD | more


def messages(*pairs, **more):
    return {"messages": [{"role": role, "content": content, **more} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([], "a JSON object is expected, not list"),
        ([{"role": "user", "content": "q"}], "a bare list of messages"),
        (3, "a JSON object is expected, not int"),
        ({}, 'no "messages"'),
        ({"messages": {}}, '"messages" is not a list'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": ["x"]}, "messages[0] is not an object"),
        (messages(("robot", "x")), "messages[0] has no role"),
        (messages((["user"], "x")), "messages[0] has no role"),
        (messages(("user", 3)), 'messages[0] has no "content"'),
        (messages(("user", None)), 'messages[0] has no "content"'),
        (messages(("user", [{"type": "text", "text": "x"}])), 'messages[0] has no "content"'),
        (messages(("user", "q"), ("assistant", None)), 'messages[1] has no "content"'),
        (messages(("user", "x")), "no message of the assistant"),
        (messages(("assistant", "x")), "begins with the assistant"),
        (messages(("system", "s"), ("assistant", "x")), "begins with the assistant"),
        (messages(("user", "q"), ("assistant", "a"), weight=0.5), 'a "weight" that is neither 0 nor 1'),
        (messages(("user", "q"), ("assistant", "a"), thinking=["t"]), '"thinking" that is not a text'),
        (messages(("user", "q"), ("assistant", "a"), tool_calls="f()"), '"tool_calls" that are not a list'),
        (with_(tools="f"), '"tools" is not a list of objects'),
        (with_(enable_thinking="yes"), '"enable_thinking" is neither true nor false'),
        (with_(reasoning_effort=1), '"reasoning_effort" is not a text'),
        ({"instruction": "i", "output": "o"}, ALPACA),
        ({"conversations": [{"from": "human", "value": "q"}]}, SHAREGPT),
        ({"messages": [{"from": "human", "value": "q"}]}, "from and value, as ShareGPT"),
    ],
)
def test_what_is_not_a_conversation(row, says):
    with pytest.raises(BadRow) as bad:
        parse_row(json.dumps(row).encode())
    assert says in str(bad.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"messages": [', "not JSON: Expecting value at column 15"),
        (b"{", "not JSON in one line"),
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
        parse_row(line)
    assert says in str(bad.value)


@pytest.mark.parametrize(
    "row",
    [
        messages(("user", "\\u0000 and 🙂"), ("assistant", "\\ud83d")),
        with_(note=[[[]]] * 200),
        with_(tools=None, enable_thinking=None, reasoning_effort=None),
        messages(("system", ""), ("user", ""), ("assistant", "")),
        messages(("user", "q"), ("assistant", None), tool_calls=[{"function": {}}]),
        messages(("user", "q"), ("assistant", "a"), weight=None),
    ],
)
def test_unusual_but_good(row):
    assert parse_row(json.dumps(row).encode()) == row


def test_what_is_accepted_is_noted_once(tmp_path):
    line = json.dumps(GOOD).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \r\n" + line)
    notes = []
    read = [(n, parse_row(text)) for n, text, _ in read_lines(tmp_path / "a.jsonl", notes)]
    assert read == [(1, GOOD), (4, GOOD)]
    expected = ["a byte order mark at the start", "lines that end in CRLF", "blank lines", "no newline at the end"]
    assert notes == expected
    (tmp_path / "b.jsonl").write_bytes(line + b"\n")
    assert list(read_lines(tmp_path / "b.jsonl", notes := [])) and notes == []


def test_a_line_over_the_limit_is_passed_over_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE", 100)
    (tmp_path / "a.jsonl").write_bytes(
        b"x" * 100 + b"\n" + b"y" * 101 + b"\n" + b"z" * 3_000_000 + b"\n1\n" + b"w" * 500
    )
    assert [(n, line and line[:1]) for n, line, _ in read_lines(tmp_path / "a.jsonl", [])] == [
        (1, b"x"), (2, None), (3, None), (4, b"1"), (5, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "is_array"),
    [
        ("[\n {},\n {}\n]\n", True), ("[{}, {}]", True), ("[{},\n{}]", True), ("\n[\n]", True), ("[{\n", True),
        ("[" + " " * 2000 + "{}]", True), ("[1]\n{}\n", False), ('[{"messages": 1}\n{}\n', False), ("{}\n", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_one_json_array(text, is_array, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE", 1000)
    file = tmp_path / f"rows.json{suffix}"
    with gzip.open(file, "wt") if suffix else open(file, "w") as out:
        out.write(text)
    if is_array:
        with pytest.raises(Refused) as refusal:
            list(read_lines(file, []))
        assert str(refusal.value) == f"{file}: is {ARRAY}. {NEEDED}"
    else:
        assert len(list(read_lines(file, []))) == len([line for line in text.splitlines() if line.strip()])


def test_files_are_found_or_named(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in data_files([str(tmp_path / "*")])] == ["a.jsonl.gz", "b.jsonl"]
    (tmp_path / "empty.jsonl").touch()
    for name, says in (("none.jsonl", "no such file"), ("empty.jsonl", "is empty"), (".", "is a directory")):
        with pytest.raises(Refused, match=f"--eval_data_file .*{says}"):
            data_files([str(tmp_path / name)], "--eval_data_file")


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
            row = json.loads(line)
            given = [m for m in row["messages"] if m != {"role": "system", "content": ""}]
            given = chat.prepare({"messages": given}, Counter()).messages
            ids = tokenizer.apply_chat_template(
                given, tools=row.get("tools"), return_dict=False, is_training=given[-1]["role"] == "assistant"
            )
            assert table["input_ids"][-1].as_py() == ids[:4096]
    assert min(seen["trained"], seen["bad"]) > number / 5, seen
