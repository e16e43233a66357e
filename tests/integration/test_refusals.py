"""Wrong input, through the command line: exit code 2 within seconds, one message that says what and where, no
traceback."""

import time

import pytest

from conftest import TRAIN, run_command


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
        (lambda a, d: [*a, "--deepspeed", d / "ds.json"], "--deepspeed {d}/ds.json: not valid JSON"),
        (lambda a, d: [*a, "--learning_rate", "abc"], "invalid float value: 'abc'"),
        (lambda a, d: [*a, "--output_dir", d / "run"], "--output_dir {d}/run: holds another run"),
        (lambda a, d: [*a, "--use_flash_attn", "--use_cpu"], "--use_flash_attn: FlashAttention needs an NVIDIA GPU"),
    ],
    ids=["path", "no-config", "no-data", "empty-data", "bad-row", "flag", "ds-file", "number", "other-run", "flash"],
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
    run = run_train(args) if "none.jsonl" in str(args) else run_here("train.py", args)
    took = time.monotonic() - began
    assert run.returncode == 2, run.stderr
    message = run.stderr[run.stderr.index("refused:") :]
    assert says.format(d=tmp_path) in message
    assert run.stderr.count("refused:") == 1
    assert "Traceback" not in run.stderr + run.stdout
    assert "Loading weights" not in run.stderr + run.stdout
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
        ({}, ["--resume_from_checkpoint", "x/checkpoint-1"], "TRAIN_DATA_FILE is not set"),
        ({"OUTPUT_DIR": "o"}, ["--use_lora"], "run first: bash"),
        ({"HOST_GPU_NUM": "many"}, [], "HOST_GPU_NUM=many"),
        ({"STALL_TIMEOUT": "soon"}, [], "STALL_TIMEOUT=soon"),
    ],
)
def test_train_sh_refuses_before_it_starts_anything(env, flags, says, tmp_path):
    script = tmp_path / "train" / "train.sh"
    script.parent.mkdir()
    script.write_bytes((TRAIN / "train.sh").read_bytes())
    run = run_command(["bash", str(script), *flags], env=env, cwd=tmp_path)
    assert run.returncode == 2 and says in run.stderr, run.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["train", "train.sh"], "nothing is written"
