"""Two ranks: DDP gets a gradient for each trained parameter, and searches for none without one; an epoch whose rows do
not go into the ranks' batches takes each row once."""

import json

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


WAYS_TO_END = {
    "padded": [],
    "packed": ["--packing", "batch"],
    "bins": ["--packing", "bin", "--max_seq_length", 40],
    "grouped": ["--group_by_length"],
    "own head": ["--model_code", "remote"],
    "zero2": ["--deepspeed", "ds_zero2_no_offload.json"],
    "zero3": ["--deepspeed", "ds_zero3_no_offload.json"],
}
QUICK_WAYS = ("padded", "bins")


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=[] if way in QUICK_WAYS else [pytest.mark.campaign, pytest.mark.needs_gxx])
        for way in WAYS_TO_END
    ],
)
def test_an_epoch_takes_each_row_once(
    way, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path
):
    """Losses over two epochs of seven rows are those of one process that takes the same rows a step; so are the counts
    of tokens."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"".join(example_rows.read_bytes().splitlines(True)[:7]))
    kind = "remote" if way == "own head" else "dense"
    args = ["--model_name_or_path", model_dir(kind, example_tokenizer_dir), "--train_data_file", rows]
    args += ["--num_train_epochs", 2, "--logging_steps", 1, "--save_strategy", "no", "--learning_rate", 1e-3]
    args += ["--per_device_train_batch_size", 1, *WAYS_TO_END[way]]
    figures = []
    for ranks in (1, 2):
        more = ["--output_dir", tmp_path / str(ranks), "--gradient_accumulation_steps", 2 // ranks]
        run = run_train([*args, *more], launcher="torchrun" if ranks > 1 else "python", nproc=ranks)
        assert run.returncode == 0, run.stderr[-3000:]
        figures.append(json.loads((tmp_path / str(ranks) / "train_results.json").read_text()))
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), abs=2e-6)
    for name in ("tokens", "supervised_tokens", "global_step"):
        assert figures[0][name] == figures[1][name]
