"""The other machines of a job: who takes part, how ssh reaches them, whether they are ready.

`NODE_IP_LIST=ip:slots,…` names them, and agent.py examines each before anything is loaded. Refused (exit code 2):
variables that contradict each other, with both values; an entry that is no host; a host whose key ssh does not know
where nobody can answer its question; nodes that are not ready, a line each, with the reason and what to do. Nothing
here switches host key checking off. Standard library only.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sft.messages import Refused
from sft.nodes.examine import GPU_SECONDS, number_of_gpus
from sft.nodes.ssh import LONGEST_SECONDS, Node, address_of, by_hand, ssh_command

REQUIREMENTS = Path(__file__).resolve().parents[3] / "requirements.txt"
COMPARED = ("model_name_or_path", "tokenizer_name_or_path", "train_data_file", "eval_data_file", "deepspeed")
SHM_BYTES = 1 << 30
UNKNOWN = "Host key verification failed"
NO_ANSWER = f"nvidia-smi -L fails or takes more than {GPU_SECONDS} s"


# ------------------------------------------------------------------------------------------------ who takes part


def read_nodes(env: dict[str, str]) -> list[Node]:
    """The nodes, the chief first, with their ranks. Raises Refused for what is malformed or contradicts itself."""
    name = next((name for name in ("NODE_IP_LIST", "IP_LIST") if env.get(name)), "")
    if env.get("IP_LIST") and env[name] != env["IP_LIST"]:
        raise Refused(f"NODE_IP_LIST={env[name]} and IP_LIST={env['IP_LIST']}: two names of one list; set one")
    own = number_from(env, "HOST_GPU_NUM")
    number_from(env, "SSH_PORT", 65535)
    entries = [entry.strip() for entry in env[name].strip(" ,").split(",")] if name else []
    nodes = [read_entry(entry, name, env) for entry in entries] or [Node("localhost", own or 0)]
    if not all(node.slots for node in nodes):  # nvidia-smi takes seconds: asked only where it is needed, once
        default = own or number_of_gpus(env)
        if default is None:
            raise Refused(f"{NO_ANSWER} here; run: nvidia-smi -pm 1, or set HOST_GPU_NUM (in NODE_IP_LIST ip:slots)")
        for node in nodes:
            node.slots = node.slots or default or 1
    hosts = [node.host for node in nodes]
    chief = name and env.get("LOCAL_IP") or hosts[0]
    if twice := [host for host in hosts if hosts.count(host) > 1]:
        raise Refused(f"{name}={env[name]}: {twice[0]} is listed twice")
    if chief not in hosts:
        raise Refused(f"LOCAL_IP={chief} is not in {name}={env[name]}")
    nodes.sort(key=lambda node: node.host != chief)
    if own and nodes[0].slots != own:
        raise Refused(f"HOST_GPU_NUM={own}, but {name} gives this machine {chief}:{nodes[0].slots}; correct one")
    ranks = 0
    for number, node in enumerate(nodes):
        node.number, node.first_rank = number, ranks
        ranks += node.slots
    where = f"{name}={env[name]}" if name else f"without NODE_IP_LIST and with HOST_GPU_NUM={nodes[0].slots}"
    for variable, value, what in (("NODES", len(nodes), "machines"), ("NODE_NUM", ranks, "processes in all")):
        given = number_from(env, variable)
        if given and given != value:
            raise Refused(f"{variable}={given}, but {where} there are {value} {what}; correct or unset {variable}")
    return nodes


def read_entry(entry: str, name: str, env: dict[str, str]) -> Node:
    """One `host:slots` of the list, 0 slots where it does not say; an IPv6 address is in brackets."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?::([1-9][0-9]*))?", entry)
    if match is None:
        rule = "each entry is host:slots, e.g. 10.0.0.2:8; the ssh port goes into SSH_PORT"
        raise Refused(f"{name}: {entry!r}: {what_is_odd(entry) or rule}")
    slots = int(match[2] or 0)
    if slots > 1024 or match[2] and match[2] == env.get("SSH_PORT"):
        raise Refused(f"{name}: {entry}: {slots} slots? That looks like a port: the ssh port goes into SSH_PORT")
    return Node(match[1].strip("[]"), slots)


def number_from(env: dict[str, str], name: str, highest: int = 1 << 20, lowest: int = 1) -> int | None:
    """A variable's number, None where it is empty; refuses one that is not from `lowest` to `highest`."""
    if not env.get(name):
        return None
    if not re.fullmatch(r"[0-9]{1,7}", env[name]) or not lowest <= int(env[name]) <= highest:
        rule = f"must be a number from {lowest} to {highest}"
        raise Refused(f"{name}={env[name]}: {what_is_odd(env[name]) or rule}")
    return int(env[name])


def what_is_odd(value: str) -> str:
    """What a value looks wrong by, with what to do; nothing where that is not known."""
    plain = unicodedata.normalize("NFKC", value)
    if plain != value:
        return f"has full-width characters; write {plain}"
    if re.search(r"\$\{?\w|\{\w+\}|<\w+>", value):
        return "a variable in it was not replaced; write its value"
    return ""


# ------------------------------------------------------------------------------------------------------------- ssh


def in_the_foreground() -> bool:
    """Whether somebody at a terminal can answer this process."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # no terminal, or another session's
        return False


def visit(nodes: list[Node]) -> None:
    """Where somebody can answer, connect once to each host that ssh does not know, so that it asks its question."""
    if len(nodes) > 1 and shutil.which("ssh") is None:
        raise Refused("NODE_IP_LIST: there is no ssh on this machine: apt-get install openssh-client")
    if not in_the_foreground():
        return
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.DEVNULL) | {"stderr": subprocess.PIPE}
    hosts = [node.host for node in nodes[1:]]
    attempts = [subprocess.Popen([*ssh_command(host, "-oBatchMode=yes"), "true"], **pipes) for host in hosts]
    for host, attempt in zip(hosts, attempts, strict=True):
        if UNKNOWN.encode() in attempt.communicate()[1]:
            subprocess.run([*ssh_command(host), "true"], stdout=subprocess.DEVNULL)


# --------------------------------------------------------------------------------------------------------- examine


def examine(nodes: list[Node], code: str, port: int, given: dict[str, Any]) -> bool:
    """Ask all nodes at once, print a line each. Returns whether they share the output directory; refuses nodes that
    are not ready.

    `code` is the folder of train.py, `port` where the ranks will meet, `given` as in launch.
    """
    output, job = given.get("output_dir"), secrets.token_hex(4)
    resumed = os.path.normpath(given.get("resume_from_checkpoint") or "")
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", os.path.basename(resumed))  # else the ranks choose one
    paths = [given.get(name) or [] for name in COMPARED]
    wanted = {
        "cwd": os.getcwd(),
        "code": code,
        "paths": [path for some in paths for path in ([some] if isinstance(some, str) else some)],
        "resumed": [os.path.join(resumed, "trainer_state.json")] if is_checkpoint else [],
        "interface": os.environ.get("NET_IFNAME"),
    }
    markers = [os.path.join(output, f".node-{job}-{node.number}") if output else None for node in nodes]
    chief = (nodes[0].host, port)

    def ask(node: Node) -> None:
        own = {"marker": markers[node.number], "towards": chief, "reach": chief}
        if node.number == 0:
            own |= {"towards": (address_of(nodes[1].host), port), "reach": None}
        node.facts = node.ask({"examine": wanted | own})

    pool = ThreadPoolExecutor(len(nodes))
    with listen_on(*chief):
        list(pool.map(ask, nodes))
    gpus = any(node.facts.get("gpus", 0) != 0 for node in nodes) and not given.get("use_cpu")
    problems = {node.host: problem_of(node, nodes[0], port, code, gpus) for node in nodes}
    for node in nodes:
        if problems[node.host] is None:
            print(f"{node.host}: ready ({node.slots} ranks, interface {node.facts['interface']})", flush=True)
    lines = [f"{host}: {problem}" for host, problem in problems.items() if problem]
    if lines:
        raise Refused("\n".join([f"{len(lines)} of {len(nodes)} nodes are not ready:", *lines]))
    if output is None:
        return False
    seen = [answer.get("seen", 0) for answer in pool.map(lambda node: node.ask({"look": markers}), nodes)]
    if set(seen) not in ({1}, {len(nodes)}):
        found = ", ".join(f"{node.host} sees {seen[node.number]} of {len(nodes)}" for node in nodes)
        raise Refused(f"OUTPUT_DIR={output}: some nodes share it and others do not ({found}): all, or none")
    return seen[0] == len(nodes)


def listen_on(host: str, port: int) -> socket.socket:
    """A socket where the ranks will meet, so that the nodes can try to connect."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        fix = "choose another" if taken else "set LOCAL_IP to this machine's address"
        what = str(error.strerror).partition(" (while")[0]
        raise Refused(f"MASTER_PORT={port} on {host}: {what}; {fix}") from None


def problem_of(node: Node, chief: Node, port: int, code: str, gpus: bool) -> str | None:
    """The first thing that keeps a node from taking part, with what to do. `gpus`: the job runs on GPUs."""
    facts, here = node.facts, chief.facts
    if not facts:
        return why_no_answer(node)
    if "error" in facts:
        return f"cannot be examined: {facts['error']}"
    if "cwd" not in here:
        return None  # the chief's own problem is reported
    if not facts["cwd"]:
        return f"has no directory {os.getcwd()}, where this was started; make it there, or start from {code}"
    if differ := differing(here["code"], facts["code"]):
        return f"other code than on the chief ({differ}); make {code} there the same as here"
    if differ := differing(here["versions"], facts["versions"]):
        fix = f"{sys.executable} -m pip install -r {REQUIREMENTS}"
        return f"other versions than on the chief ({differ}); run there: {fix}"
    for path, files in here["paths"].items():
        there = facts["paths"][path]
        if files is not None and there is None:
            return f"{path} is missing; copy it there"
        if files is not None and any(there.get(name) != size for name, size in files.items()):
            return f"{path} differs from the chief's ({differing(files, there)}); copy it there"
    for file in facts["lacks"]:
        how = "save with --save_on_each_node, or copy it" if node.number else "is it the right path?"
        return f"--resume_from_checkpoint: there is no {file}; {how}"
    if gpus and facts["gpus"] is None:
        return f"{NO_ANSWER} there; run there: nvidia-smi -pm 1"
    if gpus and facts["gpus"] < node.slots:
        return f"{node.slots} slots, but {facts['gpus']} GPUs are visible there (nvidia-smi -L); correct NODE_IP_LIST"
    if gpus and facts["shm"] < SHM_BYTES:
        return f"/dev/shm has {facts['shm'] >> 20} MB and NCCL needs 1 GB: docker run --shm-size 16g"
    if facts["interface"] not in facts["interfaces"]:
        what = facts["interface"] or f"leads to {chief.host}"
        return f"no network interface {what}; set NET_IFNAME to one of: {', '.join(facts['interfaces'])}"
    if facts["reach"]:
        return f"does not reach {chief.host}:{port} ({facts['reach']}); open the port, or choose another MASTER_PORT"
    if facts["output"]:
        return f"OUTPUT_DIR cannot be written there ({facts['output']}); make room, or choose another"
    return None


def differing(here: dict, there: dict) -> str:
    """The keys of which two tables say different things, with both values where they are short, at most four."""
    names = sorted(name for name in here | there if here.get(name) != there.get(name))
    short = all(len(str(value)) < 16 for value in [*here.values(), *there.values()])
    said = [f"{name} {there.get(name)}, here {here.get(name)}" if short else name for name in names]
    return ", ".join(said[:4]) + (f" and {len(said) - 4} more" if len(said) > 4 else "")


def why_no_answer(node: Node) -> str:
    """What ssh said, with what to do."""
    with contextlib.suppress(subprocess.TimeoutExpired):  # its end of the connection is closed
        node.process.wait(timeout=2)
    said = node.last_words()
    fix = f"try: {by_hand(node.host)} true"
    if node.process.poll() == -signal.SIGKILL:
        return f"no answer within {LONGEST_SECONDS} s; {fix}"
    if re.search("refused|timed out|closed by|banner", said):
        port = os.environ.get("SSH_PORT") or "22, or what ssh's configuration says"
        fix = f"is sshd there on port {port}? SSH_PORT sets another; {fix}"
    if UNKNOWN in said:
        fix = f"ssh does not know this host, or its key has changed; run once: {by_hand(node.host)} true"
    if "Permission denied (" in said:
        fix = f"run: ssh-copy-id {by_hand(node.host).removeprefix('ssh ')}"
    if f"{sys.executable}: " in said:
        fix = f"{sys.executable} has to be there too: install the same environment at the same path"
    return f"ssh: {said.removeprefix('ssh: ') or 'connection closed without output'}; {fix}"
