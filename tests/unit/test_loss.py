"""The loss in chunks: the sum and its gradients are those of all logits at once."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.model import head as heads
from sft.model.head import Head, SumOfLosses
from sft.training.loss import choose_loss

FLAGS = SimpleNamespace(label_smoothing_factor=0.0, use_liger_kernel=False, fp16=False)

VOCABULARY, WIDTH = 97, 16


def drawn(positions, dtype=torch.float32):
    draw = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (positions,), generator=draw)


@pytest.mark.parametrize("positions", [0, 1, 7, 8, 50])
@pytest.mark.parametrize("trained", ["both", "hidden", "weight", "none"])
def test_the_sum_and_its_gradients(positions, trained, monkeypatch):
    monkeypatch.setitem(heads.LOGITS, "cpu", 8 * VOCABULARY)
    hidden, weight, targets = drawn(positions)
    hidden.requires_grad_(trained in ("both", "hidden"))
    weight.requires_grad_(trained in ("both", "weight"))
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    ours = SumOfLosses.apply(hidden, weight, targets, torch.float32)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-6)
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    if inputs:
        expected = torch.autograd.grad(plain / 3, inputs)
        for mine, theirs in zip(torch.autograd.grad(ours / 3, inputs), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_no_more_logits_at_once_than_said(monkeypatch):
    sizes = []
    monkeypatch.setitem(heads.LOGITS, "cpu", 8 * VOCABULARY)
    monkeypatch.setattr(heads, "linear", lambda part, matrix: (sizes.append(len(part)), part @ matrix.T)[1])
    SumOfLosses.apply(*drawn(50), torch.float32)
    assert max(sizes) == 8 and sum(sizes) == 50


def test_in_half_precision_it_is_as_near_as_the_plain_way():
    hidden, weight, targets = drawn(50, torch.bfloat16)
    exact = torch.nn.functional.cross_entropy(hidden.float() @ weight.float().T, targets, reduction="sum")
    expected = torch.autograd.grad(exact, (hidden, weight))
    plain = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
    theirs = torch.autograd.grad(plain, (hidden, weight))
    total = SumOfLosses.apply(hidden, weight, targets, torch.bfloat16)
    assert total.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, other, right in zip(torch.autograd.grad(total, (hidden, weight)), theirs, expected, strict=True):
        assert mine.dtype == torch.bfloat16 and (mine - right).norm() <= 1.2 * (other - right).norm() + 1e-3


def test_a_factor_is_not_rounded_to_half_precision():
    hidden, weight, targets = drawn(50, torch.bfloat16)
    total = SumOfLosses.apply(hidden, weight, targets, torch.bfloat16)
    whole = torch.autograd.grad(total, (hidden, weight), retain_graph=False)
    total = SumOfLosses.apply(hidden, weight, targets, torch.bfloat16)
    for part, all_of_it in zip(torch.autograd.grad(total / 1007, (hidden, weight)), whole, strict=True):
        ratio = (part.double() * 1007 * all_of_it.double()).sum() / all_of_it.double().square().sum()
        assert ratio.item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_in_fp32(autocast):
    hidden, weight, targets = drawn(5, torch.float32 if autocast else torch.bfloat16)
    head = Head(WIDTH, VOCABULARY, bias=False, device="meta")
    head.weight, head.in_fp32 = torch.nn.Parameter(weight.detach()), True
    exact = hidden.float() @ weight.float().T
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(head(hidden), exact)
        with head.knows(targets):
            total = head(hidden)
        assert total.item() == pytest.approx(torch.nn.functional.cross_entropy(exact, targets, reduction="sum").item())
        assert head(hidden).shape == (5, VOCABULARY), "it has forgotten the targets"
        head.in_fp32 = False
        assert head(hidden).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["dense", "moe", "hy_v3", "hy_v4"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_model_with_the_head(kind, tie, model_dir, example_tokenizer_dir):
    """Loss and gradients of a batch, tied head included; names and weights stay."""
    model = AutoModelForCausalLM.from_pretrained(model_dir(kind, example_tokenizer_dir, tie=tie)).train()
    ids = torch.randint(10, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    keep = torch.zeros(2, 9, dtype=torch.bool)
    keep[0, 3:7], keep[1, 5:8] = True, True
    targets = ids.roll(-1, 1)[keep]
    batch = {"input_ids": ids, "labels": targets, "shift_labels": targets, "logits_to_keep": keep}

    def run():
        model.zero_grad()
        found = model(**batch, num_items_in_batch=torch.tensor(11), use_cache=False).loss
        found.backward()
        return found.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before, names = run(), list(model.state_dict())
    head = choose_loss(model, FLAGS).head
    with head.knows(targets):
        after = run()
    with pytest.raises(ValueError, match="not told the targets"):
        run()
    assert after[0] == pytest.approx(before[0], abs=1e-6) and list(model.state_dict()) == names
    assert (head.weight is model.get_input_embeddings().weight) == tie and after[1].keys() == before[1].keys()
    for name, gradient in after[1].items():
        torch.testing.assert_close(gradient, before[1][name], atol=1e-6, rtol=1e-4)


def test_where_the_head_stays_as_it_is(model_dir, example_tokenizer_dir, capsys):
    model = AutoModelForCausalLM.from_pretrained(model_dir("dense", example_tokenizer_dir))
    plain = model.get_output_embeddings()
    way = choose_loss(model, SimpleNamespace(**vars(FLAGS) | {"fp16": True}))
    assert way.at_supervised and way.head is None
    assert "loss = of all logits at once (--fp16" in capsys.readouterr().out
    model.set_output_embeddings(plain)
    way = choose_loss(model, SimpleNamespace(**vars(FLAGS) | {"label_smoothing_factor": 0.1}))
    assert way == (False, None, None)
    assert capsys.readouterr().out == "logits = at every position (--label_smoothing_factor)\n"
    model.set_output_embeddings(torch.nn.Linear(4, 4))
    assert choose_loss(model, FLAGS) == (True, None, None)
    assert "loss = of all logits at once (the head" in capsys.readouterr().out
