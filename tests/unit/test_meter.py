"""What is counted and timed: tokens, padding, seconds of the steps alone, the share of the device's peak."""

import time
from types import SimpleNamespace

import pytest
import torch

from sft.training import progress
from sft.training.progress import Meter, model_flops_utilization

CPU = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False)
TRAINER = SimpleNamespace(args=CPU, accelerator=SimpleNamespace(gather=lambda tensor: tensor), model=None)


def batch(mask=None):
    """Two rows of 5 tokens, three of them supervised."""
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, -100, -100, -100, 9]])
    found = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "labels": labels}
    return found if mask is None else found | {"attention_mask": mask}


def test_padding_is_not_counted():
    meter = Meter()
    meter.count([batch(torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])), batch()])
    results = meter.results(TRAINER)
    assert (results["tokens"], results["supervised_tokens"]) == (17, 6)
    assert results["padding_share"] == pytest.approx(3 / 20)


def test_the_first_step_and_what_is_no_step_are_not_timed():
    """Only 0.1 s of the 0.5 s here is a step after the first."""
    meter = Meter()
    meter.on_train_begin(CPU, None, None)
    for seconds, event in ((0.2, meter.on_step_end), (0.2, meter.on_save), (0.1, meter.on_step_end)):
        if event == meter.on_step_end:
            meter.count([batch()])
        time.sleep(seconds)
        event(CPU, None, None)
    assert 0.1 <= meter.seconds < 0.19
    results = meter.results(TRAINER)
    assert results["tokens_per_second"] == pytest.approx(10 / meter.seconds)
    assert results["seconds_to_first_step"] > 0.2 and results["mfu"] is None


def test_a_run_of_one_step_has_no_rate():
    meter = Meter()
    meter.on_train_begin(CPU, None, None)
    meter.count([batch()])
    meter.on_step_end(CPU, None, None)
    assert meter.results(TRAINER)["tokens_per_second"] is None


def test_ranks_are_added_up_and_the_worst_ones_memory_is_said():
    meter = Meter()
    meter.count([batch()])
    two = SimpleNamespace(gather=lambda tensor: torch.cat([tensor, tensor + 1]))
    results = meter.results(SimpleNamespace(args=CPU, accelerator=two, model=None))
    assert (results["tokens"], results["world_size"]) == (21, 2)
    assert results["peak_memory_bytes"] % 1024 == 1, "the second's, which is a byte more"


@pytest.mark.parametrize(("device", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H20", 148e12)])
def test_the_share_of_the_peak(device, peak, monkeypatch):
    """6 FLOPs a trained weight and token, 4 a frozen one, of four experts two; no embedding."""
    monkeypatch.setattr(progress.torch.cuda, "get_device_name", lambda _: device)
    weights = {"model.embed_tokens.weight": 1000, "mlp.experts.gate_up_proj": 400, "q_proj.weight": 100}
    parameters = [(name, torch.nn.Parameter(torch.zeros(n))) for name, n in weights.items()]
    parameters.append(("frozen", torch.nn.Parameter(torch.zeros(10), requires_grad=False)))
    config = SimpleNamespace(num_experts=4, moe_topk=[2, 2])
    model = SimpleNamespace(config=config, named_parameters=lambda: parameters)
    args = SimpleNamespace(device=torch.device("cuda"), bf16=True, fp16=False)
    flops = 6 * (400 / 2 + 100) + 4 * 10
    assert model_flops_utilization(model, 1e6, args, 8) == pytest.approx(flops * 1e6 / (8 * peak))
    monkeypatch.setattr(progress.torch.cuda, "get_device_name", lambda _: "another")
    assert model_flops_utilization(model, 1e6, args, 8) is None
