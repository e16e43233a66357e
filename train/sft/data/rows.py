"""jsonl files → rows. Reads the lines and says of a bad one what is wrong with it, never its text.

Refused: a file that is missing, empty, a directory, cut off (.gz) or one JSON array. Bad rows: not UTF-8, not JSON, a
key twice, NUL, lone surrogates, over 16 MB, nested too deep, not a conversation, or one in another toolkit's shape.
"""

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.messages import Refused

MAX_LINE = 16 * 2**20  # bytes
MAX_DEPTH = 100  # objects and arrays inside one another
ROLES = ("system", "user", "assistant", "tool")
THINKING = ("reasoning_content", "thinking", "reasoning")  # names of a message's thinking that transformers knows
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # not after a backslash that is escaped itself

ARRAY = "one JSON array, not one object a line"
ALPACA = "in the Alpaca shape (instruction, input, output), not messages"
SHAREGPT = "in the ShareGPT shape (conversations of from and value), not messages"
NEEDED = 'What is needed: one JSON object a line, each with "messages", written to another file'


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


def read_lines(file: Path, notes: list[str]) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield (line number from 1, line, bytes of the file read so far) for each line that is not blank.

    A line over MAX_LINE is None. Unusual things that are accepted are added to `notes`. A .gz is streamed; memory
    holds one line. Refuses a file that has no row, that is one JSON array, or that cannot be read to its end.
    """
    number, any_row, ends_in_newline = 0, False, True
    accepted: dict[str, None] = {}  # a set that keeps the order
    with open(file, "rb") as raw:
        lines: Reader = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
        while True:
            try:
                line, too_long = next_line(lines)
                one_array = not any_row and is_array(line, lines)
            except (EOFError, OSError, zlib.error) as error:
                spoilt = not isinstance(error, OSError) or isinstance(error, gzip.BadGzipFile)  # and stays so
                why = f"cannot be read ({type(error).__name__}): is the file whole?"
                raise (Refused if spoilt else Unreadable)(f"{file}:{number + 1}: {why}") from error
            if not line:
                break
            number += 1
            ends_in_newline = line.endswith(b"\n")
            if number == 1 and line.startswith(BYTE_ORDER_MARK):
                line = line.removeprefix(BYTE_ORDER_MARK)
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
    if not ends_in_newline:
        accepted["no newline at the end"] = None
    notes += accepted


def next_line(lines: Reader) -> tuple[bytes, bool]:
    """The next line, and whether it is over MAX_LINE; of such a line the beginning, and the rest is passed over."""
    line = lines.readline(MAX_LINE + 1)
    too_long = len(line) > MAX_LINE and not line.endswith(b"\n")
    piece = line
    while too_long and piece and not piece.endswith(b"\n"):
        piece = lines.readline(2**20)
    return line, too_long


def is_array(first: bytes, rest: Reader) -> bool:
    """Whether a file whose first row is `first` is one JSON array: of several lines, or of one and nothing after."""
    text = first.strip()
    if not text.startswith(b"["):
        return False
    if len(first) > MAX_LINE or text == b"[" or text.endswith((b",", b"{")):
        return True
    return text.endswith(b"]") and not rest.peek(1).strip()


# --- one line --------------------------------------------------------------------------------------------------------


def parse_row(line: bytes) -> dict:
    """The row that a line holds. Raises BadRow."""
    row = parse_json(line)
    brackets = line.count(b"{") + line.count(b"[")  # at least the depth, and quicker to count
    if brackets > MAX_DEPTH and depth(row) > MAX_DEPTH:
        raise BadRow("nested too deep")
    if b"\\u" in line:
        check_escapes(line, row)
    check_row(row)
    return row


def parse_json(line: bytes) -> Any:
    """The value of a line of JSON. Raises BadRow for what other programs would read in another way, too."""
    try:
        return DECODER.decode(line.decode("utf-8"))
    except BadRow:
        raise
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8") from error
    except json.JSONDecodeError as error:
        if line.strip() == b"{":
            raise BadRow("not JSON in one line: each row stands in a line of its own") from error
        raise BadRow(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise BadRow("nested too deep") from error
    except ValueError as error:  # more digits than Python converts
        raise BadRow("not JSON that can be read: a number is too long") from error


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise BadRow("an object has the same key twice")
    return value


def not_a_number(name: str):
    raise BadRow(f"not JSON: {name}")


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=not_a_number)


def depth(value: Any) -> int:
    """How many objects and arrays lie inside one another."""
    levels, level = 0, [value]
    while level:
        levels += 1
        items = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
        level = [item for item in items if isinstance(item, (dict, list))]
    return levels


def check_escapes(line: bytes, row: object) -> None:
    """Raise BadRow for an escape that is no text: NUL, or half of a surrogate pair."""
    if ESCAPED_NUL.search(line):
        raise BadRow("holds a NUL character")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("holds half a surrogate pair (a broken \\u escape)") from error


def check_row(row: Any) -> None:
    """Raise BadRow unless the row's messages are a conversation that can be trained on."""
    check_shape(row)
    for i, message in enumerate(row["messages"]):
        check_message(message, f"messages[{i}]")
    roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
    if "assistant" not in roles:
        raise BadRow("no message of the assistant: nothing to learn")
    if roles[0] == "assistant":
        raise BadRow("begins with the assistant: there is nothing to answer")
    if not is_list_of_objects(row.get("tools")):
        raise BadRow('"tools" is not a list of objects')
    if not isinstance(row.get("enable_thinking"), (bool, type(None))):
        raise BadRow('"enable_thinking" is neither true nor false')
    if not isinstance(row.get("reasoning_effort"), (str, type(None))):
        raise BadRow('"reasoning_effort" is not a text')


def check_shape(row: object) -> None:
    """Raise BadRow, which names the shape, unless the row is an object with a list of messages."""
    if isinstance(row, list) and row and isinstance(row[0], dict) and "role" in row[0]:
        raise BadRow('a bare list of messages: put it in an object, as "messages"')
    if not isinstance(row, dict):
        raise BadRow(f"a JSON object is expected, not {type(row).__name__}")
    if "messages" not in row:
        if {"instruction", "output"} <= set(row):
            raise BadRow(ALPACA)
        if "from" in str(row.get("conversations"))[:100]:
            raise BadRow(SHAREGPT)
        raise BadRow('no "messages"')
    if row["messages"] == []:
        raise BadRow('"messages" is empty')
    if not isinstance(row["messages"], list):
        raise BadRow('"messages" is not a list')


def check_message(message: object, where: str) -> None:
    """Raise BadRow, which names `where`, unless it is a message of a known role with content that is a text."""
    if not isinstance(message, dict):
        raise BadRow(f"{where} is not an object")
    if {"from", "value"} <= set(message):
        raise BadRow(f"{where} has from and value, as ShareGPT, not role and content")
    if message.get("role") not in ROLES:
        raise BadRow(f"{where} has no role of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if not is_list_of_objects(calls):
        raise BadRow(f'{where} has "tool_calls" that are not a list of objects')
    content = message.get("content")
    only_calls = content is None and calls and message["role"] == "assistant"
    if not isinstance(content, str) and not only_calls:
        raise BadRow(f'{where} has no "content" that is a text')
    for name in THINKING:
        if not isinstance(message.get(name), (str, type(None))):
            raise BadRow(f'{where} has "{name}" that is not a text')
    if message.get("weight") not in (None, 0, 1):
        raise BadRow(f'{where} has a "weight" that is neither 0 nor 1')


def is_list_of_objects(value: object) -> bool:
    """Also true of None: the key is not there, or null."""
    return value is None or (isinstance(value, list) and all(isinstance(item, dict) for item in value))
