"""The routers of a mixture of experts: fp32 under every stage, the load-balancing loss, the experts' load."""

import math

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import reference
from sft.model.moe import load_balancing_loss, route_in_fp32

STEPS, RATE, COEFFICIENT = 4, 1e-3, 0.5
ZERO = pytest.mark.needs_gxx
WAYS = {  # name: (flags, ranks)
    "one": (["--gradient_accumulation_steps", 2], 1),
    "packed, checkpointing": (
        ["--gradient_accumulation_steps", 2, "--gradient_checkpointing", "--packing", "batch"],
        1,
    ),
    "zero2": (["--deepspeed", "ds_zero2_no_offload.json"], 2),
    "zero3, checkpointing": (["--deepspeed", "ds_zero3_no_offload.json", "--gradient_checkpointing"], 2),
}
CASES = [
    pytest.param(kind, way, marks=[ZERO] * way.startswith("zero") + ([pytest.mark.campaign] if slow else []))
    for kind, way, slow in [
        ("moe", "one", False), ("moe", "packed, checkpointing", False), ("moe", "zero2", True),
        ("moe", "zero3, checkpointing", True), ("hy_v3", "one", True), ("hy_v3", "packed, checkpointing", False),
        ("hy_v3", "zero2", True), ("hy_v3", "zero3, checkpointing", False),
    ]
]  # fmt: skip


def scalars(output_dir):
    """What TensorBoard shows: {name: [value a step]}."""
    (folder,) = (path.parent for path in (output_dir / "runs").rglob("events*"))
    events = EventAccumulator(str(folder)).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def skip_without_router_logits(kind):
    """Skip what is compared with logits that the class does not hand out, as in transformers 5.17."""
    if kind == "moe" and "router_logits" not in HunYuanMoEV1PreTrainedModel._can_record_outputs:
        pytest.skip(f"hunyuan_v1_moe of transformers {transformers.__version__} hands out no router logits")


def arguments(directory, rows, out, *more):
    args = ["--model_name_or_path", directory, "--train_data_file", rows, "--output_dir", out, "--logging_steps", 1]
    return [*args, "--max_steps", STEPS, "--learning_rate", RATE, "--save_strategy", "no", *more]


def test_the_formula_is_that_of_transformers():
    generator = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(24, 8, generator=generator) for _ in range(3))
    mask = (torch.rand(2, 12, generator=generator) > 0.3).long()
    seen = [(logits, logits.topk(2).indices) for logits in layers]
    expected = load_balancing_loss_func(layers, 8, 2, mask)
    assert load_balancing_loss(seen, mask.flatten()).item() == pytest.approx(expected.item(), abs=1e-6)
    even = torch.eye(8).repeat(3, 1)  # each expert alike
    assert load_balancing_loss([(even, even.topk(1).indices)], torch.ones(24)).item() == pytest.approx(1.0)


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_the_losses_are_those_of_a_plain_loop(
    kind, way, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path
):
    skip_without_router_logits(kind)
    directory, (flags, ranks) = model_dir(kind, example_tokenizer_dir, initializer_range=0.1), WAYS[way]
    args = arguments(directory, example_rows, tmp_path, "--per_device_train_batch_size", 4, *flags)
    args += ["--router_aux_loss_coef", COEFFICIENT]
    run = run_train(args, launcher="torchrun" if ranks > 1 else "python", nproc=ranks)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = reference.encode_rows(example_rows, AutoTokenizer.from_pretrained(example_tokenizer_dir))
    order = reference.trainer_order(len(rows), 42, ranks, 4, 2 // ranks, STEPS)
    rate = reference.linear(RATE, STEPS)
    expected = reference.train(directory, example_rows, order, rate, router_aux_loss_coef=COEFFICIENT)
    without = reference.train(directory, example_rows, order, rate)
    difference = max(abs(a - b) for a, b in zip(losses(tmp_path), expected, strict=True))
    print(f"{kind} {way}: largest difference {difference:.1e}")
    assert difference <= 2e-6
    assert ("warning: --router_aux_loss_coef: Tencent trains Hy3" in run.stdout) == (kind in ("hy_v3", "hy_v4"))
    found = scalars(tmp_path)["train/router_aux_loss"]
    assert found[0] * COEFFICIENT == pytest.approx(expected[0] - without[0], abs=2e-6) and len(found) == STEPS


@pytest.mark.parametrize("kind", ["moe", "hy_v3", "hy_v4", "remote"])
def test_the_load_of_the_experts_is_logged(
    kind, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path
):
    """Also without the loss, which changes nothing then; counted here from the logits of one padded batch."""
    skip_without_router_logits(kind)
    directory = model_dir(kind, example_tokenizer_dir, **({"initializer_range": 0.1} if kind != "hy_v4" else {}))
    args = arguments(directory, example_rows, tmp_path, "--per_device_train_batch_size", 8, "--max_steps", 2)
    run = run_train(args)
    assert run.returncode == 0, run.stderr[-3000:]
    found = scalars(tmp_path)
    assert "train/router_aux_loss" not in found
    layers = {"moe": (0, 1), "remote": (0, 1)}.get(kind, (1,))
    names = [f"train/expert_load/layer_{i}/{what}" for i in layers for what in ("least", "most", "entropy")]
    assert {name for name in found if "expert_load" in name} == set(names)
    assert all(len(found[name]) == 2 for name in names)
    if kind in ("moe", "hy_v3"):
        tokenizer = AutoTokenizer.from_pretrained(example_tokenizer_dir)
        rows = reference.encode_rows(example_rows, tokenizer)
        ((step,),) = reference.trainer_order(len(rows), 42, 1, 8, 1, 1)
        batch = reference.pad([rows[i] for i in step], tokenizer.pad_token_id)
        model = AutoModelForCausalLM.from_pretrained(directory)
        logits = model(**batch, use_cache=False, output_router_logits=True).router_logits
        for number, layer in zip(layers, logits, strict=True):
            chosen = layer[batch["attention_mask"].flatten().bool()].topk(2).indices.flatten()
            shares = torch.bincount(chosen, minlength=4) / len(chosen)
            entropy = -sum(share * math.log(share) for share in shares.tolist() if share)
            expected = {"least": shares.min().item(), "most": shares.max().item(), "entropy": entropy}
            for what, value in expected.items():
                assert found[f"train/expert_load/layer_{number}/{what}"][0] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("kind", ["moe", "hy_v3", "hy_v4"])
def test_routers_multiply_in_fp32(kind, model_dir, example_tokenizer_dir):
    """With a weight that ZeRO has cast to bf16, and under autocast."""
    directory = model_dir(kind, example_tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(directory).bfloat16()
    route_in_fp32(model)
    gate = model.model.layers[1].mlp.gate
    weight = (gate.wg if kind == "moe" else gate).weight
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    extra = (model.model.layers[1].mlp.e_score_correction_bias,) if kind == "hy_v3" else ()
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = gate(hidden, *extra)[0]
        assert weight.dtype == torch.bfloat16 and torch.equal(logits, hidden.float() @ weight.float().T)
