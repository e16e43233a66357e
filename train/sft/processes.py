"""What the processes of a job may need: to end with their parent, a free port, how far the job has come. Standard
library only."""

import contextlib
import ctypes
import os
import signal
import socket
import time
from pathlib import Path

LOCK = ".lock"  # file in the output directory of a run
STARTED = "JOB_STARTED"  # variable: the time at which the job was started, which names it, too


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when the one that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def name_job() -> None:
    """Set the variable that names the job, where the launcher has not."""
    os.environ.setdefault(STARTED, f"{time.time():.6f}")


def write_step(lock: int, step: int) -> None:
    """Keep the last step that this job has made in the open file LOCK."""
    with contextlib.suppress(OSError):  # a full disk does not end training
        os.pwrite(lock, f"{os.environ.get(STARTED)} {step:9}\n".encode(), 0)


def forget_step(output_dir: Path | str) -> None:
    """Let this job, which is started again in a directory, have made no step there."""
    with contextlib.suppress(OSError), open(Path(output_dir, LOCK), "r+b") as lock:
        write_step(lock.fileno(), 0)


def step_made(output_dir: Path | str | None) -> int | None:
    """The last step that this job has made in a directory, or 0; None where its training has not begun there."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        job, step = Path(output_dir, LOCK).read_text().split()  # type: ignore[arg-type]
        return int(step) if job == os.environ.get(STARTED) else None
    return None
