"""The JSON text of a row → the object that it spells; of a bad one what is wrong with it, never its text.

Bad rows: not UTF-8, not JSON, a key twice, NUL, lone surrogates, nested too deep.
"""

import json
import re
from typing import Any

from sft.data.lines import BadRow

MAX_DEPTH = 100  # objects and arrays inside one another
ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # not after a backslash that is escaped itself
THINKING = ("reasoning_content", "thinking", "reasoning")  # names of a message's thinking that transformers knows


def read_row(line: bytes) -> Any:
    """The value of a row's text. Raises BadRow for what other programs would read in another way, too."""
    row = parse_json(line)
    brackets = line.count(b"{") + line.count(b"[")  # at least the depth, and quicker to count
    if brackets > MAX_DEPTH and depth(row) > MAX_DEPTH:
        raise BadRow("nested too deep")
    if b"\\u" in line:
        check_escapes(line, row)
    return row


def parse_json(line: bytes) -> Any:
    """The value of a JSON text. Raises BadRow where it is none, or has a key twice."""
    try:
        return DECODER.decode(line.decode("utf-8"))
    except BadRow:
        raise
    except UnicodeDecodeError as error:
        gbk = "; it is GBK: iconv -f GB18030 -t UTF-8 converts the file" * is_gbk(line)
        raise BadRow(f"not UTF-8{gbk}") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {guess(line) or f'{error.msg} at column {error.colno}'}") from error
    except RecursionError as error:
        raise BadRow("nested too deep") from error
    except ValueError as error:  # more digits than Python converts
        raise BadRow("not JSON that can be read: a number is too long") from error


def is_gbk(line: bytes) -> bool:
    """Whether a line is JSON once it is read as GBK."""
    try:
        json.loads(line.decode("gb18030"))
    except ValueError:
        return False
    return True


def guess(line: bytes) -> str | None:
    """What a line is that is no JSON, and what to do; None where nothing is known of it."""
    if re.match(rb"\s*\[?\{'", line):
        return "written as Python prints it; json.dumps(row, ensure_ascii=False) writes JSON"
    if re.match(rb"\s*[^{\[\s][^{\[]*[,\t]", line):
        return "a line of a csv table, or plain text? Convert the file to one JSON object a line"
    return None


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
