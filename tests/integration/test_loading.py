"""Weights that are not whole are refused with their names, experts included: nothing is trained from random values."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_model_dir

EXPERT, NORM = "model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.input_layernorm.weight"
EXTRA = "model.layers.7.mlp.up_proj.weight"


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
    directory = make_model_dir("moe", example_tokenizer_dir, tmp_path / "model")
    state = load_file(directory / "model.safetensors")
    spoil(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    args = ["--model_name_or_path", directory, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_train([*args, "--max_steps", 1])
    assert run.returncode == 2 and f"--model_name_or_path {directory}: " in run.stderr, run.stderr[-2000:]
    assert says in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
