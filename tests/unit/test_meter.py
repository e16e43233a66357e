"""What is counted and timed: tokens, padding, pairs in attention, seconds of the steps alone and those that they wait
for data, the share of the device's peak."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import HunYuanDenseV1Config, HunYuanDenseV1ForCausalLM

from sft.data.batches import Collator
from sft.training import progress
from sft.training.flops import flops_of_step
from sft.training.progress import Meter, peak_flops, utilization

DENSE = HunYuanDenseV1Config(
    vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=4
)
ARGS = {"device": torch.device("cpu"), "bf16": False, "fp16": False, "gradient_checkpointing": False}
CPU = SimpleNamespace(**ARGS, gradient_checkpointing_kwargs=None)


def trainer(gather=lambda tensor: tensor, supervised_head=True, **args):
    return SimpleNamespace(
        args=SimpleNamespace(**vars(CPU) | args),
        accelerator=SimpleNamespace(gather=gather),
        model=HunYuanDenseV1ForCausalLM(DENSE),
        data_collator=Collator(0, supervised_head=supervised_head),
    )


def batch(mask=None, device="cpu"):
    """Two rows of 5 tokens, three of them supervised."""
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, -100, -100, -100, 9]])
    found = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "labels": labels}
    found |= {} if mask is None else {"attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in found.items()}


MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])


def test_padding_is_not_counted():
    meter = Meter()
    meter.count([batch(MASK), batch()])
    results = meter.results(trainer())
    assert (results["tokens"], results["supervised_tokens"]) == (17, 6)
    assert results["padding_share"] == pytest.approx(3 / 20)


def test_pairs_are_those_within_a_row():
    """l(l+1)/2 in each, padded or laid end to end: 10, 6, 15 and 15."""
    meter, packed = Meter(), Meter()
    meter.count([batch(MASK), batch()])
    rows = [{"input_ids": np.ones(n, int), "labels": np.ones(n, int)} for n in (4, 3, 5, 5)]
    packed.count([Collator(0, "batch")(rows)])
    assert meter.counts[1] == packed.counts[1] == 46 and packed.counts[0] == packed.counts[3] == 17


def test_counting_does_not_wait_for_the_device():
    """On `meta` there are no values: whatever asks for one raises."""
    meter = Meter()
    meter.count([batch(MASK, "meta"), batch(device="meta")], filling=2)
    assert meter.counts.device.type == "meta"
    with pytest.raises(RuntimeError):
        int(meter.counts[0])


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
    results = meter.results(trainer())
    assert results["tokens_per_second"] == pytest.approx(10 / meter.seconds)
    assert results["seconds_to_first_step"] > 0.2 and results["mfu"] is None and results["data_wait_share"] == 0


def test_waiting_is_that_for_batches_after_the_first_step():
    meter = Meter()
    meter.on_train_begin(CPU, None, None)
    loader = (time.sleep(0.1) for _ in range(3))
    for step in range(3):
        next(meter.timed(loader))
        time.sleep(0.2 if step else 0)
        meter.on_step_end(CPU, None, None)
    assert next(meter.timed(loader), "none left") == "none left"
    share = meter.results(trainer())["data_wait_share"]
    assert share == pytest.approx(meter.waited / meter.seconds, abs=1e-5) and 0.2 < share < 0.45


def test_a_run_of_one_step_has_no_rate():
    meter = Meter()
    meter.on_train_begin(CPU, None, None)
    meter.count([batch()])
    meter.on_step_end(CPU, None, None)
    results = meter.results(trainer())
    assert results["tokens_per_second"] is results["data_wait_share"] is results["mfu"] is results["hfu"] is None
    assert results["flops"] == pytest.approx(flops_of_step(HunYuanDenseV1ForCausalLM(DENSE)) @ [10, 30, 3])


def test_ranks_are_added_up_and_the_worst_ones_memory_and_waiting_are_said():
    meter = Meter()
    meter.count([batch()])
    meter.seconds = meter.waited = 1.0
    results = meter.results(trainer(lambda tensor: torch.cat([tensor, tensor + 1])))
    assert (results["tokens"], results["world_size"]) == (21, 2)
    assert results["peak_memory_bytes"] % 1024 == 1, "the second's, which is a byte more"
    assert results["data_wait_share"] == 1 + 1e-6


@pytest.mark.parametrize("supervised_head", [True, False])
@pytest.mark.parametrize(
    ("recomputes", "kwargs", "every"), [(False, None, 0), (True, None, 1), (True, {"every_n_layers": 2}, 2)]
)
def test_the_share_of_the_peak(supervised_head, recomputes, kwargs, every, monkeypatch):
    """Of eight devices' work in 3 s, as one device's seconds; a head that runs everywhere costs each token."""
    monkeypatch.setattr(progress.torch.cuda, "get_device_name", lambda _: "NVIDIA H20")
    options = {"gradient_checkpointing": recomputes, "gradient_checkpointing_kwargs": kwargs, "bf16": True}
    run = trainer(supervised_head=supervised_head, device=torch.device("cuda"), **options)
    counts, timed = torch.tensor([900, 9000, 90, 950]), torch.tensor([800, 8000, 80, 850])
    figures = utilization(run, counts, timed, 3 * 8)
    units = [800, 8000, 80 if supervised_head else 800]
    needed, computed = flops_of_step(run.model) @ units, flops_of_step(run.model, every) @ units
    assert figures["mfu"] == pytest.approx(needed / (148e12 * 24))
    assert figures["hfu"] == pytest.approx(computed / (148e12 * 24)) and (computed > needed) == recomputes
    assert figures["flops"] == pytest.approx(flops_of_step(run.model) @ [900, 9000, 90 if supervised_head else 900])
    run.args.bf16 = False
    assert utilization(run, counts, timed, 24)["mfu"] is None, "fp32 has another peak"
    run.model.config = SimpleNamespace(model_type="llama")
    assert set(utilization(run, counts, timed, 24).values()) == {None}


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H800", 989.5),
        ("NVIDIA H800 PCIe", 756.5),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100X", None),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA A10", None),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", None),
        ("NVIDIA L4", None),
        ("NVIDIA L20", 119.5),
        ("NVIDIA L2", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_device_is_taken_for_no_other(name, teraflops):
    peak = peak_flops(name)
    assert peak == teraflops if teraflops is None else peak == pytest.approx(1e12 * teraflops)
