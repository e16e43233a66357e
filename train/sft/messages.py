"""What the user is told: automatic choices, notes, refusals, each once, from rank 0, and never a row's text; and what
the offline scripts share in finding out what the user means."""

import argparse
import errno
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MASK = "***"
IN_URLS = (  # what is before and after a secret
    r"(://[^/\s:@]*:)[^/\s]+(@)",  # a password
    r"(\b[\w.-]+:)[^/\s:@]+(@[\w\[])",  # the same, without http://
    r"(https?://)[^/\s:@]+(@)",  # a token alone
    r"(?i)([?&][\w-]*(?:token|key|secret|password|signature)=)[^&\s\"']+()",
)
given_secrets: set[str] = set()  # of flags
REFUSAL_SECONDS = 10  # a refusal that rank 0 has not found after that is another rank's own
OUTPUT_ROOT = Path(__file__).resolve().parents[1] / "output"  # of train.sh


class Refused(Exception):
    """Wrong input, found before training: becomes one message on stderr and exit code 2."""


def choice(name: str, value: object, why: str) -> None:
    """Print a value that was chosen automatically as `name = value (why)`."""
    note(f"{name} = {value} ({why})")


def is_first_rank() -> bool:
    """Whether this process is the one of its job that speaks."""
    return os.environ.get("RANK", "0") == "0"


def on_terminal() -> bool:
    """Whether somebody watches, for whom a bar is drawn: train.sh, which copies what is printed, says so."""
    return sys.stderr.isatty() or os.environ.get("ON_TERMINAL") == "1"


def note(message: str) -> None:
    """Print one line on stdout, from rank 0 alone."""
    if is_first_rank():
        print(masked(message), flush=True)


def is_secret(name: str) -> bool:
    """Whether a variable or flag of this name holds a secret."""
    return re.fullmatch(r"(.*_)?(token|key|secret|password|passwd)", name.lower()) is not None


def masked(value: Any) -> Any:
    """A text, or what json knows with texts in it, without secrets: passwords in URLs, tokens and keys of the
    environment and of flags."""
    if isinstance(value, dict):
        return {key: masked(part) for key, part in value.items()}
    if isinstance(value, list):
        return [masked(part) for part in value]
    if not isinstance(value, str):
        return value
    known = given_secrets | {secret for name, secret in os.environ.items() if is_secret(name)}
    for secret in sorted(known, key=len, reverse=True):
        value = value.replace(secret, MASK) if len(secret) > 7 and not os.path.isabs(secret) else value
    for pattern in IN_URLS:
        value = re.sub(pattern, rf"\1{MASK}\2", value)
    return value


def end_by_ctrl_c() -> NoReturn:
    """Say that Ctrl-C has stopped the process, and end it by the signal itself."""
    print("\nstopped by Ctrl-C", file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit(128 + signal.SIGINT)  # where it is blocked


def in_one_line(error: Exception) -> str:
    """What an error of a library says, for a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]} …"


def first_few(items: list[str]) -> str:
    """The first few of a list, for a message."""
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def guard(stream: Any) -> None:
    """Let a stream show no secret, whoever writes, and let what is printed be lost, and the run go on, where it goes
    to a file whose disk is full or has failed."""
    write, flush = losing_output(stream.write), losing_output(stream.flush)
    stream.write, stream.flush = lambda text: write(masked(text)), flush


def losing_output(method: Callable) -> Callable:
    """The method of a stream, without the errors of a disk."""

    def call(*args: Any) -> Any:
        try:
            return method(*args)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
                raise

    return call


def in_units(size: float) -> str:
    """A number of bytes for a message: 512 bytes, 1.5 MB, 70 GB."""
    power = min(4, int(math.log10(size)) // 3) if size >= 1 else 0
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def yes_or_no(text: str) -> bool:
    """The value of a script's flag, spelled as train.py's may be."""
    if text.lower() not in ("true", "t", "yes", "y", "1", "false", "f", "no", "n", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "t", "yes", "y", "1")


def run_script(
    main: Callable[[], object],
    failed: Callable[[Exception], None] = lambda error: None,
    first_refuses: Callable[[], bool] = lambda: False,
    leave: Callable[[int], NoReturn] = sys.exit,
) -> NoReturn:
    """Run a script's `main`, then end the process: with 0, with 2 and one message where it refuses, at Ctrl-C by the
    signal.

    Args:
        failed: is told of an error before its traceback is printed.
        first_refuses: of several ranks, whether the first one refuses, too, and has said so.
        leave: ends the process with an exit code.
    """
    code = 0
    guard(sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    try:
        main()
    except Refused as refusal:
        code = 2
        if is_first_rank():
            report_refusal(refusal)
        if not first_refuses() and not is_first_rank():
            time.sleep(REFUSAL_SECONDS)  # for rank 0 to say the same: its end ends this rank
            report_refusal(refusal)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        end_by_ctrl_c()
    except Exception as error:
        failed(error)
        raise
    leave(code)


def report_refusal(refusal: Refused) -> None:
    """Print it as one message on stderr."""
    print(masked(f"refused: {refusal}"), file=sys.stderr, flush=True)


def read_json(path: Path) -> dict:
    """The object in a json file; refuses one that is missing or damaged."""
    try:
        return dict(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise Refused(f"{path}: not a readable json object: {error}") from None


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses with one message, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message}; --help lists the flags")

    def add_trust(self) -> None:
        """Add --trust_remote_code, with train.py's default for a local directory."""
        text = "run the Python files that a directory brings (default: true)"
        self.add_argument("--trust_remote_code", type=yes_or_no, nargs="?", const=True, default=True, help=text)


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
