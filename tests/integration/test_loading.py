"""Weights that are not whole are refused with their names, experts included: nothing is trained from random values."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_model_dir

EXPERT, NORM = "model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.input_layernorm.weight"
EXTRA = "model.layers.7.mlp.up_proj.weight"


def spoiled(spoil, tokenizer_dir, directory):
    """A MoE's directory after `spoil` has changed its tensors."""
    make_model_dir("moe", tokenizer_dir, directory)
    state = load_file(directory / "model.safetensors")
    spoil(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state.pop(NORM), f"1 weights are missing: {NORM}"),
        (lambda state: state.update({EXTRA: torch.zeros(2)}), f"1 weights are unexpected: {EXTRA}"),
        (lambda state: state.update({NORM: torch.zeros(3)}), f"1 weights are mismatched: {NORM}"),
        (lambda state: state.pop(EXPERT), "down_proj"),
    ],
    ids=["missing", "unexpected", "misshapen", "expert missing"],
)
def test_weights_that_are_not_whole(spoil, says, example_tokenizer_dir, example_rows, run_train, tmp_path):
    directory = spoiled(spoil, example_tokenizer_dir, tmp_path / "model")
    args = ["--model_name_or_path", directory, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_train([*args, "--max_steps", 1])
    assert run.returncode == 2 and f"--model_name_or_path {directory}: " in run.stderr, run.stderr[-2000:]
    assert says in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.needs_gxx
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(lambda state: state.update({EXTRA: torch.zeros(2)}), EXTRA, marks=pytest.mark.campaign),
        (lambda state: state.update({NORM: torch.zeros(3)}), NORM),
        pytest.param(lambda state: state.pop(EXPERT), "mlp.experts.down_proj", marks=pytest.mark.campaign),
    ],
    ids=["unexpected", "misshapen", "expert missing"],
)
def test_under_zero3_too(spoil, says, example_tokenizer_dir, example_rows, run_train, tmp_path):
    directory = spoiled(spoil, example_tokenizer_dir, tmp_path / "model")
    args = ["--model_name_or_path", directory, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_train([*args, "--deepspeed", "ds_zero3_no_offload.json"], launcher="torchrun", nproc=2)
    assert run.returncode != 0 and run.stderr.count("refused: ") == 1 and says in run.stderr, run.stderr[-2000:]


def test_a_hub_id_is_its_directory(make_model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path):
    """From the hub's cache, there being no network: saved as the files are, config and all."""
    snapshot = tmp_path / "cache" / "models--someone--hunyuan" / "snapshots" / ("0" * 40)
    make_model_dir("dense", example_tokenizer_dir, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    args = ["--train_data_file", example_rows, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    run = run_train([*args, "--max_steps", 1, "--model_name_or_path", "someone/hunyuan"])
    assert run.returncode == 0, run.stderr[-3000:]
    config = json.loads((snapshot / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    lora = ["--use_lora", "--max_steps", 2, "--save_steps", 1, *args, "--output_dir", tmp_path / "lora"]
    run = run_train([*lora, "--model_name_or_path", "someone/hunyuan"])
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "someone/hunyuan"
    )
    run = run_train([*lora, "--resume_from_checkpoint", tmp_path / "lora" / "checkpoint-1"])
    assert run.returncode == 0 and "going on from" in run.stdout, run.stderr[-3000:]
    run = run_train([*args, "--max_steps", 1, "--model_name_or_path", "someone/else"])
    assert run.returncode == 2 and "--model_name_or_path someone/else: no such directory" in run.stderr
