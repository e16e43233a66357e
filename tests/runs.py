"""Runs of the scripts as a user starts them.

`run_train` and `run_script` fork them from a server (server.py) unless a cold start is asked for, `run_command` runs
any command, `run_here` what need not be a process.
"""

import atexit
import functools
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

import server

TESTS = Path(__file__).resolve().parent
TRAIN = TESTS.parent / "train"
JOB = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
# no thread in the server: numpy's BLAS and Arrow's allocator would start some
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """This process's variables and `more`, without the rendezvous variables of a surrounding job, and with no use of
    the network."""
    env = {key: value for key, value in os.environ.items() if key not in JOB}
    return env | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | (more or {})


# ------------------------------------------------------------------------------------------------------- cold starts


def launch_command(script: Path, launcher: str = "python", nproc: int = 1) -> list[str]:
    """The command that starts `nproc` processes of `script` on this machine by `python`, `torchrun` or `deepspeed`."""
    port = str(free_port())
    if launcher == "torchrun":
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(nproc), "--master_port", port]
    elif launcher == "deepspeed":
        launch = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(nproc), "--master_port", port]
    elif launcher == "python" and nproc == 1:
        launch = []
    else:
        raise ValueError(f"launcher {launcher!r} with nproc {nproc}")
    return [sys.executable, *launch, str(script)]


def run_command(
    command: list[str],
    env: dict[str, str] | None = None,
    timeout: float = 600,
    cwd: Path | None = None,
    stdin: str = "",
) -> subprocess.CompletedProcess:
    """Runs `command` to its end in a session of its own and returns CompletedProcess with text.

    After `timeout` seconds the whole session is killed, children included, and subprocess.TimeoutExpired holds what
    was printed until then. The rendezvous variables of a surrounding job are not passed on, nor is the network used.
    """
    process = subprocess.Popen(
        command, env=environment(env), cwd=cwd, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr) from None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


# -------------------------------------------------------------------------------------------------- from the server


def needs_cold_start(env: dict[str, str]) -> bool:
    """Whether the server was started with other values of what is read by imports, or for CPUs beside a GPU."""
    gpu = any(Path("/dev").glob("nvidia[0-9]*")) and env.get("CUDA_VISIBLE_DEVICES") != ""
    return gpu or any(env.get(name) != start_server()[1].get(name) for name in server.FIXED)


@functools.cache
def start_server() -> tuple[socket.socket, dict[str, str]]:
    """(our end of the socket of a server that is ready, its variables). It ends with this process."""
    env = environment(NO_THREADS)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, str(TESTS / "server.py"), str(theirs.fileno())],
            env=env | {"DS_ACCELERATOR": "cpu"},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # first, which ends it
    if ours.recv(16) != b"ready":
        raise RuntimeError("tests/server.py has ended; what it printed says why")
    return ours, env


def rank_variables(nproc: int) -> list[dict[str, str]]:
    """What torchrun gives each of `nproc` ranks; of one process nothing."""
    if nproc == 1:
        return [{}]
    world = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    world["TORCHELASTIC_RUN_ID"] = "none"
    ranks = [world | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(nproc)]
    return [{key: str(value) for key, value in rank.items()} for rank in ranks]


class ServerRun:
    """A run that the server has forked.

    Attributes:
        pids: of the ranks.
        session: of all processes of the run, and their process group.
    """

    def __init__(self, script: Path, args: Sequence, nproc: int, env: dict[str, str], cwd: Path | None, stdin: str):
        self.command = [str(script), *map(str, args)]
        files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        files[0].write(stdin.encode())
        files[0].seek(0)
        self.stdout, self.stderr = files[1:]
        umask = os.umask(0)
        os.umask(umask)
        request = {
            "script": str(script),
            "args": self.command[1:],
            "ranks": [env | rank for rank in rank_variables(nproc)],
            "cwd": str(cwd or Path.cwd()),
            "umask": umask,
        }
        packet = json.dumps(request).encode()
        assert len(packet) < server.PACKET, "a request that long needs a cold start"
        ours, theirs = os.pipe()
        self.reply = ours
        socket.send_fds(start_server()[0], [packet], [*(file.fileno() for file in files), theirs])
        os.close(theirs)
        self.lines, self.deadline = b"", None
        self.session, *self.pids = self.read_line(timeout=60)

    def read_line(self, timeout: float) -> list[int]:
        """The supervisor's next line; raises TimeoutError where it takes longer."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self.lines:
            ready, _, _ = select.select([self.reply], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            if not (more := os.read(self.reply, 4096)):
                raise RuntimeError(f"the run's supervisor was killed: {self.output(self.stderr)[-2000:]}")
            self.lines += more
        line, _, self.lines = self.lines.partition(b"\n")
        return json.loads(line)

    def output(self, file) -> str:
        """What is in a file, with each line's end as \\n."""
        file.seek(0)
        return io.TextIOWrapper(io.BytesIO(file.read()), encoding="utf-8", errors="replace").read()

    def kill(self) -> None:
        os.killpg(self.session, signal.SIGKILL)

    def wait(self, timeout: float) -> subprocess.CompletedProcess:
        """The end of the run: the first exit code that is not 0, and all output."""
        try:
            codes = self.read_line(timeout)
            os.close(self.reply)
        except TimeoutError:
            self.kill()
            texts = [self.output(file) for file in (self.stdout, self.stderr)]
            raise subprocess.TimeoutExpired(self.command, timeout, *texts) from None
        except BaseException:
            self.kill()
            raise
        code = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess(self.command, code, self.output(self.stdout), self.output(self.stderr))


def run_script(
    script: str | Path,
    args: Sequence,
    launcher: str = "python",
    nproc: int = 1,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    cwd: Path | None = None,
    cold: bool = False,
    stdin: str = "",
) -> subprocess.CompletedProcess:
    """Runs a script of `train/` with `args` as a process, or as `nproc` of them; never raises for an exit code.

    Args:
        script: its name in `train/`, or the path of another.
        launcher: `python`, `torchrun` or `deepspeed`.
        env: variables added to this process's. With more than one process OMP_NUM_THREADS is 1 unless given here.
        timeout: in seconds; see run_command.
        cwd: folder to run in, default the caller's.
        cold: start by the launcher's own command, imports and all. Otherwise the processes are forked from the server
            with the variables that `python` or `torchrun` would give them. `deepspeed`, a machine with a GPU, and
            variables that are read by imports always start cold.
        stdin: what it can read.
    """
    if launcher == "python" and nproc != 1:
        raise ValueError(f"launcher {launcher!r} with nproc {nproc}")
    env = ({"OMP_NUM_THREADS": "1"} if nproc > 1 else {}) | (env or {})
    if cold or launcher == "deepspeed" or needs_cold_start(environment(env)):
        command = launch_command(TRAIN / script, launcher, nproc) + [str(arg) for arg in args]
        return run_command(command, env, timeout, cwd, stdin)
    return ServerRun(TRAIN / script, args, nproc, environment(env), cwd, stdin).wait(timeout)


run_train = functools.partial(run_script, "train.py")


# ------------------------------------------------------------------------------------------------- in this process


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """`run_here(script, args)`: a script of train/ in this process, for runs that end before a model trains: they need
    not import torch anew. A path elsewhere is run as it is. Returns CompletedProcess with text."""

    def run(script: str | Path, args: Sequence) -> subprocess.CompletedProcess:
        command, code = [str(script), *map(str, args)], 0
        capfd.readouterr()  # what was printed before is not the script's
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        with monkeypatch.context() as patch, mock.patch.dict(os.environ):
            patch.setattr(sys, "argv", command)
            try:
                runpy.run_path(str(TRAIN / script), run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(-1)
        return subprocess.CompletedProcess(command, code, *capfd.readouterr())

    return run


def losses(output_dir: Path) -> list[float]:
    """The loss of each logging step, from `trainer_state.json` in `output_dir` (a run's or a checkpoint's)."""
    state = json.loads((Path(output_dir) / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def as_saved(checkpoint: Path) -> None:
    """Let a checkpoint that was changed count as saved that way, for what is looked at besides its manifest."""
    from sft.training.manifest import MANIFEST, entry_of

    content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
    content["files"] = {path.relative_to(checkpoint).as_posix(): entry_of(path, False) for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
