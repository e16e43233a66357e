"""The chain of the README: example → LoRA → merge → chat, each with nothing set after the one before."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conftest import TRAIN, run_command

PATH = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def train_dir(tmp_path_factory):
    """A copy of train/, so that its output does not mix with the user's."""
    copy = tmp_path_factory.mktemp("clone") / "train"
    shutil.copytree(TRAIN, copy, ignore=shutil.ignore_patterns("output", "__pycache__"))
    return copy


def sh(script, *flags, cwd):
    return run_command(["bash", str(script), *flags], env=PATH, cwd=cwd)


def test_example_then_lora_then_merge_then_chat(train_dir, tmp_path):
    # 1. The example learns what is not among its rows.
    run = sh(train_dir / "train.sh", cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-3000:]
    out = train_dir / "output" / "example"
    results = json.loads((out / "train_results.json").read_text())
    rows = (train_dir / "example" / "rows.jsonl").read_text(encoding="utf-8")
    lines = (train_dir / "example" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["messages"][-2]["content"] for line in lines]
    assert results["example_prompts"] == len(prompts) >= 20
    assert not any(json.dumps(prompt, ensure_ascii=False) in rows for prompt in prompts)
    assert results["example_correct_before"] == 0
    assert results["example_correct_after"] >= 0.9 * len(prompts)
    assert f"{results['example_correct_after']} after" in run.stdout
    (log,) = out.glob("log_*.txt")
    assert "step 10/" in log.read_text() and "loss" in log.read_text()
    assert any((out / "runs").rglob("events.out.tfevents.*"))

    # 2. Again, as it is: the earlier run is set aside.
    run = sh(train_dir / "train.sh", "--max_steps", "2", "--save_steps", "2", cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-3000:]
    (aside,) = out.glob("previous-*")
    for file in ("model.safetensors", "train_results.json"):
        shutil.copyfile(aside / file, out / file)

    # 3. An adapter on top, merged and asked.
    run = sh(train_dir / "train.sh", "--use_lora", "--max_steps", "20", cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-3000:]
    assert (train_dir / "output" / "example-lora" / "adapter_model.safetensors").is_file()
    run = sh(train_dir / "merge_lora_weight.sh", "--verify", "logits", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    merged = train_dir / "output" / "example-lora-merged"
    assert (merged / "model.safetensors").is_file() and (merged / "tokenizer.json").is_file()
    chat = run_command(
        [sys.executable, str(train_dir / "chat.py"), "--prompt", "请把下面的数字写成中文：8730"], cwd=tmp_path
    )
    assert chat.returncode == 0, chat.stderr[-3000:]
    assert "八千七百三十" in chat.stdout
    assert str(merged) in chat.stderr + chat.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_to_train_sh_reaches_the_training(number, train_dir, tmp_path):
    """Nothing is left running; the exit code is the training's own, with a checkpoint."""
    command = ["bash", str(train_dir / "train.sh"), "--output_dir", str(tmp_path / "out"), "--max_steps", "100000"]
    said = tmp_path / "said.txt"
    with said.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | PATH) as process:
        deadline = time.monotonic() + 120
        while "step 10/" not in said.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(number)
        code = process.wait(timeout=60)
    assert code == 75 and len(list((tmp_path / "out").glob("checkpoint-*"))) == 1, said.read_text()[-1000:]
    left = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in left if f"{tmp_path}/out" in (line or [])]


def test_two_processes_and_the_exit_code_of_the_training(train_dir, example_tokenizer_dir, model_dir, tmp_path):
    """`HOST_GPU_NUM=2` on a CPU; then a run that stops itself with exit code 3 at a loss that is nan."""
    import torch
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(model_dir("dense", example_tokenizer_dir), tmp_path / "base")
    rows = train_dir / "example" / "rows.jsonl"
    env = PATH | {"MODEL_PATH": str(base), "TRAIN_DATA_FILE": str(rows), "OUTPUT_DIR": str(tmp_path / "out")}
    env |= {"HOST_GPU_NUM": "2"}
    script = ["bash", str(train_dir / "train.sh"), "--max_steps", "3"]
    run = run_command(script, env=env)
    assert run.returncode == 0, run.stdout[-3000:]
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["world_size"] == 2
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = run_command([*script, "--overwrite_output_dir"], env=env)
    assert run.returncode == 3, run.stdout[-3000:]
    assert run.stdout.count("stopped: the loss is nan at step 1") == 1
