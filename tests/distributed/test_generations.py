"""One table: every generation × {load, ZeRO-2, ZeRO-3, LoRA on attention, experts, shared experts, checkpoint alone,
resume, merge}, with the difference that was measured in each cell.

    pytest -s -m campaign tests/distributed/test_generations.py
"""

import json
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import reference
from conftest import run_script
from sft.model.directory import ModelDirectory
from sft.model.load import load_model, open_directory
from sft.training.plan import parse_arguments

STEPS, RATE = 8, 1e-3
COLUMNS = ("load", "ZeRO-2", "ZeRO-3", "alone", "resume", "LoRA attention", "LoRA experts", "LoRA shared", "merge")
GENERATIONS = {  # name: (kind of make_model_dir, options, flags)
    "dense": ("dense", {}, []),
    "moe": ("moe", {}, []),
    "remote, as moe": ("remote", {}, []),
    "remote": ("remote", {}, ["--model_code", "remote"]),
    "remote, CLA": ("remote_cla", {}, []),
    "hy_v3": ("hy_v3", {}, []),
    "hy_v3, fused": ("hy_v3", {"fused": True}, []),
    "hy_v4": ("hy_v4", {}, []),
}

# the parts stand, one by one, in tests that every push runs
pytestmark = [pytest.mark.needs_gxx, pytest.mark.campaign]


@pytest.fixture(scope="module")
def table():
    """{generation: {column: difference}}, printed at the end."""
    found = {name: {} for name in GENERATIONS}
    yield found
    print("\n| generation | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
    for name, cells in found.items():
        if cells:
            print(f"| {name} | " + " | ".join(f"{cells[c]:.1e}" if c in cells else "–" for c in COLUMNS) + " |")


def plainly_loaded(name, directory):
    """A directory's model without a line of ours."""
    if name != "remote, as moe":
        return reference.load(directory)
    kept = json.loads((directory / "config.json").read_text())
    kept = {key: value for key, value in kept.items() if key not in ("model_type", "auto_map", "architectures")}
    kept["head_dim"] = kept["hidden_size"] // kept["num_attention_heads"]
    config = transformers.HunYuanMoEV1Config(**kept)
    return transformers.HunYuanMoEV1ForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32)


def as_made(name, directory):
    """What make_model_dir made, its weights not read but drawn again; with code of its own the class built here."""
    if name.startswith("remote"):
        return plainly_loaded(name, directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))


def logits(model):
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def merge(*args):
    run = run_script("merge_lora_weight.py", args)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("name", GENERATIONS)
def test_generation(name, table, make_model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path):
    cells = table[name]
    kind, options, own_flags = GENERATIONS[name]
    base, base_copy = tmp_path / "base", tmp_path / "base-copy"
    make_model_dir(kind, example_tokenizer_dir, base, **options)
    shutil.copytree(base, base_copy)
    lines = example_rows.read_text(encoding="utf-8").splitlines(keepends=True)
    train_rows, eval_rows = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train_rows.write_text("".join(lines[:64]), encoding="utf-8")
    eval_rows.write_text("".join(lines[64:72]), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(example_tokenizer_dir)
    evaluated = reference.encode_rows(eval_rows, tokenizer)

    def train(out, *flags, model=base, steps=STEPS, stage=3):
        args = ["--model_name_or_path", model] if model else []
        args += ["--train_data_file", train_rows, "--eval_data_file", eval_rows, "--eval_strategy", "steps"]
        args += ["--eval_steps", steps, "--per_device_eval_batch_size", 1, "--max_steps", steps, "--logging_steps", 1]
        args += ["--save_steps", 4, "--learning_rate", RATE, "--per_device_train_batch_size", 4, "--output_dir", out]
        args += ["--deepspeed", f"ds_zero{stage}_no_offload.json", *own_flags, *flags]
        run = run_train(args, launcher="torchrun", nproc=2)
        assert run.returncode == 0, run.stderr[-3000:]
        return out

    def evaluation(out):
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        return next(entry["eval_loss"] for entry in history if "eval_loss" in entry)

    def difference(one, two):
        return max(abs(a - b) for a, b in zip(one, two, strict=True))

    # what is loaded
    arguments = ["--model_name_or_path", str(base), "--train_data_file", "x", "--output_dir", str(tmp_path / "out")]
    model_args, _, training_args = parse_arguments([*arguments, *own_flags])
    with torch.random.fork_rng(devices=[]):
        loaded = load_model(model_args, training_args, tokenizer, open_directory(model_args))
    cells["load"] = (logits(loaded) - logits(as_made(name, base))).abs().max().item()

    # all weights: against a plain loop; hy_v4's indexer is not trained in either
    model = plainly_loaded(name, base)
    order = reference.trainer_order(64, 42, 2, 4, 1, STEPS)
    rate = reference.linear(RATE, STEPS)
    expected = reference.train(base, train_rows, order, rate, example_tokenizer_dir, model=model)
    cells["ZeRO-2"] = difference(losses(train(tmp_path / "zero2", stage=2)), expected)
    full = train(tmp_path / "zero3", "--make_moe_param_leaf_module", model=base_copy)
    cells["ZeRO-3"] = difference(losses(full), expected)

    # the checkpoint alone: its base is gone
    shutil.rmtree(base_copy)
    alone = [reference.mean_loss(plainly_loaded(name, d), evaluated, 4) for d in (full / "checkpoint-8", full)]
    cells["alone"] = difference(alone, [evaluation(full)] * 2)
    names = [ModelDirectory(directory).tensors.keys() for directory in (base, full, full / "checkpoint-4")]
    assert names[0] == names[1] == names[2], "the files' tensors are not the base's"

    # going on from step 4, without the base
    again = train(tmp_path / "again", "--resume_from_checkpoint", full / "checkpoint-4", model=None)
    cells["resume"] = difference(losses(again)[4:], losses(full)[4:])

    # adapters: each taken up by plain PEFT in this process, then merged
    merged = []
    for column, target in (("attention", None), ("experts", "experts"), ("shared", "shared_mlp")):
        if kind == "dense" and target:
            continue
        flags = ["--use_lora", "--lora_rank", 4] + (["--lora_target_modules", target] if target else [])
        adapter = train(tmp_path / column, *flags, steps=4)
        model = PeftModel.from_pretrained(plainly_loaded(name, base), adapter)
        cells[f"LoRA {column}"] = abs(reference.mean_loss(model, evaluated, 4) - evaluation(adapter))
        out = tmp_path / f"{column}-merged"
        merge("--base_model_path", base, "--adapter_model_path", adapter, "--output_path", out)
        expected = logits(model)
        assert (expected - logits(plainly_loaded(name, base))).abs().max() > 1e-4, "the adapter does nothing"
        merged.append((logits(plainly_loaded(name, out)) - expected).abs().max().item())
    cells["merge"] = max(merged)

    limits = {"load": 1e-5, "ZeRO-2": 1e-5, "ZeRO-3": 1e-5, "alone": 1e-5, "resume": 1e-6, "merge": 1e-5}
    wrong = {column: value for column, value in cells.items() if not value <= limits.get(column, 1e-5)}
    assert not wrong, wrong
