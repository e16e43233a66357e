"""A run goes on with another number of processes: six further steps, with weight decay, equal to the undisturbed run
of the first number.

The table, with the largest differences: `pytest -s -m campaign tests/distributed/test_other_ranks.py`.
"""

import itertools
import json

import pytest
from safetensors.torch import load_file

PLACES = {"plain": None, "zero2": "ds_zero2_no_offload.json", "zero3": "ds_zero3_no_offload.json"}
OFFLOAD = {"offload": "ds_zero3_offload.json"}
KINDS = {"dense": [], "moe": [], "hy_v3": [], "lora": ["--use_lora", "--lora_rank", 4]}
GUARD = {("moe", "zero2", 2, 1), ("lora", "zero3", 1, 2), ("dense", "plain", 2, 1)}
ROWS = [*itertools.product(KINDS, PLACES, (2,), (1,)), *itertools.product(KINDS, PLACES, (1,), (2,))]
ROWS += [("dense", "zero2", 2, 4), ("moe", "zero3", 2, 4), ("hy_v3", "zero3", 4, 1), ("lora", "zero2", 4, 2)]
ROWS += [("dense", "offload", 2, 1)]
TABLE = [
    pytest.param(
        *row,
        id="-".join(map(str, row)),
        marks=([] if row in GUARD else [pytest.mark.campaign])
        + ([] if row[1] == "plain" else [pytest.mark.needs_gxx]),
    )
    for row in ROWS
]


@pytest.fixture
def train(example_rows, run_train, tmp_path):
    """`train(name, ranks, *flags)`: the run, which writes to the directory `name`."""

    def run(name, ranks, *flags):
        launcher = "torchrun" if ranks > 1 else "python"
        return run_train([*flags, "--output_dir", tmp_path / name], launcher, ranks)

    return run


@pytest.fixture
def few_rows(example_rows, tmp_path):
    """A file of 64 rows."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(example_rows.read_bytes().splitlines(True)[:64]))
    return file


def flags_of(model, rows, place, ranks, *more):
    """Ten steps of 8 rows, across the end of an epoch, saved after the fourth."""
    flags = ["--model_name_or_path", model, "--train_data_file", rows, "--max_steps", 10, "--save_steps", 4]
    flags += ["--logging_steps", 1, "--learning_rate", 1e-3, "--weight_decay", 0.1, "--max_seq_length", 64]
    flags += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4 // ranks, *more]
    return [*flags, "--deepspeed", (PLACES | OFFLOAD)[place]] if place != "plain" else flags


def differences(one, two):
    """(largest of the losses, largest of the final weights) between two output directories."""
    logs = [json.loads((d / "trainer_state.json").read_text())["log_history"] for d in (one, two)]
    losses = [[(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs]
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]] == [*range(1, 11)]
    name = "adapter_model.safetensors" if (one / "adapter_model.safetensors").exists() else "model.safetensors"
    states = [load_file(d / name) for d in (one, two)]
    assert states[0].keys() == states[1].keys()
    weights = max((states[0][key].float() - states[1][key].float()).abs().max().item() for key in states[0])
    return max(abs(a - b) for (_, a), (_, b) in zip(*losses)), weights


@pytest.mark.parametrize(("kind", "place", "before", "now"), TABLE)
def test_six_further_steps_are_equal(
    kind, place, before, now, model_dir, example_tokenizer_dir, few_rows, train, tmp_path
):
    model = model_dir("moe" if kind == "lora" else kind, example_tokenizer_dir)
    whole = train("whole", before, *flags_of(model, few_rows, place, before, *KINDS[kind]))
    assert whole.returncode == 0, whole.stderr[-3000:]
    on = train("on", now, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-4")
    assert on.returncode == 0, on.stderr[-3000:]
    said = f"gradient_accumulation_steps = {4 // now} (processes {now}, the run {before}: the same rows a step)"
    assert said in on.stdout and "not exact" not in on.stdout
    losses, weights = differences(tmp_path / "whole", tmp_path / "on")
    print(f"{kind} {place} {before} → {now}: largest difference of losses {losses:.1e}, of weights {weights:.1e}")
    assert losses <= 2e-6 and weights <= 1e-6


def test_what_would_have_other_rows_is_refused(model_dir, example_tokenizer_dir, few_rows, train, tmp_path):
    """With the numbers that would do; there and back again, with the flag of the first command, it is the same run."""
    flags = flags_of(model_dir("dense", example_tokenizer_dir), few_rows, "plain", 2)
    assert train("whole", 2, *flags).returncode == 0
    here = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-4"]
    run = train("on", 3, *here)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    says = "processes 3 (the run: 2): a step has 4 batches of 2 rows; numbers of processes that divide it: 1, 2, 4."
    assert says in " ".join(run.stderr.split())
    run = train("on", 1, *here, "--gradient_accumulation_steps", 3)
    assert run.returncode == 2 and "--gradient_accumulation_steps 3 (the run: 2)" in run.stderr
    run = train("on", 1, *here)
    assert run.returncode == 0, run.stderr[-3000:]
    record = json.loads((tmp_path / "on" / "checkpoint-8" / "run.json").read_text())
    assert record["processes"] == 2 and record["arguments"]["gradient_accumulation_steps"] == 2
    here = ["--resume_from_checkpoint", tmp_path / "on" / "checkpoint-8", "--gradient_accumulation_steps", 2]
    run = train("again", 2, *here)
    assert run.returncode == 0, run.stderr[-3000:]
    losses, weights = differences(tmp_path / "whole", tmp_path / "again")
    assert losses <= 2e-6 and weights <= 1e-6


@pytest.mark.campaign
@pytest.mark.needs_gxx
@pytest.mark.parametrize(("place", "kind"), [("zero2", "dense"), ("zero3", "lora")])
def test_the_best_checkpoint_may_be_of_other_ranks(
    place, kind, model_dir, example_tokenizer_dir, few_rows, train, tmp_path
):
    """The final weights are those of step 4, whose loss is the highest, as saved by one process."""
    best = ["--eval_data_file", few_rows, "--eval_strategy", "steps", "--eval_steps", 4, "--load_best_model_at_end"]
    best += ["--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]
    flags = flags_of(model_dir("dense", example_tokenizer_dir), few_rows, place, 1, *KINDS[kind], *best)
    assert train("run", 1, *flags).returncode == 0
    run = train("run", 2, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-4")
    assert run.returncode == 0, run.stderr[-3000:]
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    final, saved = (load_file(folder / name) for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"))
    assert final.keys() == saved.keys() and all((final[key] == saved[key]).all() for key in final)
