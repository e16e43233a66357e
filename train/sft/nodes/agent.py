"""One node of a job: examine the machine, run its ranks under torch's agent, end them.

launch.py calls `run` itself where the job has one machine. Of several, each gets this very text through its connection,
so that a node is never examined by its own, perhaps older, copy: nothing of this package is imported here, and psutil
and torch only where they are needed.

Both sides write one JSON object a line. From the launcher: examine, look, start, signal, refused, and {} every few
seconds; to it: examined, seen, output, late, failed, done. When the launcher closes its end, or is silent for
SILENCE_SECONDS, the ranks end. A refused job leaves no file and no directory that was made here.
"""

import codecs
import collections
import contextlib
import glob
import hashlib
import importlib.metadata
import json
import logging
import os
import queue
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

SILENCE_SECONDS = 30  # the launcher, or the network to it, is gone
KILL_SECONDS = 10  # from SIGTERM to SIGKILL
GPU_SECONDS = 60  # for nvidia-smi: eight GPUs without persistence mode take more than 11
GPU_DEVICES = "/dev/nvidia[0-9]*"
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "datasets", "psutil")
STATES = {"stopped": "stopped (SIGSTOP)", "disk-sleep": "waiting for a disk"}

# A rank ends with the agent, however that ends, and one process alone is no distributed job.
RANK = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
if os.environ["WORLD_SIZE"] == "1":
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
                 "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"):
        del os.environ[name]
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


# ---------------------------------------------------------------------------------------------------- examine


def number_of_gpus(env: dict[str, str]) -> int | None:
    """The NVIDIA GPUs that processes with this environment see. None where that is unknown: nvidia-smi takes too long,
    or it fails or is missing although there are devices."""
    chosen, lines = env.get("CUDA_VISIBLE_DEVICES"), ""
    named = [name for name in (chosen or "").split(",") if name.strip() and name.strip() != "-1"]
    if chosen is not None and not named:
        return 0
    try:
        with contextlib.suppress(OSError):  # there is none
            lines = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=GPU_SECONDS).stdout
    except subprocess.TimeoutExpired:
        return None
    number = sum(line.startswith("GPU") for line in lines.splitlines())
    if number == 0 and glob.glob(GPU_DEVICES):
        return None
    return number if chosen is None else min(number, len(named))


def sizes(path: str) -> dict[str, int] | None:
    """{file: bytes} of a file, of a glob's files or of a directory's top; None where there is nothing."""
    if os.path.isdir(path):
        files = [entry.path for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith(".")]
        return {os.path.basename(file): os.path.getsize(file) for file in files}
    return {file: os.path.getsize(file) for file in sorted(glob.glob(path) or [path]) if os.path.exists(file)} or None


def code(directory: str) -> dict[str, str]:
    """{file: hash} of the scripts and DeepSpeed files of a directory, its packages included."""
    found = {}
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if name not in ("output", "example", "__pycache__")]
        for file in files:
            if file.endswith((".py", ".json")):
                path = os.path.join(folder, file)
                with open(path, "rb") as content:
                    found[os.path.relpath(path, directory)] = hashlib.sha256(content.read()).hexdigest()
    return found


def versions() -> dict[str, str | None]:
    """Of Python and the packages that have to agree, without importing them."""
    found: dict[str, str | None] = {"python": ".".join(map(str, sys.version_info[:2]))}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def interface_towards(host: str, port: int) -> str | None:
    """The network interface from which this machine reaches a host. Nothing is sent."""
    with contextlib.suppress(OSError, ImportError):
        import psutil  # a node without it is still examined

        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as s:
            s.connect(address)
            own = s.getsockname()[0].partition("%")[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address.partition("%")[0] == own for address in addresses):
                return name
    return None


def reach(host: str, port: int) -> str | None:
    """What prevents a connection, or None."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def writable(marker: str, made: list[str]) -> str | None:
    """Write the file `marker`, with its directory; what prevents it, or None. `made` gets the new directories, the
    innermost first."""
    folder = os.path.dirname(os.path.abspath(marker))
    parent = folder
    while not os.path.lexists(parent):
        made.append(parent)
        parent = os.path.dirname(parent)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(marker, "w") as file:
            file.write("x" * 4096)
    except OSError as error:
        return error.strerror
    return None


def examine(wanted: dict, made: list[str]) -> dict:
    """What the launcher compares between the nodes; `made` as in writable."""
    there = os.path.isdir(wanted["cwd"])
    if there:
        os.chdir(wanted["cwd"])
    return {
        "cwd": there,
        "code": code(wanted["code"]),
        "versions": versions(),
        "paths": {path: sizes(path) for path in wanted["paths"]},
        "lacks": [file for file in wanted["resumed"] if not os.path.isfile(file)],
        "gpus": number_of_gpus(dict(os.environ)),
        "shm": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        "interface": wanted["interface"] or interface_towards(*wanted["towards"]),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "reach": reach(*wanted["reach"]) if wanted["reach"] else None,
        "output": writable(wanted["marker"], made) if there and wanted["marker"] else None,  # last: others take time
    }


# ------------------------------------------------------------------------------------------------------- run


class Ranks:
    """The ranks of this node under torch's agent, in a thread of its own: what they print, how they ended."""

    root_log_dir = None  # torch asks for it, as for `reify`

    def __init__(self, job: dict, tell: Callable[[dict], None]):
        self.job, self.tell = job, tell
        self.last_words: dict[int, collections.deque] = {}
        self.relays: list[threading.Thread] = []
        self.processes: list = []
        self.ended = False
        self.failure: list | None = None  # rank, exit code (-n: signal n), the error's line
        self.thread = threading.Thread(target=self.launch, daemon=True)
        self.thread.start()

    def launch(self) -> None:
        """Call torch's agent, which returns when the ranks have ended, on every node where all went well."""
        logging.disable(logging.CRITICAL)  # the agent's own words: the launcher says how a rank ended
        job, (host, port) = self.job, self.job["master"]
        try:
            from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
            from torch.distributed.launcher.api import LaunchConfig, elastic_launch

            config = LaunchConfig(
                min_nodes=job["nodes"],
                max_nodes=job["nodes"],
                nproc_per_node=job["slots"],
                run_id="job",
                rdzv_backend="static",
                rdzv_endpoint=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
                rdzv_configs={"rank": job["node"]},
                max_restarts=0,
                logs_specs=self,
            )
            words = ["-ISc", RANK, str(os.getpid()), *job["command"]]
            elastic_launch(config, sys.executable)(*(word.replace("$", "$$") for word in words))  # torch fills ${…} in
        except ChildFailedError as error:
            rank, code = first_failure({rank: failure.exitcode for rank, failure in error.failures.items()})
        except Exception as error:
            rank, code = job["first_rank"], 1
            self.last_words[rank] = [f"{type(error).__name__}: {error}"]
        else:
            rank, code = None, 0
        self.ended = True
        for relay in self.relays:
            relay.join(timeout=SILENCE_SECONDS)
        if code:
            self.failure = [rank, code, self.reason(rank)]

    def reify(self, envs: dict[int, dict]):
        """Where torch is to write each rank's output: into a pipe that is read here."""
        from torch.distributed.elastic.multiprocessing.api import LogsDest

        pipes = {}
        for local in envs:
            source, sink = os.pipe()
            pipes[local] = f"/dev/fd/{sink}"
            relay = threading.Thread(target=self.relay, args=(self.job["first_rank"] + local, source), daemon=True)
            self.relays.append(relay)
            relay.start()
        return LogsDest(stdouts=pipes, stderrs=pipes, error_files=dict.fromkeys(pipes, os.devnull))

    def relay(self, rank: int, source: int) -> None:
        """Pass on what a rank prints: rank 0's at once, its progress bar too, the others' in whole lines."""
        decoder, line = codecs.getincrementaldecoder("utf-8")("replace"), ""
        self.last_words[rank] = collections.deque(maxlen=200)
        while True:
            ended = self.ended  # before the last look
            if not select.select([source], [], [], 0.1)[0]:
                if ended:
                    break
                continue
            text = decoder.decode(os.read(source, 1 << 16))
            *whole, line = re.split(r"(?<=[\r\n])", line + text)
            self.last_words[rank].extend(part.strip() for part in whole)
            if rank == 0 or whole:
                self.tell({"output": text if rank == 0 else "".join(whole)})
        if line:
            self.last_words[rank].append(line)
            self.tell({"output": "\n" if rank == 0 else line + "\n"})

    def reason(self, rank: int) -> str:
        """The last line of a rank's output that names an error, or nothing; whether the disk is full there."""
        lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in self.last_words.get(rank, ())]  # torch puts it there
        errors = [line for line in lines if re.match(r"([\w.]+\.)?\w*(Error|Exception)\b", line)]
        reason = errors[-1][:300] if errors else ""
        output = self.job["output"]
        with contextlib.suppress(OSError):  # libraries have other words for it
            if output and shutil.disk_usage(output).free < 1 << 16:
                reason += f" (no space left in {output} there)"
        return reason

    def alive(self) -> list:
        """The processes that have not ended."""
        import psutil

        if len(self.processes) < self.job["slots"]:  # torch's agent is still starting them
            self.processes = psutil.Process().children()
        return [process for process in self.processes if process.is_running()]

    def send(self, number: int) -> None:
        for process in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def first_failure(codes: dict[int, int]) -> tuple[int, int]:
    """Of {rank: exit code} in the order of their ends: rank and code of the one to name. A rank that ends with 1 may
    have lost its peer, and torch's agent ends the others by SIGTERM."""
    weights = {-signal.SIGTERM: 0, 1: 1}
    rank = max(codes, key=lambda rank: weights.get(codes[rank], 2))
    return rank, codes[rank]


def run(job: dict, orders: queue.SimpleQueue, tell: Callable[[dict], None]) -> int:
    """Run the ranks of one node to their end; the exit code of the first that failed (-n: signal n ended it), else 0.

    Args:
        job: command (without the interpreter), slots, first_rank, world_size, node (its number), nodes, master
            [host, port], env (variables added to this process's own), output (a directory, or None).
        orders: {"signal": number} for every rank, {"end": True}. A second signal, later than what signals every process
            of a container at once, is an end, too.
        tell: gets the messages output, late and failed.
    """
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    if job["world_size"] > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job["slots"])))
    os.environ.update(job["env"] | {"PYTHONIOENCODING": "utf-8"})
    ranks = Ranks(job, tell)
    signalled, killed_at = None, None
    while ranks.thread.is_alive():
        order = {}
        with contextlib.suppress(queue.Empty):
            order = orders.get(timeout=0.1)
        now, alive = time.monotonic(), ranks.alive()
        if "signal" in order and signalled is None:
            signalled = now
            ranks.send(order["signal"])
            if not alive:
                ranks.failure = [job["first_rank"], -order["signal"], ""]
                break
        elif "end" in order or "signal" in order and now - signalled > 2:
            ranks.send(signal.SIGTERM)
            killed_at = killed_at or now + KILL_SECONDS
        if killed_at and not alive:  # none was started, or torch's agent waits for other nodes
            ranks.thread.join(timeout=2)
            break
        if killed_at and now > killed_at:
            for process in alive:
                state = process.status()
                tell({"late": [job["first_rank"] + ranks.processes.index(process), STATES.get(state, state)]})
            ranks.send(signal.SIGKILL)
            killed_at = now + KILL_SECONDS
    for process in ranks.processes:  # what they have started
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    if ranks.failure is None:
        return 0
    tell({"failed": ranks.failure})
    return ranks.failure[1]


# ------------------------------------------------------------------------------------------ one of several nodes


class Node:
    """The conversation with the launcher over stdin and stdout, and what has to go after a refusal."""

    def __init__(self):
        self.orders: queue.SimpleQueue = queue.SimpleQueue()
        self.control, self.session = os.dup(0), os.getppid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the ranks would inherit it
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.refused, self.gone = False, False
        self.made, self.marker, self.log = [], None, None

    def listen(self) -> None:
        """Until the launcher closes its end or is silent: then an end, and a second one for what does not end."""
        rest = b""
        while ready := select.select([self.control], [], [], SILENCE_SECONDS)[0]:
            chunk = os.read(self.control, 1 << 16)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for order in map(json.loads, lines):
                self.refused |= "refused" in order
                self.orders.put(order)
        self.gone = not ready
        self.closed.set()
        self.orders.put({"end": True})
        time.sleep(2 * KILL_SECONDS)
        self.leave()

    def tell(self, message: dict) -> None:
        """Write a message, a rank's output also to this node's log. In vain where the launcher is gone."""
        if "output" in message and self.log is not None:
            try:
                self.log.write(message["output"])
                self.log.flush()
            except (OSError, ValueError):  # a full disk: the output must not be lost with it
                self.log = None
        if self.gone:
            return
        with self.lock, contextlib.suppress(OSError):
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()

    def answer(self, order: dict) -> None:
        """Examine this node, look for the other nodes' files, start the ranks."""
        if "examine" in order:
            self.marker = order["examine"]["marker"]
            try:
                self.tell({"examined": examine(order["examine"], self.made)})
            except Exception as error:  # the launcher says it, whatever it is
                self.tell({"examined": {"error": f"{type(error).__name__}: {error}"}})
        elif "look" in order:
            self.tell({"seen": {"seen": sum(map(os.path.exists, order["look"]))}})
        elif "start" in order:
            job = order["start"]
            self.tidy()
            if job["log"]:
                self.made[:0] = [] if os.path.lexists(job["log"]) else [os.path.abspath(job["log"])]
                with contextlib.suppress(OSError):
                    self.log = open(job["log"], "a", encoding="utf-8")  # noqa: SIM115
            code = run(job, self.orders, self.tell)
            self.tell({"done": True})
            self.closed.wait()  # the first node's agent keeps the ranks' store; another node may refuse
            self.refused = code == 2 or self.refused and code in (-signal.SIGTERM, -signal.SIGKILL)
            self.made = self.made if self.refused else []

    def tidy(self) -> None:
        """Take the marker away that `examine` wrote."""
        if self.marker:
            with contextlib.suppress(OSError):
                os.remove(self.marker)

    def leave(self) -> None:
        """End this process. What is left in `made` was made for a job that was refused."""
        self.tidy()
        for path in self.made:
            with contextlib.suppress(OSError):  # not empty: another's files
                os.remove(path) if os.path.isfile(path) else os.rmdir(path)
        if self.gone:  # over a dead network the ssh session would stay for a quarter of an hour
            hang_up(self.session)
        os._exit(0)  # past what a dead network blocks


def hang_up(session: int) -> None:
    """End the ssh session that this ran in. Where it is gone already, our parent is another process, in a container the
    very sshd that listens."""
    with contextlib.suppress(OSError), open(f"/proc/{session}/comm") as file:
        if os.getppid() == session and file.read().startswith("sshd"):
            os.kill(session, signal.SIGTERM)


def main() -> None:
    node = Node()
    for number in (signal.SIGINT, signal.SIGHUP):  # what is meant for the ranks comes from the launcher
        signal.signal(number, lambda number, frame: None)  # not SIG_IGN, which the ranks would inherit
    signal.signal(signal.SIGTERM, lambda number, frame: node.orders.put({"end": True}))
    sys.stdout.write("\n")  # a login shell may have printed something
    threading.Thread(target=node.listen, daemon=True).start()
    while not node.closed.is_set() and "end" not in (order := node.orders.get()):
        node.answer(order)
    node.leave()


if __name__ == "__main__":
    main()
