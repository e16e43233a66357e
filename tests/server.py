"""A process that has imported everything and forks the ranks of a run, which then costs one second instead of seven.

    python tests/server.py FD

FD is one end of a Unix socket. Each packet that arrives there is a request: a json object with four open files (stdin,
stdout, stderr, and where to reply). The server itself runs no torch operation and starts no thread, so that what it
forks is as good as new. What the libraries read when they are imported (FIXED) is the server's for all its runs.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train"
# Read by libraries when they are imported: a run with another value has to start cold.
FIXED = {"HF_DATASETS_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "DS_ACCELERATOR", "PYTHONPATH"}
MODULES = (
    "accelerate", "datasets", "deepspeed", "peft", "psutil", "torch.utils.tensorboard", "transformers.trainer",
    "transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense",
    "transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe",
    "transformers.models.hy_v3.modeling_hy_v3", "transformers.models.hy_v4.modeling_hy_v4",
)  # fmt: skip
PACKET = 1 << 17  # bytes of a request: below the kernel's default for a socket
GRACE = 10.0  # seconds that the other ranks have once one has failed


def import_everything() -> None:
    """What train.py and the other scripts import, or may import later."""
    sys.path.insert(0, str(TRAIN))
    for name in MODULES:
        with contextlib.suppress(ModuleNotFoundError):  # another release of transformers has not every class
            importlib.import_module(name)
    import sft

    for module in pkgutil.walk_packages(sft.__path__, "sft."):
        try:
            importlib.import_module(module.name)
        except ImportError:  # without bitsandbytes, or with another release of transformers
            if module.name != "sft.model.four_bits":
                raise


def threads() -> list[str]:
    """The names of this process's threads, as the kernel has them."""
    tasks = Path("/proc/self/task").iterdir()
    return [(task / "comm").read_text().strip() for task in tasks]


def serve(control: socket.socket) -> None:
    """Fork a supervisor for each request, until the other end is closed."""
    while True:
        packet, files, _, _ = socket.recv_fds(control, PACKET, 4)
        if not packet:
            return
        if len(threads()) != 1:
            raise RuntimeError(f"a process with threads cannot be forked safely: {threads()}")
        if os.fork() == 0:
            control.close()
            end_like_a_script(supervise, json.loads(packet), *files)
        for file in files:
            os.close(file)
        reap()


def reap() -> None:
    """Take leave of the supervisors that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def supervise(request: dict, stdin: int, stdout: int, stderr: int, reply: int) -> None:
    """Start the ranks of a run in a session of its own, and write two lines of json to `reply`: first the process ids
    (this one's, then the ranks'), at the end the ranks' exit codes in the order in which they ended."""
    os.setsid()
    die_with_parent()
    ranks = []
    for env in request["ranks"]:
        pid = os.fork()
        if pid == 0:
            os.close(reply)
            end_like_a_script(become_rank, request, env, (stdin, stdout, stderr))
        ranks.append(pid)
    os.write(reply, json.dumps([os.getpid(), *ranks]).encode() + b"\n")
    codes = wait_for(set(ranks))
    os.write(reply, json.dumps(codes).encode() + b"\n")
    os._exit(0)  # the handlers that imports have registered are the ranks'


def wait_for(ranks: set[int]) -> list[int]:
    """The exit codes of the processes, in the order in which they end. As torchrun does, the others are asked to end
    once one has failed."""
    codes, deadline = [], None
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if deadline and time.monotonic() > deadline:
                signal_all(ranks, signal.SIGKILL)
            time.sleep(0.01)
            continue
        ranks.discard(pid)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] != 0 and deadline is None:
            deadline = time.monotonic() + GRACE
            signal_all(ranks, signal.SIGTERM)
    return codes


def signal_all(pids: set[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)  # not reaped yet: it is there


def become_rank(request: dict, env: dict[str, str], files: tuple[int, int, int]) -> None:
    """Run the script as `python SCRIPT ARGS` would, with the request's environment, folder, umask and files."""
    import torch

    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", os.cpu_count())))
    tempfile.tempdir = None  # TMPDIR may be another
    for fd, file in enumerate(files):
        os.dup2(file, fd)
        os.close(file)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)),
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )
    sys.argv = [request["script"], *request["args"]]
    runpy.run_path(request["script"], run_name="__main__")


def end_like_a_script(work: Callable, *args) -> None:
    """Do the work and end the process by `os._exit`, past what the server had under way: with the exit code of a
    script that raises the same, its handlers run and its output written."""
    code = 0
    try:
        work(*args)
    except SystemExit as stopped:
        code = stopped.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def die_with_parent() -> None:
    """Ask Linux for SIGKILL when the parent is gone: nothing outlives a test run that was killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    die_with_parent()
    import_everything()
    gc.collect()
    gc.freeze()  # or the first collection in each rank would copy every page
    with socket.socket(fileno=int(sys.argv[1])) as control:
        control.send(b"ready")
        serve(control)


if __name__ == "__main__":
    main()
