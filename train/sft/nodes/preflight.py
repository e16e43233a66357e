"""The other machines of a job: who takes part, how they are reached, whether they are ready.

`NODE_IP_LIST=ip:slots,…` names them, ssh reaches them, from the chief to them alone, and agent.py examines each before
anything is loaded. Refused (exit code 2): variables that contradict one another, with both values; an entry that is no
host; a host whose key ssh does not know where nobody can answer its question; nodes that are not ready, a line each,
with the reason and what mends it. Nothing here switches host key checking off. Standard library only.
"""

import contextlib
import os
import queue
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from json import dumps, loads
from pathlib import Path

from sft.messages import Refused
from sft.nodes.agent import GPU_SECONDS, number_of_gpus
from sft.processes import die_with_parent

AGENT = Path(__file__).with_name("agent.py")
REQUIREMENTS = Path(__file__).resolve().parents[3] / "requirements.txt"
COMPARED = ("model_name_or_path", "tokenizer_name_or_path", "train_data_file", "eval_data_file", "deepspeed")
EXAMINE_SECONDS = 12  # without a sign of a node while it examines itself
LONGEST_SECONDS = 75  # until it has done so: nvidia-smi may take a minute
SHM_BYTES = 1 << 30
BOOTSTRAP = "import sys; exec(compile(sys.stdin.buffer.read(int(sys.argv[1])), 'agent.py', 'exec'))"
NO_ANSWER = f"nvidia-smi -L fails or takes more than {GPU_SECONDS} s"


# ------------------------------------------------------------------------------------------------ who takes part


@dataclass
class Node:
    """A machine of the job, and the connection to it."""

    host: str
    slots: int
    number: int = 0  # 0 is the chief
    first_rank: int = 0
    process: subprocess.Popen | None = None
    heard: float = 0.0
    done: bool = False
    facts: dict = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)  # lines of ssh's stderr
    outbox: queue.Queue = field(default_factory=queue.Queue)
    threads: list[threading.Thread] = field(default_factory=list)

    def send(self, **message) -> None:
        """Say something to agent.py there; in vain where the connection is gone. Never waits."""
        self.outbox.put(dumps(message).encode() + b"\n")

    def hang_up(self) -> None:
        """Close our end of the connection, once all is said."""
        self.outbox.put(None)


def read_nodes(env: dict[str, str]) -> list[Node]:
    """The nodes, the chief first, with their ranks. Raises Refused for what is malformed or contradicts itself."""
    name = next((name for name in ("NODE_IP_LIST", "IP_LIST") if env.get(name)), None)
    if env.get("IP_LIST") and (env.get("NODE_IP_LIST") or env["IP_LIST"]) != env["IP_LIST"]:
        raise Refused(
            f"NODE_IP_LIST={env['NODE_IP_LIST']} and IP_LIST={env['IP_LIST']}: two names of one list; set one"
        )
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
    twice = next((host for host in hosts if hosts.count(host) > 1), None)
    if twice:
        raise Refused(f"{name}={env[name]}: {twice} stands there twice")
    chief = name and env.get("LOCAL_IP") or hosts[0]
    if chief not in hosts:
        raise Refused(f"LOCAL_IP={chief} is not in {name}={env[name]}")
    nodes.sort(key=lambda node: node.host != chief)
    if own and nodes[0].slots != own:
        raise Refused(f"HOST_GPU_NUM={own}, but {name} gives this machine {chief}:{nodes[0].slots}; correct one")
    where = f"{name}={env[name]}" if name else f"without NODE_IP_LIST and with HOST_GPU_NUM={nodes[0].slots}"
    for variable, value in (("NODES", len(nodes)), ("NODE_NUM", sum(node.slots for node in nodes))):
        given = number_from(env, variable)
        if given and given != value:
            what = "machines" if variable == "NODES" else "processes in all"
            raise Refused(
                f"{variable}={given}, but {where} there are {value} {what}; correct one or leave {variable} out"
            )
    for number, node in enumerate(nodes):
        node.number, node.first_rank = number, sum(before.slots for before in nodes[:number])
    return nodes


def read_entry(entry: str, name: str, env: dict[str, str]) -> Node:
    """One `host:slots` of the list, 0 slots where it does not say; an IPv6 address stands in brackets."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?::([1-9][0-9]*))?", entry)
    if match is None:
        raise Refused(f"{name}: {entry!r}: each entry is host:slots, e.g. 10.0.0.2:8; the ssh port goes into SSH_PORT")
    slots = int(match[2] or 0)
    if slots > 1024 or match[2] and match[2] == env.get("SSH_PORT"):
        raise Refused(f"{name}: {entry}: {slots} slots? That looks like a port: the ssh port goes into SSH_PORT")
    return Node(match[1].strip("[]"), slots)


def number_from(env: dict[str, str], name: str, highest: int = 1 << 20) -> int | None:
    """A variable's number from 1, None where it is empty."""
    if not env.get(name):
        return None
    if not re.fullmatch(r"[0-9]{1,7}", env[name]) or not 1 <= int(env[name]) <= highest:
        raise Refused(f"{name}={env[name]}: must be a number from 1" + (f" to {highest}" if highest < 1 << 20 else ""))
    return int(env[name])


def flag(command: list[str], name: str) -> list[str] | None:
    """The values that a command line gives a flag, the last time that it stands there; None where it does not."""
    values = None
    for i, word in enumerate(command):
        key, equals, value = word.partition("=")
        if key.replace("-", "_") == f"__{name}":
            end = next((j for j in range(i + 1, len(command)) if command[j].startswith("--")), len(command))
            values = [value] if equals else command[i + 1 : end]
    return values


def is_on(command: list[str], name: str) -> bool:
    """Whether a command line sets a flag that is a yes or no."""
    values = flag(command, name)
    return values is not None and (not values or values[0].lower() not in ("false", "0", "no", "n", "f"))


# ------------------------------------------------------------------------------------------------------------- ssh


def ssh_command(host: str, *options: str) -> list[str]:
    """ssh to a host. Its own configuration says what these options do not; host keys are checked as it says."""
    port = ["-p", os.environ["SSH_PORT"]] if os.environ.get("SSH_PORT") else []
    own = [word for option in options for word in ("-o", option)]
    return ["ssh", "-o", "PasswordAuthentication=no", "-o", "ConnectTimeout=8", *own, *port]


def by_hand(host: str) -> str:
    """The ssh command to type for a host."""
    port = f"-p {os.environ['SSH_PORT']} " if os.environ.get("SSH_PORT") else ""
    return f"ssh {port}{host}"


def looked_up(host: str) -> dict[str, str]:
    """What ssh's configuration says of a host: hostname, port, userknownhostsfile…"""
    shown = subprocess.run([*ssh_command(host), "-G", "--", host], capture_output=True, text=True).stdout
    return {"hostname": host, "port": "22"} | dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)


def known_as(config: dict[str, str]) -> str:
    """The name under which ssh keeps a host's key."""
    address, port = config["hostname"], config["port"]
    return config.get("hostkeyalias") or (address if port == "22" else f"[{address}]:{port}")


def is_known(host: str) -> bool:
    """Whether ssh has a key for this host on its list, or would not ask, by the user's own configuration."""
    config = looked_up(host)
    if config.get("stricthostkeychecking") in ("false", "no", "off", "accept-new"):
        return True
    files = f"{config.get('userknownhostsfile', '')} {config.get('globalknownhostsfile', '')}".split()
    searches = (["ssh-keygen", "-F", known_as(config), "-f", os.path.expanduser(file)] for file in files)
    return any(subprocess.run(search, capture_output=True).returncode == 0 for search in searches)


def fingerprints(host: str) -> str:
    """Those of the keys that a host shows now."""
    config = looked_up(host)
    scan = subprocess.run(["ssh-keyscan", "-T", "5", "-p", config["port"], config["hostname"]], capture_output=True)
    shown = subprocess.run(["ssh-keygen", "-lf", "-"], input=scan.stdout, capture_output=True).stdout.decode()
    return ", ".join(f"{words[1]} {words[-1]}" for words in map(str.split, shown.splitlines()) if len(words) > 2)


def visit(nodes: list[Node]) -> None:
    """Connect once, one after another, to the hosts that ssh does not know, so that it asks its question. Without a
    terminal, where nobody can answer, they are refused with their fingerprints."""
    if len(nodes) > 1 and not (shutil.which("ssh") and shutil.which("ssh-keygen")):
        raise Refused("NODE_IP_LIST: there is no ssh on this machine: apt-get install openssh-client")
    unknown = []
    for node in nodes[1:]:
        if is_known(node.host):
            continue
        if os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp():
            asked = [*ssh_command(node.host), "--", node.host, "true"]
            if subprocess.run(asked, stdout=subprocess.DEVNULL).returncode == 0 or is_known(node.host):
                continue
        shown = fingerprints(node.host) or "it shows none: is sshd running there, on that port?"
        unknown.append(
            f"{node.host}: ssh does not know this host yet. Its key now: {shown}. If that is its own (there: "
            f"ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub), run `{by_hand(node.host)} true` and answer yes"
        )
    if unknown:
        raise Refused("\n".join(unknown))


def connect(node: Node, inbox: queue.Queue) -> None:
    """Start agent.py there. Each of its messages goes into the inbox as (node, message), (node, None) at the end."""
    source = AGENT.read_bytes()
    command = [sys.executable, str(AGENT)]
    if node.number > 0:
        there = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(BOOTSTRAP)} {len(source)}"
        alive = ("ServerAliveInterval=5", "ServerAliveCountMax=4", "BatchMode=yes", "ControlMaster=no")
        command = [*ssh_command(node.host, *alive, "ControlPath=none"), "-T", "--", node.host, there]
        node.outbox.put(source)
    pipe = subprocess.PIPE
    node.process = subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
        # the chief's own node sees our end by its pipe, and ends its ranks
        preexec_fn=die_with_parent if node.number > 0 else None,
    )
    node.heard = time.monotonic()

    def speak() -> None:
        with contextlib.suppress(OSError):
            while (words := node.outbox.get()) is not None:
                node.process.stdin.write(words)
                node.process.stdin.flush()
            node.process.stdin.close()

    def listen() -> None:
        for line in node.process.stdout:
            with contextlib.suppress(ValueError):  # what a login shell says by itself
                message = loads(line)
                if isinstance(message, dict):
                    inbox.put((node, message))
        inbox.put((node, None))

    def complain() -> None:
        for line in node.process.stderr:
            node.complaints += [text] if (text := line.decode(errors="replace").strip()) else []

    node.threads = [threading.Thread(target=target, daemon=True) for target in (speak, listen, complain)]
    for thread in node.threads:
        thread.start()


# --------------------------------------------------------------------------------------------------------- examine


def examine(nodes: list[Node], inbox: queue.Queue, command: list[str], port: int, env: dict[str, str]) -> bool:
    """Ask all nodes at once, print a line each. Returns whether they share the output directory.

    Args:
        inbox: of (node, message).
        command: train.py and its flags; its folder and what they name are compared between the nodes.
        port: where the ranks will meet.
        env: the variables that the ranks get.
    """
    job, output = secrets.token_hex(4), flag(command, "output_dir")
    resumed = flag(command, "resume_from_checkpoint") or []
    wanted = {
        "cwd": os.getcwd(),
        "code": os.path.dirname(os.path.abspath(command[0])),
        "paths": [path for name in COMPARED for path in flag(command, name) or []],
        "resumed": [os.path.join(path, "trainer_state.json") for path in resumed],
        "env": env,
        "interface": os.environ.get("NET_IFNAME"),
        "output": output[-1] if output else None,
    }
    markers = [f".node-{job}-{node.number}" for node in nodes]
    deadline = time.monotonic() + LONGEST_SECONDS
    with listening(nodes[0].host, port):
        for node in nodes:
            towards = (nodes[0].host if node.number else looked_up(nodes[1].host)["hostname"], port)
            reach = (nodes[0].host, port) if node.number else None
            node.send(examine=wanted | {"towards": towards, "reach": reach, "marker": markers[node.number]})
        wait_for(nodes, inbox, "examined", deadline)
    gpus = any(node.facts.get("gpus", 0) != 0 for node in nodes) and not is_on(command, "use_cpu")
    found = {node.host: problem_of(node, nodes[0], port, wanted["code"], gpus) for node in nodes}
    problems = {host: problem for host, problem in found.items() if problem}
    for node in nodes:
        if node.host not in problems:
            print(f"{node.host}: ready ({node.slots} ranks, interface {node.facts['interface']})", flush=True)
    if problems:
        lines = [f"{host}: {problem}" for host, problem in problems.items()]
        raise Refused("\n".join([f"{len(problems)} of {len(nodes)} nodes are not ready:", *lines]))
    for node in nodes:
        node.send(look=markers)
    wait_for(nodes, inbox, "seen", deadline)
    seen = {node.host: len(node.facts.get("seen", ())) for node in nodes}
    if set(seen.values()) not in ({1}, {len(nodes)}):
        found = ", ".join(f"{host} sees {number} of {len(nodes)}" for host, number in seen.items())
        raise Refused(f"OUTPUT_DIR={wanted['output']}: some nodes share it and others do not ({found}): all, or none")
    return set(seen.values()) == {len(nodes)}


@contextlib.contextmanager
def listening(host: str, port: int):
    """Listen where the ranks will meet, so that the nodes can try to come."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as s:
            s.bind(address)
    except OSError as error:
        raise Refused(
            f"{host} is not an address of this machine ({error.strerror}); LOCAL_IP is the chief's"
        ) from None
    try:
        server = socket.create_server(("", port), family=family, backlog=256)
    except OSError as error:
        raise Refused(f"MASTER_PORT={port}: {os.strerror(error.errno)} on this machine; choose another") from None
    with server:
        yield


def wait_for(nodes: list[Node], inbox: queue.Queue, what: str, deadline: float) -> None:
    """Put each node's answer into its facts; a node that was not heard from for EXAMINE_SECONDS, or has not answered
    at the deadline, has none."""
    waiting = {node.host for node in nodes}
    while waiting and time.monotonic() < deadline:
        waiting -= {node.host for node in nodes if time.monotonic() - node.heard > EXAMINE_SECONDS}
        with contextlib.suppress(queue.Empty):
            node, message = inbox.get(timeout=0.2)
            node.heard = time.monotonic()
            node.send(beat=True)  # it is to hear from us too
            if message is None:
                waiting.discard(node.host)
                node.done = True
            elif what in message:
                waiting.discard(node.host)
                node.facts |= message[what]


def problem_of(node: Node, chief: Node, port: int, code: str, gpus: bool) -> str | None:
    """The first thing that keeps a node from taking part, with what mends it.

    Args:
        port: where the ranks will meet.
        code: the folder of train.py.
        gpus: the job runs on GPUs.
    """
    facts, here = node.facts, chief.facts
    if not facts:
        return why_no_answer(node)
    if "error" in facts:
        return f"cannot be examined: {facts['error']}"
    if "cwd" not in here:
        return None  # the chief's own problem is told of
    if not facts["cwd"]:
        return f"has no directory {os.getcwd()}, where this was started; make it there, or start from {code}"
    if differ := differing(here["code"], facts["code"]):
        extra = [os.path.join(code, name) for name in facts["code"] if name not in here["code"]]
        mends = [copy(code, here["code"], facts["code"] or None, node.host)]
        mends = [f"{by_hand(node.host)} rm {shlex.join(extra)}"] if extra else mends
        return f"other code than on the chief ({differ}); run: {mends[0]}"
    if differ := differing(here["versions"], facts["versions"]):
        fix = f"{sys.executable} -m pip install -r {REQUIREMENTS}"
        return f"other versions than on the chief ({differ}); run there: {fix}"
    for path, files in here["paths"].items():
        there = facts["paths"][path]
        if files is not None and (there is None or any(there.get(name) != size for name, size in files.items())):
            what = "is missing" if there is None else f"differs from the chief's ({differing(files, there)})"
            return f"{path} {what}; run: {copy(path, files, there, node.host)}"
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


def copy(path: str, here: dict, there: dict | None, host: str) -> str:
    """The command that copies what differs to the same place on a host: the files of a directory or a glob, or all of
    a path that is not there."""
    port = f"-P {os.environ['SSH_PORT']} " if os.environ.get("SSH_PORT") else ""
    path = os.path.abspath(path)
    files = [name for name in here if (there or {}).get(name) != here[name]]
    if os.path.isdir(path) and there is None:
        options, files = "-rp", [path]
    else:
        options, files = "-p", [os.path.join(path, name) if os.path.isdir(path) else name for name in files]
    where, folders = f"[{host}]" if ":" in host else host, {}
    for file in map(os.path.abspath, files):
        folders.setdefault(os.path.dirname(file) + "/", []).append(file)
    return " && ".join(
        f"scp {options} {port}{shlex.join(inside)} {where}:{shlex.quote(folder)}" for folder, inside in folders.items()
    )


def why_no_answer(node: Node) -> str:
    """What ssh said, with what mends it."""
    if not node.done:
        seconds = EXAMINE_SECONDS if time.monotonic() - node.heard > EXAMINE_SECONDS else LONGEST_SECONDS
        return f"no answer within {seconds} s; try: {by_hand(node.host)} true"
    for thread in node.threads[1:]:
        thread.join(timeout=2)
    said = "\n".join(node.complaints)
    mends = {
        "Permission denied (": f"run: ssh-copy-id {by_hand(node.host).removeprefix('ssh ')}",
        "IDENTIFICATION HAS CHANGED": f"if that was on purpose, run: ssh-keygen -R '{known_as(looked_up(node.host))}'",
        "Connection refused": "run sshd there: /usr/sbin/sshd -p PORT, and set SSH_PORT",
        f"{sys.executable}: ": f"{sys.executable} has to be there too: install the same environment at the same path",
    }
    fix = next((fix for part, fix in mends.items() if part in said), f"try: {by_hand(node.host)} true")
    return f"ssh: {node.complaints[-1].removeprefix('ssh: ') if node.complaints else 'closed without a word'}; {fix}"
