"""M17: an adapter as --model_name_or_path: its base is the model, and training begins at step 0 from it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def made(tmp_path_factory, example_tokenizer_dir, example_rows, make_model_dir, run_train):
    """(base, adapter of one step, the flags of a run). Do not write into them."""
    folder = tmp_path_factory.mktemp("adapter")
    base = make_model_dir("dense", example_tokenizer_dir, folder / "base", initializer_range=0.2)
    flags = ["--train_data_file", example_rows, "--logging_steps", 1, "--save_steps", 1, "--max_seq_length", 128]
    flags += ["--per_device_train_batch_size", 4, "--learning_rate", 1e-2, "--report_to", "none"]
    lora = ["--use_lora", "--lora_rank", 4, "--lora_alpha", 6, "--use_rslora", "--lora_target_modules", "o_proj"]
    out = folder / "adapter"
    run = run_train([*flags, *lora, "--max_steps", 1, "--model_name_or_path", base, "--output_dir", out])
    assert run.returncode == 0, run.stderr[-3000:]
    return base, out, flags


def read(directory, name):
    return json.loads((directory / name).read_text())


def test_it_begins_from_the_adapter_and_goes_on_like_any_run(made, run_train, losses, tmp_path):
    base, adapter, flags = made
    out = tmp_path / "out"
    args = [*flags, "--max_steps", 3, "--model_name_or_path", adapter]
    run = run_train([*args, "--learning_rate", 0, "--output_dir", out])
    assert run.returncode == 0 and "the training begins at step 0 from it" in run.stdout, run.stderr[-3000:]
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, out))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read(out, "adapter_config.json") == read(adapter, "adapter_config.json")
    assert read(out, "base.json") == read(adapter, "base.json")
    assert [entry["step"] for entry in read(out, "trainer_state.json")["log_history"] if "loss" in entry] == [1, 2, 3]

    whole = tmp_path / "whole"
    assert run_train([*args, "--output_dir", whole]).returncode == 0
    assert read(whole / "checkpoint-1", "run.json")["arguments"]["use_lora"] is True
    again = [*flags, "--max_steps", 3, "--resume_from_checkpoint", whole / "checkpoint-1"]
    for number, more in enumerate([[], ["--model_name_or_path", adapter, "--lora_rank", 4]]):
        run = run_train([*again, *more, "--output_dir", tmp_path / f"again{number}"])
        assert run.returncode == 0 and "begins at step 0" not in run.stdout, run.stderr[-3000:]
        assert losses(tmp_path / f"again{number}") == pytest.approx(losses(whole), abs=1e-5)


REFUSED = {
    "rank": (["--lora_rank", 8], "these differ from it: --lora_rank 8 (the adapter: 4)"),
    "several": (
        ["--lora_alpha", 8, "--lora_dropout", 0.1],
        "--lora_alpha 8 (the adapter: 6), --lora_dropout 0.1 (the adapter: 0.0)",
    ),
    "no LoRA": (["--use_lora", "false"], "--use_lora False (the adapter: True)"),
    "targets": (
        ["--lora_target_modules", "q_proj", "o_proj"],
        "--lora_target_modules q_proj o_proj: not what the ada",
    ),
    "all weights": (["--trainable_params", "norm"], "--trainable_params: not beside --use_lora"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_differ_are_refused(case, made, run_here, tmp_path):
    _, adapter, flags = made
    more, says = REFUSED[case]
    args = [*flags, "--max_steps", 1, "--model_name_or_path", adapter, *more, "--output_dir", tmp_path / "out"]
    run = run_here("train.py", args)
    assert run.returncode == 2 and says in run.stderr and not (tmp_path / "out").exists(), run.stderr


def test_another_base_is_refused_and_the_same_elsewhere_is_not(
    made, example_tokenizer_dir, make_model_dir, run_here, run_train, tmp_path
):
    base, adapter, flags = made
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    other = make_model_dir("dense", example_tokenizer_dir, tmp_path / "other", initializer_range=0.2, seed=1)
    args = [*flags, "--max_steps", 1, "--model_name_or_path", copy, "--lora_target_modules", "o_proj"]
    for named, more, code in (
        (other, [], 2),
        (other, ["--any_base"], 0),
        (shutil.copytree(base, tmp_path / "moved"), [], 0),
    ):
        settings = read(copy, "adapter_config.json") | {"base_model_name_or_path": str(named)}
        (copy / "adapter_config.json").write_text(json.dumps(settings))
        out = tmp_path / f"out-{named.name}{len(more)}"
        command = [*args, *more, "--output_dir", out]
        run = run_here("train.py", command) if code else run_train(command)
        assert run.returncode == code, run.stderr[-3000:]
        assert ("is not the base that it was trained on" in run.stdout + run.stderr) == (named == other)
    assert read(tmp_path / "out-moved0", "base.json")["path"] == str(tmp_path / "moved")


def test_it_is_not_overwritten(made, run_here, tmp_path):
    _, adapter, flags = made
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    (copy / "tokenizer_config.json").unlink()  # then only the adapter itself is in the way
    args = [*flags, "--max_steps", 1, "--model_name_or_path", copy, "--output_dir", copy, "--overwrite_output_dir"]
    run = run_here("train.py", args)
    assert run.returncode == 2 and f"--model_name_or_path {copy}: lies in --output_dir" in run.stderr, run.stderr
