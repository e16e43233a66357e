"""Wrong input, through the command line: exit code 2 within seconds, one message that says what and where, no
traceback."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from conftest import TRAIN, run_command
from runs import free_port
from sft.messages import Refused
from sft.training import output_dir

PATH = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def good(model, rows, out):
    return ["--model_name_or_path", model, "--train_data_file", rows, "--output_dir", out]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda a, d: [*a, "--model_name_or_path", d / "none"], "--model_name_or_path {d}/none: no such directory"),
        (lambda a, d: [*a, "--model_name_or_path", d], "--model_name_or_path {d}: has no config.json"),
        (lambda a, d: [*a, "--train_data_file", d / "none.jsonl"], "--train_data_file {d}/none.jsonl: no such file"),
        (lambda a, d: [*a, "--train_data_file", d / "empty.jsonl"], "--train_data_file {d}/empty.jsonl: is empty"),
        (lambda a, d: [*a, "--train_data_file", d / "bad.jsonl"], "{d}/bad.jsonl:2: not JSON"),
        (lambda a, d: [*a, "--use_loar"], "unknown argument --use_loar: did you mean --use_lora?"),
        (lambda a, d: [*a, "--deepspeed", d / "ds.json"], "{d}/ds.json: not a readable json object"),
        (lambda a, d: [*a, "--learning_rate", "abc"], "invalid float value: 'abc'"),
        (lambda a, d: [*a, "--output_dir", d / "run"], "--output_dir {d}/run: holds another run"),
        (
            lambda a, d: [*a, "--use_lora", "--lora_target_modules", "lm_head"],
            "lm_head: the head is the embedding's own",
        ),
        (lambda a, d: [*a, "--use_flash_attn", "--use_cpu"], "--use_flash_attn: FlashAttention needs an NVIDIA GPU"),
    ],
    ids=[
        "path",
        "no-config",
        "no-data",
        "empty-data",
        "bad-row",
        "flag",
        "ds-file",
        "number",
        "other-run",
        "tied-head",
        "flash",
    ],
)
def test_refused_before_a_model_is_loaded(
    spoil, says, model_dir, example_tokenizer_dir, example_rows, run_train, run_here, tmp_path
):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text(example_rows.read_text(encoding="utf-8").splitlines()[0] + "\n{secret\n")
    (tmp_path / "ds.json").write_text("{")
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    args = good(model_dir("moe", example_tokenizer_dir), example_rows, tmp_path / "out")
    began = time.monotonic()
    args = spoil(args, tmp_path)
    # one of them as a user runs it
    run = run_train(args, cold=True) if "none.jsonl" in str(args) else run_here("train.py", args)
    took = time.monotonic() - began
    assert run.returncode == 2, run.stderr
    message = run.stderr[run.stderr.index("refused:") :]
    assert says.format(d=tmp_path) in message
    assert run.stderr.count("refused:") == 1
    assert "Traceback" not in run.stderr + run.stdout
    assert "attention = " not in run.stderr + run.stdout
    assert "secret" not in run.stderr + run.stdout
    assert not (tmp_path / "out").exists()
    assert took < 60


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--use_cla"], "--use_cla: hunyuan_v1_moe, which is built from the architecture flags, has no cross-layer"),
        (["--num_shared_expert", "2"], "--num_shared_expert: hunyuan_v1_moe"),
        (["--use_lora"], "--use_lora: an adapter needs a model"),
    ],
)
def test_an_architecture_that_the_class_cannot_express(
    flags, says, example_tokenizer_dir, example_rows, run_here, tmp_path
):
    args = ["--tokenizer_name_or_path", example_tokenizer_dir, "--train_data_file", example_rows]
    args += ["--output_dir", tmp_path / "out", "--num_experts", 4, "--moe_topk", 2, *flags]
    run = run_here("train.py", args)
    assert run.returncode == 2 and says in run.stderr, run.stderr


@pytest.mark.parametrize(
    ("env", "flags", "says"),
    [
        ({"MODEL_PATH": "m"}, [], "TRAIN_DATA_FILE is not set"),
        ({"OUTPUT_DIR": "o"}, ["--use_lora"], "run first: bash"),
        ({"HOST_GPU_NUM": "many"}, [], "HOST_GPU_NUM=many"),
        ({"STALL_TIMEOUT": "soon"}, [], "STALL_TIMEOUT=soon"),
    ],
)
def test_train_sh_refuses_before_it_starts_anything(env, flags, says, tmp_path):
    script = tmp_path / "train" / "train.sh"
    shutil.copytree(TRAIN, script.parent, ignore=shutil.ignore_patterns("output", "__pycache__"))
    before = sorted(tmp_path.rglob("*"))
    run = run_command(["bash", str(script), *flags], env=env | {"PYTHONDONTWRITEBYTECODE": "1"}, cwd=tmp_path)
    assert run.returncode == 2 and says in run.stderr, run.stderr
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize("script", ["train.sh", "merge_lora_weight.sh"])
def test_sh_in_place_of_bash(script):
    """T14."""
    run = run_command(["sh", str(TRAIN / script), "--help"], env=PATH)
    assert run.returncode == 0 and "usage" in run.stdout, run.stderr


def test_an_unknown_number_of_gpus_is_not_0(tmp_path):
    """T15: refused, unless it is given."""
    train = shutil.copytree(TRAIN, tmp_path / "train", ignore=shutil.ignore_patterns("output", "__pycache__"))
    with (train / "sft" / "nodes" / "examine.py").open("a") as file:
        file.write("\n\ndef number_of_gpus(env):\n    return None\n")
    command, env = ["bash", str(train / "train.sh")], {"MODEL_PATH": "m"}
    run = run_command(command, env=env)
    assert run.returncode == 2 and "nvidia-smi -pm 1" in run.stderr, run.stderr
    run = run_command(command, env=env | {"HOST_GPU_NUM": "2"})
    assert run.returncode == 2 and "TRAIN_DATA_FILE is not set" in run.stderr, run.stderr


@pytest.mark.parametrize("overwrite", [[], ["--overwrite_output_dir"]], ids=["", "overwrite"])
@pytest.mark.parametrize("kind", ["model", "old model", "adapter", "tokenizer", "checkpoint"])
def test_another_models_directory_is_not_overwritten(
    kind, overwrite, model_dir, example_tokenizer_dir, example_rows, run_here, tmp_path
):
    """S10."""
    out = tmp_path / "run" / "checkpoint-4" if kind == "checkpoint" else tmp_path / "downloaded"
    files = {"model": ["config.json", "model-00001-of-00002.safetensors"], "old model": ["pytorch_model.bin"]}
    files |= {"adapter": ["adapter_config.json"], "tokenizer": ["tokenizer_config.json"]}
    files |= {"checkpoint": ["config.json", "trainer_state.json"]}
    out.mkdir(parents=True)
    for name in files[kind]:
        (out / name).write_text("{}")
    run = run_here("train.py", [*good(model_dir("moe", example_tokenizer_dir), example_rows, out), *overwrite])
    assert run.returncode == 2, run.stderr
    assert f"--output_dir {out}: contains a model that no run has written" in run.stderr
    assert sorted(path.name for path in out.iterdir()) == files[kind]


def test_a_second_job_in_the_same_directory_is_refused(
    model_dir, example_tokenizer_dir, example_rows, run_here, run_train, tmp_path
):
    """S9: before it reads any row, with several ranks too, whatever else is given. Not once the first is over."""
    model, out = model_dir("dense", example_tokenizer_dir), tmp_path / "out"
    out.mkdir()
    args = [*good(model, example_rows, out), "--max_steps", 1]
    with open(out / ".lock", "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        for flags in ([], ["--overwrite_output_dir"]):
            run = run_here("train.py", [*args, *flags])
            assert run.returncode == 2, run.stderr
            assert f"--output_dir {out}: another running job uses it" in run.stderr
            assert "rows:" not in run.stdout
        run = run_train(args, launcher="torchrun", nproc=2)
        assert run.returncode != 0 and run.stderr.count("refused: ") == 1, run.stderr[-2000:]
        assert [path.name for path in out.iterdir()] == [".lock"]
    run = run_train(args)
    assert run.returncode == 0, run.stderr[-2000:]


def test_without_locks_one_line_and_no_refusal(tmp_path, monkeypatch, capsys):
    """And a directory that cannot be written is refused where it would be made."""
    args = types.SimpleNamespace(output_dir=str(tmp_path / "a" / "b"), should_save=True, world_size=1)
    output_dir.lock_output_dir(args)
    assert not (tmp_path / "a").exists(), "nothing is made before the run begins"

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_dir.fcntl, "flock", no_locks)
    for _ in range(2):
        output_dir.lock_output_dir(args, begin=True)
    assert capsys.readouterr().out.count("has no locks") == 1 and (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    args.output_dir = str(tmp_path / "file" / "out")
    with pytest.raises(Refused, match="cannot be written"):
        output_dir.lock_output_dir(args, begin=True)


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--use_loar"], 2),
        (["--help"], 0),
        (["--model_name_or_path", "nowhere"], 2),
        (["--train_data_file", "bad"], 2),
    ],
    ids=["flag", "help", "model", "rows"],
)
def test_a_refusal_leaves_nothing_behind(flags, code, example_rows, tmp_path):
    """U3, through train.sh: no directory, no log."""
    (tmp_path / "bad").write_text("{secret\n")
    args = ["--train_data_file", str(example_rows), "--output_dir", str(tmp_path / "new" / "out"), *flags]
    run = run_command(["bash", str(TRAIN / "train.sh"), *args], env=PATH, cwd=tmp_path)
    assert run.returncode == code and "secret" not in run.stdout, run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


AT_EXIT = """
import atexit, os, pathlib, time
if "RANK" in os.environ:
    file = pathlib.Path(os.environ["ENDED"], os.environ["RANK"])
    atexit.register(lambda: file.write_text(str(time.time())))
"""


@pytest.mark.parametrize("code", [2, 0], ids=["refused", "done"])
def test_ranks_end_together_after_their_atexit_handlers(
    code, model_dir, example_tokenizer_dir, example_rows, tmp_path
):
    """H1: as wandb registers one. Of a refusal that all ranks have come to only rank 0 speaks, and none waits."""
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT)
    (tmp_path / "bad.jsonl").write_text("{secret\n")
    rows = tmp_path / "bad.jsonl" if code else example_rows
    args = good(model_dir("dense", example_tokenizer_dir), rows, tmp_path / "out")
    command = [sys.executable, str(TRAIN / "train.py"), *map(str, args), "--max_steps", "1"]
    job = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    job |= {"PYTHONPATH": tmp_path, "ENDED": tmp_path, "OMP_NUM_THREADS": 1}
    ranks = []
    for rank in (0, 1):
        env = os.environ | {key: str(value) for key, value in (job | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [code, code], said
    ended = [float((tmp_path / rank).read_text()) for rank in "01"]
    assert abs(ended[0] - ended[1]) < 5, "neither waits for the other to be ended"
    assert [text.count("refused: ") for text in said] == [1 if code else 0, 0]
    if not code:
        assert json.loads((tmp_path / "out" / "train_results.json").read_text())["world_size"] == 2
