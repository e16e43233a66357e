"""What is looked at before a run goes on: its training state, its steps, its flags, the rate of its next step."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sft.arguments import defaults
from sft.messages import Refused
from sft.training.go_on import follow_schedule, losses_so_far
from sft.training.manifest import write_manifest
from sft.training.plan import go_on_with, refuse_another_run, spelled, zero_of
from sft.training.resume import check_training_state, find_best, read_trainer_state, steps_left


def arguments(**more):
    """The training arguments that these checks read."""
    values = {
        "deepspeed": None,
        "world_size": 1,
        "save_on_each_node": False,
        "resume_anyway": False,
        "auto_resume": False,
        "dataloader_drop_last": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": -1,
    }
    values |= {"early_stopping_patience": None, "load_best_model_at_end": False, "verify_checkpoints": False}
    return SimpleNamespace(**values | {"num_train_epochs": 1.0, "record": {}} | more)


@pytest.fixture
def checkpoint(tmp_path):
    """At step 10 of 20, of one process."""
    tmp_path = tmp_path / "checkpoint-10"
    tmp_path.mkdir()
    state = {"global_step": 10, "max_steps": 20, "log_history": []}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save([1], tmp_path / name)
    return tmp_path


def deepspeed_checkpoint(folder, ranks):
    (folder / "optimizer.pt").unlink()
    (folder / "latest").write_text("global_step10\n")
    (folder / "global_step10").mkdir()
    for rank in range(ranks):
        torch.save([1], folder / "global_step10" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        torch.save([1], folder / f"rng_state_{rank}.pth")


def test_a_whole_one_goes_on(checkpoint, capsys):
    check_training_state(checkpoint, arguments())
    assert f"going on from {checkpoint}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["missing", "not whole"])
def test_a_part_that_is_missing_or_cut_is_named(name, damage, checkpoint):
    file = checkpoint / name
    whole = file.read_bytes()
    file.unlink()
    if damage == "not whole":
        file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match=f"{name} is {damage}"):
        check_training_state(checkpoint, arguments())


def test_each_rank_needs_its_random_state(checkpoint):
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    with pytest.raises(Refused, match=r"rng_state_1\.pth is missing"):
        check_training_state(checkpoint, arguments(world_size=2))


def test_deepspeeds_states_are_one_a_rank(checkpoint):
    engine = SimpleNamespace(config={"zero_optimization": {"stage": 2}})
    args = arguments(deepspeed="x", world_size=2, hf_deepspeed_config=engine)
    with pytest.raises(Refused, match=r"latest is missing"):
        check_training_state(checkpoint, args)
    deepspeed_checkpoint(checkpoint, 2)
    check_training_state(checkpoint, args)
    state = next((checkpoint / "global_step10").iterdir())
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(Refused, match=f"{state.name} is not whole"):
        check_training_state(checkpoint, args)
    state.unlink()
    with pytest.raises(Refused, match="states of 1 of 2 ranks"):
        check_training_state(checkpoint, args)


@pytest.mark.parametrize(
    ("given", "more", "left"),
    [
        (set(), {"max_steps": 50}, 10),  # not given: as its run planned
        ({"max_steps"}, {"max_steps": 12}, 2),
        ({"max_steps"}, {"max_steps": 5}, 0),
        ({"num_train_epochs"}, {"num_train_epochs": 2}, 16),  # 101 rows, 8 a step: 13 steps an epoch
        ({"num_train_epochs"}, {"num_train_epochs": 2, "dataloader_drop_last": True}, 16),  # 25 whole batches
        ({"num_train_epochs"}, {"num_train_epochs": 2, "gradient_accumulation_steps": 1}, 42),
    ],
)
def test_steps_that_are_left(given, more, left, checkpoint):
    assert steps_left(checkpoint, arguments(**more), 101, frozenset(given)) == left


def change(checkpoint, **more):
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def test_a_run_that_has_stopped_early_has_none_left(checkpoint):
    """S4, with the patience of now."""
    counted = {"args": {"early_stopping_patience": 2}, "attributes": {"early_stopping_patience_counter": 2}}
    change(checkpoint, stateful_callbacks={"EarlyStoppingCallback": counted})
    for patience, left in {1: 0, 2: 0, 3: 10, None: 10}.items():
        assert steps_left(checkpoint, arguments(early_stopping_patience=patience), 101, frozenset()) == left


@pytest.mark.parametrize("linked", [False, True])
def test_the_best_checkpoint_is_beside_or_where_it_was(linked, checkpoint, tmp_path):
    """S5. The one that goes on may be a symlink to it, in another directory."""
    run, was = tmp_path / "run", tmp_path / "was" / "checkpoint-4"
    here = run / "checkpoint-10"
    shutil.copytree(checkpoint, here)
    change(here, best_model_checkpoint=str(was))
    if linked:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "checkpoint-10").symlink_to(here)
    named = tmp_path / "other" / "checkpoint-10" if linked else here
    assert find_best(named, arguments()) is None
    was.mkdir(parents=True)
    assert find_best(named, arguments()) == was
    (run / "checkpoint-4").mkdir()
    assert find_best(named, arguments()) == run / "checkpoint-4"
    change(here, best_model_checkpoint="out/checkpoint-10")
    assert find_best(named, arguments()) == named
    change(here, best_model_checkpoint=None)
    assert find_best(named, arguments(load_best_model_at_end=True)) is None


def test_a_best_checkpoint_that_may_be_needed_is_whole(checkpoint, tmp_path, capsys):
    change(checkpoint, best_model_checkpoint="/gone/checkpoint-4")
    needs, best = arguments(load_best_model_at_end=True), checkpoint.parent / "checkpoint-4"
    with pytest.raises(Refused, match=rf"{best}: is the run's best .* manifest\.json: missing\. To go on without"):
        find_best(checkpoint, needs)
    # rotation kept the best of a newer checkpoint, which is damaged
    assert find_best(checkpoint, arguments(load_best_model_at_end=True, auto_resume=True)) is None
    assert f"not exact: {best}: is the run's best checkpoint" in capsys.readouterr().out
    best.mkdir()
    (best / "model.safetensors").write_text("weights")
    args = arguments(load_best_model_at_end=True, process_index=0, should_save=True)
    write_manifest(best, args)
    assert find_best(checkpoint, needs) == best
    (best / "model.safetensors").write_text("Weights")
    with pytest.raises(Refused, match=r"model\.safetensors: content"):
        find_best(checkpoint, needs)
    assert find_best(checkpoint, arguments(load_best_model_at_end=True, resume_anyway=True)) is None
    assert "--resume_anyway: not exact: " in capsys.readouterr().out


def test_a_finished_run_needs_no_optimizer(checkpoint):
    (checkpoint / "optimizer.pt").unlink()
    assert steps_left(checkpoint, arguments(max_steps=10), 101, frozenset({"max_steps"})) == 0
    with pytest.raises(Refused, match=r"optimizer\.pt is missing"):
        steps_left(checkpoint, arguments(), 101, frozenset())


def test_what_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    with pytest.raises(Refused, match="no such directory"):
        read_trainer_state(tmp_path / "nowhere")
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(Refused, match=r"no whole trainer_state\.json"):
        read_trainer_state(checkpoint)


def test_values_that_are_written_otherwise_are_the_same():
    assert spelled(0) == spelled(0.0) == "0" and spelled(1e-05) == spelled(0.00001) != spelled(1.1e-05)
    assert spelled(["b", "a"]) == spelled(["a", "b"]) != spelled(["a"])


def zero(stage=2, **more):
    return {"zero_optimization": {"stage": stage, **more}}


def test_a_deepspeed_file_is_its_stage_and_offload():
    found = zero_of({**zero(3, offload_optimizer={"device": "cpu"}), "sparse_gradients": True}, {})
    assert found["deepspeed"] == "ZeRO-3, offload to cpu and none" and found["deepspeed sparse_gradients"] is True
    assert zero_of(zero(2), {})["deepspeed"] == "ZeRO-2" and zero_of(None, {}) == {"deepspeed": "none"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"bf16": {"enabled": True}}, {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}}),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, {"bf16": {"enabled": True}, "fp16": {}}),
        ({"prescale_gradients": False, "amp": {"enabled": False}, "data_types": {"grad_accum_dtype": None}}, {}),
        ({"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": "auto"}),
        ({"optimizer": {"params": {"lr": 1e-5}}}, {"optimizer": {"params": {"lr": "auto"}}}),
        (zero(cpu_offload=False, zenflow=False, offload_param={}), zero()),
    ],
)  # fmt: skip
def test_files_that_mean_the_same_are_the_same(one, other):
    flags = {"bf16": True}
    assert zero_of(zero() | one, flags) == zero_of(zero() | other, flags)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"bf16": {"enabled": "auto"}}, {}),
        ({"bf16": {"enabled": "auto"}}, {"bf16": {"enabled": "auto", "immediate_grad_update": True}}),
        ({"gradient_clipping": "auto"}, {}),
        ({"zero_force_ds_cpu_optimizer": False}, {}),
        ({"amp": {"enabled": True}}, {"amp": {"enabled": False}}),
        (zero(reduce_scatter=False), zero()),
    ],
)
def test_files_that_mean_something_else_are_not(one, other):
    assert zero_of(zero() | one, {"bf16": True}) != zero_of(zero() | other, {"bf16": True})


@pytest.mark.parametrize(
    ("config", "says", "fits"),
    [
        (zero(round_robin_gradients=True), "zero_optimization.round_robin_gradients True (the run: off)", False),
        (zero(sub_group_size=100), "zero_optimization.sub_group_size 100 (the run: 1000000000)", False),
        (zero() | {"optimizer": {"type": "Adam"}}, 'optimizer {"type": "Adam"} (the run: off)', False),
        (zero(zero_quantized_weights=True), "zero_optimization.zero_quantized_weights True (the run: off)", True),
        (zero(cpu_offload=True), "zero_optimization.cpu_offload True (the run: off)", False),
        (zero() | {"gradient_clipping": 2}, "gradient_clipping auto (the run: off)", True),
        (zero(overlap_comm=True, stage3_prefetch_bucket_size=5, reduce_bucket_size="auto"), None, True),
        (zero(sub_group_size=1e9, round_robin_gradients=False, offload_optimizer={"device": "none"}), None, True),
        (zero() | {"wandb": {"enabled": True}, "steps_per_print": 1}, None, True),
    ],
)
def test_another_deepspeed_file(config, says, fits, capsys):
    """A key that decides is refused by name; where the optimizer's shards fit it, --resume_anyway goes on."""
    run, given = {"deepspeed": zero()}, {"deepspeed": config, "resume_anyway": False}
    with pytest.raises(Refused, match=re.escape(f"deepspeed {says}")) if says else contextlib.nullcontext() as refusal:
        refuse_another_run(Path("checkpoint-1"), run, given)
    assert says is None or ("--resume_anyway" in str(refusal.value)) == fits
    with contextlib.nullcontext() if fits else pytest.raises(Refused, match=re.escape(f"deepspeed {says}")):
        refuse_another_run(Path("checkpoint-1"), run, given | {"resume_anyway": True})
    assert (f"deepspeed {says}" in capsys.readouterr().out) == bool(fits and says)


def test_a_masked_value_is_never_used(capsys):
    """Nor compared: one that decides must be given, others are taken as not given."""
    known = defaults() | {"run_name": "http://me:***@host", "output_dir": "out", "optim_args": None}
    given = {"resume_from_checkpoint": "out/checkpoint-1", "train_data_file": ["rows.jsonl"]}
    assert go_on_with({"arguments": known}, given)["run_name"] is None
    assert "does not record --run_name: taken as not given" in capsys.readouterr().out
    with pytest.raises(Refused, match="does not record --optim_args, because it had a secret in it"):
        go_on_with({"arguments": known | {"optim_args": "a=***"}}, given)
    values = go_on_with({"arguments": known | {"optim_args": "a=***"}}, given | {"optim_args": "a=1"})
    assert values["optim_args"] == "a=1"
    with pytest.raises(Refused, match="does not record its run's rows"):
        go_on_with({"arguments": known, "rows": {"files": ["***/rows.jsonl"]}}, given | {"train_data_file": None})


def test_losses_of_a_checkpoint_without_their_sum():
    """Logged every second step, saved at the fifth: the mean of what is known stands for the rest."""
    history = [{"step": 2, "loss": 3.0}, {"step": 3, "eval_loss": 9.0}, {"step": 4, "loss": 1.0}]
    found = losses_so_far({"log_history": history, "global_step": 5})
    assert found == {"logged": pytest.approx(10.0), "unlogged": 0.0, "last_logged": 5}
    kept = {"logged": 1.0, "unlogged": 2.0, "last_logged": 3}
    assert losses_so_far({"stateful_callbacks": {"GoOn": {"attributes": kept}}}) == kept


def test_the_next_rate_is_the_schedules_of_now(capsys):
    """At step 10, planned to 20 and now to 40."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": 10, "_last_lr": [0.5], "lr_lambdas": [None]})
    optimizer.param_groups[0]["lr"] = 0.5
    follow_schedule(scheduler, 10, 40)
    assert optimizer.param_groups[0]["lr"] == 0.75 and scheduler.last_epoch == 10
    assert "next learning rate = 0.75 (step 11 of 40; as it was planned 0.5)" in capsys.readouterr().out
    follow_schedule(scheduler, 10, 40)
    assert capsys.readouterr().out == "", "nothing has changed"
