"""Packed rows attend row by row: the values and gradients are those of the mask of all tokens, which is not made."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sft.data.batches import Collator
from sft.training import attention
from sft.training.attention import ROW_BY_ROW, VARLEN, keep_rows_apart

ON_CPU = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False)


def rows(*lengths):
    draw = np.random.default_rng(0)
    ids = [draw.integers(10, 300, length) for length in lengths]
    return [{"input_ids": row, "labels": row.copy()} for row in ids]


@pytest.fixture
def load(model_dir, example_tokenizer_dir):
    def load(kind, **config):
        options = {"initializer_range": 0.2, "num_attention_heads": 4, "num_key_value_heads": 2} | config
        return AutoModelForCausalLM.from_pretrained(model_dir(kind, example_tokenizer_dir, **options))

    return load


@pytest.mark.parametrize("kind", ["dense", "moe", "hy_v3"])
@pytest.mark.parametrize("how", ["all weights", "recomputed", "adapter"])
def test_the_same_as_with_a_mask(kind, how, load, monkeypatch):
    model = load(kind).train()
    if how == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    elif how == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = Collator(0, "batch")(rows(20, 1, 33))
    del batch["numbers"]

    def losses_and_gradients():
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    masked = losses_and_gradients()
    keep_rows_apart(model, ON_CPU)
    monkeypatch.setattr(attention, "sdpa_mask", lambda *args, **kwargs: pytest.fail("a mask was made"))
    ours = losses_and_gradients()
    assert model.config._attn_implementation == ROW_BY_ROW and ours[0] == pytest.approx(masked[0], abs=1e-6)
    assert len(ours[1]) == len(masked[1]) > 5
    for mine, theirs in zip(ours[1], masked[1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_compiled_once_for_rows_of_any_number_and_length(load):
    model, graphs, expected = load("dense").train(), [], []
    keep_rows_apart(model, ON_CPU)
    batches = [Collator(0, "batch")(rows(*lengths)) for lengths in ((20, 1, 33), (40,), (7, 12, 3, 9), (25, 31))]
    for batch in batches:
        del batch["numbers"]
        expected.append(model(**batch, use_cache=False).loss.item())

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model.compile(backend=count, dynamic=True)
    for number, batch in enumerate(batches):
        assert model(**batch, use_cache=False).loss.item() == pytest.approx(expected[number], abs=1e-6)
        if number == 0:
            once = len(graphs)
    assert 0 < once == len(graphs)


@pytest.mark.parametrize("kind", ["dense", "moe", "hy_v3"])
def test_generation_within_a_packed_run(kind, load):
    """Padded on the left, with a cache and without, as in a run that is not packed."""
    model = load(kind).eval()
    ids = torch.tensor(np.stack([row["input_ids"] for row in rows(12, 12)]))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0

    def answers(**more):
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=mask, **options, **more)

    def whole():
        return model(ids[1:]).logits

    before = answers(), answers(use_cache=False), whole()
    keep_rows_apart(model, ON_CPU)
    after = answers(), answers(use_cache=False), whole()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        ("hy_v4", {}, "= eager ("),
        ("dense", {"attention_dropout": 0.1}, "= sdpa (attention_dropout is set"),
        ("dense", {"sliding_window": 8}, "= sdpa (sliding_window is set"),
    ],
)
def test_what_keeps_its_mask(kind, config, says, load, capsys):
    model = load(kind, **config)
    keep_rows_apart(model, ON_CPU)
    assert says in capsys.readouterr().out and model.config._attn_implementation != ROW_BY_ROW


def test_what_gives_other_values_is_not_used(load, monkeypatch, capsys):
    """PyTorch's kernel on a CPU cannot run, and one that is wrong is found."""
    model = load("dense")
    keep_rows_apart(model, ON_CPU, use_flash_attn=True)
    assert f"warning: attention of packed rows: {VARLEN} is not used on this device: " in capsys.readouterr().out
    assert model.config._attn_implementation == ROW_BY_ROW
    model.set_attn_implementation("sdpa")
    functions = attention.ALL_ATTENTION_FUNCTIONS
    wrong = lambda module, q, k, v, *args, **kwargs: (q.transpose(1, 2) + 0 * (k.sum() + v.sum()), None)
    monkeypatch.setitem(functions._global_mapping, ROW_BY_ROW, wrong)
    keep_rows_apart(model, ON_CPU)
    assert "= sdpa (with a mask of all tokens" in capsys.readouterr().out


def test_pytorchs_kernel_gets_rows_of_its_dtype(load, monkeypatch):
    """A stand-in for the kernel, which needs a GPU: row by row, from what the kernel is handed."""

    def kernel(query, key, value, begins_q, begins_k, longest_q, longest_k, scale, window_size, enable_gqa):
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16 and window_size == (-1, 0) and enable_gqa
        assert torch.equal(begins_q, begins_k) and begins_q.dtype == torch.int32 and longest_q == longest_k == 33
        parts = [
            tensor.transpose(0, 1)[None].tensor_split(begins_q[1:-1].tolist(), 2) for tensor in (query, key, value)
        ]
        options = {"is_causal": True, "scale": scale, "enable_gqa": True}
        rows = [torch.nn.functional.scaled_dot_product_attention(*row, **options) for row in zip(*parts)]
        return torch.cat(rows, 2)[0].transpose(0, 1)

    model = load("moe").train()
    batch = Collator(0, "batch")(rows(20, 1, 33))
    del batch["numbers"]
    found = []
    for kind in (ROW_BY_ROW, VARLEN):
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
        model.set_attn_implementation(kind)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(**batch, use_cache=False).loss.item())
    assert found[0] == pytest.approx(found[1], abs=2e-3)
