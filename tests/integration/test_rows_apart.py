"""Packed rows do not see one another: on every class, in a batch laid end to end and in bins."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import reference
from conftest import make_model_dir
from sft.data.batches import Bins, Collator
from sft.data.examples import IGNORE_INDEX, Options, load_examples
from sft.training.flops import flops_of_step

KINDS = ("dense", "moe", "hy_v3", "hy_v4")
SCALE = {"initializer_range": 0.2}  # so that every token matters


@pytest.mark.parametrize(("kind", "kept"), [*((kind, 64) for kind in KINDS), ("hy_v4", 8)])
@pytest.mark.parametrize("packing", ["batch", "bin"])
def test_another_row_changes_nobody_elses_loss(kind, kept, packing, model_dir, example_tokenizer_dir):
    """`kept`: tokens that Hy4's indexer keeps for each."""
    if not hasattr(transformers.modeling_utils, "slice_logits_to_keep"):
        pytest.skip(f"transformers {transformers.__version__} takes no mask for logits_to_keep")
    more = SCALE | ({"index_topk": kept} if kind == "hy_v4" else {})
    model = AutoModelForCausalLM.from_pretrained(model_dir(kind, example_tokenizer_dir, **more)).train()
    draw = np.random.default_rng(0)

    def row(length):
        ids = draw.integers(10, 300, length)
        return {"input_ids": ids, "labels": np.where(np.arange(length) < 3, IGNORE_INDEX, ids)}

    def losses(rows):
        """Of each supervised token, in their order."""
        batch = Collator(0, packing)([rows] if packing == "bin" else rows)
        targets = batch.pop("shift_labels")
        del batch["labels"]
        logits = model(**batch, use_cache=False).logits.reshape(len(targets), -1)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none").detach()

    rows = [row(length) for length in (20, 15, 30)]
    parts = [17, 12, 27]
    before = losses(rows).split(parts)
    for changed in range(3):
        other = [row(len(r["input_ids"])) if i == changed else r for i, r in enumerate(rows)]
        after = losses(other).split(parts)
        for i in range(3):
            if i == changed:
                assert (before[i] - after[i]).abs().max() > 0.1
            else:
                assert torch.allclose(before[i], after[i], atol=1e-6, rtol=0)
    if kept < max(parts):  # which of several equal scores the indexer keeps depends on where the row stands
        return
    alone = torch.cat([losses([r]) for r in rows])
    assert torch.allclose(torch.cat(before), alone, atol=2e-5, rtol=0), "as if each row stood alone"


marks = [pytest.mark.campaign, pytest.mark.needs_gxx]
TABLE = [pytest.param(kind, None, 1, id=f"{kind}-one") for kind in KINDS]
TABLE += [
    pytest.param(kind, "ds_zero3_no_offload.json", 2, id=f"{kind}-zero3", marks=marks)
    for kind in ("dense", "moe", "hy_v3")
]


@pytest.mark.parametrize(("kind", "deepspeed", "ranks"), TABLE)
def test_bins_train_as_their_rows_one_by_one(
    kind, deepspeed, ranks, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path
):
    """The plain loop takes each row of a step's bins as a batch of its own; index_topk keeps all of a row."""
    more = {"index_topk": 128} if kind == "hy_v4" else {}
    model, steps, seed = model_dir(kind, example_tokenizer_dir, **more), 6, 42
    args = ["--model_name_or_path", model, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    args += ["--packing", "bin", "--max_seq_length", 128, "--per_device_train_batch_size", 2 // ranks]
    args += ["--max_steps", steps, "--logging_steps", 1, "--learning_rate", 1e-3, "--save_strategy", "no"]
    args += ["--deepspeed", deepspeed] if deepspeed else []
    run = run_train(args, launcher="torchrun" if ranks > 1 else "python", nproc=ranks)
    assert run.returncode == 0, run.stderr[-3000:]

    tokenizer = AutoTokenizer.from_pretrained(example_tokenizer_dir)
    bins = Bins(load_examples([str(example_rows)], tokenizer, Options(128)), 128, seed)
    order = [
        [
            [int(row)]
            for micro_batch in step
            for b in micro_batch
            for row in bins.order[bins.starts[b] : bins.starts[b + 1]]
        ]
        for step in reference.trainer_order(len(bins), seed, 1, 2, 1, steps)
    ]
    plain = reference.train(model, example_rows, order, reference.linear(1e-3, steps))
    ours = losses(tmp_path / "out")
    difference = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    print(f"{kind} {deepspeed}: largest difference {difference:.1e}")
    assert difference <= 1e-5, (ours, plain)
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["padding_share"] == 0 and results["num_bins"] == len(bins) and results["bin_fill"] > 0.9
    lengths = bins.examples.lengths[[row for step in order for (row,) in step]].astype(int)
    units = [lengths.sum(), (lengths * (lengths + 1) // 2).sum(), results["supervised_tokens"]]
    needed = flops_of_step(AutoModelForCausalLM.from_pretrained(model)) @ units
    assert results["flops"] == pytest.approx(needed) and 0 < results["data_wait_share"] < 1


@pytest.mark.parametrize("packing", ["batch", "bin"])
def test_packing_with_code_of_the_directory_is_refused(
    packing, example_tokenizer_dir, example_rows, run_here, tmp_path
):
    model = make_model_dir("remote", example_tokenizer_dir, tmp_path / "model")
    args = ["--model_name_or_path", model, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_here("train.py", [*args, "--model_code", "remote", "--packing", packing])
    assert run.returncode == 2 and f"--packing {packing}: not with the code that a directory brings" in run.stderr
