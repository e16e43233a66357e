"""Other numbers of processes, without any: the rows of a step, the parts of a rank, what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from sft.arguments import defaults
from sft.messages import Refused
from sft.training.reshard import check_shards, parts_of, seed_ranks, steps_for_ranks


def values(**more):
    return defaults() | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3} | more


@pytest.mark.parametrize(("before", "now", "steps"), [(4, 2, 6), (4, 12, 1), (4, 1, 12), (4, 3, 4), (4, 4, None)])
def test_each_step_keeps_its_batches(before, now, steps, capsys):
    assert steps_for_ranks({"processes": before}, values(), now) == steps
    assert len(capsys.readouterr().out.splitlines()) == (steps is not None)


@pytest.mark.parametrize(
    ("now", "flags", "says"),
    [
        (5, {}, "a step has 12 batches of 2 rows; numbers of processes that divide it: 1, 2, 3, 4, 6, 12."),
        (24, {}, "a step has 12 batches"),
        (2, {"group_by_length": True}, "--group_by_length"),
        (2, {"train_sampling_strategy": "group_by_length"}, "--group_by_length"),
        (2, {"average_tokens_across_devices": False}, "--average_tokens_across_devices false"),
        (2, {"dataloader_drop_last": True}, "--dataloader_drop_last"),
        (2, {"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
    ],
)
def test_other_rows_are_refused_or_said(now, flags, says, capsys):
    with pytest.raises(Refused) as refusal:
        steps_for_ranks({"processes": 4}, values(**flags), now)
    assert says in str(refusal.value) and f"processes {now} (the run: 4)" in str(refusal.value)
    assert steps_for_ranks({"processes": 4}, values(**flags, resume_anyway=True), now) is None
    assert says.rstrip(".") in capsys.readouterr().out


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_what_is_given_otherwise_is_used(name, capsys):
    """Refused before, but for --resume_anyway; the run's own value, given again, is not otherwise."""
    record = {"processes": 4, "arguments": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}}
    assert steps_for_ranks(record, values(resume_anyway=True), 2) == 6
    capsys.readouterr()
    assert steps_for_ranks(record, values(resume_anyway=True, **{name: 8}), 2) is None
    assert capsys.readouterr().out == f"--resume_anyway: not exact: processes 2 (the run: 4): --{name} 8 as given\n"


def test_every_element_is_divided_once():
    """Flat tensors of three ranks and of two, with sizes that neither divides."""
    groups = [{"a": 7, "b": 1}, {"c": 12}]
    for ranks in (1, 2, 3, 5):
        parts = [part for rank in range(ranks) for part in parts_of(groups, rank, ranks)]
        for name, numel in {"a": 7, "b": 1, "c": 12}.items():
            own = [range(offset, offset + n) for what, _, _, offset, n in parts if what == name]
            elements = [element for part in own for element in part if element < numel]
            assert elements == [*range(numel)]


def test_random_numbers_depend_on_seed_step_and_rank_alone(capsys):
    drawn = []
    for seed, step, rank in ((1, 4, 0), (1, 4, 1), (1, 8, 0), (2, 4, 0), (1, 4, 0)):
        args = SimpleNamespace(seed=seed, world_size=2, process_index=rank, neftune_noise_alpha=None)
        model = torch.nn.Sequential(torch.nn.Dropout(0.0))
        model.config = SimpleNamespace(attention_dropout=0.0)
        seed_ranks(args, model, step)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 4 and drawn[0] == drawn[-1] and not capsys.readouterr().out
    model.config.attention_dropout = 0.1
    seed_ranks(args, model, step)
    assert "not exact: dropout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("zero", "shards", "says"),
    [
        ({"stage": 2}, 4, None),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, 4, None),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, 4, "without NVMe"),
        ({"stage": 1}, 4, "only ZeRO-2 and ZeRO-3"),
        ({}, 0, "only ZeRO-2 and ZeRO-3"),
        ({"stage": 2}, 2, "it holds the optimizer states of 2 ranks, those of the others are on other disks"),
    ],
)
def test_shards_that_cannot_be_divided_are_refused(zero, shards, says, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"world_size": 4}))
    (tmp_path / "latest").write_text("global_step4")
    (tmp_path / "global_step4").mkdir()
    for rank in range(shards):
        (tmp_path / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    args = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(config={"zero_optimization": zero}), world_size=2)
    if says is None:
        return check_shards(tmp_path, args)
    with pytest.raises(Refused) as refusal:
        check_shards(tmp_path, args)
    assert says in str(refusal.value) and "was saved by 4 processes, these are 2" in str(refusal.value)
