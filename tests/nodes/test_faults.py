"""What ends a job on two machines: how soon, with which exit code and message, and what is left behind.

    pytest -s -m "campaign or not campaign" tests/nodes/test_faults.py

prints the table. Real hosts (hosts.py), plain DDP over gloo, a run that would go on for hours.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from hosts import SSH, SSH_PORT, TRAIN, Job

pytestmark = pytest.mark.needs_hosts
OTHER = "/other/python train.py -m sft.start --output_dir /other"


@pytest.fixture(scope="module")
def table():
    rows = [
        "| fault | ends after | exit code | message | left on each host | the other job |",
        "|---|---|---|---|---|---|",
    ]
    yield rows
    print("\n" + "\n".join(rows))


class Bed:
    """Two hosts, another job on each, and the job that something happens to."""

    def __init__(self, two, model, rows, folder):
        self.two, self.folder, self.out, self.undo = two, folder, folder / "out", []
        self.data = folder / "data" / "rows.jsonl"
        self.data.parent.mkdir()
        shutil.copyfile(rows, self.data)
        self.nodes = ",".join(f"{host.address}:1" for host in two)
        self.env = {"MODEL_PATH": model, "TRAIN_DATA_FILE": self.data, "OUTPUT_DIR": self.out, "DS_CONFIG": "none"}
        self.env["SSH_PORT"] = SSH_PORT
        self.others = [Job(host, ["bash", "-c", f"exec -a '{OTHER}' sleep 3600"]) for host in two]

    def start(self, **env):
        command = ["bash", TRAIN / "train.sh", "--max_steps", 100000, "--save_steps", 3, "--max_seq_length", 64]
        terminal = env.pop("terminal", False)
        return Job(self.two[0], command, terminal=terminal, **({"NODE_IP_LIST": self.nodes} | self.env | env))

    def on(self, host, script, undo=None):
        """Change something there until the test ends."""
        self.two[host].sh(script)
        if undo:
            self.undo.append((host, undo))

    def rank(self, host):
        """The process of the rank there."""
        found = self.two[host].processes("train.py", str(self.out)).items()
        (pid,) = (pid for pid, line in found if "sft.start" not in line)
        return pid

    def left(self):
        """What is left of the job on each host: its scripts, its connections."""
        return [
            {**host.processes(str(self.out)), **host.processes("agent.py"), **host.processes("sshd:", "notty")}
            for host in self.two
        ]


@pytest.fixture
def bed(two, model_dir, example_tokenizer_dir, example_rows, tmp_path):
    bed = Bed(two, model_dir("dense", example_tokenizer_dir), example_rows, tmp_path)
    yield bed
    for host, script in reversed(bed.undo):
        two[host].sh(script)
    for other in bed.others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other.pid, signal.SIGKILL)


def kill(bed, job):
    os.kill(bed.rank(1), signal.SIGKILL)


def kill_launcher(bed, job):
    os.kill(next(iter(bed.two[1].processes("agent.py"))), signal.SIGKILL)


def stop(bed, job):
    os.kill(bed.rank(1), signal.SIGSTOP)


def unplug(bed, job):
    bed.two[1].link("down")
    bed.undo.append((1, "ip link set eth0 up"))


def small_disk(bed):
    bed.out.mkdir()
    bed.on(1, f"mount -t tmpfs -o size=150k tmpfs {bed.out}", f"umount {bed.out}")


def other_code(bed):
    copy = shutil.copytree(TRAIN, bed.folder / "train", ignore=shutil.ignore_patterns("output", "__pycache__"))
    with (copy / "sft" / "data" / "examples.py").open("a") as file:
        file.write("# changed\n")
    bed.on(1, f"mount --bind {copy} {TRAIN}", f"umount {TRAIN}")


def no_data(bed):
    bed.on(1, f"mount -t tmpfs tmpfs {bed.data.parent}", f"umount {bed.data.parent}")


def unreachable(bed):
    unplug(bed, None)


def no_key(bed):
    bed.on(1, f"mv {SSH}/authorized_keys {SSH}/aside", f"mv {SSH}/aside {SSH}/authorized_keys")


def other_interpreter(bed):
    folder = Path(sys.executable).parent
    bed.on(1, f"mount -t tmpfs tmpfs {folder}", f"umount {folder}")


def forget(bed):
    bed.on(0, f"mv {SSH}/known_hosts {SSH}/aside", f"mv {SSH}/aside {SSH}/known_hosts")


def take_port(bed):
    listen = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(3600)"
    holder = Job(bed.two[0], ["python3", "-c", listen])
    bed.others.append(holder)
    time.sleep(1)


def insist(bed, job):
    stop(bed, job)
    os.kill(job.pid, signal.SIGTERM)
    time.sleep(6)
    os.kill(job.pid, signal.SIGTERM)


# the address in front of rank 0's lines is not in front of the last one
GOES_ON = r"(?s): stopped on request at step \d+\. Last checkpoint: \S+\. Continue with:\r?\n"
GOES_ON += r".*\nNODE_IP_LIST=\S+ [^\n]*bash [^\n]*--resume_from_checkpoint [^\n]*\n\Z"
ctrl_c = dict(terminal=True), lambda bed, job: job.type("\x03")
terminate = {}, lambda bed, job: os.kill(job.pid, signal.SIGTERM)
hang_up = dict(terminal=True), lambda bed, job: os.close(job.terminal)

RUNNING = {  # fault: (environment, what happens in the middle of a step, exit code, what is said, seconds)
    "rank 1 SIGKILL": ({}, kill, 137, r"failed: rank 1 on 10\.77\.0\.2: killed by SIGKILL", 60),
    "launcher on node 2 SIGKILL": ({}, kill_launcher, 1, r"failed: node 10\.77\.0\.2: its launcher or the", 60),
    "network of node 2 down": ({}, unplug, 1, r"failed: node 10\.77\.0\.2: ", 60),
    "rank 1 SIGSTOP, STALL_TIMEOUT=30": (
        {"STALL_TIMEOUT": 30}, stop, 1, r"rank 1 on 10\.77\.0\.2 did not end by itself: stopped \(SIGSTOP\)", 90
    ),
    "Ctrl-C": (*ctrl_c, 75, GOES_ON, 30),
    "SIGTERM": (*terminate, 75, GOES_ON, 30),
    "SIGHUP, terminal closed": (*hang_up, 75, GOES_ON.removesuffix(r"\Z"), 30),
    "rank 1 SIGTERM": ({}, lambda bed, job: os.kill(bed.rank(1), signal.SIGTERM), 75, GOES_ON, 30),
    "file stop": ({}, lambda bed, job: (bed.out / "stop").touch(), 75, GOES_ON, 30),
    "SIGTERM, and again after 6 s, rank 1 SIGSTOP": ({}, insist, 143, r"\nfailed: asked to stop; rank 0 ", 60),
}  # fmt: skip
BEFORE = {  # what is wrong: (how, environment, exit code, what is said)
    "node 2's disk full": (
        small_disk,
        {},
        2,
        r"refused: --output_dir \S+: a checkpoint takes 1\.23 MB, and 15\d kB are",
    ),
    "other code on node 2": (
        other_code,
        {},
        2,
        r"10\.77\.0\.2: other code than on the chief \(sft/data/examples\.py\); make \S+ there the same as here",
    ),
    "data missing on node 2": (no_data, {}, 2, r"10\.77\.0\.2: .*rows\.jsonl is missing; copy it there"),
    "wrong slots": (None, {"NODE_NUM": 5}, 2, r"NODE_NUM=5, but NODE_IP_LIST=\S+ there are 2 processes in all"),
    "host key unknown, no terminal": (
        forget,
        {},
        2,
        r"10\.77\.0\.2: ssh: Host key verification failed.*run once: ssh -p 36005 10\.77\.0\.2 true",
    ),
    "node 2 unreachable": (unreachable, {}, 2, r"10\.77\.0\.2: ssh: .*; try: ssh -p 36005 "),
    "node 2 wants a password": (
        no_key,
        {},
        2,
        r"10\.77\.0\.2: ssh: .*Permission denied.*; run: ssh-copy-id -p 36005 ",
    ),
    "no environment on node 2": (other_interpreter, {}, 2, r"10\.77\.0\.2: ssh: .*; \S+ has to be there too: install"),
    "port taken": (take_port, {}, 2, r"MASTER_PORT=29500 on 10\.77\.0\.1: Address already in use"),
}
CAMPAIGN = ("launcher on node 2 SIGKILL", "rank 1 SIGSTOP, STALL_TIMEOUT=30", "Ctrl-C", "SIGHUP, terminal closed")
CAMPAIGN += ("node 2's disk full", "node 2 unreachable", "file stop", "SIGTERM, and again after 6 s, rank 1 SIGSTOP")


def cases(table):
    return [pytest.param(name, marks=[pytest.mark.campaign] if name in CAMPAIGN else []) for name in table]


def judge(name, bed, job, began, code, says, seconds, table):
    ended = job.end()
    took = time.monotonic() - began
    for log in bed.out.glob("log_*.txt") if job.terminal else ():  # a terminal may be gone
        job.output += log.read_text(errors="replace")
    deadline = began + seconds
    while any(bed.left()) and time.monotonic() < deadline:
        time.sleep(0.2)
    left, others = bed.left(), [other.code() is None for other in bed.others]
    said = re.findall(r"^(?:failed|refused): .*(?:\n.*)?", job.output, re.MULTILINE)
    message = " ".join(said[-1].replace("|", "/").split())[:150] if said else "–"
    table.append(
        f"| {name} | {took:.0f} s | {ended} | {message} | {', '.join(str(len(x)) for x in left)} | {others} |"
    )
    assert ended == code, job.output[-3000:]
    assert took < seconds
    assert re.search(says, job.output), job.output[-3000:]
    assert not any(left) and all(others)


@pytest.mark.parametrize("name", cases(RUNNING))
def test_in_the_middle_of_a_run(name, bed, table):
    env, happens, code, says, seconds = RUNNING[name]
    job = bed.start(**env)
    job.wait_for(r"step 5/")
    began = time.monotonic()
    happens(bed, job)
    judge(name, bed, job, began, code, says, seconds, table)


@pytest.mark.parametrize("moment", [0, *(pytest.param(n, marks=pytest.mark.campaign) for n in range(1, 30))])
def test_stopped_at_any_moment(moment, bed):
    """By a signal to train.sh or to any rank: one whole checkpoint, or none before the first step."""
    seed = os.environ.get("SEED", str(time.time_ns() % 10_000))
    chance = random.Random(f"{seed} {moment}")
    job = bed.start()
    job.wait_for(r"10\.77\.0\.2: ready|step 1/" if moment % 3 == 0 else r"step 1/")
    time.sleep(chance.random() * 5)
    number, rank, pid = chance.choice([signal.SIGTERM, signal.SIGINT]), chance.choice([0, 1, None]), job.pid
    with contextlib.suppress(ValueError):  # it is not there yet
        pid = pid if rank is None else bed.rank(rank)
    print(f"SEED={seed}: {number.name} to {'train.sh' if pid == job.pid else f'rank {rank}'}")
    os.kill(pid, number)
    code = job.end(60)
    found = sorted(bed.out.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert code == 75 and "Traceback" not in job.output and not any(bed.left()), job.output[-3000:]
    if "step 1/" not in job.output:
        assert not found and "stopped on request before the first step" in job.output
        return
    (step,) = re.findall(r"stopped on request at step (\d+)", job.output)
    assert found[-1].name == f"checkpoint-{step}"
    files = {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"}
    assert files <= set(os.listdir(found[-1]))


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_started_again(again, bed):
    """A rank is killed once; or again in each attempt, before a new step is made."""
    job = bed.start(MAX_RESTARTS=3)
    job.wait_for(r"step 10/")
    kill(bed, job)
    job.wait_for(r"restart 1 of 3: rank 1 on 10\.77\.0\.2: killed by SIGKILL.*; going on from the newest whole")
    before = len(job.output)
    if again:
        while not bed.two[1].processes("train.py", str(bed.out)):
            time.sleep(0.1)
        kill(bed, job)
        assert job.end() == 137 and "failed: restart 1 made no new step; rank 1 on 10.77.0.2" in job.output[before:]
    else:
        job.wait_for(r"(?s)restart 1 of 3.*going on from \S*checkpoint-\d+.*step \d+/")
        os.kill(job.pid, signal.SIGTERM)
        assert job.end() == 75 and "restart 2" not in job.output, job.output[before:]
    assert not any(bed.left())


@pytest.mark.campaign
def test_a_node_that_is_away_for_a_while(bed):
    """As one that reboots: the first restart finds it away, the second one goes on."""
    job = bed.start(MAX_RESTARTS=2)
    job.wait_for(r"step 10/")
    unplug(bed, job)
    job.wait_for(r"restart 1 of 2: node 10\.77\.0\.2: its launcher or the connection to it ended")
    job.wait_for(r"restart 2 of 2: restart 1 was refused: 1 of 2 nodes are not ready: 10\.77\.0\.2: ssh: .*; going on")
    bed.two[1].link("up")
    job.wait_for(r"(?s)restart 2 of 2.*going on from \S*checkpoint-\d+.*step \d+/", 240)
    os.kill(job.pid, signal.SIGTERM)
    assert job.end() == 75 and re.search(GOES_ON, job.output), job.output[-3000:]
    assert not any(bed.left())


@pytest.mark.campaign
def test_stopped_while_a_restart_loads(bed):
    """The launcher says how to go on, which the ranks cannot know yet."""
    job = bed.start(MAX_RESTARTS=1)
    job.wait_for(r"step 10/")
    kill(bed, job)
    job.wait_for(r"(?s)restart 1 of 1.*10\.77\.0\.2: ready")
    while not bed.two[1].processes("train.py", str(bed.out)):
        time.sleep(0.1)
    time.sleep(2)
    os.kill(job.pid, signal.SIGTERM)
    assert job.end() == 75
    again = job.output.partition("restart 1 of 1")[2]
    assert "step 1" not in again, "it was too late"
    assert "stopped on request. To go on, start the same command again with --auto_resume" in again
    assert not any(bed.left())


@pytest.mark.parametrize("name", cases(BEFORE))
def test_before_it_begins(name, bed, table):
    spoil, env, code, says = BEFORE[name]
    if spoil:
        spoil(bed)
    began = time.monotonic()
    job = bed.start(**env)
    judge(name, bed, job, began, code, says, 60, table)  # beside other tests; the table says how long it took
    if code == 2:
        assert not any(path.name.startswith("checkpoint-") for path in bed.folder.rglob("*"))
        assert "Traceback" not in job.output


@pytest.mark.parametrize(
    "name", ["not ready", "a bad row", pytest.param("an unknown flag", marks=pytest.mark.campaign)]
)
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.campaign)], ids=["apart", "shared"])
def test_a_refusal_leaves_nothing_on_the_nodes(name, shared, bed):
    """Of directories and logs that were made for the job, by train.sh on the chief."""
    disk = bed.folder / "disk"
    disk.mkdir()
    if not shared:
        bed.on(1, f"mount -t tmpfs tmpfs {disk}", f"umount {disk}")
    if name == "not ready":
        no_data(bed)
    if name == "a bad row":
        bed.data.write_text("{}\n")
    flags = ["--max_setps", "3"] if name == "an unknown flag" else []
    env = bed.env | {"OUTPUT_DIR": disk / "a" / "out", "NODE_IP_LIST": bed.nodes}
    job = Job(bed.two[0], ["bash", TRAIN / "train.sh", *flags], **env)
    assert job.end() == 2 and "Traceback" not in job.output, job.output
    assert ("10.77.0.2: ready" in job.output) == (name == "a bad row"), "the ranks were started there"
    if not shared:
        assert bed.two[1].sh(f"find {disk} -mindepth 1") == ""
    assert not any(disk.iterdir())


@pytest.mark.campaign
def test_a_slow_nvidia_smi_is_waited_for(bed):
    """14 s on node 2, longer than a node may be silent."""
    smi = bed.folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\n[ $(hostname) = node1 ] || sleep 14\necho 'GPU 0: NVIDIA X'\n")
    smi.chmod(0o755)
    job = bed.start(PATH=f"{bed.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    job.wait_for(r"10\.77\.0\.2: ready \(1 ranks", 60)
    assert time.monotonic() - job.began > 14
    os.kill(job.pid, signal.SIGTERM)
    job.end()
