"""jsonl files → rows. What a line may be, and what is said of one that cannot be trained on: never its text.

Refused: a file that is missing, empty, a directory, cut off (.gz) or one JSON array. Bad rows: not UTF-8, not JSON, a
key twice, NUL, lone surrogates, over 16 MB, nested too deep, not a conversation, or one in another toolkit's shape.
"""

import glob
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sft.messages import Refused

MAX_LINE = 16 * 2**20  # bytes
MAX_DEPTH = 100  # objects and arrays inside one another
SHOWN = 20  # lines of a kind that a report names; the rest is counted
ROLES = ("system", "user", "assistant", "tool")
THINKING = ("reasoning_content", "thinking", "reasoning")  # names of a message's thinking that transformers knows
MAY_NOT_BE_TEXT = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")  # escapes of NUL and of surrogates

ARRAY = "one JSON array, not one object a line"
ALPACA = "in the Alpaca shape (instruction, input, output), not messages"
SHAREGPT = "in the ShareGPT shape (conversations of from and value), not messages"
NEEDED = 'What is needed: one JSON object a line, each with "messages", written to another file'


class BadRow(ValueError):
    """What is wrong with one row, without its text."""


class Unreadable(Refused):
    """A file that could not be read now; another time it may."""


@dataclass
class Report:
    """What a pass over rows found. Of each kind the first lines with what is said of them, and the number of all."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def found(self, kind: str, line: int, what: str = "") -> None:
        self.counts[kind] += 1
        if len(self.lines.setdefault(kind, [])) < SHOWN:
            self.lines[kind].append((line, what))

    def add(self, later: "Report") -> None:
        """Add what was found further down."""
        self.counts.update(later.counts)
        for kind, lines in later.lines.items():
            self.lines[kind] = (self.lines.get(kind, []) + lines)[:SHOWN]
        self.notes += [n for n in later.notes if n not in self.notes]


def data_files(patterns: list[str], flag: str = "--train_data_file") -> list[Path]:
    """The files that paths and globs name, in their order; refused where one is missing, empty or a directory."""
    if not patterns:
        raise Refused(f"{flag} is not given: one or more jsonl files")
    files = []
    for pattern in patterns:
        found = [Path(pattern)] if os.path.exists(pattern) else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not found:
            raise Refused(f"{flag} {pattern}: no such file")
        for file in found:
            if file.is_dir():
                raise Refused(f"{flag} {file}: is a directory: name the files in it, e.g. '{file}/*.jsonl'")
            if file.stat().st_size == 0:
                raise Refused(f"{flag} {file}: is empty")
        files += found
    return files


def read_lines(file: Path, notes: list[str]) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield (number from 1, line, bytes of the file read so far) for each line that is not blank; the line is None
    where it is too long. What was accepted silently is added to `notes`.

    A `.gz` is read through; memory holds one line.
    """
    number, line, any_row = 0, b"\n", False
    accepted: dict[str, None] = {}
    with open(file, "rb") as raw, gzip.open(raw) if file.suffix == ".gz" else raw as lines:
        while True:
            try:
                line, before = lines.readline(MAX_LINE + 1), line
                too_long = len(line) > MAX_LINE and not line.endswith(b"\n")
                tail = line[-2:]
                while too_long and tail and not tail.endswith(b"\n"):
                    tail = lines.readline(2**20)[-2:]
                one_array = not any_row and line.strip() and is_array(line, lines)
            except (EOFError, OSError, zlib.error) as error:
                what = f"cannot be read ({type(error).__name__}): is the file whole?"
                spoilt = isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error))
                raise (Refused if spoilt else Unreadable)(f"{file}:{number + 1}: {what}") from error
            if not line:
                break
            number += 1
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
                accepted["a byte order mark at the start"] = None
            if line.endswith(b"\r\n"):
                accepted["lines that end in CRLF"] = None
            if not line.strip():
                accepted["blank lines"] = None
                continue
            if one_array:
                raise Refused(f"{file}: is {ARRAY}. {NEEDED}")
            any_row = True
            yield number, None if too_long else line, raw.tell()
    if not any_row:
        raise Refused(f"{file}: is empty: it has no row")
    if not before.endswith(b"\n"):
        accepted["no newline at the end"] = None
    notes += accepted


def is_array(first: bytes, rest) -> bool:
    """Whether a file whose first row is `first` is one JSON array: of several lines, or of one and nothing after."""
    text = first.strip()
    if not text.startswith(b"["):
        return False
    if len(first) > MAX_LINE or text == b"[" or text.endswith((b",", b"{")):
        return True
    return text.endswith(b"]") and not rest.peek(1).strip()


# ------------------------------------------------------------------------------------------------------ one line


def parse_row(line: bytes) -> dict:
    """The row that a line holds. Raises BadRow."""
    try:
        row = DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8") from error
    except json.JSONDecodeError as error:
        if line.strip() == b"{":
            raise BadRow("not JSON in one line: each row stands in a line of its own") from error
        raise BadRow(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise BadRow("nested too deep") from error
    except BadRow:
        raise
    except ValueError as error:  # more digits than Python converts
        raise BadRow("not JSON that can be read: a number is too long") from error
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and depth(row) > MAX_DEPTH:
        raise BadRow("nested too deep")
    if MAY_NOT_BE_TEXT.search(line):
        for text in texts(row):
            if "\0" in text:
                raise BadRow("holds a NUL character")
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise BadRow("holds half a surrogate pair (a broken \\u escape)")
    check_row(row)
    return row


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise BadRow("an object has the same key twice")
    return value


def not_a_number(name: str):
    raise BadRow(f"not JSON: {name}")


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=not_a_number)


def depth(value: object) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [v for x in level for v in (x.values() if isinstance(x, dict) else x) if isinstance(v, (dict, list))]
    return deepest


def texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts(item)


def check_row(row: object) -> None:
    """Raise BadRow unless the row's messages are a conversation that can be trained on."""
    if isinstance(row, list) and row and isinstance(row[0], dict) and "role" in row[0]:
        raise BadRow('a bare list of messages: put it in an object, as "messages"')
    if not isinstance(row, dict):
        raise BadRow(f"a JSON object is expected, not {type(row).__name__}")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        if "messages" not in row and {"instruction", "output"} <= set(row):
            raise BadRow(ALPACA)
        if "messages" not in row and "from" in str(row.get("conversations"))[:100]:
            raise BadRow(SHAREGPT)
        if "messages" not in row:
            raise BadRow('no "messages"')
        raise BadRow('"messages" is empty' if messages == [] else '"messages" is not a list')
    for i, message in enumerate(messages):
        check_message(message, f"messages[{i}]")
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    if "assistant" not in spoken:
        raise BadRow("no message of the assistant: nothing to learn")
    if spoken[0] == "assistant":
        raise BadRow("begins with the assistant: there is nothing to answer")
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow('"tools" is not a list of objects')
    if not isinstance(row.get("enable_thinking"), (bool, type(None))):
        raise BadRow('"enable_thinking" is neither true nor false')
    if not isinstance(row.get("reasoning_effort"), (str, type(None))):
        raise BadRow('"reasoning_effort" is not a text')


def check_message(message: object, where: str) -> None:
    """Raise BadRow, which names `where`, unless it is a message of a known role with content that is a text."""
    if not isinstance(message, dict):
        raise BadRow(f"{where} is not an object")
    if {"from", "value"} <= set(message):
        raise BadRow(f"{where} has from and value, as ShareGPT, not role and content")
    if message.get("role") not in ROLES:
        raise BadRow(f"{where} has no role of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise BadRow(f'{where} has "tool_calls" that are not a list of objects')
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and calls and message["role"] == "assistant"):
        raise BadRow(f'{where} has no "content" that is a text')
    for name in THINKING:
        if not isinstance(message.get(name), (str, type(None))):
            raise BadRow(f'{where} has "{name}" that is not a text')
    if message.get("weight") not in (None, 0, 1):
        raise BadRow(f'{where} has a "weight" that is neither 0 nor 1')
