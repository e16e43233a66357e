"""What the user is told: automatic choices, notes, refusals. Each once, from rank 0, and never a row's text."""

import json
import os
from pathlib import Path


class Refused(Exception):
    """Wrong input, found before training: becomes one message on stderr and exit code 2."""


def choice(name: str, value: object, why: str) -> None:
    """Print a value that was chosen automatically as `name = value (why)`."""
    note(f"{name} = {value} ({why})")


def note(message: str) -> None:
    """Print one line on stdout, from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises Refused."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: cannot be read as JSON ({type(error).__name__})") from error
