"""Which checkpoint a run goes on from, and what becomes of the others."""

import json
from types import SimpleNamespace

import pytest

from sft.messages import Refused
from sft.training import choose
from sft.training.choose import choose_checkpoint, run_or_checkpoint
from sft.training.manifest import MANIFEST, RUN, write_manifest
from sft.training.output_dir import begin_output_dir, check_output_dir


def arguments(output, **more):
    values = {"output_dir": str(output), "should_save": True, "world_size": 1, "resume_from_checkpoint": None}
    values |= {"auto_resume": False, "overwrite_output_dir": False, "process_index": 0, "save_on_each_node": False}
    return SimpleNamespace(**values | {"verify_checkpoints": False} | more)


@pytest.fixture
def run(tmp_path):
    """A run's directory with checkpoints 2, 4 and 10, of which each file tells its step."""
    output = tmp_path / "out"
    for step in (2, 4, 10):
        checkpoint = output / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / RUN).write_text("{}")
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
        (checkpoint / "model.safetensors").write_text(f"weights of {step}")
        write_manifest(checkpoint, arguments(output))
    return output


def of_an_earlier_release(checkpoint, *more):
    for name in (RUN, MANIFEST):
        (checkpoint / name).unlink()
    for name in more:
        (checkpoint / name).write_text("")


@pytest.mark.parametrize("given", ["auto", "run", "nothing"])
def test_the_newest_whole_one(given, run, capsys):
    """By step, in a run's directory however it is named; each that is newer and not whole has a line."""
    flags = {
        "auto": {"auto_resume": True, "output_dir": str(run)},
        "run": {"resume_from_checkpoint": str(run)},
        "nothing": {"resume_from_checkpoint": "", "output_dir": str(run)},
    }[given]
    assert choose_checkpoint(flags).name == "checkpoint-10" and capsys.readouterr().out == ""
    (run / "checkpoint-10" / MANIFEST).unlink()
    (run / "checkpoint-4" / "model.safetensors").write_text("Weights of 4")
    assert choose_checkpoint(flags).name == "checkpoint-2"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "checkpoint-10: manifest.json: missing; passed over"
    assert lines[1] == "checkpoint-4: model.safetensors: content; passed over"
    (run / "checkpoint-2" / "model.safetensors").write_text("weights")
    if given == "auto":
        assert choose_checkpoint(flags) is None
        assert choose_checkpoint({**flags, "resume_from_checkpoint": None}) is None
    else:
        with pytest.raises(Refused, match="none of its checkpoints is whole"):
            choose_checkpoint(flags)
    assert "checkpoint-2: model.safetensors: size; passed over" in capsys.readouterr().out


def test_without_a_name_and_a_directory_the_newest_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choose, "OUTPUT_ROOT", tmp_path / "nowhere")
    with pytest.raises(Refused, match="there is no run in"):
        choose_checkpoint({"resume_from_checkpoint": ""})
    monkeypatch.setattr(choose, "OUTPUT_ROOT", tmp_path)
    assert choose_checkpoint({"resume_from_checkpoint": ""}) == run / "checkpoint-10"
    assert f"resume_from_checkpoint = {run} (the newest run)" in capsys.readouterr().out


def test_one_that_is_named_must_be_whole(run):
    given = {"resume_from_checkpoint": str(run / "checkpoint-4")}
    assert choose_checkpoint(given) == run / "checkpoint-4"
    for word, damage in {"content": "weights of 5", "size": "w"}.items():
        (run / "checkpoint-4" / "model.safetensors").write_text(damage)
        with pytest.raises(Refused, match=rf"checkpoint-4: is not whole: model\.safetensors: {word}"):
            choose_checkpoint({**given, "resume_anyway": True})
    (run / "checkpoint-4" / MANIFEST).unlink()
    with pytest.raises(Refused, match=r"is not whole: manifest\.json: missing"):
        choose_checkpoint(given)


def test_of_an_earlier_release(run, capsys):
    """It is named, or not taken; under DeepSpeed its files could run code."""
    checkpoint = run / "checkpoint-10"
    of_an_earlier_release(checkpoint)
    given = {"resume_from_checkpoint": str(checkpoint)}
    assert choose_checkpoint(given) == checkpoint
    assert "has no manifest.json: its files are not compared" in capsys.readouterr().out
    (checkpoint / "latest").write_text("global_step10")
    with pytest.raises(Refused, match="DeepSpeed would unpickle its files"):
        choose_checkpoint(given)
    assert choose_checkpoint({**given, "resume_anyway": True}) == checkpoint
    for other in (2, 4):
        of_an_earlier_release(run / f"checkpoint-{other}")
    with pytest.raises(Refused, match="checkpoint-2: was saved by an earlier release .*, name it"):
        choose_checkpoint({"auto_resume": True, "output_dir": str(run)})
    assert (
        choose_checkpoint({**given, "auto_resume": True, "output_dir": str(run), "resume_anyway": True}) == checkpoint
    )
    with pytest.raises(Refused, match="checkpoint-2: was saved by an earlier release .*, name it"):
        choose_checkpoint({"resume_from_checkpoint": str(run)})


def test_a_name_that_is_none(run):
    """What there is beside it is said, and not that a file is missing in it."""
    for name, why in {
        "out/checkpoint-11": "no such directory",
        "ou": "no such directory",
        "out/runs": "not a check",
    }.items():
        (run / "runs").mkdir(exist_ok=True)
        beside = "checkpoint-10, .*checkpoint-4" if name != "ou" else f"There are: {run}$"
        for anyway in (False, True):
            with pytest.raises(Refused, match=f"{name}: .*{why}.*{beside}"):
                choose_checkpoint({"resume_from_checkpoint": str(run.parent / name), "resume_anyway": anyway})
    with pytest.raises(Refused, match=f"{run.parent}: is not a checkpoint.*There are: {run}$"):
        choose_checkpoint({"resume_from_checkpoint": str(run.parent)})
    with pytest.raises(Refused, match="nowhere/at: no such directory$"):
        choose_checkpoint({"resume_from_checkpoint": "nowhere/at"})


def test_all_ranks_take_the_first_ones_newest_run(run, monkeypatch):
    """Another has not seen it yet, or has another disk."""
    monkeypatch.setattr(choose, "OUTPUT_ROOT", run.parent / "not yet")
    assert run_or_checkpoint("", None, lambda found: found or str(run)) == run
    monkeypatch.setattr(
        choose, "from_all_ranks", lambda value: [str(run), value] if isinstance(value, str) else [value]
    )
    assert choose_checkpoint({"resume_from_checkpoint": ""}) == run / "checkpoint-10"


def test_a_run_begins_in_the_place_of_torn_checkpoints(run, capsys):
    """They are removed and named; whole ones, and an earlier release's, are not."""
    args = arguments(run, auto_resume=True)
    for step in (2, 10):
        (run / f"checkpoint-{step}" / MANIFEST).unlink()
    of_an_earlier_release(run / "checkpoint-4")
    assert check_output_dir(args, None, None) is False
    begin_output_dir(args, False)
    assert not list(run.glob("checkpoint-*")) and len(list(run.glob("previous-*/checkpoint-4/*"))) == 2
    said = capsys.readouterr().out
    assert "checkpoint-2: was not whole, removed" in said and "checkpoint-10: was not whole, removed" in said


def test_newer_ones_than_the_one_that_goes_on_are_set_aside(run, capsys):
    """A later --auto_resume would take them for its own."""
    args = arguments(run, resume_from_checkpoint=str(run / "checkpoint-2"))
    begin_output_dir(args, check_output_dir(args, None, None))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert {path.name for path in run.glob("previous-*/*")} == {"checkpoint-4", "checkpoint-10"}
    assert "checkpoint-10: was moved to" in capsys.readouterr().out
    other = arguments(run.parent / "other", resume_from_checkpoint=str(run / "checkpoint-2"))
    begin_output_dir(other, check_output_dir(other, None, None))
    assert (run / "checkpoint-2").is_dir()


def test_a_finished_run_stays_as_it_is(run, capsys):
    for path in run.glob("checkpoint-*"):
        path.rename(run.parent / path.name)
    (run / "train_results.json").write_text('{"global_step": 10}')
    (run / "trainer_state.json").write_text('{"global_step": 10, "max_steps": 10}')
    with pytest.raises(SystemExit) as end:
        check_output_dir(arguments(run, auto_resume=True), None, None)
    assert end.value.code == 0 and "the run is finished, it stays as it is" in capsys.readouterr().out
    (run / "train_results.json").write_text('{"global_step": 8}')
    for more in ({"auto_resume": True}, {}):
        with pytest.raises(Refused, match="holds another run"):
            check_output_dir(arguments(run, **more), None, None)
