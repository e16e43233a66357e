"""Losses of fixed runs, kept in tests/losses: a change that is not meant to change training shows the same ones.

One that is meant to says why in its commit, and writes them anew: `UPDATE_LOSSES=1 pytest
tests/integration/test_golden_losses.py`.
"""

import json
import os

import pytest

from conftest import TESTS

RUNS = {
    "dense_padded": ("dense", ["--packing", "none", "--gradient_accumulation_steps", 2]),
    "moe_packed_checkpointing": ("moe", ["--packing", "batch", "--gradient_checkpointing"]),
    "moe_lora_warmup_cosine": (
        "moe",
        ["--use_lora", "--lr_scheduler_type", "cosine_with_min_lr", "--min_lr", 1e-4, "--warmup_ratio", 0.2],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_what_they_were(name, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path):
    kind, flags = RUNS[name]
    args = ["--model_name_or_path", model_dir(kind, example_tokenizer_dir), "--train_data_file", example_rows]
    args += ["--output_dir", tmp_path, "--max_steps", 10, "--logging_steps", 1, "--learning_rate", 1e-3]
    args += ["--per_device_train_batch_size", 4, "--save_strategy", "no", *flags]
    run = run_train(args, env={"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    golden = TESTS / "losses" / f"{name}.json"
    said = [round(loss, 6) for loss in losses(tmp_path)]
    if os.environ.get("UPDATE_LOSSES"):
        golden.write_text(json.dumps(said) + "\n")
    expected = json.loads(golden.read_text())
    assert said == pytest.approx(expected, abs=1e-5)
