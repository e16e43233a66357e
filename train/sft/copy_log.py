"""Copy standard input to standard output as it is, and to the file that is named as lines of text, without what a
progress bar has drawn over. Signals, a full disk and a terminal that is gone do not end it: it ends with its input.

train.sh starts it; standard library only.
"""

import contextlib
import os
import re
import signal
import sys


def write(file: int, text: bytes) -> None:
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(file, text) :]


def as_line(text: bytes) -> bytes:
    """What is left of a line once all of it is drawn."""
    return re.sub(rb".*\r(?=.)", b"", text.rstrip(b"\r ")) + b"\n"


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    log, rest = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), b""
    while block := os.read(0, 2**16):
        write(1, block)
        *lines, rest = (rest + block).split(b"\n")
        write(log, b"".join(map(as_line, lines)))
    write(log, as_line(rest) if rest else b"")
