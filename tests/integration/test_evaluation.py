"""Rows to evaluate on: the loss is the mean over their supervised tokens, and the best checkpoint is what is kept."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import reference
from conftest import EXAMPLE_TOKENIZER


def loss_on(model_dir: Path, rows_file: Path) -> float:
    """Mean over all supervised tokens, each row by itself."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    total = supervised = 0
    for row in reference.encode_rows(rows_file, AutoTokenizer.from_pretrained(EXAMPLE_TOKENIZER)):
        count = sum(label != reference.IGNORED for label in row["labels"][1:])
        with torch.no_grad():
            total += model(**reference.pad([row], 0), use_cache=False).loss.item() * count
        supervised += count
    return total / supervised


def evaluations(output: Path) -> list[float]:
    log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["eval_loss"] for entry in log if "eval_loss" in entry]


WAYS = {  # name: (flags, ranks)
    "one": ([], 1),
    "one, packed": (["--packing", "bin", "--max_seq_length", "128"], 1),
    "lora": (["--use_lora", "--packing", "batch"], 1),
    "zero3": (["--deepspeed", "ds_zero3_no_offload.json"], 2),
    "zero3, lora": (["--deepspeed", "ds_zero3_no_offload.json", "--use_lora"], 2),
    "zero2": (["--deepspeed", "ds_zero2_no_offload.json"], 2),
    "two ranks": ([], 2),
}
GUARD = ("one", "zero3, lora")
CASES = [
    pytest.param(
        name,
        marks=([] if name in GUARD else [pytest.mark.campaign])
        + ([pytest.mark.needs_gxx] if "--deepspeed" in WAYS[name][0] else []),
    )
    for name in WAYS
]


@pytest.mark.parametrize("way", CASES)
def test_the_best_checkpoint_is_the_final_model(
    way, train_and_eval_rows, model_dir, example_tokenizer_dir, run_train, tmp_path
):
    """The learning rate is so high that the loss soon gets worse: the run ends early, not with its last weights."""
    flags, ranks = WAYS[way]
    rows, eval_rows = train_and_eval_rows
    model, out = model_dir("moe", example_tokenizer_dir), tmp_path / "out"
    args = ["--model_name_or_path", model, "--train_data_file", rows, "--eval_data_file", eval_rows]
    args += ["--output_dir", out, "--max_steps", 60, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 1]
    args += ["--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 4, "--lr_scheduler_type", "constant"]
    args += ["--learning_rate", 10.0 if "--use_lora" in flags else 0.5, "--save_only_model", "false"]
    args += ["--load_best_model_at_end", "--early_stopping_patience", 2, *flags]
    run = run_train(args, launcher="torchrun" if ranks > 1 else "python", nproc=ranks)
    assert run.returncode == 0, run.stderr[-3000:]
    losses = evaluations(out)
    best = losses.index(min(losses))
    assert best + 3 == len(losses) < 30, "stopped after two evaluations without a better loss"
    assert losses[-1] > losses[best]

    if "--use_lora" in flags:
        name, found = "adapter_model.safetensors", run_merged_loss(model, out, eval_rows)
    else:
        name, found = "model.safetensors", loss_on(out, eval_rows)
    assert found == pytest.approx(losses[best], abs=1e-5), "of the final directory, by a plain loop"
    checkpoint = out / f"checkpoint-{2 * (best + 1)}"
    ours, kept = load_file(out / name), load_file(checkpoint / name)
    assert ours.keys() == kept.keys() and all(torch.equal(ours[k], kept[k]) for k in ours)
    results = json.loads((out / "train_results.json").read_text(encoding="utf-8"))
    assert results["num_eval_examples"] == 13 and results["num_examples"] == 100


def run_merged_loss(model, adapter, rows_file):
    from peft import PeftModel

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload()
    merged.save_pretrained(adapter / "merged")
    return loss_on(adapter / "merged", rows_file)


def test_a_share_is_split_off_and_evaluated_when_a_checkpoint_is_saved(
    example_rows, model_dir, example_tokenizer_dir, run_train, tmp_path
):
    args = ["--model_name_or_path", model_dir("dense", example_tokenizer_dir), "--train_data_file", example_rows]
    args += ["--output_dir", tmp_path, "--max_steps", 4, "--save_steps", 2, "--eval_split", 0.05]
    run = run_train(args)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "eval_strategy = steps (there are rows to evaluate on)" in run.stdout
    results = json.loads((tmp_path / "train_results.json").read_text(encoding="utf-8"))
    assert 20 < results["num_eval_examples"] < 80
    assert results["num_examples"] + results["num_eval_examples"] == results["num_rows"] == 900
    assert len(evaluations(tmp_path)) == 2 and "eval_loss" in run.stdout
