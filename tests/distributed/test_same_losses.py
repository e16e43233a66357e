"""The same rows a step give the same loss, however they are spread: over ranks, ZeRO stages, micro-batches, with and
without padding.

In fp32 on the real rows with the 128k vocabulary, against a plain loop that computes full logits (tests/reference.py):
four steps of the rows in GUARD every time; ten steps of all others, with the largest difference of each run, by
`pytest -s -m campaign tests/distributed/test_same_losses.py`.
"""

import functools
import itertools

import pytest

import reference

GLOBAL_BATCH, LEARNING_RATE, TOLERANCE = 8, 1e-4, 1e-5
PLACES = {  # name: (DeepSpeed file, ranks)
    "one": (None, 1),
    "zero2": ("ds_zero2_no_offload.json", 2),
    "zero3": ("ds_zero3_no_offload.json", 2),
    "zero3-offload": ("ds_zero3_offload.json", 2),
}
GUARD = {  # the share that runs every time
    ("moe", "zero2", 2, "none"),
    ("moe", "zero3-offload", 2, "batch"),
    ("dense", "one", 2, "none"),
    ("hy_v3", "zero3", 1, "batch"),
}
TABLE = [
    pytest.param(
        *row,
        id="-".join(map(str, row)),
        marks=([] if row in GUARD else [pytest.mark.campaign]) + ([] if row[1] == "one" else [pytest.mark.needs_gxx]),
    )
    for row in itertools.product(("dense", "moe", "hy_v3"), PLACES, (1, 2), ("none", "batch"))
]


@pytest.fixture(scope="module")
def rows_file(shared, tmp_path_factory):
    """The first 300 real rows."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (shared / "data" / "car_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:300]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def expected(rows_file, model_dir, hy_tokenizer_dir):
    """`expected(kind, steps)`: the plain loop's losses."""

    @functools.cache
    def get(kind, steps):
        order = reference.trainer_order(300, 42, 1, GLOBAL_BATCH, 1, steps)
        schedule = reference.linear(LEARNING_RATE, steps)
        return reference.train(model_dir(kind, hy_tokenizer_dir), rows_file, order, schedule)

    return get


@pytest.mark.parametrize(("kind", "place", "accumulation", "packing"), TABLE)
def test_losses_equal_the_plain_loop(
    kind, place, accumulation, packing, expected, rows_file, model_dir, hy_tokenizer_dir, run_train, losses, tmp_path
):
    deepspeed, ranks = PLACES[place]
    steps = 4 if (kind, place, accumulation, packing) in GUARD else 10
    args = ["--model_name_or_path", model_dir(kind, hy_tokenizer_dir), "--train_data_file", rows_file]
    args += ["--output_dir", tmp_path, "--max_steps", steps, "--logging_steps", 1, "--learning_rate", LEARNING_RATE]
    args += ["--per_device_train_batch_size", GLOBAL_BATCH // ranks // accumulation]
    args += ["--gradient_accumulation_steps", accumulation, "--packing", packing, "--save_strategy", "no"]
    args += ["--deepspeed", deepspeed] if deepspeed else []
    run = run_train(args, launcher="torchrun" if ranks > 1 else "python", nproc=ranks)
    assert run.returncode == 0, run.stderr[-3000:]
    ours, plain = losses(tmp_path), expected(kind, steps)
    difference = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    print(f"{kind} {place} accumulation {accumulation} packing {packing}: largest difference {difference:.1e}")
    assert difference <= TOLERANCE, (ours, plain)
