"""What every process of a job may need: to end with its parent, a free port. Standard library only."""

import ctypes
import signal
import socket


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when the one that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
