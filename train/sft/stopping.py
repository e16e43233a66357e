"""Stop on request: what SIGTERM and SIGINT do to a process of a job.

Standard library only, because a rank listens before it imports torch.

A thread of each rank hears the signals, because the main one may be in a collective that ends only with its peers.
Before the first step a signal ends the process at once. From then on it is a request, on which the ranks agree
(training/stop_on_request.py). A second one counts only AGAIN_SECONDS later, because launchers, terminals and
containers send the same one twice; it ends the process at once.
"""

import contextlib
import ctypes
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sft.messages import masked
from sft.processes import name_job

EXIT_STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that a launcher passes on
AGAIN_SECONDS = 5
PEER_SECONDS = 3  # for the signal of a launcher that ends a job, after a peer is gone
NOTHING_SAVED = "Nothing new is saved yet: start the same command again"
BEFORE_THE_FIRST_STEP = f"stopped on request before the first step. {NOTHING_SAVED}"

requested = threading.Event()  # this process is asked to stop


def write_line(text: str) -> None:
    """Write a line to stderr, from any thread and from a signal handler: past Python's buffers and their locks."""
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, f"\n{masked(text)}\n".encode())  # a progress bar may be unfinished


def go_on_from(checkpoint: Path, begin: str, how: str = "Continue with:") -> str:
    """What was saved last, and the command that goes on from it, after `begin`."""
    return f"Last checkpoint: {checkpoint}. {how}\n{begin} --resume_from_checkpoint {shlex.quote(str(checkpoint))}"


# ------------------------------------------------------------------------------------------------ before the ranks


def end_at_signals(words: str) -> None:
    """Let a signal end the launcher with exit code 75, after `words`: by SystemExit, which tidies up what is under
    way."""

    def end(number: int, frame: object) -> None:
        for other in heard:  # a second one must not cut the tidying short
            signal.signal(other, signal.SIG_IGN)
        write_line(words)
        sys.exit(EXIT_STOPPED)

    heard = not_ignored(*SIGNALS)
    for number in heard:
        signal.signal(number, end)


def not_ignored(*numbers: int) -> list[int]:
    """The signals that are not ignored, as under nohup."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


# ------------------------------------------------------------------------------------------------------- in a rank


def listen() -> None:
    """Start the thread that hears SIGTERM and SIGINT."""
    name_job()
    heard = not_ignored(signal.SIGTERM, signal.SIGINT)
    end, begin = os.pipe()
    os.set_blocking(begin, False)
    signal.set_wakeup_fd(begin, warn_on_full_buffer=False)  # Python writes the number of each signal there
    for number in heard:
        signal.signal(number, leave_it_to_the_thread)
    threading.Thread(target=hear, args=(end, heard), daemon=True).start()


def leave_it_to_the_thread(number: int, frame: object) -> None:
    """The handler in the main thread, which may be anywhere."""


def leave_it_to_the_parent() -> None:
    """In a process that a rank has forked, which loads or tokenizes data: it must not write into the rank's pipe, and
    has to go on working for the checkpoint when a whole process group is signalled."""
    if signal.getsignal(signal.SIGTERM) == leave_it_to_the_thread:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})


os.register_at_fork(after_in_child=leave_it_to_the_parent)


def hear(pipe: int, heard: list[int]) -> None:
    """Answer each signal, for as long as the process lives."""
    while True:
        number = os.read(pipe, 1)[0]
        if number in heard:
            answer(number)


def end_before_the_first_step(number: int) -> None:
    """End the process at once."""
    requested.set()
    if os.environ.get("RANK", "0") == "0" and "GO_ON_WITH" not in os.environ:  # else start.py says so
        write_line(BEFORE_THE_FIRST_STEP)
    end_children()
    for task in Path("/proc/self/task").glob("*/children"):  # a compiler that builds an extension
        with contextlib.suppress(OSError):  # it has ended
            for child in task.read_text().split():
                os.kill(int(child), signal.SIGTERM)
    os._exit(EXIT_STOPPED)


answer: Callable[[int], None] = end_before_the_first_step


def take_as_request(last_words: Callable[[], str]) -> None:
    """From now on a first signal is a request. A second one ends the process by the signal, after `last_words` on the
    first rank."""
    global answer
    first_at = 0.0

    def take(number: int) -> None:
        nonlocal first_at
        requested.set()
        now, first_at = time.monotonic(), first_at or time.monotonic()
        if now - first_at < AGAIN_SECONDS:
            return
        if os.environ.get("RANK", "0") == "0":
            write_line(last_words())
        end_children()
        default(number)
        os.kill(os.getpid(), number)
        os._exit(128 + number)  # the first process of a container outlives that

    answer = take


def default(number: int) -> None:
    """Put a signal back to its default, from any thread: signal.signal works in the main one alone."""
    ctypes.CDLL(None).signal(number, 0)  # SIG_DFL


def end_children() -> None:
    """Kill what this process has forked: it does not end by SIGTERM, and would miss its parent with a traceback."""
    default(signal.SIGCHLD)  # at which torch raises an error
    for child in multiprocessing.active_children():
        child.kill()


def end_if_asked(error: Exception) -> None:
    """Of several ranks, at an error: wait for the launcher's signal, in case a peer was ended first. If this rank is
    asked to stop, one line and the end: the error has come of that."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and requested.wait(timeout=PEER_SECONDS):
        first_line = str(error).strip().partition("\n")[0]
        write_line(f"rank {os.environ['RANK']}, asked to stop: {type(error).__name__}: {first_line[:200]}")
        end_children()
        os._exit(1)
