"""One node of a job: run its ranks under torch's elastic agent, end them.

launch.py calls `run` itself where the job has one machine. Of several, each gets the chief's text of this file and of
examine.py over its connection, so that its own, perhaps older, copy decides nothing. Besides these two: the standard
library, psutil and torch.

What the ranks print goes to stdout. The rest is JSON, an object a line: on stdin the orders (examine, look, start,
signal, refused, and {} every few seconds), on stderr the answers (examined, seen, late, failed, done). When the
launcher closes stdin, or is silent for SILENCE_SECONDS, the ranks end. A refused job leaves nothing that was made here.
"""

import contextlib
import json
import logging
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from sft.nodes.examine import examine, number_of_gpus  # noqa: F401  (train.sh takes the second one from here)

SILENCE_SECONDS = 30  # the launcher, or the network to it, is gone
KILL_SECONDS = 10  # from SIGTERM to SIGKILL
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


def call_torch(job: dict, ended: list) -> None:
    """Run the ranks under torch's elastic agent, until they have ended, on every node where all went well. `ended` gets
    what failed: rank, exit code (-n: signal n), a reason or nothing; (None, 0, "") where nothing did."""
    logging.disable(logging.CRITICAL)  # torch's own words: the launcher says how a rank ended
    host, port = job["master"]
    try:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
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
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # no files: the ranks write where we do
        )
        command = ["-ISc", RANK, str(os.getpid()), *job["command"]]
        command = [word.replace("$", "$$") for word in command]  # torch fills ${local_rank} in
        elastic_launch(config, sys.executable)(*command)
        ended.append((None, 0, ""))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank = first_failure(codes)
        ended.append((rank, codes[rank], full_disk(job["output"])))
    except Exception as error:  # torch's agent itself has failed
        ended.append((job["first_rank"], 1, f"{type(error).__name__}: {error}"))


def first_failure(codes: dict[int, int]) -> int:
    """Of {rank: exit code}, in the order in which they ended, the rank to name: one that ends with 1 may have lost its
    peer, and torch ends the others by SIGTERM."""
    weights = {-signal.SIGTERM: 0, 1: 1}
    return max(codes, key=lambda rank: weights.get(codes[rank], 2))


def full_disk(directory: str | None) -> str:
    """Words on an output directory without room: libraries have others for it."""
    with contextlib.suppress(OSError):
        if directory and shutil.disk_usage(directory).free < 1 << 16:
            return f"no space left in {directory} there"
    return ""


def children(known: list, number: int) -> list:
    """This process's ranks, once torch's agent has started all; what is known of them until then."""
    import psutil

    if len(known) == number:
        return known
    return [child for child in psutil.Process().children() if child.name() != "tee"]


def send(processes: list, number: int) -> None:
    """A signal to each that has not ended."""
    for process in processes:
        if process.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def run(job: dict, orders: queue.SimpleQueue, tell: Callable[[dict], None]) -> int:
    """Run the ranks of one node to their end; the exit code of the first that failed (-n: signal n ended it), else 0.

    Args:
        job: command (without the interpreter), slots, first_rank, world_size, node (its number), nodes, master
            [host, port], output (a directory, or None).
        orders: {"signal": number} for every rank, {"end": True}. A second signal, later than what signals every process
            of a container at once, is an end, too.
        tell: gets the messages late and failed.
    """
    os.environ["PYTHONIOENCODING"] = "utf-8"
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    if job["world_size"] > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job["slots"])))
    ended: list[tuple] = []
    torch_agent = threading.Thread(target=call_torch, args=(job, ended), daemon=True)
    torch_agent.start()
    ranks, signalled_at, kill_at = [], None, None
    while torch_agent.is_alive():
        order = {}
        with contextlib.suppress(queue.Empty):
            order = orders.get(timeout=0.1)
        now, ranks = time.monotonic(), children(ranks, job["slots"])
        if "signal" in order and signalled_at is None:
            signalled_at = now
            send(ranks, order["signal"])
            if not ranks:
                ended.append((job["first_rank"], -order["signal"], ""))
                break
        elif "end" in order or "signal" in order and now - signalled_at > 2:
            send(ranks, signal.SIGTERM)
            kill_at = kill_at or now + KILL_SECONDS
        if kill_at and not any(rank.is_running() for rank in ranks):
            torch_agent.join(timeout=2)  # not where it waits for other nodes
            break
        if kill_at and now > kill_at:
            for number, rank in enumerate(ranks, job["first_rank"]):
                if rank.is_running():
                    tell({"late": [number, STATES.get(rank.status(), rank.status())]})
            send(ranks, signal.SIGKILL)
            kill_at = now + KILL_SECONDS
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.pid, signal.SIGKILL)  # what it has started
    failure = ended[0] if ended else (None, 0, "")
    if failure[1]:
        tell({"failed": failure})
    return failure[1]


# ------------------------------------------------------------------------------------------ one of several nodes


class Agent:
    """The conversation with the launcher, and what has to go after a refusal."""

    def __init__(self):
        self.orders: queue.SimpleQueue = queue.SimpleQueue()
        self.stdin, self.stderr = os.dup(0), os.dup(2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the ranks inherit these
        os.dup2(1, 2)
        self.session, self.closed = os.getppid(), threading.Event()
        self.refused, self.gone = False, False
        self.made: list[str] = []
        self.marker: str | None = None

    def listen(self) -> None:
        """Until the launcher closes its end or is silent: then the ranks end, and at last this process."""
        rest = b""
        while ready := select.select([self.stdin], [], [], SILENCE_SECONDS)[0]:
            chunk = os.read(self.stdin, 1 << 16)
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
        """Answer the launcher, in vain where it is gone."""
        if not self.gone:
            with contextlib.suppress(OSError):
                os.write(self.stderr, json.dumps(message).encode() + b"\n")

    def examine(self, wanted: dict) -> None:
        self.marker = wanted["marker"]
        try:
            self.tell({"examined": examine(wanted, self.made)})
        except Exception as error:  # the launcher reports it, whatever it is
            self.tell({"examined": {"error": f"{type(error).__name__}: {error}"}})

    def start(self, job: dict) -> None:
        """Run the ranks; what they print goes to this node's log, too."""
        self.tidy()
        if job["log"]:
            self.made[:0] = [] if os.path.lexists(job["log"]) else [os.path.abspath(job["log"])]
            tee = subprocess.Popen(["tee", "-a", job["log"]], stdin=subprocess.PIPE, start_new_session=True)
            os.dup2(tee.stdin.fileno(), 1)
            os.dup2(1, 2)
        os.environ.update(job["env"])
        code = run(job, self.orders, self.tell)
        os.dup2(0, 1)
        os.dup2(0, 2)
        self.tell({"done": True})
        self.closed.wait()  # the first node's agent holds the ranks' store; another node may refuse
        if code != 2 and not (self.refused and code in (-signal.SIGTERM, -signal.SIGKILL)):
            self.made = []

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
        os._exit(0)  # torch's thread may still wait


def hang_up(session: int) -> None:
    """End the ssh session that this ran in. Where it is gone already, our parent is another process, in a container the
    very sshd that listens."""
    with contextlib.suppress(OSError), open(f"/proc/{session}/comm") as file:
        if os.getppid() == session and file.read().startswith("sshd"):
            os.kill(session, signal.SIGTERM)


def main() -> None:
    agent = Agent()
    for number in (signal.SIGINT, signal.SIGHUP):  # what is meant for the ranks comes from the launcher
        signal.signal(number, lambda number, frame: None)  # not SIG_IGN, which the ranks would inherit
    signal.signal(signal.SIGTERM, lambda number, frame: agent.orders.put({"end": True}))
    threading.Thread(target=agent.listen, daemon=True).start()
    while "end" not in (order := agent.orders.get()):
        if "examine" in order:
            agent.examine(order["examine"])
        elif "look" in order:
            agent.tell({"seen": {"seen": sum(map(os.path.exists, order["look"]))}})
        elif "start" in order:
            agent.start(order["start"])
            break
    agent.leave()


if __name__ == "__main__":
    main()
