"""Files to the text of each row: what is accepted, in which shapes a file may stand, what is refused by name."""

import gzip
import json
import random

import pytest

from sft.data import lines
from sft.data.lines import data_files, read_lines
from sft.data.shapes import parse_row
from sft.messages import Refused

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


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
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    (tmp_path / "a.jsonl").write_bytes(
        b"x" * 100 + b"\n" + b"y" * 101 + b"\n" + b"z" * 3_000_000 + b"\n1\n" + b"w" * 500
    )
    assert [(n, line and line[:1]) for n, line, _ in read_lines(tmp_path / "a.jsonl", [])] == [
        (1, b"x"), (2, None), (3, None), (4, b"1"), (5, None),
    ]  # fmt: skip


ROWS = [GOOD | {"n": i, "text": '},\n[ \\" é\u2028'} for i in range(3)]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("block", [1, 7, 2**20])
@pytest.mark.parametrize(
    ("text", "name", "numbers"),
    [
        (json.dumps(ROWS, indent=1), "JSON array", [2, 16, 30]),
        (json.dumps(ROWS, ensure_ascii=False), "JSON array", [1, 2, 3]),  # in one line
        ("[" + ",\n".join(map(json.dumps, ROWS)) + "]\n", "JSON array", [1, 2, 3]),
        ("\n[\n" + "\n,".join(map(json.dumps, ROWS)) + "\n]\n\n", "JSON array", [3, 4, 5]),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), "JSON objects over several lines", [1, 15, 29]),
    ],
)
def test_rows_that_do_not_stand_in_lines(text, name, numbers, suffix, block, tmp_path, monkeypatch):
    """Read in blocks that end anywhere."""
    monkeypatch.setattr(lines, "BLOCK", block)
    file = tmp_path / "rows"
    file.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    found = list(read_lines(file, notes := []))
    assert [(number, json.loads(row)) for number, row, _ in found] == list(zip(numbers, ROWS))
    assert name in notes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[\n{},\n{}\n", ":4: not JSON: the array has no end"),
        ("[\n{},\n{", ":3: not JSON: Expecting property name enclosed in double quotes. No row after"),
        ("[\n{}\n{}\n]", ":3: not JSON: no comma between two elements"),
        ("[\n{},\n]", ":3: not JSON: Expecting value"),
        ("[\n{}\n]\n{}", ":4: not JSON: more text after the array's end"),
        ("[\n]\n", ": is empty: it has no row"),
        ('{\n"a": 1,\n', ":3: not JSON: Expecting property name"),
        ('[\n"\udc80"\n]', ": is JSON array, and not in UTF-8"),
        ("PAR1\x15\x04", ": is parquet: convert it"),
        ("PK\x03\x04", ": is a zip archive or an Excel file"),
        ("\udcff\udcfe{\0}\0", ": is UTF-16 text"),
    ],
)
def test_a_file_that_cannot_be_read(text, says, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Refused) as refusal:
        list(read_lines(file, []))
    assert str(refusal.value).startswith(f"{file}{says}")


@pytest.mark.parametrize(
    "text", ["{\n{}\n", "[1]\n{}\n", '[{"messages": 1}\n{}\n', "{}\n", '[{"role": 1}]\n[{"role": 2}]\n']
)
def test_what_stands_in_lines(text, tmp_path):
    """And is no array, whatever its first line begins with."""
    (tmp_path / "rows").write_text(text)
    assert [row.strip().decode() for _, row, _ in read_lines(tmp_path / "rows", [])] == text.split("\n")[:-1]


def test_an_element_over_the_limit_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    monkeypatch.setattr(lines, "BLOCK", 10)
    (tmp_path / "rows").write_text(json.dumps(["x" * 50, "y" * 150, "z"], indent=1))
    found = [(number, row and row[:2]) for number, row, _ in read_lines(tmp_path / "rows", [])]
    assert found == [(2, b'"x'), (3, None), (4, b'"z')]


def test_gzip_is_known_by_its_first_bytes(tmp_path):
    """Whatever the file is called."""
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(b"{}\n"))
    (tmp_path / "rows.gz").write_bytes(b"{}\n")
    for name in ("rows.jsonl", "rows.gz"):
        assert [row for _, row, _ in read_lines(tmp_path / name, [])] == [b"{}\n"]


def test_a_large_array_is_streamed(tmp_path):
    """Each row once, in order, with its line."""
    draw, rows = random.Random(0), []
    for i in range(3000):
        rows.append({"i": i, "text": draw.choice('ab"\\{[\n') * draw.randrange(2000)})
    (tmp_path / "rows").write_text(json.dumps(rows, indent=0))
    found = [(number, json.loads(row)) for number, row, _ in read_lines(tmp_path / "rows", [])]
    assert [row for _, row in found] == rows and [number for number, _ in found] == [2 + 4 * i for i in range(3000)]


def test_files_are_found_or_named(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in data_files([str(tmp_path / "*")])] == ["a.jsonl.gz", "b.jsonl"]
    (tmp_path / "empty.jsonl").touch()
    for name, says in (("none.jsonl", "no such file"), ("empty.jsonl", "is empty"), (".", "is a directory")):
        with pytest.raises(Refused, match=f"--eval_data_file .*{says}"):
            data_files([str(tmp_path / name)], "--eval_data_file")
