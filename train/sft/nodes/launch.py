"""Start a job on this machine or on many, watch it, and end as the training ends.

    python -m sft.nodes.launch [--log FILE] train.py --flag value …   HOST_GPU_NUM processes here, or NODE_IP_LIST=…
    python -m sft.nodes.launch --visit                                let ssh ask about hosts that it does not know yet

train.sh runs both. With NODE_IP_LIST the nodes are examined all at once (preflight.py), started, watched by a beat in
both directions (agent.py), and ended together. The README says why this is neither torchrun nor DeepSpeed's launcher.

The exit code is that of the first process that failed (128 + n where signal n killed it), and 1 where a node or its
network is lost. Standard library only: it starts at once.
"""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sft.messages import Refused
from sft.nodes.agent import BEAT_SECONDS, KILL_SECONDS, SILENCE_SECONDS
from sft.nodes.preflight import Node, connect, examine, flag, is_on, number_from, read_nodes, visit
from sft.processes import die_with_parent, free_port

FORWARDED = ("NCCL_", "GLOO_", "TORCH_", "HF_", "OMP_", "CUDA_", "DS_", "WANDB_", "PYTORCH_", "TRANSFORMERS_", "TQDM_")
FORWARDED += ("SHARP_", "SWANLAB_", "TRACKIO_", "MLFLOW_", "MODELSCOPE_", "TORCHINDUCTOR_", "TOKENIZERS_", "TRITON_")
FORWARDED += ("UCX_", "FI_", "MKL_", "CUBLAS_")
SEARCHED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")  # what a container sets is not there in a session of ssh
GRACE_SECONDS = 12  # for the other processes to end by themselves, once one has failed


def forwarded(env: dict[str, str]) -> dict[str, str]:
    """The variables that the ranks on every node get. Refused: a name in FORWARD=NAME,NAME that is not set."""
    further = [name.strip() for name in env.get("FORWARD", "").split(",") if name.strip()]
    for name in further:
        if name not in env or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            bare = name.partition("=")[0]
            raise Refused(f"FORWARD: {bare!r} is not the bare name of a variable that is set; export it")
    names = {name for name in env if name.startswith(FORWARDED) or name.lower().endswith("_proxy")}
    return {name: env[name] for name in env if name in names.union(SEARCHED, further)}


# ------------------------------------------------------------------------------------------------------------ watch


class Printer:
    """The nodes' output, each line with its node's address in front where there are several, from a thread of its
    own: a terminal that is held back holds no beat back."""

    def __init__(self, prefixed: bool):
        self.prefixed, self.queue = prefixed, queue.Queue()
        self.owner, self.at_start = None, True
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def put(self, host: str | None, text: str) -> None:
        """`host` None: the launcher's own line."""
        self.queue.put((host, text))

    def run(self) -> None:
        while (item := self.queue.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
                sys.stdout.write(self.shown(*item))
                sys.stdout.flush()

    def shown(self, host: str | None, text: str) -> str:
        """The text as it is printed: a line that another node left unfinished is ended, each line begins with its
        node's address, a carriage return begins a line too."""
        out = []
        if self.owner not in (None, host):  # in the middle of another's line, a progress bar mostly
            out.append("\n")
            self.owner, self.at_start = None, True
        for part in re.findall(r"[\r\n]|[^\r\n]+", text):
            if part not in "\r\n":
                if self.at_start and self.prefixed and host is not None:
                    out.append(f"{host}: ")
                self.owner = host
            elif part == "\n":
                self.owner = None
            self.at_start = part in "\r\n"
            out.append(part)
        return "".join(out)

    def close(self, given_up: Callable[[], object]) -> None:
        """Wait until all is shown, or until it is given up."""
        self.queue.put(None)
        while self.thread.is_alive() and not given_up():
            self.thread.join(timeout=0.2)


def part(nodes: list[Node]) -> None:
    """Close the connections, and wait until the nodes are gone, but for one beyond reach, which ends by itself."""
    for node in nodes:
        node.hang_up()
    deadline = time.monotonic() + 5
    for node in nodes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(timeout=max(0, deadline - time.monotonic()))
        if node.number:
            node.process.kill()


@dataclass
class Failure:
    """What failed. Of failures in the same second the heaviest one is told of: a rank that ends with exit code 1 may
    have lost its peer."""

    what: str
    code: int
    weight: int = 0
    when: float = field(default_factory=time.monotonic)


class Watch:
    """A job that runs: what the nodes say, the first failure, the end."""

    def __init__(self, nodes: list[Node], inbox: queue.Queue, printer: Printer):
        self.nodes, self.inbox, self.printer = nodes, inbox, printer
        self.failures: list[Failure] = []
        self.signals, self.signalled, self.signalled_at = [], None, 0.0
        self.ending, self.late = False, set()

    def pass_on(self, number: int) -> None:
        """A signal to the launcher is one to every rank; a second one, later than what signals every process of a
        container at once, ends the job."""
        now = time.monotonic()
        if self.signalled and now - self.signalled_at > 2:
            self.end(0)
        elif not self.signalled:
            self.signalled, self.signalled_at = number, now
            for node in self.nodes:
                node.send(signal=number)

    def end(self, grace: float, refused: bool = False) -> None:
        """Every node ends its ranks after `grace` seconds. Where the job was `refused`, it leaves nothing behind."""
        self.ending, self.deadline = True, time.monotonic() + grace + KILL_SECONDS + 8
        for node in self.nodes:
            node.send(end=grace, refused=refused)

    def lost(self, node: Node, why: str) -> None:
        """Nothing more is expected of a node."""
        node.done = True
        self.failures.append(Failure(f"node {node.host}: {why}", code=1, weight=2))

    def handle(self, node: Node, message: dict | None) -> None:
        """One message of a node, as agent.py lists them; None: its connection has ended."""
        node.heard = time.monotonic()
        if message is None:
            if not node.done:
                why = f": {node.complaints[-1]}" if node.complaints else ""
                self.lost(node, f"its launcher or the connection to it ended{why}")
        elif "output" in message:
            self.printer.put(node.host, message["output"])
        elif "done" in message:
            node.done = True
        elif "late" in message:
            rank, state = message["late"]
            if rank not in self.late and state != "gone":
                self.late.add(rank)
                self.printer.put(None, f"rank {rank} on {node.host} did not end by itself: {state}\n")
        elif "ended" in message:
            rank, code, reason = message["ended"]
            if code:
                name = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                if code == -signal.SIGKILL and not self.ending:
                    name += " (out of memory? see dmesg there)"
                reason = f": {reason}" if reason else ""
                code = 128 - code if code < 0 else code
                self.failures.append(Failure(f"rank {rank} on {node.host}: {name}{reason}", code, int(code != 1)))

    def run(self) -> int:
        """Until every node is done. Returns the exit code."""
        beat = 0.0
        while not all(node.done for node in self.nodes):
            with contextlib.suppress(queue.Empty):
                self.handle(*self.inbox.get(timeout=0.1))
            while self.signals:
                self.pass_on(self.signals.pop(0))
            now = time.monotonic()
            if now - beat > BEAT_SECONDS:
                beat = now
                for node in self.nodes:
                    node.send(beat=True)
            for node in self.nodes:
                if not node.done and now - node.heard > SILENCE_SECONDS:
                    self.lost(node, f"no sign of it for {SILENCE_SECONDS} s")
            if self.failures and not self.ending and now - self.failures[0].when > 1:
                lost = any(failure.weight == 2 for failure in self.failures)
                refused = any(failure.code == 2 for failure in self.failures)  # and rank 0 has said why
                self.end(0 if lost else 3 if refused else GRACE_SECONDS, refused)
            if self.ending and now > self.deadline:
                break
        part(self.nodes)
        return self.verdict()

    def verdict(self) -> int:
        """Say what failed first, and where."""
        if not self.failures:
            return 0
        soon = [failure for failure in self.failures if failure.when - self.failures[0].when <= 1]
        first = max(soon, key=lambda failure: failure.weight)
        by = f"stopped by {signal.Signals(self.signalled).name}; " if self.signalled else ""
        by_hand = self.signalled == signal.SIGINT and first.code == 128 + signal.SIGINT and len(self.nodes) == 1
        if first.code not in (2, 3, 75) and not by_hand:  # of these the training has told
            self.printer.put(None, f"failed: {by}{first.what}\n")
        return first.code


def main(command: list[str], log: str | None) -> int:
    """Start the command on every node and wait for it."""
    nodes, env = read_nodes(dict(os.environ)), {}
    several, inbox = len(nodes) > 1, queue.Queue()
    master = nodes[0].host if several else "127.0.0.1"
    port = number_from(dict(os.environ), "MASTER_PORT", 65535) or (29500 if several else free_port())
    if several:
        if flag(command, "hub_token"):
            raise Refused("--hub_token: would stand in every node's process list; export HF_TOKEN instead")
        env = forwarded(dict(os.environ))
    for node in nodes:
        connect(node, inbox)
    if several:
        try:
            command = check_saving(command, examine(nodes, inbox, command, port, env))
        except Refused:  # once nothing is left of it on any node
            part([node for node in nodes if node.facts])
            raise
    watch = Watch(nodes, inbox, Printer(several))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup
            continue
        signal.signal(number, lambda number, frame: watch.signals.append(number))
    world_size = sum(node.slots for node in nodes)
    for node in nodes:
        network = {}
        if several:
            names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
            network = {name: node.facts["interface"] for name in names if name not in env}
        job = {"command": command, "env": network, "slots": node.slots, "first_rank": node.first_rank}
        job |= {"node": node.number, "world_size": world_size, "master": [master, port]}
        own_log = re.sub(r"(\.[^./]*)?$", rf"_{node.host.replace(':', '-')}\1", log, count=1) if log else None
        node.send(start=job | {"log": own_log if node.number else None})
    code = watch.run()
    watch.printer.close(given_up=lambda: watch.signals)
    return code


def check_saving(command: list[str], shared: bool) -> list[str]:
    """On separate disks every node saves a checkpoint that is whole for its own ranks; on a shared one the chief
    does."""
    if shared and is_on(command, "save_on_each_node"):
        raise Refused("--save_on_each_node: the nodes share the output directory, and would write the same files")
    if flag(command, "save_on_each_node") is not None:
        return command
    if shared:  # a run that goes on may have been on separate disks
        return [*command, *["--save_on_each_node", "False"] * (flag(command, "resume_from_checkpoint") is not None)]
    print("save_on_each_node = True (the nodes' output directories are separate)", flush=True)
    return [*command, "--save_on_each_node", "True"]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.stdout.reconfigure(errors="replace")
    try:
        if arguments == ["--visit"]:
            visit(read_nodes(dict(os.environ)))
            sys.exit(0)
        log = arguments[1] if arguments[:1] == ["--log"] else None
        if log:  # train.sh, which ends with us; killed, it cannot tell us
            die_with_parent(signal.SIGTERM)
        code = main(arguments[2:] if log else arguments, log)
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.exit(code)
