"""Going on from a checkpoint: the steps after it are those of the undisturbed run; a finished run makes no more."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.campaign)], ids=["full", "lora"])
def test_goes_on_where_it_stopped(lora, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path):
    flags = ["--train_data_file", example_rows, "--max_steps", 6, "--save_steps", 3, "--logging_steps", 1]
    flags += ["--learning_rate", 1e-3, "--per_device_train_batch_size", 4] + (
        ["--use_lora", "--lora_dropout", 0.1] * lora
    )
    first = tmp_path / "first"
    model = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir)]
    run = run_train([*flags, *model, "--output_dir", first])
    assert run.returncode == 0, run.stderr[-3000:]

    # in another directory, from a checkpoint that is gone before the end: --save_total_limit rotates such away
    second = tmp_path / "second"
    shutil.copytree(first / "checkpoint-3", second / "checkpoint-3")
    run = run_train(
        [*flags, "--output_dir", second, "--resume_from_checkpoint", second / "checkpoint-3", "--save_total_limit", 1]
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "going on from" in run.stdout
    assert losses(second) == pytest.approx(losses(first), abs=1e-6)
    assert not (second / "checkpoint-3").exists()
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    one, two = load_file(first / name), load_file(second / name)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for file in ("tokenizer.json", "chat_template.jinja") + (() if lora else ("config.json",)):
        assert (second / file).read_bytes() == (first / file).read_bytes(), file

    # the end of a finished run: no step, but the final files
    third = tmp_path / "third"
    run = run_train([*flags, "--output_dir", third, "--resume_from_checkpoint", first / "checkpoint-6"])
    assert run.returncode == 0, run.stderr[-3000:]
    assert "no step is left" in run.stdout and "step 7" not in run.stdout
    three = load_file(third / name)
    assert all(torch.equal(one[key], three[key]) for key in one)
    results = json.loads((third / "train_results.json").read_text())
    assert results["global_step"] == 6 and results.keys() >= {"tokens", "mfu", "world_size", "num_rows", "train_loss"}

    # without the optimiser's state it would not be going on
    (second / "checkpoint-6" / "optimizer.pt").unlink()
    more = [*flags, "--max_steps", 8, "--output_dir", second, "--resume_from_checkpoint", second / "checkpoint-6"]
    run = run_train(more)
    assert run.returncode == 2 and "optimizer.pt: missing" in run.stderr


STAGES = {
    "one": [],
    "zero2": ["--deepspeed", "ds_zero2_no_offload.json"],
    "zero3": ["--deepspeed", "ds_zero3_no_offload.json"],
}
ALWAYS = ("lora", "zero3")  # the others with the campaign


@pytest.mark.parametrize(
    ("what", "stage"),
    [
        pytest.param(
            what,
            stage,
            marks=[pytest.mark.needs_gxx] * (stage != "one") + [pytest.mark.campaign] * ((what, stage) != ALWAYS),
        )
        for what in ("full", "lora")
        for stage in STAGES
    ],
)
def test_steps_5_to_8(what, stage, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path):
    """As in the undisturbed run, without and with the model's path; a finished run makes no further step."""
    base = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir)]
    flags = [
        "--train_data_file",
        example_rows,
        "--max_steps",
        8,
        "--save_steps",
        4,
        "--logging_steps",
        1,
        *STAGES[stage],
    ]
    flags += ["--learning_rate", 1e-3, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    flags += ["--use_lora", "--lora_dropout", 0.1] * (what == "lora")
    name = "adapter_model.safetensors" if what == "lora" else "model.safetensors"

    def run(out, *more):
        ranks = 1 if stage == "one" else 2
        args = [*flags, "--output_dir", tmp_path / out, *more]
        done = run_train(args, launcher="python" if ranks == 1 else "torchrun", nproc=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("first", *base)
    first = losses(tmp_path / "first")
    checkpoint = ["--resume_from_checkpoint", tmp_path / "first" / "checkpoint-4"]
    for out, model in (("without", []), ("with", base)):
        assert "going on from" in run(out, *checkpoint, *model)
        again = losses(tmp_path / out)
        difference = max(abs(a - b) for a, b in zip(again, first, strict=True))
        print(f"{what}, {stage}, {out} the model's path: largest difference {difference:.1e}")
        assert difference <= 1e-6 and again[:4] == first[:4]
        one, two = (load_file(tmp_path / folder / name) for folder in ("first", out))
        assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    output = run("finished", "--resume_from_checkpoint", tmp_path / "first" / "checkpoint-8")
    assert "no step is left" in output and "step 9" not in output
    three = load_file(tmp_path / "finished" / name)
    assert all(torch.equal(one[key], three[key]) for key in one)


@pytest.mark.parametrize("damage", ["missing", "cut", "shape"])
def test_weights_that_are_not_whole_are_refused(
    damage, make_model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path
):
    """And a run that is refused leaves the earlier one where it is."""
    from safetensors.torch import save_file

    base = make_model_dir("dense", example_tokenizer_dir, tmp_path / "base")
    file = base / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
        weight = tensors.pop(name)
        tensors |= {name: weight[:-1].contiguous()} if damage == "shape" else {}
        save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    args = ["--model_name_or_path", base, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_train([*args, "--overwrite_output_dir", "--max_steps", 1])
    assert run.returncode == 2, run.stderr[-2000:]
    assert (f"{file}" if damage == "cut" else "--model_name_or_path") in run.stderr and "Traceback" not in run.stderr
    if damage == "missing":
        assert "1 weights are missing: model.layers.1.mlp.up_proj.weight" in run.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["checkpoint-1"]
