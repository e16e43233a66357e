"""A run that is asked to stop, at any moment and however: one whole checkpoint of the step on which the ranks agree,
exit code 75, the command that goes on, no traceback, no process left."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from conftest import TRAIN
from runs import ServerRun, environment, run_script

ZERO2 = ["--deepspeed", "ds_zero2_no_offload.json"]
SEED = int(os.environ.get("SEED", time.time_ns() % 10_000))
LINE = r"^stopped on request at step (\d+)\. Last checkpoint: (\S+)\. Continue with:\n(.*)\n\Z"


@pytest.fixture
def flags(model_dir, example_tokenizer_dir, example_rows, tmp_path):
    """Of a run that would take hours."""
    return [
        "--model_name_or_path", model_dir("dense", example_tokenizer_dir), "--train_data_file", example_rows,
        "--output_dir", tmp_path / "out", "--max_steps", 1_000_000, "--logging_steps", 1, "--save_steps", 1_000_000,
        "--max_seq_length", 64, "--disable_tqdm", "True", "--report_to", "none",
    ]  # fmt: skip


class Run(ServerRun):
    def __init__(self, flags, nproc=1):
        super().__init__(TRAIN / "train.py", flags, nproc, environment({"OMP_NUM_THREADS": "1"}), None, "")

    def wait_for(self, pattern, seconds=120):
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.output(self.stdout)):
            assert time.monotonic() < deadline, self.output(self.stdout) + self.output(self.stderr)
            time.sleep(0.05)

    def signal(self, number, rank=0):
        os.kill(self.pids[rank], number)

    def end(self, seconds=60):
        """(exit code, stdout, everything) of the end; no process is left, and nothing looks like an error."""
        done = self.wait(seconds)
        said = done.stdout + done.stderr
        alone = re.sub(r"\nrank \d, asked to stop: .*", "", said)  # its peer was gone before it was asked
        # torch's own, where the peer that serves the store ends while this rank connects to it; no code of ours runs
        alone = re.sub(r"\[rank\d\]:\[W[^\n]* TCPStore\.cpp.*?_start \+ [^\n]*", "", alone, flags=re.DOTALL)
        assert "Traceback" not in alone and "Error" not in alone, said[-3000:]
        deadline = time.monotonic() + 5
        while left := [process for process in psutil.process_iter() if is_of(process, self.session)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        return done.returncode, done.stdout, said


def is_of(process, session):
    """Whether it belongs to a session, and is not only waiting for the server to see its end."""
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def the_checkpoint(stdout, out):
    """(its step, the command that goes on) of a run that has stopped with one whole checkpoint."""
    (line,) = re.findall(LINE, stdout, re.MULTILINE)
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{line[0]}"]
    assert line[1] == str(out / f"checkpoint-{line[0]}")
    return int(line[0]), shlex.split(line[2])


def go_on(command, steps, nproc):
    """Two steps further by the command, and to the end."""
    launcher = ["python"] if nproc == 1 else ["torchrun", "--nproc_per_node", str(nproc)]
    assert command[: len(launcher)] == launcher
    script, *flags = command[len(launcher) :]
    launcher = "python" if nproc == 1 else "torchrun"
    run = run_script(script, [*flags, "--max_steps", steps + 2], launcher, nproc)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert f"step {steps + 2}/{steps + 2}" in run.stdout


# ----------------------------------------------------------------------------------------------------- a signal


@pytest.mark.parametrize("more", [[], pytest.param(ZERO2, marks=pytest.mark.needs_gxx)], ids=["plain", "ZeRO-2"])
@pytest.mark.parametrize("moment", [0, *(pytest.param(n, marks=pytest.mark.campaign) for n in range(1, 15))])
def test_a_signal_to_any_rank(moment, more, flags, tmp_path):
    """At random moments of two ranks: 30 in the campaign."""
    chance = random.Random(f"{SEED} {moment} {more}")
    number, rank = chance.choice([signal.SIGTERM, signal.SIGINT]), chance.randrange(2)
    run = Run([*flags, *more], nproc=2)
    run.wait_for(r"step 1/")
    time.sleep(chance.random() * 2)
    print(f"SEED={SEED}: {signal.Signals(number).name} to rank {rank}")
    began = time.monotonic()
    run.signal(number, rank)
    made = int((tmp_path / "out" / ".lock").read_text().split()[1])
    code, stdout, _ = run.end()
    assert code == 75
    step, command = the_checkpoint(stdout, tmp_path / "out")
    print(f"ended after {time.monotonic() - began:.1f} s, {step - made} steps later")
    assert step - made <= 4, "two, and on a busy machine what is made until the signal is heard"
    if moment == (1 if more else 0):
        go_on(command, step, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.campaign)])
def test_one_process(number, flags, tmp_path):
    run = Run(flags)
    run.wait_for(r"step 3/")
    run.signal(number)
    code, stdout, _ = run.end()
    step, command = the_checkpoint(stdout, tmp_path / "out")
    assert code == 75 and step == stdout.count("/1000000  loss"), "it stops at this step's end"
    go_on(command, step, 1)


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("moment", [0, *(pytest.param(n, marks=pytest.mark.campaign) for n in range(1, 10))])
def test_before_the_first_step(moment, nproc, flags, tmp_path):
    chance = random.Random(f"{SEED} {moment} {nproc}")
    number, rank = chance.choice([signal.SIGTERM, signal.SIGINT]), chance.randrange(nproc)
    run = Run(flags, nproc)
    time.sleep(0.3 + chance.random() * 1.5)
    print(f"SEED={SEED}: {signal.Signals(number).name} to rank {rank}")
    run.signal(number, rank)
    code, stdout, said = run.end()
    assert code == 75
    if "step 1/" in stdout:
        the_checkpoint(stdout, tmp_path / "out")
        return
    assert said.count("stopped on request before the first step. Nothing new is saved yet: start the same") == 1
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_while_rows_are_tokenized(flags, example_rows, tmp_path):
    rows = tmp_path / "many.jsonl"
    rows.write_text(example_rows.read_text() * 100)
    run = Run([*flags, "--train_data_file", rows, "--preprocessing_num_workers", 2])
    deadline = time.monotonic() + 60
    while len(psutil.Process(run.pids[0]).children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    run.signal(signal.SIGTERM)
    code, _, said = run.end(10)
    assert code == 75 and said.count("stopped on request before the first step") == 1


def test_a_second_signal_counts_after_5_seconds(flags, tmp_path):
    """Here rank 1 does not answer: the first signal cannot be obeyed."""
    run = Run([*flags, "--save_steps", 2, "--save_total_limit", 1], nproc=2)
    run.wait_for(r"step 3/")
    run.signal(signal.SIGSTOP, 1)
    time.sleep(0.3)
    run.signal(signal.SIGTERM)
    for _ in range(3):
        time.sleep(1)
        run.signal(signal.SIGTERM)
        run.signal(signal.SIGINT)
    assert psutil.pid_exists(run.pids[0])
    time.sleep(2.2)
    run.signal(signal.SIGTERM)
    began = time.monotonic()
    psutil.wait_procs([psutil.Process(run.pids[0])], timeout=1)
    run.signal(signal.SIGKILL, 1)
    code, stdout, said = run.end()
    assert code == -signal.SIGTERM and time.monotonic() - began < 3
    (line,) = re.findall(r"stopped at once at step (\d+)\. Last checkpoint: (\S+)\. Continue with:\n(.*)", said)
    assert line[1] in line[2] and re.fullmatch(rf"{tmp_path}/out/checkpoint-\d+", line[1])
    assert int(line[0]) - int(line[1].rpartition("-")[2]) <= 2, "the last one, or the one before while that is written"


@pytest.mark.campaign
def test_a_group_is_signalled_with_workers_that_load(flags, tmp_path):
    """As by a terminal, or by Slurm: the workers hear it, too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / signal.Signals(number).name
        command = [sys.executable, TRAIN / "train.py", *flags, "--output_dir", out, "--dataloader_num_workers", 2]
        command += ["--dataloader_persistent_workers", "True"]
        with (tmp_path / "said.txt").open("w") as said:
            job = subprocess.Popen([str(part) for part in command], stdout=said, stderr=said, start_new_session=True)
            deadline = time.monotonic() + 100
            while "step 20/" not in (tmp_path / "said.txt").read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            workers = psutil.Process(job.pid).children()
            os.killpg(job.pid, number)
            assert job.wait(timeout=30) == 75
        text = (tmp_path / "said.txt").read_text()
        assert "Traceback" not in text and "Error" not in text, text[-2000:]
        the_checkpoint(text, out)
        assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=5)[1]


# ------------------------------------------------------------------------------------------------- the file `stop`


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_a_file(nproc, flags, tmp_path):
    """One that is older than the start is removed."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "stop").touch()
    run = Run(flags, nproc)
    run.wait_for(r"step 5/")
    assert f"{out}/stop: removed, because it is older than this start" in run.output(run.stdout)
    (out / "stop").touch()
    code, stdout, _ = run.end()
    assert code == 75
    the_checkpoint(stdout, out)


def test_the_last_step_finishes_the_run(flags, tmp_path):
    """Asked from the start by a file that is newer than it, a run of one step is done."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "stop").touch()
    os.utime(out / "stop", (time.time() + 1000,) * 2)
    run = run_script("train.py", [*flags, "--max_steps", 1])
    assert run.returncode == 0, run.stderr[-2000:]
    assert (out / "train_results.json").is_file() and "stopped" not in run.stdout


# --------------------------------------------------------------------------------------------- what is not done then


def test_the_end_of_a_run_is_left_out(flags, tmp_path):
    """With --load_best_model_at_end and one checkpoint kept, the Trainer would delete the one of the stop."""
    best = ["--eval_split", 0.2, "--eval_strategy", "steps", "--eval_steps", 10, "--save_steps", 10]
    best += ["--load_best_model_at_end", "True", "--save_total_limit", 1, "--learning_rate", 0.1]
    run = Run([*flags, *best])
    run.wait_for(r"step 33/")
    run.signal(signal.SIGTERM)
    code, stdout, _ = run.end()
    (line,) = re.findall(LINE, stdout, re.MULTILINE)
    assert code == 75 and (tmp_path / "out" / f"checkpoint-{line[0]}" / "trainer_state.json").is_file()
    assert not (tmp_path / "out" / "train_results.json").exists()
    assert stdout.count("eval_loss") == int(line[0]) // 10


@pytest.mark.campaign
def test_where_each_step_evaluates_and_only_the_best_is_saved(flags, tmp_path):
    """It stops at that step, better or not, and goes on as the undisturbed run."""
    more = ["--eval_split", 0.02, "--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "best"]
    flags = [*flags, *more, "--load_best_model_at_end", "True", "--learning_rate", 0.1, "--max_steps", 60]
    whole = run_script("train.py", [*flags, "--output_dir", tmp_path / "whole"])
    assert whole.returncode == 0, whole.stderr[-2000:]
    run = Run(flags)
    run.wait_for(r"step 20/")
    run.signal(signal.SIGTERM)
    code, stdout, _ = run.end()
    ((step, checkpoint, _),) = re.findall(LINE, stdout, re.MULTILINE)
    assert code == 75 and Path(checkpoint).name == f"checkpoint-{step}" and int(step) < 60
    done = run_script("train.py", ["--resume_from_checkpoint", checkpoint])
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", tmp_path / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_jit_checkpoints_are_refused(flags, run_here):
    done = run_here("train.py", [*flags, "--enable_jit_checkpoint"])
    assert done.returncode == 2 and "--enable_jit_checkpoint: leave it out" in done.stderr


# ------------------------------------------------------------------------------------------------------ torch's lock


@pytest.mark.needs_gxx
def test_a_build_lock_that_is_left(flags, tmp_path):
    """By a process that was killed while it loaded DeepSpeed's extension. Two jobs at once get past it."""
    from torch.utils.cpp_extension import _get_build_directory

    built = Path(_get_build_directory("deepspeed_shm_comm", False))
    folder = tmp_path / "extensions" / built.name
    shutil.copytree(built, folder)
    (folder / "lock").touch()
    flags = [*flags, *ZERO2, "--max_steps", 2]
    env = environment({"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder.parent)})
    runs = [
        ServerRun(TRAIN / "train.py", [*flags, "--output_dir", tmp_path / name], 2, env, None, "") for name in "ab"
    ]
    for run in runs:
        done = run.wait(300)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert not (folder / "lock").exists()
