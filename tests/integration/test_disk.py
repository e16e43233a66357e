"""A disk that fills, a limit on files, a directory that is gone or read-only: the last checkpoint stays whole, one
line says what is wrong, all ranks end with exit code 1."""

import os
import re
import shlex
import shutil
import subprocess
import time

import pytest

from conftest import TRAIN
from runs import ServerRun, environment, launch_command, run_command, run_script
from sft.training.manifest import checkpoints_in, is_whole

ZERO2, ZERO3 = (["--deepspeed", f"ds_zero{stage}_no_offload.json"] for stage in (2, 3))
# flags, ranks, bytes of a tmpfs that holds one and a half checkpoints of the tiny model
KINDS = {
    "one": ([], 1, 5_900_000),
    "ddp": ([], 2, 5_900_000),
    "lora": (["--use_lora"], 1, 1_250_000),
    "zero2": (ZERO2, 2, 9_900_000),
    "zero2_lora": ([*ZERO2, "--use_lora"], 2, 2_400_000),
    "zero3": (ZERO3, 2, 8_000_000),
}
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
sys.argv = sys.argv[1:2] + sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kinds(*always):
    """All kinds; those that are not `always` run with the campaign."""

    def marks(kind):
        return [pytest.mark.needs_gxx] * ("zero" in kind) + [pytest.mark.campaign] * (kind not in always)

    return pytest.mark.parametrize("kind", [pytest.param(kind, marks=marks(kind)) for kind in KINDS])


@pytest.fixture
def mount(tmp_path):
    """`mount(*arguments)`: mounted on tmp_path/disk until the test ends."""
    place, number = tmp_path / "disk", 0
    place.mkdir()

    def do(*arguments):
        nonlocal number
        done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs (run as root, with CAP_SYS_ADMIN): {done.stderr.strip()}")
        number += arguments[0] != "-o"  # else it is only changed
        return place

    yield do
    for _ in range(number):
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def flags(model_dir, example_tokenizer_dir, example_rows):
    flags = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir), "--train_data_file", example_rows]
    return [*flags, "--max_steps", 4, "--save_steps", 2, "--per_device_train_batch_size", 2, "--logging_steps", 1]


def start(kind, flags, script="train.py", timeout=200):
    ranks = KINDS[kind][1]
    return run_script(script, flags, launcher="python" if ranks == 1 else "torchrun", nproc=ranks, timeout=timeout)


def check_failed(run, line):
    """One line, and nothing else that is an error."""
    assert run.returncode == 1, run.stderr[-3000:]
    lines = [text for text in run.stderr.splitlines() if text.startswith("failed: ")]
    assert len(lines) == 1 and re.search(line, lines[0]), run.stderr[-3000:]
    assert "Traceback" not in run.stderr + run.stdout and "Error" not in run.stderr, run.stderr[-3000:]


@kinds("one", "zero3")
def test_a_disk_that_fills(kind, flags, mount):
    more, _, size = KINDS[kind]
    disk = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    run = start(kind, [*flags, *more, "--output_dir", disk / "out"])
    check_failed(
        run, r"checkpoint-4 could not be saved: No space left on device: \S+ \w+ are free in .*/out, \S+ \wB more are "
        r"needed\. Newest whole checkpoint: checkpoint-2$"
    )  # fmt: skip
    assert [is_whole(path) for path in checkpoints_in(disk / "out")] == [True, False]
    assert ("warning: " in run.stdout and "2 checkpoints of" in run.stdout) or "lora" in kind


@kinds("one")
def test_the_manifest_has_no_room(kind, flags, mount):
    """The files of a checkpoint have been written, and the disk holds no more: told at one of the next steps, and not
    at the next save."""
    more = [*KINDS[kind][0], "--report_to", "none"]
    disk = mount("-t", "tmpfs", "tmpfs")
    run = start(kind, [*flags, *more, "--output_dir", disk / "out", "--max_steps", 2])
    assert run.returncode == 0, run.stderr[-3000:]
    held = len(list((disk / "out/checkpoint-2").rglob("*"))) - 1  # not the manifest
    shutil.rmtree(disk / "out")
    mount("-o", f"remount,nr_inodes={held + 4}")  # beside the disk, the run's and the checkpoint's directory, .lock
    run = start(kind, [*flags, *more, "--output_dir", disk / "out", "--max_steps", 400, "--save_steps", 40])
    check_failed(
        run, r"checkpoint-40 could not be saved: No space left on device: \S+ \w+ are free in \S+/out\. Newest"
    )
    steps = [int(step) for step in re.findall(r"^step (\d+)/", run.stdout, re.MULTILINE)]
    assert 40 <= max(steps) < 60


@kinds("one")
def test_a_limit_on_the_size_of_files(kind, flags, tmp_path):
    """The second save meets it: RLIMIT_FSIZE, as `ulimit -f` sets it."""
    script, out = tmp_path / "limited.py", tmp_path / "out"
    script.write_text(LIMITED)
    limit = 100_000 if "lora" in kind else 600_000
    arguments = [TRAIN / "train.py", limit, *flags, *KINDS[kind][0], "--output_dir", out]
    run = start(kind, arguments, script)
    check_failed(run, r"checkpoint-2 could not be saved: File too large\. Newest whole checkpoint: none$")
    assert [is_whole(path) for path in checkpoints_in(out)] == [False]


def begin(kind, flags, out):
    """A long run that has saved a first checkpoint."""
    more, ranks, _ = KINDS[kind]
    args = [*flags, *more, "--output_dir", out, "--max_steps", 100_000, "--save_steps", 5]
    variables = environment({"OMP_NUM_THREADS": "1"})
    run = ServerRun(TRAIN / "train.py", args, ranks, variables, None, "")
    deadline = time.monotonic() + 120
    while not any(map(is_whole, checkpoints_in(out))):
        assert time.monotonic() < deadline, run.wait(1).stderr[-2000:]
        time.sleep(0.05)
    return run


@kinds("ddp")
def test_the_directory_is_deleted_in_mid_run(kind, flags, tmp_path):
    out = tmp_path / "out"
    run = begin(kind, flags, out)
    out.rename(tmp_path / "moved")  # at once, unlike a deletion
    shutil.rmtree(tmp_path / "moved", ignore_errors=True)
    check_failed(run.wait(60), r"could not be saved: the directory is gone\. Newest whole checkpoint: none$")
    assert not out.exists()


def test_a_directory_that_becomes_read_only(flags, tmp_path, mount):
    disk = mount("-t", "tmpfs", "tmpfs")
    run = begin("one", flags, disk / "out")
    mount("--bind", os.fspath(disk))  # of which no file is open yet
    mount("-o", "remount,bind,ro")
    check_failed(run.wait(60), r"could not be saved: Read-only file system\. Newest whole checkpoint: checkpoint-\d+$")
    assert any(map(is_whole, checkpoints_in(disk / "out")))


def test_not_even_one_fits(flags, mount):
    disk = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    for kind in ("one", "ddp"):
        run = start(kind, [*flags, "--output_dir", disk / "out"], timeout=60)
        assert run.returncode == 2 and run.stderr.count("refused: ") == 1, run.stderr[-2000:]
        assert re.search(r"a checkpoint takes 3\.\d+ MB, and 1\.05 MB are free", run.stderr)
        assert not (disk / "out").exists()


def test_curves_that_cannot_be_written_end_no_training(flags, mount, tmp_path):
    disk = mount("-t", "tmpfs", "-o", "size=16k", "tmpfs")
    arguments = [*flags, "--output_dir", tmp_path / "out", "--logging_dir", disk / "curves"]
    (disk / "full").write_bytes(b"0" * 12_288)  # one page is left
    run = start("one", arguments, timeout=60)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "warning: TensorBoardCallback has failed and reports no more: " in run.stdout
    assert [is_whole(path) for path in checkpoints_in(tmp_path / "out")] == [True, True]


def test_a_log_that_cannot_be_written_ends_no_training(flags, mount, tmp_path):
    disk = mount("-t", "tmpfs", "-o", "size=16k", "tmpfs")
    (disk / "full").write_bytes(b"0" * 12_288)
    command = [*launch_command(TRAIN / "train.py"), *map(str, flags), "--output_dir", str(tmp_path / "out")]
    (disk / "log").write_bytes(b"0" * 4_000)  # what is left of its page holds the first words
    shell = f"{shlex.join(command)} --report_to none >> {disk}/log 2>&1"
    run = run_command(["bash", "-c", shell], timeout=120)
    assert run.returncode == 0
    assert [is_whole(path) for path in checkpoints_in(tmp_path / "out")] == [True, True]
    assert (disk / "log").stat().st_size == 4_096
