"""A run that ends by its evaluations: the same on resume, and finished once it has ended."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

STEPS = 60


@pytest.fixture(scope="module")
def stopped(train_and_eval_rows, model_dir, example_tokenizer_dir, run_train, tmp_path_factory):
    """A run that an evaluation has ended: its flags but the directory, the directory, its steps.

    The learning rate is so high that the loss soon gets worse.
    """
    out = tmp_path_factory.mktemp("stopped") / "out"
    rows, eval_rows = train_and_eval_rows
    flags = ["--model_name_or_path", model_dir("dense", example_tokenizer_dir), "--train_data_file", rows]
    flags += ["--eval_data_file", eval_rows, "--max_steps", STEPS, "--eval_steps", 2, "--save_steps", 2]
    flags += ["--per_device_train_batch_size", 4, "--lr_scheduler_type", "constant", "--learning_rate", 3]
    flags += ["--load_best_model_at_end", "--early_stopping_patience", 2, "--logging_steps", 1, "--report_to", "none"]
    run = run_train([*flags, "--output_dir", out])
    assert run.returncode == 0, run.stderr[-3000:]
    steps = json.loads((out / "train_results.json").read_text())["global_step"]
    assert 6 <= steps < STEPS
    return SimpleNamespace(flags=flags, out=out, steps=steps, best=steps - 4)


def is_same(one, two):
    """The final weights, and what was logged at each step but the times."""
    weights = [load_file(out / "model.safetensors") for out in (one, two)]
    logs = [json.loads((out / "trainer_state.json").read_text())["log_history"] for out in (one, two)]
    kept = [[(e["step"], e.get("loss"), e.get("eval_loss")) for e in log if "train_runtime" not in e] for log in logs]
    return kept[0] == kept[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("where", ["moved", pytest.param("other", marks=pytest.mark.campaign)])
def test_goes_on_to_the_same_end(where, stopped, run_train, tmp_path):
    """S4, S5: the patience goes on. The run's directory was moved: the best checkpoint is found beside the one that
    goes on, and rotation leaves it."""
    checkpoints = [f"checkpoint-{step}" for step in (stopped.best, stopped.best + 2)]
    for name in checkpoints:
        shutil.copytree(stopped.out / name, tmp_path / "moved" / name)
    hidden = stopped.out.rename(stopped.out.with_name("gone"))
    try:
        flags = ["--resume_from_checkpoint", tmp_path / "moved" / checkpoints[1], "--output_dir", tmp_path / where]
        run = run_train([*flags, "--save_total_limit", 1])
    finally:
        hidden.rename(stopped.out)
    assert run.returncode == 0, run.stderr[-3000:]
    assert is_same(stopped.out, tmp_path / where), run.stdout
    assert (tmp_path / "moved" / checkpoints[0]).is_dir()


@pytest.mark.parametrize("left", ["all", "without the last", "none"])
@pytest.mark.parametrize("more", [[], ["--max_steps", 2 * STEPS]], ids=["same", "longer"])
def test_a_stopped_run_is_finished(left, more, stopped, run_here, tmp_path):
    """S4: whatever it has kept, and however long it was planned."""
    out = tmp_path / "out"
    shutil.copytree(stopped.out, out)
    gone = {"all": (), "without the last": out.glob(f"checkpoint-{stopped.steps}"), "none": out.glob("checkpoint-*")}
    for path in gone[left]:
        shutil.rmtree(path)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run = run_here("train.py", [*stopped.flags, "--output_dir", out, "--auto_resume", *more])
    assert run.returncode == 0 and "the run is finished, it stays as it is" in run.stdout, run.stderr
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_cut_off_while_it_wrote_its_final_files(stopped, run_here, tmp_path):
    """S4: its last checkpoint says that it has stopped; the results of an earlier, shorter run do not."""
    for number, results in enumerate([None, {"global_step": stopped.best}]):
        out = tmp_path / f"{number}"
        shutil.copytree(stopped.out, out, ignore=lambda folder, names: set(names) & {"model.safetensors"})
        for step in range(2, stopped.steps + 1, 2):
            shutil.copytree(stopped.out / f"checkpoint-{step}", out / f"checkpoint-{step}", dirs_exist_ok=True)
        (out / "train_results.json").unlink()
        if results:
            (out / "train_results.json").write_text(json.dumps(results))
        run = run_here("train.py", [*stopped.flags, "--output_dir", out, "--auto_resume"])
        assert run.returncode == 0 and "no step is left, its final files are written" in run.stdout, run.stderr
        assert is_same(stopped.out, out)
        assert json.loads((out / "train_results.json").read_text())["global_step"] == stopped.steps


def test_more_patience_goes_on(stopped, run_train, tmp_path):
    """One evaluation more, and with it the same best."""
    shutil.copytree(stopped.out, tmp_path / "out")
    more = ["--output_dir", tmp_path / "out", "--auto_resume", "--early_stopping_patience", 3]
    run = run_train([*stopped.flags, *more])
    assert run.returncode == 0, run.stderr[-3000:]
    assert "train_results.json, trainer_state.json: moved to" in run.stdout
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["global_step"] == stopped.steps + 2


def test_final_files_that_the_disk_refuses(stopped, run_here, tmp_path):
    """One line, as at the end of training."""
    (tmp_path / "training_args.bin").mkdir()
    checkpoint = stopped.out / f"checkpoint-{stopped.steps}"
    run = run_here("train.py", ["--resume_from_checkpoint", checkpoint, "--output_dir", tmp_path])
    assert run.returncode == 1 and f"failed: {tmp_path} could not be saved: Is a directory." in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "train_results.json").exists()


def test_a_checkpoint_of_an_epochs_end_has_what_is_done_there(stopped, run_train, tmp_path):
    """The evaluation and the log entry of that epoch, of 25 steps, where checkpoints are saved by steps."""
    flags = [*stopped.flags, "--load_best_model_at_end", "False", "--eval_strategy", "epoch", "--save_steps", 25]
    flags += ["--logging_strategy", "epoch", "--learning_rate", 0.5, "--early_stopping_patience", 1]
    run = run_train([*flags, "--output_dir", tmp_path / "whole"])
    assert run.returncode == 0, run.stderr[-3000:]
    shutil.copytree(tmp_path / "whole" / "checkpoint-25", tmp_path / "out" / "checkpoint-25")
    run = run_train([*flags, "--output_dir", tmp_path / "out", "--auto_resume"])
    assert run.returncode == 0, run.stderr[-3000:]
    assert is_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.campaign
@pytest.mark.needs_gxx
def test_of_two_ranks_with_zero(stopped, model_dir, example_tokenizer_dir, run_train, tmp_path):
    """S4, S5, beside an evaluation before the first step, which a run that goes on does not count again."""
    flags = [*stopped.flags, "--model_name_or_path", model_dir("moe", example_tokenizer_dir), "--eval_on_start"]
    flags += ["--deepspeed", "ds_zero2_no_offload.json", "--restore_callback_states_from_checkpoint"]
    run = run_train([*flags, "--output_dir", tmp_path / "whole"], launcher="torchrun", nproc=2)
    assert run.returncode == 0, run.stderr[-3000:]
    steps = json.loads((tmp_path / "whole" / "train_results.json").read_text())["global_step"]
    for step in (steps - 4, steps - 2):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "moved" / f"checkpoint-{step}")
    hidden = (tmp_path / "whole").rename(tmp_path / "gone")
    flags += ["--output_dir", tmp_path / "moved", "--auto_resume", "--save_total_limit", 1]
    for said in ("best checkpoint = ", "the run is finished, it stays as it is"):
        run = run_train(flags, launcher="torchrun", nproc=2)
        assert run.returncode == 0 and said in run.stdout, run.stderr[-3000:]
        assert "does not exist anymore" not in run.stderr and is_same(hidden, tmp_path / "moved")
    (tmp_path / "moved" / "stop").mkdir()  # cannot be removed as a file
    os.utime(tmp_path / "moved" / "stop", (0, 0))
    run = run_train([*flags, "--early_stopping_patience", 3], launcher="torchrun", nproc=2)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.count("refused: ") == 1 and "stop: cannot be written (Is a directory)" in run.stderr
