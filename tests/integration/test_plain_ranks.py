"""Two ranks without DeepSpeed: DDP gets a gradient for each trained parameter, and searches for none without one."""

import pytest

KINDS = ("dense", "moe", "hy_v3", "hy_v4")
WAYS = {"all weights": [], "adapter": ["--use_lora", "--lora_target_modules", "all-linear"]}
CHECKPOINTING = ["--gradient_checkpointing"]
CASES = [
    pytest.param(
        kind, way, more, marks=[] if (kind, way, more) == ("moe", "all weights", []) else pytest.mark.campaign
    )
    for kind in KINDS
    for way in WAYS
    for more in ([], CHECKPOINTING)
]


@pytest.mark.parametrize(("kind", "way", "more"), CASES)
def test_no_parameter_is_without_gradient(
    kind, way, more, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path
):
    """DDP raises at the second step where a parameter had none at the first."""
    args = ["--model_name_or_path", model_dir(kind, example_tokenizer_dir), "--train_data_file", example_rows]
    args += ["--output_dir", tmp_path, "--max_steps", 3, "--logging_steps", 1, "--save_strategy", "no"]
    args += ["--per_device_train_batch_size", 1, *WAYS[way], *more]
    run = run_train(args, launcher="torchrun", nproc=2)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(losses(tmp_path)) == 3
    assert "find_unused_parameters" not in run.stderr  # with it, DDP warns that it found none
