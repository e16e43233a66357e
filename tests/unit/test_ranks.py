"""What ranks do for one another at a logging step, at a save and in the backward pass: no more than is needed."""

import pytest
import torch
from torch import nn
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from sft.model import moe
from sft.model.directory import ModelDirectory
from sft.training import save
from sft.training.progress import Meter
from sft.training.trainer import Trainer

LAYERS = 3


@pytest.fixture
def model():
    config = HunYuanMoEV1Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=32, num_experts=4, moe_topk=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return HunYuanMoEV1ForCausalLM(config)


def make_trainer(model, folder, coefficient=0.0, **arguments) -> Trainer:
    args = TrainingArguments(str(folder), use_cpu=True, **{"report_to": "none"} | arguments)
    return Trainer(
        model=model, args=args, meter=Meter(), companions=ModelDirectory(None), router_aux_loss_coef=coefficient
    )


@pytest.fixture
def reductions(monkeypatch):
    """What the routers reduce over the ranks: here one that adds a second rank with the same counts."""
    seen = []

    def reduce(tensor, reduction="sum"):
        seen.append(tensor)
        return tensor * 2 if reduction == "sum" else tensor

    monkeypatch.setattr(moe, "reduce", reduce)
    return seen


def batch():
    ids = torch.randint(1, 32, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}


# --- routers ---------------------------------------------------------------------------------------------------------


def test_one_collective_gives_the_load_of_all_layers(model, tmp_path, reductions):
    trainer = make_trainer(model, tmp_path, report_to="tensorboard")
    inputs = batch()
    model.train()
    trainer.compute_loss(model, dict(inputs))
    logs = {"loss": 1.0}
    trainer.routers.on_log(trainer.args, trainer.state, trainer.control, logs)
    assert len(reductions) == 1
    logits = model(**inputs, output_router_logits=True).router_logits
    for number in range(LAYERS):
        chosen = logits[number][inputs["attention_mask"].flatten().bool()].topk(2).indices.flatten()
        shares = torch.bincount(chosen, minlength=4) / len(chosen)
        assert logs[f"expert_load/layer_{number}/least"] == pytest.approx(shares.min().item())
        assert logs[f"expert_load/layer_{number}/most"] == pytest.approx(shares.max().item())
        entropy = -sum(share * share.log() for share in shares if share).item()
        assert logs[f"expert_load/layer_{number}/entropy"] == pytest.approx(entropy)
    trainer.routers.on_log(trainer.args, trainer.state, trainer.control, {"loss": 1.0})
    assert len(reductions) == 1, "nothing was seen since the last log"


def test_without_a_reporter_no_router_is_watched(model, tmp_path, reductions):
    trainer = make_trainer(model, tmp_path)
    assert trainer.routers is None
    trainer.compute_loss(model.train(), batch())
    trainer.log({"loss": 1.0})
    assert reductions == []


def test_without_a_reporter_the_load_balancing_loss_costs_one_collective(model, tmp_path, reductions):
    trainer = make_trainer(model, tmp_path, coefficient=0.5)
    trainer.current_gradient_accumulation_steps = 1
    inputs = batch()
    with_balance = trainer.compute_loss(model.train(), dict(inputs))
    plain = model(**inputs, output_router_logits=True)
    balance = load_balancing_loss_func(plain.router_logits, 4, 2, inputs["attention_mask"])
    assert with_balance.item() == pytest.approx(plain.loss.item() + 0.5 * balance.item(), abs=1e-6)
    logs = {"loss": 1.0}
    trainer.log(logs)
    assert logs["router_aux_loss"] == pytest.approx(balance.item(), abs=1e-6)
    assert not any("expert_load" in name for name in logs)
    assert len(reductions) == 1 and reductions[0].ndim == 0


# --- fp32 masters ----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The parameters whose masters were read from ZeRO's optimiser, a collective each; here all masters are 1."""
    import deepspeed.utils

    parameters = []

    def read(parameter):
        parameters.append(parameter)
        return torch.ones(parameter.shape)

    monkeypatch.setattr(deepspeed.utils, "safe_get_full_fp32_param", read)
    return parameters


@pytest.mark.parametrize("keep", [True, False])
def test_every_rank_reads_the_masters_and_the_saving_one_keeps_them(keep, model, asked):
    names = {name for name, _ in model.named_parameters() if "gate.wg" in name}
    values = save.master_values(model, names, keep)
    assert len(asked) == len(names) == LAYERS
    assert set(values) == (names if keep else set())


@pytest.mark.parametrize("saves", [True, False])
def test_masters_are_held_only_while_a_rank_saves(saves, model, asked, tmp_path, monkeypatch):
    trainer = make_trainer(model, tmp_path)
    routers = {name for name, _ in model.named_parameters() if "gate.wg" in name}
    frozen = min(routers)
    model.get_parameter(frozen).requires_grad = False
    base = {name: torch.zeros(()) for name in routers}
    trainer.companions.fp32_names = set(routers)
    trainer.companions.values = lambda names: {name: base[name] for name in names}
    trainer.stored = {name: name for name, _ in model.named_parameters()}
    trainer.is_deepspeed_enabled = True
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda args: saves))
    held = []
    monkeypatch.setattr("transformers.Trainer.save_model", lambda *args: held.append(dict(trainer.masters)))
    trainer.save_model(tmp_path)
    assert len(asked) == LAYERS - 1, "the frozen one has no master"
    expected = {name: 0.0 if name == frozen else 1.0 for name in routers} if saves else {}
    assert {name: value.max().item() for name, value in held[0].items()} == expected
    assert trainer.masters == {}


def test_masters_go_when_saving_fails(model, asked, tmp_path, monkeypatch):
    trainer = make_trainer(model, tmp_path)
    trainer.is_deepspeed_enabled = True
    trainer.stored = {name: name for name, _ in model.named_parameters()}
    trainer.companions.fp32_names = set(trainer.stored)

    def fail(*args):
        assert trainer.masters
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.Trainer.save_model", fail)
    with pytest.raises(OSError, match="No space"):
        trainer.save_model(tmp_path)
    assert trainer.masters == {}


# --- unused parameters -----------------------------------------------------------------------------------------------


class OfADirectory(nn.Module):
    """Stands for code that a model directory brings."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(2, 2)

    def forward(self, input_ids, labels=None):
        return self.linear(input_ids)


def test_ddp_does_not_look_for_unused_parameters_of_transformers_own_classes(model, tmp_path):
    assert make_trainer(model, tmp_path).args.ddp_find_unused_parameters is False
    given = make_trainer(model, tmp_path, ddp_find_unused_parameters=True)
    assert given.args.ddp_find_unused_parameters is True
    other = make_trainer(OfADirectory(model.config), tmp_path)
    assert other.args.ddp_find_unused_parameters is None, "its experts may get no token"


def test_nor_under_an_adapter(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert make_trainer(adapted, tmp_path).args.ddp_find_unused_parameters is False
