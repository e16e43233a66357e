"""A checkpoint's run goes on as it was planned; what is given and would make it another is refused."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from conftest import REPO, TRAIN, run_command
from sft.messages import Refused
from sft.training.record import read_record

PATH = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
ZERO2, ZERO3 = "ds_zero2_no_offload.json", "ds_zero3_no_offload.json"
KNOWN = ["--max_seq_length", 4096, "--packing", "none", "--train_on", "all", "--overlong", "truncate"]


def lines_of(readme, script):
    """The first command of a README that goes on by a script."""
    text = (REPO / readme).read_text(encoding="utf-8")
    return re.search(rf"^.*{script} --resume_from_checkpoint.*?(?=\s+#|$)", text, re.M)[0]


def differences(one, two):
    """(largest of the losses, largest of the final weights) between two output directories."""
    logs = [json.loads((d / "trainer_state.json").read_text())["log_history"] for d in (one, two)]
    losses = [[(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs]
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
    means = [json.loads((d / "train_results.json").read_text())["train_loss"] for d in (one, two)]
    pairs = [(a, b) for (_, a), (_, b) in zip(*losses)] + [tuple(means)]
    name = "adapter_model.safetensors" if (one / "adapter_model.safetensors").exists() else "model.safetensors"
    states = [load_file(d / name) for d in (one, two)]
    assert states[0].keys() == states[1].keys()
    weights = max((states[0][key].float() - states[1][key].float()).abs().max().item() for key in states[0])
    return max(abs(a - b) for a, b in pairs), weights


@pytest.fixture(scope="module")
def first(model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path_factory):
    """(flags, output directory) of a run of 6 steps that was planned otherwise than the defaults, every time. What is
    logged and what is saved do not coincide."""
    out = tmp_path_factory.mktemp("first") / "out"
    flags = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir), "--train_data_file", example_rows]
    flags += ["--max_steps", 6, "--save_steps", 3, "--logging_steps", 2, "--learning_rate", 1e-3, "--min_lr", 1e-4]
    flags += ["--lr_scheduler_type", "cosine", "--warmup_ratio", 0.2, "--per_device_train_batch_size", 2]
    flags += ["--gradient_accumulation_steps", 2, "--seed", 7, "--max_seq_length", 64, "--packing", "batch"]
    flags += ["--weight_decay", 0.1, "--hub_token", "hf_verysecret"]
    run = run_train([*flags, "--output_dir", out])
    assert run.returncode == 0, run.stderr[-3000:]
    return flags, out


def test_what_the_readmes_say_goes_on_as_planned(first, example_rows, run_train, tmp_path):
    """S1, S11: without any flag of the run, from the middle of what is logged."""
    _, out = first
    assert lines_of("README.md", "train.py") == lines_of("README_CN.md", "train.py")
    shutil.copytree(out / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    line = lines_of("README.md", "train.py").replace("out/checkpoint-100", "out/checkpoint-3")
    run = run_command(
        [sys.executable, *line.replace("train/", f"{TRAIN}/").replace("rows.jsonl", str(example_rows)).split()[1:]],
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "missing keys" not in run.stdout + run.stderr
    assert differences(out, tmp_path / "out") == (0, 0)
    finished = run_train(
        [
            "--resume_from_checkpoint",
            out / "checkpoint-6",
            "--train_data_file",
            example_rows,
            "--output_dir",
            tmp_path / "end",
        ]
    )
    assert finished.returncode == 0 and "no step is left" in finished.stdout
    assert differences(out, tmp_path / "end") == (pytest.approx(0, abs=1e-12), 0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--per_device_train_batch_size", 4], "--per_device_train_batch_size 4 (the run: 2)"),
        (["--gradient_accumulation_steps", 1], "--gradient_accumulation_steps 1 (the run: 2)"),
        (["--seed", 3], "--seed 3 (the run: 7)"),
        (["--learning_rate", 2e-3], "--learning_rate 0.002 (the run: 0.001)"),
        (["--min_lr", 0], "--min_lr 0 (the run: 0.0001)"),
        (["--lr_scheduler_type", "linear"], "--lr_scheduler_type linear (the run: cosine)"),
        (["--warmup_steps", 1], "--warmup_steps 1 (the run: 0)"),
        (["--weight_decay", 0], "--weight_decay 0 (the run: 0.1)"),
        (["--optim", "sgd"], "--optim sgd (the run: adamw_torch"),
        (["--packing", "none"], "--packing none (the run: batch)"),
        (["--max_seq_length", 4096], "--max_seq_length 4096 (the run: 64)"),
        (["--use_lora"], "--use_lora True (the run: False)"),
        (["--lora_rank", 8], "--lora_rank 8 (the run: 64)"),
        (["--train_attention_params_only"], "--train_attention_params_only True (the run: False)"),
        (["--model_code", "remote"], "--model_code remote (the run: auto)"),
        (["--deepspeed", ZERO3], "--deepspeed ZeRO-3 (the run: none)"),
        (["--bf16"], "--bf16 True (the run: False)"),
        (["--eval_split", 0.1], "--eval_split 0.1 (the run: None)"),
        (["--seed", 3, "--packing", "none", "--max_steps", 9], "--packing none (the run: batch)"),
    ],
    ids=lambda value: "".join(map(str, value[:1])) if isinstance(value, list) else "",
)  # fmt: skip
def test_another_run_is_refused_with_both_values(flags, says, first, example_rows, run_here, tmp_path):
    """S2, S7, from the command line and from a file; all in one message."""
    args = ["--resume_from_checkpoint", first[1] / "checkpoint-3", "--train_data_file", example_rows]
    args += ["--output_dir", tmp_path / "out"]
    run = run_here("train.py", [*args, *flags])
    assert run.returncode == 2 and says in run.stderr and run.stderr.count("refused: ") == 1, run.stderr
    assert not (tmp_path / "out").exists()
    if "--seed" in flags:
        assert "--seed 3 (the run: 7)" in run.stderr and "max_steps" not in run.stderr
        file = tmp_path / "run.yaml"
        pairs = zip([*args, *flags][::2], [*args, *flags][1::2])
        file.write_text("".join(f"{key.removeprefix('--')}: {value}\n" for key, value in pairs))
        assert says in run_here("train.py", [file]).stderr


def test_other_rows_and_another_number_of_processes_are_refused(first, example_rows, run_here, run_train, tmp_path):
    fewer = tmp_path / "rows.jsonl"
    fewer.write_bytes(b"".join(example_rows.read_bytes().splitlines(True)[:-1]))
    args = ["--resume_from_checkpoint", first[1] / "checkpoint-3", "--output_dir", tmp_path / "out"]
    run = run_here("train.py", [*args, "--train_data_file", fewer])
    assert run.returncode == 2 and "num_rows 899 (the run: 900)" in run.stderr, run.stderr
    others = tmp_path / "others.jsonl"
    others.write_bytes(b"".join(reversed(example_rows.read_bytes().splitlines(True))))
    run = run_here("train.py", [*args, "--train_data_file", others])
    assert run.returncode == 2 and "these are not the run's rows" in run.stderr, run.stderr
    run = run_train([*args, "--train_data_file", example_rows], launcher="torchrun", nproc=3)
    assert run.returncode != 0 and run.stderr.count("refused: ") == 1, run.stderr[-2000:]
    assert "processes 3 (the run: 1): a step has 2 batches" in run.stderr and not (tmp_path / "out").exists()


def test_another_model_tokenizer_or_directory_is_refused(
    first, model_dir, make_model_dir, example_tokenizer_dir, example_rows, run_here, tmp_path
):
    """Of a run of all weights, whose model and tokenizer are the checkpoint's."""
    args = ["--resume_from_checkpoint", first[1] / "checkpoint-3", "--train_data_file", example_rows]
    args += ["--output_dir", tmp_path / "out"]
    dense = model_dir("dense", example_tokenizer_dir)
    run = run_here("train.py", [*args, "--model_name_or_path", dense])
    assert run.returncode == 2 and "is not the base of the run" in run.stderr, run.stderr
    other = shutil.copytree(example_tokenizer_dir, tmp_path / "tokenizer")
    (other / "chat_template.jinja").write_text("!" + (other / "chat_template.jinja").read_text())
    run = run_here("train.py", [*args, "--tokenizer_name_or_path", other])
    assert run.returncode == 2 and f"{other}: is not the run's tokenizer" in run.stderr, run.stderr
    twin = make_model_dir("moe", example_tokenizer_dir, tmp_path / "twin", seed=5)
    run = run_here("train.py", [*args, "--model_name_or_path", twin])
    assert run.returncode == 2 and f"{twin}: is not the base of the run" in run.stderr, run.stderr
    assert not (tmp_path / "out").exists()


def test_what_only_says_how_long_or_how_often_holds(first, example_rows, run_train, tmp_path):
    """S3; and one line has the next learning rate, before and after."""
    flags = ["--resume_from_checkpoint", first[1] / "checkpoint-3", "--train_data_file", example_rows]
    flags += ["--output_dir", tmp_path, "--save_steps", 4, "--logging_steps", 1, "--num_train_epochs", 0.05]
    flags += ["--gradient_checkpointing", "--report_to", "none"]
    run = run_train(flags)
    assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-4",
        "checkpoint-8",
    ]
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, *range(4, 13)]
    said = re.search(r"next learning rate = (\S+) \(step 4 of 12; as it was planned (\S+)\)", run.stdout)
    assert float(said[1]) == pytest.approx(entries[1]["learning_rate"], rel=1e-3)
    before = json.loads((first[1] / "trainer_state.json").read_text())["log_history"][1]  # of step 4
    assert float(said[2]) == pytest.approx(before["learning_rate"], rel=1e-3)


def without_plan(checkpoint, target):
    """A checkpoint as it was before it recorded its run."""
    names = shutil.ignore_patterns("run.json", "manifest.json")
    return shutil.copytree(checkpoint, target, ignore=names)


def test_a_checkpoint_that_knows_less(first, example_rows, run_train, run_here, tmp_path):
    """Of an earlier release: what it does not say must be given, the rest is compared and goes on as planned."""
    old = without_plan(first[1] / "checkpoint-3", tmp_path / "checkpoint-3")
    args = ["--resume_from_checkpoint", old, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_here("train.py", args)
    assert run.returncode == 2 and "--max_seq_length, --packing, --train_on, --overlong" in run.stderr, run.stderr
    args += ["--max_seq_length", 64, "--packing", "batch", "--train_on", "all", "--overlong", "truncate"]
    run = run_here("train.py", [*args, "--seed", 8, "--warmup_ratio", 0.2])
    assert run.returncode == 2 and "differ from its run: --seed 8 (the run: 7). Leave" in run.stderr, run.stderr
    run = run_train(args)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "does not record --eval_split, --model_code, --trainable_params" in run.stdout
    assert differences(first[1], tmp_path / "out") == (0, 0)


@pytest.mark.parametrize("harm", [os.link, shutil.copyfile])
def test_arguments_of_another_program_and_what_they_must_not_do(harm, tmp_path):
    """Hugging Face's own arguments are understood; reading a file runs nothing that is in it."""
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1, "log_history": []}')
    theirs = transformers.TrainingArguments(tmp_path, save_strategy="epoch", lr_scheduler_type="cosine", use_cpu=True)
    torch.save(theirs, tmp_path / "training_args.bin")
    plan = read_record(tmp_path)["arguments"]
    expected = {"save_strategy": "epoch", "lr_scheduler_type": "cosine", "seed": 42, "use_lora": False, "processes": 1}
    assert {key: plan[key] for key in expected} == expected and "accelerator_config" not in plan

    class Harm:
        def __reduce__(self):
            return harm, (str(tmp_path / "trainer_state.json"), str(tmp_path / "harm"))

    theirs.seed = Harm()
    torch.save(theirs, tmp_path / "training_args.bin")
    with contextlib.suppress(Refused):
        read_record(tmp_path)
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (tmp_path / "harm").exists(), "and it would have"


def test_no_token_is_written(first):
    """T10, in any file of the run."""
    files = [path for path in first[1].rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if b"hf_verysecret" in path.read_bytes()]


# ------------------------------------------------------------------------------------------- cut off, through train.sh


def start(flags, env, said):
    command = ["bash", str(TRAIN / "train.sh"), *map(str, flags)]
    return subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | PATH | env, start_new_session=True)


@pytest.mark.parametrize(
    ("what", "stage"),
    [
        ("full", None),
        pytest.param("lora", ZERO3, marks=[pytest.mark.campaign, pytest.mark.needs_gxx]),
        pytest.param("lora", None, marks=pytest.mark.campaign),
        pytest.param("lora", ZERO2, marks=[pytest.mark.campaign, pytest.mark.needs_gxx]),
        pytest.param("full", ZERO2, marks=[pytest.mark.campaign, pytest.mark.needs_gxx]),
        pytest.param("full", ZERO3, marks=[pytest.mark.campaign, pytest.mark.needs_gxx]),
    ],
)
def test_stopped_and_gone_on(what, stage, model_dir, example_tokenizer_dir, example_rows, tmp_path):
    """S1, S8: by the line of each README, and by the command that is printed; equal to the undisturbed run."""
    env = {"MODEL_PATH": str(model_dir("moe", example_tokenizer_dir)), "TRAIN_DATA_FILE": str(example_rows)}
    env |= {"DS_CONFIG": stage, "HOST_GPU_NUM": "2", "OMP_NUM_THREADS": "1"} if stage else {}
    where = {key: env[key] for key in ("HOST_GPU_NUM", "OMP_NUM_THREADS") if key in env}
    flags = ["--max_steps", 40, "--save_steps", 10, "--learning_rate", 1e-3, "--logging_steps", 3]
    flags += ["--per_device_train_batch_size", 8, "--max_seq_length", 128]
    flags += ["--use_lora", "--lora_rank", 8] if what == "lora" else []
    whole = run_command(
        ["bash", str(TRAIN / "train.sh"), *map(str, flags)], env=PATH | env | {"OUTPUT_DIR": str(tmp_path / "whole")}
    )
    assert whole.returncode == 0, whole.stdout[-3000:]

    out, said = tmp_path / "cut", tmp_path / "said.txt"
    with said.open("w") as file:
        job = start(flags, env | {"OUTPUT_DIR": str(out)}, file)
        deadline = time.monotonic() + 300
        while not (out / "checkpoint-10" / "trainer_state.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # in the middle of a step
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=60) == 75, said.read_text()[-3000:]
    text = said.read_text()
    (line,) = re.findall(r"stopped on request at step (\d+)\. Last checkpoint: (\S+)\. Continue with:\n(.*)", text)
    assert "Traceback" not in text and "Error" not in text and "failed" not in text
    assert line[1] == str(out / f"checkpoint-{line[0]}") and 10 < int(line[0]) < 40
    assert text.splitlines()[-1] == line[2]

    lines = [
        lines_of(readme, "train.sh").replace("train/train.sh", str(TRAIN / "train.sh"))
        for readme in ("README.md", "README_CN.md")
    ]
    lines = [line.replace("rows.jsonl", str(example_rows)) for line in lines]
    lines = [re.sub(r"\S+/checkpoint-\d+", "{}", line) for line in lines]
    for number, command in enumerate([*sorted(set(lines)), None]):
        copy = shutil.copytree(out, tmp_path / f"{number}" / "cut")
        command = command.format(copy / Path(line[1]).name) if command else line[2].replace(str(out), str(copy))
        run = run_command(["bash", "-c", command], env=PATH | (where if number == 0 else {}))
        assert run.returncode == 0, run.stdout[-3000:]
        losses, weights = differences(tmp_path / "whole", copy)
        print(f"{what}, {stage}: {command}: largest difference of losses {losses:.1e}, of weights {weights:.1e}")
        assert losses <= 1e-6 and weights <= 1e-6
