"""On which step a run stops, by what the Trainer would do there."""

import types
from concurrent.futures import Future
from pathlib import Path

import pytest
from transformers import TrainerControl

from sft import stopping
from sft.nodes import agent
from sft.training import go_on, manifest, stop_on_request


class Work:
    """Stands for an all_reduce that is under way: all ranks have answered when it is waited for."""

    waited = 0

    def wait(self):
        Work.waited += 1


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """`steps(...)`: the steps of a run, of 10 at most and 4 an epoch, at whose end it saves and stops; None where it
    is done."""

    def run(asked_at, ranks=1, evaluate=(), save_strategy="steps", epochs=None, trainer=None):
        monkeypatch.setattr(stopping, "requested", type(stopping.requested)())
        monkeypatch.setattr(stopping, "take_as_request", lambda last_words: None)
        monkeypatch.setattr(stop_on_request.distributed, "all_reduce", lambda *args, **kwargs: Work())
        trainer = trainer or types.SimpleNamespace(rest_of_save=manifest.RestOfSave())
        stop = stop_on_request.StopOnRequest(types.SimpleNamespace(how=lambda args: "", trainer=trainer))
        stop.group = "of several ranks" if ranks > 1 else None
        args = types.SimpleNamespace(save_strategy=save_strategy, should_save=True, output_dir=tmp_path)
        for step in range(1, 11):
            control = TrainerControl(should_evaluate=step in evaluate)
            state = types.SimpleNamespace(global_step=step, max_steps=10, epoch=step / 4)
            trainer.step = step
            if step == asked_at:
                stopping.requested.set()
            stop.on_step_end(args, state, control)
            if control.should_evaluate and args.save_strategy == "best":
                control.should_save = False  # as the Trainer does: the evaluation is not a better one
            ended = control.should_training_stop
            if ended or state.epoch.is_integer():
                if epochs and not ended:
                    control.should_evaluate = control.should_save = True
                stop.on_epoch_end(args, state, control)
                if control.should_evaluate and args.save_strategy == "best":
                    control.should_save = False
                assert not ended or not (control.should_evaluate or control.should_save), "twice"
            if control.should_training_stop:
                assert ended or control.should_save
                return step
        return None

    return run


@pytest.mark.parametrize(
    ("asked_at", "how", "stops_at"),
    [
        (2, {}, 2),
        (2, {"ranks": 2}, 3),  # the answer of all is read a step later
        (4, {}, 4),  # at the end of the epoch
        (3, {"ranks": 2}, 4),
        (4, {"epochs": True}, 4),
        (9, {"ranks": 2}, None),  # the run's last step finishes it
        (10, {}, None),
        (10, {"ranks": 2}, None),
        (2, {"evaluate": [2]}, 2),
        (2, {"evaluate": [2, 3, 4, 5], "save_strategy": "best"}, 2),  # and it saves, better or not
        (4, {"epochs": True, "save_strategy": "best"}, 4),
        (4, {"ranks": 2, "evaluate": range(11), "save_strategy": "best"}, 5),
    ],
)
def test_the_step(asked_at, how, stops_at, steps):
    Work.waited = 0
    assert steps(asked_at, **how) == stops_at


def test_no_answer_is_left_under_way(steps):
    Work.waited = 0
    assert steps(99, ranks=2) is None and Work.waited == 9, "one is begun at each step but the last"


@pytest.mark.parametrize(("ranks", "told_at"), [(1, 1), (2, 2)])
def test_a_checkpoint_that_is_not_whole_is_told_at_once(ranks, told_at, steps):
    """And not at the next save: the Trainer's finish_save ends all ranks."""
    trainer = types.SimpleNamespace(rest_of_save=manifest.RestOfSave(), finish_save=lambda: 1 / 0)
    trainer.rest_of_save.work = Future()
    trainer.rest_of_save.work.set_exception(OSError(28, "No space left on device"))
    with pytest.raises(ZeroDivisionError):
        steps(99, ranks=ranks, trainer=trainer)
    assert trainer.step == told_at


@pytest.mark.parametrize(
    ("codes", "rank"),
    [
        ({1: -9, 0: 75}, 1),  # the peer of one that was killed stops
        ({1: 1, 0: 75}, 1),
        ({0: 75, 1: 1}, 0),  # one is stopped alone, before the first step; the other one loses it
        ({0: -15, 1: 75}, 1),  # one does not listen yet
        ({1: 75, 0: 2}, 0),
    ],
)
def test_which_rank_is_named(codes, rank):
    assert agent.first_failure(codes) == rank


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
SAME = "To go on, start the same launcher again with:\n/a/train.py --resume_from_checkpoint 'o t/checkpoint-3'"


@pytest.mark.parametrize(
    ("ranks", "env", "line"),
    [
        (1, {}, "Continue with:\npython /a/train.py --resume_from_checkpoint 'o t/checkpoint-3'"),
        (2, TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, "Continue with:\ntorchrun --nproc_per_node 2 /a/train.py --resume_"),
        (4, TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, SAME),  # two nodes
        (2, {"LOCAL_WORLD_SIZE": "2"}, SAME),  # srun, deepspeed
        (
            4,
            TORCHRUN | {"GO_ON_WITH": "A=1 bash train.sh"},
            "Continue with:\nA=1 bash train.sh --resume_from_checkpoint",
        ),
    ],
)
def test_the_command_that_goes_on(ranks, env, line, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GO_ON_WITH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["/a/train.py", "--max_steps", "9"])
    stopped = go_on.GoOn(None)
    there = [Path("o t/checkpoint-3"), Path("o t/checkpoint-6")]
    monkeypatch.setattr(go_on, "checkpoints_in", lambda output: there)
    monkeypatch.setattr(go_on, "is_whole", lambda checkpoint: checkpoint.name == "checkpoint-3")  # 6 is being written
    said = stopped.how(types.SimpleNamespace(world_size=ranks, save_only_model=False, output_dir="o t"))
    assert said.startswith(f"Last checkpoint: o t/checkpoint-3. {line}"), said
