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
    """The object in a json file; refuses one that is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise Refused(f"{path}: not a readable json object: {error}") from None
