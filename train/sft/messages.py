"""What the user is told: automatic choices, notes, refusals, each once, from rank 0, and never a row's text; and what
the offline scripts share in finding out what the user means."""

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import NoReturn

OUTPUT_ROOT = Path(__file__).resolve().parents[1] / "output"  # of train.sh
NOTHING_SAVED = "Nothing new is saved yet: start the same command again"


class Refused(Exception):
    """Wrong input, found before training: becomes one message on stderr and exit code 2."""


def choice(name: str, value: object, why: str) -> None:
    """Print a value that was chosen automatically as `name = value (why)`."""
    note(f"{name} = {value} ({why})")


def note(message: str) -> None:
    """Print one line on stdout, from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def end_by_ctrl_c(when: str, how: str = NOTHING_SAVED) -> None:
    """Say, on rank 0, what Ctrl-C has stopped and how to go on; end by the signal itself, from any thread."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"\nstopped by Ctrl-C {when}. {how}\n")  # at once: another rank's words must not come between
        sys.stderr.flush()
    for worker in multiprocessing.active_children():  # one that loads data would miss us with a traceback
        worker.kill()
    ctypes.CDLL(None).signal(signal.SIGINT, 0)  # SIG_DFL
    os.kill(os.getpid(), signal.SIGINT)


def first_few(items: list[str]) -> str:
    """The first few of a list, for a message."""
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def read_json(path: Path) -> dict:
    """The object in a json file; refuses one that is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise Refused(f"{path}: not a readable json object: {error}") from None


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses with one message, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message}; --help lists the flags")


def newest(root: Path, files: tuple[str, ...]) -> Path | None:
    """The directory right under `root` of which one of `files` changed last; a run with none of them at its top counts
    with its newest checkpoint-N. None where there is none."""
    found = []
    for run in root.iterdir() if root.is_dir() else ():
        checkpoints = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        for paths in ([] if re.search(r"\.tmp-\d+$", run.name) else [run], checkpoints):
            there = [path / file for path in paths for file in files if (path / file).is_file()]
            if there:
                found.append(max((file.stat().st_mtime, file.parent) for file in there))
                break
    return max(found)[1] if found else None
