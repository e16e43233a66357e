"""Which checkpoint a run goes on from, and what becomes of the others."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft.messages import Refused
from sft.training import choose
from sft.training.choose import choose_checkpoint, run_or_checkpoint
from sft.training.manifest import MANIFEST, RUN, write_manifest
from sft.training.output_dir import begin_output_dir, check_output_dir, is_finished


def arguments(output, **more):
    values = {"output_dir": str(output), "should_save": True, "world_size": 1, "resume_from_checkpoint": None}
    values |= {"auto_resume": False, "overwrite_output_dir": False, "process_index": 0, "save_on_each_node": False}
    values |= {"max_steps": 10, "num_train_epochs": 3.0, "early_stopping_patience": None}
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


def test_a_disk_that_a_machine_lacks(run, monkeypatch):
    """The run would begin at step 0, and its checkpoints be set aside."""
    elsewhere = {bool: False, list: [], type(None): None, str: "none"}  # what rank 1 says
    monkeypatch.setattr(choose, "from_all_ranks", lambda value: [value, elsewhere.get(type(value))])
    for given in ({"auto_resume": True, "output_dir": str(run)}, {"resume_from_checkpoint": str(run)}):
        with pytest.raises(Refused, match=f"{run}: rank 1 does not see the checkpoints in it: is it mounted"):
            choose_checkpoint(given)
    given = {"auto_resume": True, "output_dir": str(run)}
    assert choose_checkpoint(given | {"overwrite_output_dir": True}) == run / "checkpoint-10"
    for path in run.glob("*/manifest.json"):  # a first save that was cut off before the other machine began its part
        path.unlink()
    assert choose_checkpoint(given) is None


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
    assert "checkpoint-4, checkpoint-10: moved to" in capsys.readouterr().out
    other = arguments(run.parent / "other", resume_from_checkpoint=str(run / "checkpoint-2"))
    begin_output_dir(other, check_output_dir(other, None, None))
    assert (run / "checkpoint-2").is_dir()


def finish(output, step, epoch=0.5, counter=0, results=None):
    """Put the final files of a run there that has ended at `step`."""
    patience = {"args": {"early_stopping_patience": 2}, "attributes": {"early_stopping_patience_counter": counter}}
    state = {"global_step": step, "epoch": epoch, "stateful_callbacks": {"EarlyStoppingCallback": patience}}
    (output / "train_results.json").write_text(results or json.dumps({"global_step": step}))
    (output / "trainer_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("ended", "asked", "finished"),
    [
        ({"step": 10}, {}, True),
        ({"step": 10}, {"max_steps": 5}, True),
        ({"step": 10}, {"max_steps": 11}, False),
        ({"step": 10, "epoch": 2.4}, {"max_steps": -1, "num_train_epochs": 2.3}, True),
        ({"step": 10, "epoch": 2.4}, {"max_steps": -1}, False),
        ({"step": 12}, {"max_steps": 12}, True),  # the last save was at 10
        ({"step": 12, "counter": 2}, {"max_steps": 60, "early_stopping_patience": 2}, True),
        ({"step": 12, "counter": 2}, {"max_steps": 60, "early_stopping_patience": 3}, False),
        ({"step": 12, "counter": 2}, {"max_steps": 60}, False),
        ({"step": 8}, {"max_steps": 8}, False),  # of an earlier, shorter run
        ({"step": 10, "results": "{"}, {}, False),
        ({"step": 10, "results": '{"global_step": 8}'}, {}, False),
    ],
)
def test_whether_a_run_is_finished(ended, asked, finished, run):
    """At the newest checkpoint's step or later, and no more steps are asked for."""
    finish(run, **ended)
    assert is_finished(arguments(run, resume_from_checkpoint=str(run / "checkpoint-10"), **asked)) == finished


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_finished_run_stays_as_it_is(checkpoints, run, capsys):
    finish(run, 10)
    newest = {"resume_from_checkpoint": str(run / "checkpoint-10")} if checkpoints else {}
    for path in () if checkpoints else run.glob("checkpoint-*"):
        path.rename(run.parent / path.name)
    with pytest.raises(SystemExit) as end:
        check_output_dir(arguments(run, auto_resume=True, **newest), None, None)
    assert end.value.code == 0 and "the run is finished, it stays as it is" in capsys.readouterr().out
    longer = {"max_steps": 12, **newest}
    if checkpoints:
        assert check_output_dir(arguments(run, auto_resume=True, **longer), None, None) is False
        return
    for more in ({"auto_resume": True}, {}):
        with pytest.raises(Refused, match="holds another run"):
            check_output_dir(arguments(run, **longer, **more), None, None)


def test_a_run_that_goes_on_is_finished_no_more(run, capsys):
    """From an earlier checkpoint, to another end: cut off, it would look like a finished one."""
    finish(run, 10)
    args = arguments(run, resume_from_checkpoint=str(run / "checkpoint-4"), auto_resume=True)
    assert is_finished(args)
    begin_output_dir(args, False)
    moved = "train_results.json, trainer_state.json, checkpoint-10: moved to"
    assert not is_finished(args) and moved in capsys.readouterr().out
    assert len(list(run.glob("previous-*/*"))) == 3 and (run / "checkpoint-4").is_dir()


@pytest.mark.parametrize("what", ["stop", "rename", "mkdir", "rmdir"])
def test_what_the_disk_refuses_is_a_refusal(what, run, monkeypatch):
    """Of all ranks: the others wait for the first."""

    def fail(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    args = arguments(run, resume_from_checkpoint=str(run / "checkpoint-2"))
    begin_output_dir(args, False)  # has the lock
    (run / "stop").touch()
    os.utime(run / "stop", (0, 0))
    monkeypatch.setenv("JOB_STARTED", "1.0")
    shutil.copytree(next(run.glob("previous-*/checkpoint-4")), run / "checkpoint-3")
    if what == "rmdir":
        (run / "checkpoint-3" / MANIFEST).unlink()
    owner, name = {"rmdir": (shutil, "rmtree"), "stop": (Path, "unlink")}.get(what, (Path, what))
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(Refused, match=rf"--output_dir: {run}/.*: cannot be written \(Permission denied\)"):
        begin_output_dir(args, False)


@pytest.mark.parametrize("name", ["file", "file/out", "read_only", "read_only/out", "a" * 300])
def test_a_directory_that_cannot_be_written_is_refused_early(name, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "read_only").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "read_only")  # the tests may run as root
    with pytest.raises(Refused, match=r"--output_dir.*(file|read_only|aaa).*be written"):
        check_output_dir(arguments(tmp_path / name), None, None)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "read_only"}
