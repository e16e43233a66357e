"""Start one process a GPU on this machine, pass signals on, and end as the training ends.

    python launch.py NPROC PORT train.py --flag value …

Not torchrun, because that makes 1 of every exit code and answers a signal with a code of its own; here the code is
that of the first process that failed (128 + n where signal n killed it). Standard library only: it starts at once.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time

GRACE_SECONDS = 15  # for the other processes to end by themselves, once one has failed


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def die_with_parent() -> None:
    """Ask Linux to kill this process when the launcher is gone, however it went."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start(nproc: int, port: int, command: list[str]) -> list[subprocess.Popen]:
    """Start the processes, each in a session of its own, so that a signal reaches it once: through us."""
    threads = max(1, (os.cpu_count() or 1) // nproc)
    processes = []
    for rank in range(nproc):
        env = {"OMP_NUM_THREADS": str(threads), **os.environ}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen([sys.executable, *command], env=env, start_new_session=True, preexec_fn=die_with_parent)
        )
    return processes


def send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def wait(processes: list[subprocess.Popen]) -> int:
    """Wait for all; when one fails give the others a while, then end them. Returns the first failure or 0."""
    first, deadline = 0, None
    while any(process.poll() is None for process in processes):
        if first == 0:
            first = next((p.returncode for p in processes if p.poll() not in (None, 0)), 0)
            if first:
                deadline = time.monotonic() + GRACE_SECONDS
        elif time.monotonic() > deadline:
            send(processes, signal.SIGKILL if time.monotonic() > deadline + GRACE_SECONDS else signal.SIGTERM)
        time.sleep(0.1)
    first = first or next((p.returncode for p in processes if p.returncode), 0)
    return 128 - first if first < 0 else first


def main(nproc: int, port: int, command: list[str]) -> int:
    processes = start(nproc, port or free_port(), command)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: send(processes, number))
    return wait(processes)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
