"""MAX_RESTARTS, and how the launcher ends ranks that wait for a lost one. On one machine, with scripts in place of the
training."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conftest import run_command
from hosts import TRAIN

LAUNCH = """
import os, sys
from sft import processes, stopping
from sft.nodes import launch
stopping.end_at_signals("stopped on request: nothing had begun")
processes.name_job()
launch.RESTART_SECONDS = float(os.environ["PAUSE"])
code = launch.launch(sys.argv[1:], {"output_dir": os.environ["OUT"]}, None)
sys.stdout.flush()
os._exit(code)
"""
# Makes the steps that the first word names, one number an attempt, and then ends as it says.
RUN = """
import os, signal, sys, time
from sft import processes
attempts, out = sys.argv[1].split(","), os.environ["OUT"]
rank, file = os.environ.get("RANK", "0"), os.path.join(out, "attempts" + os.environ.get("RANK", "0"))
with open(file, "a+") as done:
    done.write("x")
    done.seek(0)
    step, how = attempts[len(done.read()) - 1].split(":")
os.write(1, f"attempt {sys.argv[2:]}\\n".encode())
if step != "-" and rank == "0":
    processes.write_step(os.open(os.path.join(out, ".lock"), os.O_RDWR | os.O_CREAT), int(step))
if rank == "0":
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else time.sleep(60) if how == "wait" else os._exit(int(how))
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank that waits in a collective
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    """`start(attempts, restarts)`: a job of two ranks; its MASTER_PORT is the same at each attempt."""

    def begin(attempts, restarts, ranks="1", pause="0.1", **env):
        (tmp_path / "run.py").write_text(RUN)
        (tmp_path / "out").mkdir(exist_ok=True)
        env = os.environ | {"HOST_GPU_NUM": ranks, "PYTHONPATH": str(TRAIN), "MAX_RESTARTS": str(restarts)} | env
        env |= {"PAUSE": pause, "OUT": str(tmp_path / "out")}
        command = [sys.executable, "-c", LAUNCH, tmp_path / "run.py", attempts]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


KILLED = r"rank 0 on localhost: killed by SIGKILL \(out of memory\? see dmesg there\)"
AGAIN = "going on from the newest whole checkpoint"
ENDS = {  # how each attempt ends: (steps and ends, MAX_RESTARTS, exit code, attempts, what is said)
    "goes on": ("5:kill,9:0", 3, 0, 2, rf"restart 1 of 3: {KILLED}; {AGAIN}\n"),
    "none allowed": ("5:kill,9:0", 0, 137, 1, rf"failed: {KILLED}\n"),
    "not often enough": ("5:7,6:kill,7:8,8:0", 2, 8, 3, r"failed: rank 0 on localhost: exit code 8\n"),
    "the same step": ("5:7,5:7,9:0", 3, 7, 2, r"failed: restart 1 made no new step; rank 0 on localhost: exit code 7"),
    "an earlier step": ("5:7,8:7,6:7,9:0", 5, 7, 3, "failed: restart 2 made no new step; "),
    "nothing has begun": ("-:7,-:7,9:0", 5, 7, 2, r"restart 1 of 5: .*; beginning again\n"),
    "refused": ("5:2,9:0", 3, 2, 1, "^attempt"),
    "non-finite": ("5:3,9:0", 3, 3, 1, "^attempt"),
    "stopped": ("5:75,9:0", 3, 75, 1, "^attempt"),
}


QUICK = ("goes on", "the same step", "nothing has begun")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.campaign) for name in ENDS]
)
def test_a_job_that_fails_is_started_again(name, start):
    attempts, restarts, code, number, says = ENDS[name]
    job = start(attempts, restarts)
    output = job.communicate(timeout=100)[0]
    began = re.findall(r"^attempt (.*)$", output, re.MULTILINE)
    assert job.returncode == code and len(began) == number, output
    assert re.search(says, output), output
    resumes = "-" not in attempts
    assert began == ["[]", *(number - 1) * ["['--auto_resume', 'True']" if resumes else "[]"]]


def test_two_ranks_that_meet_at_the_same_port_again(start):
    """The one that waits for the lost one is killed, and is not what is named."""
    from runs import free_port

    began = time.monotonic()
    job = start("5:kill,6:7", 1, ranks="2", MASTER_PORT=str(free_port()))
    output = job.communicate(timeout=100)[0]
    assert f"restart 1 of 1: {KILLED}".replace("\\", "") in output and job.returncode == 7, output
    assert "failed: rank 0 on localhost: exit code 7" in output
    assert time.monotonic() - began < 40, "torch waits for 30 s each time"


@pytest.mark.parametrize("old", [False, pytest.param(True, marks=pytest.mark.campaign)], ids=["new", "over old"])
def test_a_run_of_train_sh_is_started_again(old, model_dir, example_tokenizer_dir, example_rows, tmp_path):
    """One that is killed before it has begun does not go on from the run that it is to set aside."""
    out = tmp_path / "out"
    flags = ["--output_dir", out, "--model_name_or_path", model_dir("dense", example_tokenizer_dir), "--max_steps", 60]
    flags += ["--train_data_file", example_rows, "--max_seq_length", 64, "--save_steps", 10, "--overwrite_output_dir"]
    command = ["bash", *map(str, [TRAIN / "train.sh", *flags])]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MAX_RESTARTS": "1"}
    if old:
        assert run_command(command, env).returncode == 0
    job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ranks: list = []
    while not ranks:
        with contextlib.suppress(psutil.Error):  # one that has just ended
            ranks = [p for p in psutil.Process(job.pid).children() if str(TRAIN / "train.py") in p.cmdline()]
        time.sleep(0.05)
    while not old and not (out / "checkpoint-10" / "manifest.json").exists():
        time.sleep(0.01)
    ranks[0].kill()
    output = job.communicate(timeout=100)[0]
    assert job.returncode == 0 and "restart 1 of 1: rank 0 on localhost: killed by SIGKILL" in output, output
    again = output.partition("restart 1 of 1")[2]
    assert ("step 1/60" in again) == old and ("going on from" in again) != old, again
    assert len(list(out.glob("previous-*"))) == old


@pytest.mark.parametrize(
    ("number", "pause"),
    [(signal.SIGTERM, "60"), (signal.SIGTERM, "0.1"), pytest.param(signal.SIGHUP, "60", marks=pytest.mark.campaign)],
)
def test_a_stop_before_a_new_step(number, pause, start):
    """In the pause before it is started again, or while it loads: how to go on is said."""
    job = start("12:kill,-:wait", 3, pause=pause)
    for line in job.stdout:
        if "restart 1 of 3" in line if pause == "60" else "attempt ['--auto_resume'" in line:
            break
    time.sleep(0.3)
    job.send_signal(number)
    output = job.communicate(timeout=20)[0]
    assert job.returncode == 75, output
    assert "To go on, start the same command again with --auto_resume\n" in output, output
