"""Files → the JSON text of each row, streamed: one object a line, one JSON array, or objects over several lines.

Refused: a file that is missing, empty, a directory, cut off, or in another format (parquet, …).
"""

import codecs
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from sft.messages import Refused

MAX_LINE = 16 * 2**20  # bytes of a row
BLOCK = 2**20  # bytes that are read at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
FORMATS = {  # by a file's first bytes
    b"PAR1": "parquet", b"ARROW1": "an Arrow file", b"PK\x03\x04": "a zip archive or an Excel file", b"BZh": "bzip2",
    b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text",
}  # fmt: skip
SPACE = re.compile(r"[ \t\r\n]*")
ARRAY, OBJECTS = "JSON array", "JSON objects over several lines"

Reader = gzip.GzipFile | io.BufferedReader


class BadRow(ValueError):
    """What is wrong with one row, without its text."""


class Unreadable(Refused):
    """A file could not be read this time; another time it may be."""


def data_files(patterns: list[str], flag: str = "--train_data_file") -> list[Path]:
    """The files that paths and globs name, in their order. Refuses one that is missing, empty or a directory."""
    if not patterns:
        raise Refused(f"{flag} is not given: one or more jsonl files")
    files = []
    for pattern in patterns:
        names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        found = sorted(map(Path, names))
        if not found:
            raise Refused(f"{flag} {pattern}: no such file")
        for file in found:
            if file.is_dir():
                raise Refused(f"{flag} {file}: is a directory: name the files in it, e.g. '{file}/*.jsonl'")
            if file.stat().st_size == 0:
                raise Refused(f"{flag} {file}: is empty")
        files += found
    return files


def is_gzip(file: Path) -> bool:
    """Whether a file is compressed: by its first bytes, whatever it is called."""
    with open(file, "rb") as raw:
        return raw.read(2) == GZIP


def read_lines(file: Path, notes: list[str]) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield (line number from 1, text of a row, bytes of the file read so far) for each row.

    A row over MAX_LINE is None. In an array that stands in one line rows are numbered instead. Unusual things that are
    accepted are added to `notes`. Memory holds a few rows. Refuses a file that has no row, that is in another format,
    or that cannot be read to its end.
    """
    at, accepted = 0, dict[str, None]()  # a set that keeps the order
    with open(file, "rb") as raw:
        stream: Reader = gzip.GzipFile(fileobj=raw) if is_gzip(file) else raw
        try:
            for at, text in rows_of(stream, file, accepted):
                yield at, text, raw.tell()
        except (EOFError, OSError, zlib.error) as error:
            spoilt = not isinstance(error, OSError) or isinstance(error, gzip.BadGzipFile)  # and stays so
            why = f"cannot be read ({type(error).__name__}): is the file whole?"
            raise (Refused if spoilt else Unreadable)(f"{file}:{at + 1}: {why}") from error
        except UnicodeDecodeError as error:
            raise Refused(f"{file}: is {next(iter(accepted))}, and not in UTF-8") from error
    if not at:
        raise Refused(f"{file}: is empty: it has no row")
    notes += accepted


def rows_of(stream: Reader, file: Path, accepted: dict[str, None]) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, text) of each row; see read_lines."""
    number, any_row, ends_in_newline = 0, False, True
    while True:
        line, too_long = next_line(stream)
        if not line:
            break
        number += 1
        ends_in_newline = line.endswith(b"\n")
        if number == 1:
            refuse_format(file, line)
            if line.startswith(BYTE_ORDER_MARK):
                line = line.removeprefix(BYTE_ORDER_MARK)
                accepted["a byte order mark at the start"] = None
        if line.endswith(b"\r\n"):
            accepted["lines that end in CRLF"] = None
        if not line.strip():
            accepted["blank lines"] = None
            continue
        if not any_row and (layout := layout_of(line, stream)):
            accepted[layout] = None
            values = Values(file, line, number, stream)
            yield from values.of_array() if layout == ARRAY else values.one_after_the_other()
            return
        any_row = True
        yield number, None if too_long else line
    if not ends_in_newline:
        accepted["no newline at the end"] = None


def refuse_format(file: Path, first: bytes) -> None:
    """Refuse a file that begins like one of another format."""
    for mark, name in FORMATS.items():
        if first.startswith(mark):
            raise Refused(f"{file}: is {name}: convert it to a text file in UTF-8 with one JSON object a line")


def next_line(lines: Reader) -> tuple[bytes, bool]:
    """The next line, and whether it is over MAX_LINE; of such a line the beginning. The rest is passed over, but for
    an array's."""
    line = lines.readline(MAX_LINE + 1)
    too_long = len(line) > MAX_LINE and not line.endswith(b"\n")
    piece = line
    while too_long and not line.lstrip().startswith(b"[") and piece and not piece.endswith(b"\n"):
        piece = lines.readline(BLOCK)
    return line, too_long


def layout_of(first: bytes, rest: Reader) -> str | None:
    """What a file is whose first row is `first`, if not one row a line: one array, or objects over several lines."""
    text = first.strip()
    if text.startswith(b"{"):
        goes_on = text.endswith((b"{", b"[", b",")) and rest.peek(1)[:1] not in b"{["  # else it is cut off
        return OBJECTS if goes_on else None
    if not text.startswith(b"["):
        return None
    if len(first) > MAX_LINE or text == b"[" or text.endswith((b",", b"{")):
        return ARRAY
    return ARRAY if text.endswith(b"]") and not rest.peek(1).strip() else None


class Values:
    """JSON values in a stream, of which each may stand in several lines.

    Args:
        first: the line with which they begin.
        line: its number.
    """

    def __init__(self, file: Path, first: bytes, line: int, rest: Reader):
        self.file, self.rest, self.line = file, rest, line
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.pos = self.decode(first), 0
        self.in_one_line = not first.endswith(b"\n") or not rest.peek(1).strip()

    def of_array(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield (line number, text) of each element; its own number where the array stands in one line."""
        number = 0
        self.next_character()
        self.go_to(self.pos + 1)
        while (mark := self.next_character()) != "]":
            if number and mark != ",":
                raise self.refusal("no comma between two elements" if mark else "the array has no end")
            if number:
                self.go_to(self.pos + 1)
            number += 1
            line, text = self.next_value()
            yield number if self.in_one_line else line, text
        self.go_to(self.pos + 1)
        if self.next_character():
            raise self.refusal("more text after the array's end")

    def one_after_the_other(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield (number of its first line, text) of each value."""
        while self.next_character():
            yield self.next_value()

    def next_value(self) -> tuple[int, bytes | None]:
        """(line number, text) of the value that begins here; no text where it is over MAX_LINE."""
        self.next_character()
        while True:
            try:
                end = SCANNER.raw_decode(self.text, self.pos)[1]
                break
            except (json.JSONDecodeError, RecursionError) as error:
                if len(self.text) > 2 * MAX_LINE or not self.read_more():
                    if isinstance(error, RecursionError):
                        raise self.refusal("nested too deep") from error
                    self.go_to(error.pos)
                    raise self.refusal(error.msg) from error
        line, text = self.line, self.text[self.pos : end].encode()
        self.go_to(end)
        return line, text if len(text) <= MAX_LINE else None

    def next_character(self) -> str:
        """The next one that is no white space; empty at the end."""
        while True:
            space = SPACE.match(self.text, self.pos)
            self.go_to(space.end() if space else self.pos)
            if self.pos < len(self.text) or not self.read_more():
                return self.text[self.pos : self.pos + 1]

    def go_to(self, pos: int) -> None:
        self.line += self.text.count("\n", self.pos, pos)
        self.pos = pos

    def read_more(self) -> bool:
        """Read on; False at the end. What a value has so far doubles, for it is scanned again."""
        block = self.rest.read(max(BLOCK, len(self.text)))
        self.text, self.pos = self.text[self.pos :] + self.decode(block, final=not block), 0
        return bool(block)

    def refusal(self, why: str) -> Refused:
        return Refused(f"{self.file}:{self.line}: not JSON: {why}. No row after this place can be read")


SCANNER = json.JSONDecoder()  # finds where a value ends; what it holds is read with the row
