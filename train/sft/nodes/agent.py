"""One node of a job: run its ranks under torch's elastic agent, end them.

launch.py calls `run` itself where the job has one machine. Of several, each gets the chief's text of this file and of
examine.py over its connection, so that its own, perhaps older, copy decides nothing. Besides these two: the standard
library, psutil and torch.

On stdin come the orders, a JSON object a line: examine and look, which are answered on stdout; start; signal; refused;
and {} every few seconds. What the ranks print goes to stdout, at last what has failed to stderr. When the launcher
closes stdin, or is silent for SILENCE_SECONDS, the ranks end. A refused job leaves nothing that was made here.
"""

import contextlib
import json
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from sft.nodes.examine import examine

with contextlib.suppress(ImportError):  # a node without it is still examined
    import psutil

SILENCE_SECONDS = 30  # the launcher, or the network to it, is gone
KILL_SECONDS = 10  # from SIGTERM to SIGKILL
LOST_SECONDS = 5  # from the end of one rank to SIGKILL for the others
AGAIN_SECONDS = 5  # until a second signal counts: terminals and containers signal the ranks and us
EXIT_STOPPED = 75
STATES = {"stopped": "stopped (SIGSTOP)", "disk-sleep": "waiting for a disk"}

# A rank ends with the agent, however that ends, and one process alone is no distributed job.
RANK = """
import ctypes, os, re, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
if os.environ["WORLD_SIZE"] == "1":
    torchs = "TORCHELASTIC_.*|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    for name in [name for name in os.environ if re.fullmatch(torchs, name)]:
        del os.environ[name]
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def call_torch(job: dict, failed: list, killed: set[int]) -> None:
    """Run the ranks under torch's elastic agent. It returns when they have ended, where all went well on all nodes.
    `failed` gets rank, exit code (-n: signal n) and a reason, unless none failed but those in `killed` (process
    ids)."""
    logging.disable(logging.CRITICAL)  # torch's own words: ours are below
    socket.getfqdn = own_name
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
            rdzv_configs={"rank": job["number"]},
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # no files: the ranks write where we do
        )
        command = ["-ISc", RANK, str(os.getpid()), *job["command"]]
        command = [word.replace("$", "$$") for word in command]  # torch fills ${local_rank} in
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = {n: failure.exitcode for n, failure in error.failures.items() if failure.pid not in killed}
        rank = first_failure(codes or {job["first_rank"]: -signal.SIGKILL})
        failed.append((rank, codes.get(rank, -signal.SIGKILL), ""))
    except Exception as error:  # of torch's agent itself
        failed.append((job["first_rank"], 1, f": {type(error).__name__}: {error}"))


def own_name(name: str = "") -> str:
    """The name as it is, in place of socket.getfqdn: torch 2.13's agent calls it at each event, which takes seconds
    where no name server answers. Goes with the release that does not."""
    return name


def first_failure(codes: dict[int, int]) -> int:
    """Of {rank: exit code}, in the order in which they ended, the rank to name. One that ends with 1 may have lost its
    peer, and torch sends the others SIGTERM, at which they end or stop."""
    weights = {-signal.SIGTERM: 0, 1: 1, EXIT_STOPPED: 1}
    return max(codes, key=lambda rank: weights.get(codes[rank], 2))


class Ranks:
    """The processes that torch's agent starts."""

    def __init__(self, job: dict):
        self.job = job
        self.found: list = []
        self.killed: set[int] = set()  # process ids of those that waited for a lost one

    def alive(self) -> list:
        """Those that have not ended."""
        if len(self.found) < self.job["slots"]:  # not all are started yet
            with contextlib.suppress(psutil.Error):
                self.found = [child for child in psutil.Process().children() if child.name() != "tee"]
        return [rank for rank in self.found if rank.is_running()]

    def send(self, number: int) -> None:
        for rank in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)

    def kill(self, say: bool) -> None:
        """Kill those that are left, after a word on each where they should have ended by themselves."""
        for number, rank in enumerate(self.found, self.job["first_rank"]):
            with contextlib.suppress(psutil.Error):
                state = STATES.get(rank.status(), rank.status())
                if say and state != psutil.STATUS_ZOMBIE:
                    os.write(1, f"rank {number} on {self.job['host']} did not end by itself: {state}\n".encode())
        self.killed.update(rank.pid for rank in self.alive())
        self.send(signal.SIGKILL)

    def sweep(self) -> None:
        """Kill what they have started: each leads a process group."""
        for rank in self.found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.pid, signal.SIGKILL)


def run(job: dict, orders: queue.SimpleQueue) -> tuple[int, str]:
    """Run the ranks of one node to their end. Returns the exit code of the first that failed, and what failed.

    Args:
        job: command (without the interpreter), world_size, nodes (how many), master [host, port], and of this node:
            number, host, slots, first_rank.
        orders: {"signal": number}, which asks the ranks to stop. A second one that comes AGAIN_SECONDS later, or
            {"end": True}, ends them within KILL_SECONDS.
    """
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the ranks inherit what we have
    os.environ.update(PYTHONIOENCODING="utf-8", PYTHONUNBUFFERED="1")
    if job["world_size"] > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job["slots"])))
    ranks, failed = Ranks(job), list[tuple]()
    torch_agent = threading.Thread(target=call_torch, args=(job, failed, ranks.killed), daemon=True)
    torch_agent.start()
    signalled_at, kill_at, lost_at = 0.0, 0.0, 0.0
    while torch_agent.is_alive():
        order = {}
        with contextlib.suppress(queue.Empty):
            order = orders.get(timeout=0.1)
        now, alive = time.monotonic(), ranks.alive()
        if "signal" in order and not signalled_at:
            signalled_at = now
            ranks.send(signal.SIGTERM)
            if not ranks.found:  # none is started yet
                return EXIT_STOPPED, f"no rank on {job['host']} was started"
        elif "end" in order or ("signal" in order and now - signalled_at > AGAIN_SECONDS):
            ranks.send(signal.SIGTERM)
            kill_at = kill_at or now + KILL_SECONDS
        if kill_at and not alive:
            torch_agent.join(timeout=2)  # longer where it waits for other nodes
            break
        if kill_at and now > kill_at:
            ranks.kill(say=True)
            kill_at = now + KILL_SECONDS
        lost_at = (lost_at or now) if 0 < len(alive) < len(ranks.found) else 0.0
        if lost_at and now > lost_at + LOST_SECONDS:  # they may wait for it in a collective
            ranks.kill(say=False)
    ranks.sweep()
    if not failed:
        return 0, ""
    rank, code, reason = failed[0]
    if code == -signal.SIGTERM and signalled_at and not kill_at:  # it had not begun to listen
        code = EXIT_STOPPED
    what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL and not kill_at:
        what += " (out of memory? see dmesg there)"
    return 128 - code if code < 0 else code, f"rank {rank} on {job['host']}: {what}{reason}"


# ------------------------------------------------------------------------------------------ one of several nodes


class Agent:
    """The conversation with the launcher, and what has to go after a refusal."""

    def __init__(self):
        self.orders: queue.SimpleQueue = queue.SimpleQueue()
        self.stdin, self.stderr, self.session = os.dup(0), os.dup(2), os.getppid()
        os.dup2(1, 2)  # the ranks inherit it
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
        self.orders.put({"end": True})
        time.sleep(2 * KILL_SECONDS)
        self.leave(1)

    def answer(self, order: dict) -> dict:
        if "look" in order:
            return {"seen": sum(map(os.path.exists, order["look"]))}
        self.marker = order["examine"]["marker"]
        try:
            return examine(order["examine"], self.made)
        except Exception as error:  # the launcher reports it, whatever it is
            return {"error": f"{type(error).__name__}: {error}"}

    def start(self, job: dict) -> int:
        """Run the ranks; what they print goes to this node's log, too. Returns the exit code."""
        self.tidy()
        os.environ.update(job["env"])
        made, self.made = self.made, []
        if job["log"]:
            made[:0] = [] if os.path.lexists(job["log"]) else [os.path.abspath(job["log"])]
            tee: Any = subprocess.Popen(["tee", "-a", "--", job["log"]], stdin=subprocess.PIPE, start_new_session=True)
            os.dup2(tee.stdin.fileno(), 1)
            os.dup2(1, 2)
            tee.stdin.close()
        code, failure = run(job, self.orders)
        if not self.gone:
            os.write(self.stderr, json.dumps({"failure": failure}).encode() + b"\n")
        if code == 2 or self.refused and code in (EXIT_STOPPED, 128 + signal.SIGTERM, 128 + signal.SIGKILL):
            self.made = made
        if job["log"]:
            os.dup2(0, 1)
            os.dup2(0, 2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                tee.wait(timeout=5)  # it has the log open
        return code

    def tidy(self) -> None:
        """Take the marker away that `examine` wrote."""
        if self.marker:
            with contextlib.suppress(OSError):
                os.remove(self.marker)

    def leave(self, code: int) -> None:
        """End this process. What is left in `made` was made for a job that was refused."""
        self.tidy()
        for path in self.made:
            with contextlib.suppress(OSError):  # not empty: another's files
                os.remove(path) if os.path.isfile(path) else os.rmdir(path)
        if self.gone:  # over a dead network the ssh session would stay for a quarter of an hour
            with contextlib.suppress(psutil.Error):
                hang_up(self.session)
        os._exit(code)  # torch's thread may still wait


def hang_up(session: int) -> None:
    """End the ssh session that this ran in. Where it is gone already, our parent is another process, in a container
    the very sshd that listens."""
    parent = psutil.Process().parent()
    if parent and parent.pid == session and parent.name().startswith("sshd"):
        parent.terminate()


def main() -> None:
    """Follow the launcher's orders until the job has ended here, and end the process with the node's exit code."""
    agent = Agent()
    for number in (signal.SIGINT, signal.SIGHUP):  # what is meant for the ranks comes from the launcher
        signal.signal(number, lambda number, frame: None)  # not SIG_IGN, which the ranks would inherit
    signal.signal(signal.SIGTERM, lambda number, frame: agent.orders.put({"signal": number}))
    threading.Thread(target=agent.listen, daemon=True).start()
    while not {"end", "signal", "start"} & (order := agent.orders.get()).keys():
        if "examine" in order or "look" in order:  # a login shell may have begun a line
            os.write(1, b"\n" + json.dumps(agent.answer(order)).encode() + b"\n")
    agent.leave(agent.start(order["start"]) if "start" in order else 0)


if __name__ == "__main__":
    main()
