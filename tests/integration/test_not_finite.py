"""Losses and gradients that are not finite: exit code 3 before the optimizer's step, or a step that is skipped."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import TESTS, run_script
from sft.data.batches import Bins
from sft.data.examples import Options, load_examples

run_faulty = functools.partial(run_script, TESTS / "not_finite.py")
WAYS = {  # name: (flags, ranks, batches a step, sequences a batch)
    "one": (["--gradient_accumulation_steps", 2], 1, 2, 2),
    "one, lora, packed": (["--use_lora", "--packing", "batch"], 1, 1, 2),
    "two ranks": (["--packing", "batch", "--gradient_accumulation_steps", 2, "--max_grad_norm", 0], 2, 2, 2),
    "two ranks, bins": (["--packing", "bin", "--max_seq_length", 128], 2, 1, 2),
    "zero2": (["--deepspeed", "ds_zero2_no_offload.json"], 2, 1, 2),
    "zero2, lora": (
        ["--deepspeed", "ds_zero2_no_offload.json", "--use_lora", "--gradient_accumulation_steps", 2],
        2,
        2,
        2,
    ),
    "zero2, bf16": (["--deepspeed", "ds_zero2_no_offload.json", "--bf16", "--packing", "batch"], 2, 1, 2),
    "zero3": (["--deepspeed", "ds_zero3_no_offload.json", "--packing", "batch"], 2, 1, 2),
    "zero3, bf16, bins": (
        ["--deepspeed", "ds_zero3_no_offload.json", "--bf16", "--packing", "bin", "--max_seq_length", 128],
        2,
        1,
        2,
    ),
}
ALWAYS = ("one", "two ranks", "zero2, lora")
CASES = [
    pytest.param(
        name,
        marks=[pytest.mark.needs_gxx] * ("--deepspeed" in flags) + [pytest.mark.campaign] * (name not in ALWAYS),
    )
    for name, (flags, *_) in WAYS.items()
]


@pytest.fixture(scope="module")
def files(example_rows, tmp_path_factory):
    """Two files of rows, the first of 5."""
    folder, lines = tmp_path_factory.mktemp("rows"), example_rows.read_bytes().splitlines(keepends=True)
    for name, part in (("a", lines[:5]), ("b", lines[5:60])):
        (folder / f"{name}.jsonl").write_bytes(b"".join(part))
    return [folder / "a.jsonl", folder / "b.jsonl"]


@pytest.fixture
def start(model_dir, example_tokenizer_dir, files, tmp_path):
    """`start(way, faults, *flags)`: 6 steps over the rows in order, a checkpoint each; a fault is (step, what, value),
    in the last batch of the last rank. Returns the process and the output directory."""

    def run(way, faults, *more):
        flags, ranks, batches, size = WAYS[way]
        args = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir), "--train_data_file", *files]
        args += ["--output_dir", tmp_path / "out", "--max_steps", 6, "--save_steps", 1, "--logging_steps", 1]
        args += ["--per_device_train_batch_size", size, "--train_sampling_strategy", "sequential", "--use_cpu"]
        args += ["--learning_rate", 1e-3, "--lr_scheduler_type", "linear", *flags, *more]
        last = {"rank": ranks - 1, "batch": batches - 1}
        env = {"FAULTS": json.dumps([last | {"step": s, "what": what, "value": v} for s, what, v in faults])}
        launcher = "python" if ranks == 1 else "torchrun"
        return run_faulty(args, launcher=launcher, nproc=ranks, env=env, timeout=300), tmp_path / "out"

    return run


def weights(out, step):
    file = "adapter_model.safetensors" if (out / f"checkpoint-{step}" / "adapter_config.json").exists() else None
    return load_file(out / f"checkpoint-{step}" / (file or "model.safetensors"))


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def rates(out, step):
    log = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [entry["learning_rate"] for entry in log if "learning_rate" in entry]


def rows_of(way, step, files, tokenizer):
    """`file:line, line` of the last batch of the last rank in a step, of rows that are taken in order."""
    flags, ranks, batches, size = WAYS[way]
    last = step * batches * ranks
    items = list(range((last - 1) * size, last * size))
    if "bin" in flags:
        bins = Bins(load_examples(list(map(str, files)), tokenizer, Options(128)), 128, 42)
        items = [int(i) for b in items for i in bins.order[bins.starts[b] : bins.starts[b + 1]]]
    lines = [(files[0], i + 1) if i < 5 else (files[1], i - 4) for i in items]
    shown = [f"{line}" if n and file == lines[n - 1][0] else f"{file}:{line}" for n, (file, line) in enumerate(lines)]
    return ", ".join(shown[:4]) + f" and {len(shown) - 4} more" * (len(shown) > 4)


@pytest.mark.parametrize("way", CASES)
def test_a_loss_ends_the_run_before_its_step(way, start, files, format_tokenizer):
    """After a step that gradients alone have spoiled, which is skipped: the schedule stays where it is."""
    value = "inf" if "zero3" in way or way == "one" else "nan"  # the inf has finite gradients of its own
    done, out = start(way, [(2, "gradient", "nan"), (4, "loss", value)])
    assert done.returncode == 3, done.stderr[-3000:]
    rank = WAYS[way][1] - 1
    rows = rows_of(way, 4, files, format_tokenizer("example"))
    message = f"stopped: the loss is {value} at step 4 on rank {rank} ({rows})"
    assert done.stderr.count(message) == 1, (message, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    assert done.stdout.count("step 2: the gradients are not finite") == 1
    assert not (out / "checkpoint-4").exists() and not list(out.glob("*.safetensors"))
    assert same(weights(out, 1), weights(out, 2)) and not same(weights(out, 2), weights(out, 3))
    assert all(tensor.isfinite().all() for tensor in weights(out, 3).values())
    assert rates(out, 3) == pytest.approx([1e-3, 1e-3 * 5 / 6, 1e-3 * 5 / 6])


@pytest.mark.parametrize("way", CASES)
def test_gradients_twice_end_the_run_with_a_checkpoint(way, start):
    """Of the weights that are still finite, saved whatever the flags say."""
    faults = [(3, "gradient", "inf"), (4, "gradient", "nan")]
    done, out = start(way, faults, "--save_strategy", "no")
    assert done.returncode == 3, done.stderr[-3000:]
    assert "stopped: the gradients are not finite at step 4, for the second time" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    assert all(tensor.isfinite().all() for tensor in weights(out, 4).values())
    assert json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_a_second_time_is_counted_over_a_resume(start):
    done, out = start("one", [(2, "gradient", "nan")])
    assert done.returncode == 0 and done.stdout.count("are not finite") == 1, done.stderr[-3000:]
    again, _ = start("one", [(5, "gradient", "nan")], "--resume_from_checkpoint", out / "checkpoint-4")
    assert again.returncode == 3 and "at step 5, for the second time" in again.stderr, again.stderr[-3000:]


def test_the_best_checkpoint_is_not_asked_for(start, files):
    """Where only the best is saved, too, the run ends with a checkpoint, although its step is evaluated."""
    flags = ["--eval_data_file", files[0], "--save_strategy", "best", "--eval_strategy", "steps", "--eval_steps", 1]
    done, out = start("one", [(2, "gradient", "nan"), (3, "gradient", "nan")], *flags)
    assert done.returncode == 3, done.stderr[-3000:]
    assert (out / "checkpoint-3").is_dir()


def test_overflows_of_fp16_are_left_to_its_loss_scale(start, monkeypatch):
    """However often; but not a loss that is not finite."""
    monkeypatch.setenv("LOSS_SCALE", "1")
    faults = [(2, "gradient", "inf"), (3, "gradient", "nan")]
    done, out = start("one", [*faults, (5, "loss", "nan")], "--fp16")
    assert done.returncode == 3, done.stderr[-3000:]
    assert "gradients are not finite" not in done.stdout + done.stderr
    assert "stopped: the loss is nan at step 5" in done.stderr
    assert same(weights(out, 1), weights(out, 3)) and not same(weights(out, 3), weights(out, 4))


def test_fp16_without_a_loss_scale_is_as_fp32(start):
    """On a CPU."""
    done, out = start("one", [(2, "gradient", "inf"), (3, "gradient", "nan")], "--fp16")
    assert done.returncode == 3 and "at step 3, for the second time" in done.stderr, done.stderr[-3000:]
    assert same(weights(out, 1), weights(out, 3))
