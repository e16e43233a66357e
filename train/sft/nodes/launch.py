"""Start a job on this machine or on many, watch it, and end as the training ends.

On one machine torch's elastic agent is called here; with NODE_IP_LIST the nodes are examined (preflight.py), and an
agent.py on each calls it. A failure on one node ends the job on all.

The exit code is that of the first process that failed (128 + n where signal n killed it), and 1 where a node or its
network is lost.
"""

import contextlib
import functools
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.messages import Refused
from sft.nodes.agent import KILL_SECONDS, run
from sft.nodes.preflight import Node, connect, examine, number_from, read_nodes, visit
from sft.processes import die_with_parent, free_port

FORWARDED = ("NCCL_", "GLOO_", "TORCH_", "HF_", "OMP_", "CUDA_", "DS_", "WANDB_", "PYTORCH_", "TRANSFORMERS_", "TQDM_")
FORWARDED += ("SHARP_", "SWANLAB_", "TRACKIO_", "MLFLOW_", "MODELSCOPE_", "TORCHINDUCTOR_", "TOKENIZERS_", "TRITON_")
FORWARDED += ("UCX_", "FI_", "MKL_", "CUBLAS_")
SEARCHED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")  # what a container sets is not there in a session of ssh
BEAT_SECONDS = 2
GRACE_SECONDS = 12  # for the other nodes' processes to end by themselves, once one has failed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def forwarded(env: dict[str, str]) -> dict[str, str]:
    """The variables that the ranks on every node get. Refused: a name in FORWARD=NAME,NAME that is not set."""
    further = [name.strip() for name in env.get("FORWARD", "").split(",") if name.strip()]
    for name in further:
        if name not in env or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            bare = name.partition("=")[0]
            raise Refused(f"FORWARD: {bare!r} is not the bare name of a variable that is set; export it")
    names = {name for name in env if name.startswith(FORWARDED) or name.lower().endswith("_proxy")}
    return {name: env[name] for name in env if name in names.union(SEARCHED, further)}


@dataclass
class Failure:
    """What failed. Of failures in the same second the heaviest one is named: a rank that ends with exit code 1 may
    have lost its peer."""

    what: str
    code: int
    weight: int = 0
    when: float = field(default_factory=time.monotonic)


class Watch:
    """A job that runs: what the nodes print and say, the first failure, the end."""

    def __init__(self, nodes: list[Node]):
        self.nodes, self.lock = nodes, threading.Lock()
        self.failures: list[Failure] = []
        self.signalled: int | None = None
        self.ending = False
        self.unfinished = nodes[0].host if len(nodes) == 1 else None  # whose line may be; one machine's ranks print

    def show(self, host: str, line: str) -> None:
        """Print a node's line with its address in front; the launcher's own, where `host` is empty."""
        with self.lock, contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            if self.unfinished not in (None, host):  # a progress bar
                sys.stdout.write("\n")
            sys.stdout.write(f"{host}: {line}" if host else line)
            sys.stdout.flush()
            self.unfinished = None if line.endswith("\n") else host

    def handle(self, node: Node, message: dict | None) -> None:
        """One message of a node, as agent.py lists them; None: its connection has ended."""
        if message is None:
            node.ended = True
            if not node.done:
                what = f"node {node.host}: its launcher or the connection to it ended"
                what += f": {node.complaint}" if node.complaint else ""
                self.failures.append(Failure(what, code=1, weight=2))
        elif "done" in message:
            node.done = True
        elif "late" in message:
            rank, state = message["late"]
            self.show("", f"rank {rank} on {node.host} did not end by itself: {state}\n")
        elif "failed" in message:
            rank, code, reason = message["failed"]
            name = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if code == -signal.SIGKILL and not self.ending and not self.signalled:
                name += " (out of memory? see dmesg there)"
            what = f"rank {rank} on {node.host}: {name}" + (f": {reason}" if reason else "")
            self.failures.append(Failure(what, 128 - code if code < 0 else code, int(code != 1)))

    def run(self, inbox: queue.Queue, orders: queue.SimpleQueue) -> None:
        """Until every node has ended: pass the orders on, end all once one has failed."""
        deadline = None
        while not all(node.ended for node in self.nodes):
            with contextlib.suppress(queue.Empty):
                self.handle(*inbox.get(timeout=0.1))
            with contextlib.suppress(queue.Empty):
                self.tell_all(orders.get_nowait())
            now = time.monotonic()
            if not self.ending and self.is_over(now):
                self.ending, deadline = True, now + KILL_SECONDS + 8
                if any(failure.code == 2 for failure in self.failures):
                    self.tell_all({"refused": True})
                for node in self.nodes:
                    node.hang_up()
            if self.ending and now > deadline:
                break
        for node in self.nodes[1:]:
            node.process.kill()  # one beyond reach ends by itself

    def tell_all(self, order: dict) -> None:
        for node in self.nodes:
            node.send(order)

    def is_over(self, now: float) -> bool:
        """Whether the nodes are to end: all are done, or one has failed and the others have had time for it."""
        if all(node.done or node.ended for node in self.nodes):
            return True
        if not self.failures:
            return False
        grace = GRACE_SECONDS
        if any(failure.code == 2 for failure in self.failures):
            grace = 3  # rank 0 has said why
        if any(failure.weight == 2 for failure in self.failures):
            grace = 0
        return now - self.failures[0].when > 1 + grace

    def verdict(self) -> int:
        """The exit code. Says what failed first, and where."""
        if not self.failures:
            return 0
        soon = [failure for failure in self.failures if failure.when - self.failures[0].when <= 1]
        first = max(soon, key=lambda failure: failure.weight)
        by = f"stopped by {signal.Signals(self.signalled).name}; " if self.signalled else ""
        by_hand = self.signalled == signal.SIGINT and first.code == 128 + signal.SIGINT and len(self.nodes) == 1
        if first.code not in (2, 3, 75) and not by_hand:  # of these the training has told
            self.show("", f"failed: {by}{first.what}\n")
        return first.code


def launch(command: list[str], given: dict[str, Any], log: Path | None) -> int:
    """Start the command on every node and wait for it. Returns the job's exit code; refuses nodes that are not ready.

    Args:
        command: the path of train.py and its flags.
        given: {flag: value} of what the flags say.
        log: where train.sh writes; the other nodes get files like it, with their address in the name.
    """
    nodes = read_nodes(dict(os.environ))
    several, watch = len(nodes) > 1, Watch(nodes)
    inbox: queue.Queue = queue.Queue()
    orders: queue.SimpleQueue = queue.SimpleQueue()
    port = number_from(dict(os.environ), "MASTER_PORT", 65535) or (29500 if several else free_port())
    if several:
        command = prepare(nodes, inbox, watch.show, command, port, given)

    def take(number: int, frame) -> None:
        watch.signalled = watch.signalled or number
        orders.put({"signal": number})

    for number in SIGNALS:
        signal.signal(number, take)
    job = {"command": command, "world_size": sum(node.slots for node in nodes), "nodes": len(nodes)}
    job |= {"master": [nodes[0].host if several else "127.0.0.1", port], "output": given.get("output_dir")}
    for node in nodes:
        own = job | {"node": node.number, "slots": node.slots, "first_rank": node.first_rank, "log": None}
        if not several:
            run(own, orders, functools.partial(watch.handle, node))
            break
        names = {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} - os.environ.keys()
        own["env"] = dict.fromkeys(names, node.facts["interface"])
        if log and node.number:
            own["log"] = f"{log.with_suffix('')}_{node.host.replace(':', '-')}{log.suffix}"
        node.send({"start": own})
    if several:
        watch.run(inbox, orders)
    for number in SIGNALS:  # should the terminal be held back
        signal.signal(number, signal.SIG_DFL)
    return watch.verdict()


def prepare(nodes, inbox, show, command: list[str], port: int, given: dict[str, Any]) -> list[str]:
    """Connect to the nodes and examine them. Returns the command with `--save_on_each_node` as their disks need it: on
    separate disks every node saves a checkpoint that is whole for its own ranks, on a shared one the chief does."""
    if given.get("hub_token"):
        raise Refused("--hub_token: would show in every node's process list; export HF_TOKEN instead")
    env = forwarded(dict(os.environ))
    for node in nodes:
        connect(node, inbox, show, env)
    threading.Thread(target=beat, args=(nodes,), daemon=True).start()
    each = given.get("save_on_each_node")
    try:
        shared = examine(nodes, inbox, os.path.dirname(os.path.abspath(command[0])), port, given)
        if shared and each:
            raise Refused("--save_on_each_node: the nodes share the output directory, and would write the same files")
    except Refused:  # said once nothing is left of it on any node
        for node in nodes:
            node.hang_up()
        for node in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.process.wait(timeout=5 if node.facts else 0)
            node.process.kill()
        raise
    if each is None and not shared:
        print("save_on_each_node = True (the nodes' output directories are separate)", flush=True)
        return [*command, "--save_on_each_node", "True"]
    if each is None and given.get("resume_from_checkpoint") is not None:  # a run that may have been on separate disks
        return [*command, "--save_on_each_node", "False"]
    return command


def beat(nodes: list[Node]) -> None:
    """Let every agent hear from the launcher."""
    while True:
        time.sleep(BEAT_SECONDS)
        for node in nodes:
            node.send({})


# ------------------------------------------------------------------------- until train.sh's own start calls launch()


def given_by(command: list[str]) -> dict[str, Any]:
    """{flag: value} of a command line: a list for what takes several, True or False for what is a yes or no."""
    found: dict[str, list[str]] = {}
    for i, word in enumerate(command):
        if word.startswith("--"):
            key, equals, value = word.partition("=")
            end = next((j for j in range(i + 1, len(command)) if command[j].startswith("--")), len(command))
            found[key[2:].replace("-", "_")] = [value] if equals else command[i + 1 : end]
    given: dict[str, Any] = {}
    for name, values in found.items():
        given[name] = values[-1] if values else True
        if name in ("train_data_file", "eval_data_file"):
            given[name] = values
        if name in ("use_cpu", "save_on_each_node"):
            given[name] = not values or values[0].lower() not in ("false", "0", "no", "n", "f")
    return given


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.stdout.reconfigure(errors="replace")
    try:
        if arguments == ["--visit"]:
            visit(read_nodes(dict(os.environ)))
            sys.exit(0)
        log = Path(arguments[1]) if arguments[:1] == ["--log"] else None
        if log:  # train.sh, which ends with us; killed, it cannot tell us
            die_with_parent(signal.SIGTERM)
            arguments = arguments[2:]
        code = launch(arguments, given_by(arguments), log)
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
