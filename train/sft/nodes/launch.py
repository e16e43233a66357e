"""Start a job on this machine or on many, watch it, and end as the training ends.

On one machine torch's elastic agent is called here; with NODE_IP_LIST the nodes are examined (preflight.py), and an
agent.py on each calls it. A failure on one node ends the job on all.

The exit code is that of the first process that failed (128 + n where signal n killed it), and 1 where a node or its
network is lost. With MAX_RESTARTS a job that failed is started again, and goes on from its newest whole checkpoint.
"""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.messages import Refused
from sft.nodes.agent import AGAIN_SECONDS, KILL_SECONDS, SILENCE_SECONDS, run
from sft.nodes.preflight import examine, number_from, read_nodes
from sft.nodes.ssh import Node
from sft.processes import forget_step, free_port, step_made
from sft.stopping import BEFORE_THE_FIRST_STEP, EXIT_STOPPED, SIGNALS, end_at_signals, not_ignored, write_line

FORWARDED = (
    "NCCL_", "GLOO_", "TORCH_", "HF_", "OMP_", "CUDA_", "DS_", "WANDB_", "PYTORCH_", "TRANSFORMERS_", "TQDM_",
    "SHARP_", "SWANLAB_", "TRACKIO_", "MLFLOW_", "MODELSCOPE_", "TORCHINDUCTOR_", "TOKENIZERS_", "TRITON_",
    "UCX_", "FI_", "MKL_", "CUBLAS_",
)  # fmt: skip
SEARCHED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")  # what a container sets is not there in a session of ssh
BEAT_SECONDS = 2
RESTART_SECONDS = 5  # until a job that failed is started again
LOST_NODE_SECONDS = SILENCE_SECONDS + 2 * KILL_SECONDS  # the same, where a node may still be ending its ranks
NOT_READY_SECONDS = 120  # the same, where the nodes were not ready: one that reboots takes minutes
GO_ON_LATER = "stopped on request. To go on, start the same command again with --auto_resume"
GRACE_SECONDS = 3  # for the other nodes' processes to end by themselves, once one has failed


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
    """What has failed on a node."""

    code: int
    what: str
    weight: int = 1  # 2: the node is lost; 0: a rank ended with exit code 1, and may have lost its peer
    when: float = field(default_factory=time.monotonic)


def launch(command: list[str], given: dict[str, Any], log: Path | None) -> int:
    """Run the command on every node, after a failure up to MAX_RESTARTS times again. Returns the job's exit code;
    refuses nodes that are not ready.

    Args:
        command: the path of train.py and its flags.
        given: {flag: value} of what the flags say.
        log: where train.sh writes; the other nodes get files like it, with their address in the name.
    """
    most, restarts, furthest = number_from(dict(os.environ), "MAX_RESTARTS", lowest=0) or 0, 0, -1
    failure, words, output = None, BEFORE_THE_FIRST_STEP, str(given.get("output_dir"))
    while True:
        refused = ""
        try:
            failure, signalled = run_once(command, given, log)
        except Refused as refusal:
            if failure is None:  # of the first start
                raise
            refused = f"restart {restarts} was refused: {' '.join(str(refusal).split())}"
            failure, signalled = Failure(failure.code, refused), False
        if failure is None:
            return 0
        step = step_made(output)
        if failure.code == EXIT_STOPPED and not step:
            write_line(words)
        if failure.code in (2, 3, EXIT_STOPPED):  # of these the training has told
            return failure.code
        stuck = restarts > 0 and not refused and (step or 0) <= furthest
        if signalled or stuck or restarts == most:
            why = "asked to stop; " if signalled else f"restart {restarts} made no new step; " if stuck else ""
            with contextlib.suppress(OSError):
                print(f"\nfailed: {why}{failure.what}", flush=True)  # a progress bar may be unfinished
            return failure.code
        restarts, furthest, how = restarts + 1, max(furthest, step or 0), "beginning again"
        if step is not None:  # else what is in the output directory is of an earlier run
            how, words = "going on from the newest whole checkpoint", GO_ON_LATER
            forget_step(output)
            if not given.get("auto_resume"):
                command, given = [*command, "--auto_resume", "True"], given | {"auto_resume": True}
        print(f"\nrestart {restarts} of {most}: {failure.what}; {how}", flush=True)
        end_at_signals(words)
        time.sleep(NOT_READY_SECONDS if refused else LOST_NODE_SECONDS if failure.weight == 2 else RESTART_SECONDS)


def run_once(command: list[str], given: dict[str, Any], log: Path | None) -> tuple[Failure | None, bool]:
    """Start the command on every node and wait for it. Returns what failed first, None where all went well, and
    whether a signal has come."""
    nodes = read_nodes(dict(os.environ))
    several = len(nodes) > 1
    port = number_from(dict(os.environ), "MASTER_PORT", 65535) or (29500 if several else free_port())
    if several:
        command = prepare(nodes, command, port, given)
    signalled: list[int] = []
    orders: queue.SimpleQueue = queue.SimpleQueue()

    def take(number: int, frame: object) -> None:
        if not signalled:
            write_line(f"stopping on request. To stop at once, send it again after {AGAIN_SECONDS} s")
        signalled.append(number)
        orders.put({"signal": number})

    before = {number: signal.getsignal(number) for number in not_ignored(*SIGNALS)}
    for number in before:
        signal.signal(number, take)
    job = {"command": command, "world_size": sum(node.slots for node in nodes), "nodes": len(nodes)}
    job["master"] = [nodes[0].host if several else "127.0.0.1", port]
    parts = [job | {name: getattr(node, name) for name in ("number", "host", "slots", "first_rank")} for node in nodes]
    if several:
        for node, part in zip(nodes, parts, strict=True):
            names = {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} - os.environ.keys()
            part |= {"env": dict.fromkeys(names, node.facts["interface"]), "log": None}
            if log and node.number:
                part["log"] = f"{log.with_suffix('')}_{node.host.replace(':', '-')}{log.suffix}"
            node.send({"start": part})
        failure = watch(nodes, orders)
        if failure and failure.code == EXIT_STOPPED:
            print(nodes[0].go_on, end="", flush=True)  # once more, without the address in front
    else:
        code, what = run(parts[0], orders)
        failure = Failure(code, what) if code else None
    for number, handler in before.items():
        signal.signal(number, handler)
    return failure, bool(signalled)


def prepare(nodes: list[Node], command: list[str], port: int, given: dict[str, Any]) -> list[str]:
    """Connect to the nodes and examine them. Returns the command with `--save_on_each_node` as their disks need it: on
    separate disks every node saves a checkpoint that is whole for its own ranks, on a shared one the chief does."""
    if given.get("hub_token"):
        raise Refused("--hub_token: would show in every node's process list; export HF_TOKEN instead")
    env = forwarded(dict(os.environ))
    for node in nodes:
        node.connect(env)
    threading.Thread(target=beat, args=(nodes,), daemon=True).start()
    each = given.get("save_on_each_node")
    try:
        shared = examine(nodes, os.path.dirname(os.path.abspath(command[0])), port, given)
        if shared and each:
            raise Refused("--save_on_each_node: the nodes share the output directory, and would write the same files")
        if given.setdefault("shared", shared) != shared:  # at a restart
            raise Refused(
                "whether the nodes share OUTPUT_DIR has changed since the start: is it mounted on all of them?"
            )
    except BaseException:  # reported once nothing is left of it on any node
        end(nodes, 5)
        raise
    goes_on = given.get("auto_resume") or given.get("resume_from_checkpoint") is not None
    if each is not None or shared and not goes_on:
        return command
    if not shared:
        print("save_on_each_node = True (the nodes' output directories are separate)", flush=True)
    return [*command, "--save_on_each_node", str(not shared)]  # one that goes on may have begun on other disks


def beat(nodes: list[Node]) -> None:
    """Let every agent hear from the launcher."""
    while True:
        time.sleep(BEAT_SECONDS)
        for node in nodes:
            node.send({})


def watch(nodes: list[Node], orders: queue.SimpleQueue) -> Failure | None:
    """Show what the nodes print and pass the orders on, until all have ended; one that fails ends the others. Returns
    what failed first; of what failed in the same second, the heaviest."""
    readers = [threading.Thread(target=node.show, daemon=True) for node in nodes]
    for reader in readers:
        reader.start()
    running, failures = list(nodes), []
    while running:
        with contextlib.suppress(queue.Empty):
            order = orders.get(timeout=0.1)
            for node in nodes:
                node.send(order)
        for node in [node for node in running if node.process.poll() is not None]:
            running.remove(node)
            readers[node.number].join(timeout=SILENCE_SECONDS)
            failures += [failure] if (failure := failure_of(node)) else []
        lost = any(failure.weight == 2 for failure in failures)
        if failures and time.monotonic() - failures[0].when > (1 if lost else 1 + GRACE_SECONDS):
            if any(failure.code == 2 for failure in failures):
                for node in nodes:
                    node.send({"refused": True})
            end(nodes, KILL_SECONDS + 8)
            break
    for node in running:
        readers[node.number].join(timeout=2)
    soon = [failure for failure in failures if failure.when - failures[0].when <= 1]
    return max(soon, key=lambda failure: failure.weight, default=None)


def failure_of(node: Node) -> Failure | None:
    """What failed on a node whose agent has ended: by the agent's last words, or by ssh's."""
    said, code = node.last_words(), node.process.returncode
    if not said.startswith('{"failure": '):
        what = f"node {node.host}: its launcher or the connection to it ended"
        return Failure(1, f"{what}: {said}" if said else what, weight=2)
    what = json.loads(said)["failure"]
    if node.error and code == 1:
        what += f": {node.error}"
    return Failure(code, what, weight=int(code != 1)) if what else None


def end(nodes: list[Node], seconds: float) -> None:
    """Close the connections and wait until the agents have ended, but for one beyond reach, which ends by itself."""
    deadline = time.monotonic() + seconds
    for node in nodes:
        node.hang_up()
    for node in nodes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(timeout=max(0, deadline - time.monotonic()))
        if node.number > 0:
            node.process.kill()
