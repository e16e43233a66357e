"""FLOPs from the configuration: those that PyTorch counts while a step runs, and the sizes that the models are named
after."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, HunYuanDenseV1Config, HunYuanMoEV1Config, HYV3Config

from sft.arguments import ModelArguments
from sft.model.directory import ModelDirectory
from sft.model.load import freeze
from sft.model.lora import add_adapter
from sft.model.pretrained import load_pretrained
from sft.training.flops import TOKEN, flops_of_step
from sft.training.loss import choose_loss

ROWS, LENGTH = 2, 24
KINDS = ["dense", "moe", "hy_v3", "hy_v4"]
TRAINED = {
    "all": {},
    "attention": {"train_attention_params_only": True},
    "upper layer": {"trainable_params": r"layers\.1\.mlp"},
    "norms": {"trainable_params": "norm"},
    "adapter": {"use_lora": True},
    "all-linear": {"use_lora": True, "lora_target_modules": ["all-linear"]},
    "experts": {"use_lora": True, "lora_target_modules": ["experts"]},
}
QUICK = [(trained, 0) for trained in ("all", "upper layer", "adapter")] + [("all", 2), ("all-linear", 1)]
TABLE = [
    pytest.param(kind, trained, every, marks=[] if (trained, every) in QUICK else [pytest.mark.campaign])
    for kind in KINDS
    for trained in TRAINED
    for every in (0, 1, 2)
    if (kind, trained) != ("dense", "experts")
]


@pytest.fixture
def load(model_dir, example_tokenizer_dir):
    """`load(kind, trained)`: a tiny model all of whose products PyTorch sees."""

    def load(kind, trained="all"):
        model = AutoModelForCausalLM.from_pretrained(
            model_dir(kind, example_tokenizer_dir), attn_implementation="eager"
        )
        if kind != "dense":
            model.set_experts_implementation("eager")
        args = ModelArguments(lora_rank=4, **TRAINED[trained])
        if args.use_lora:
            return add_adapter(model, args, None).train()
        freeze(model, args)
        return model.train()

    return load


def count(model, at_supervised=True):
    """(what PyTorch counts in a step; tokens, pairs of tokens whichever comes first, positions of the head)."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 300, (ROWS, LENGTH), generator=draw)
    keep = torch.rand(ids.shape, generator=draw) < (0.3 if at_supervised else 2)
    batch = {"logits_to_keep": keep, "labels": ids[keep], "shift_labels": ids[keep]}
    if model_head := getattr(model, "lm_head", None):
        model_head.targets = ids[keep]  # for the Head of loss.py
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, **batch, use_cache=False).loss.backward()
    return counter.get_total_flops(), [ids.numel(), ROWS * LENGTH**2, int(keep.sum())]


@pytest.mark.parametrize(("kind", "trained", "every"), TABLE)
def test_as_pytorch_counts(kind, trained, every, load):
    model = load(kind, trained)
    if every:
        model.activation_checkpointing_enable(every_n_layers=every)
    theirs, units = count(model)
    ours = flops_of_step(model, every) @ units
    if trained == "experts" or (kind, trained) == ("moe", "all-linear"):  # PEFT adds those adapters to the weights
        assert 0.7 < ours / theirs < 1
    else:
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("at_supervised", [True, False])
def test_the_head_in_chunks_costs_what_a_head_costs(at_supervised, load):
    model = load("dense")
    plain, units = count(model, at_supervised)
    flags = SimpleNamespace(label_smoothing_factor=0.0, use_liger_kernel=False, fp16=False)
    assert choose_loss(model, flags).head
    assert count(model, at_supervised)[0] == plain == pytest.approx(flops_of_step(model) @ units)


# Published configurations, and the parameters that a token passes through, from the models' names.
PUBLISHED = {
    "Hunyuan-7B": (HunYuanDenseV1Config, 7.5, {"intermediate_size": 14336, "num_hidden_layers": 32}),
    "Hunyuan-A13B": (HunYuanMoEV1Config, 13, {"intermediate_size": 3072, "num_hidden_layers": 32, "num_experts": 64,
                                              "moe_topk": [8] * 32}),
    "Hy3, A21B": (HYV3Config, 21, {"num_attention_heads": 64, "num_hidden_layers": 80}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_token_costs_six_flops_for_each_parameter_that_it_passes(name):
    """Kaplan et al. 2020; here without the embeddings, which are looked up."""
    config_class, billions, keys = PUBLISHED[name]
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_class(**shape | {"vocab_size": 128167} | keys))
    token, pair, target = flops_of_step(model)
    assert (token + target) / 6e9 == pytest.approx(billions, rel=0.05)
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    assert pair == 3 * 4 * layers * heads * 128


@pytest.fixture
def old(model_dir, example_tokenizer_dir):
    """`old(kind, code)`: a directory that brings old code, computed by that or by the class of transformers."""
    return lambda kind, code: load_pretrained(ModelDirectory(model_dir(kind, example_tokenizer_dir), model_code=code))


@pytest.mark.parametrize("every", [0, 1])
def test_old_code_costs_what_the_class_of_transformers_costs(every, old):
    """Of A13B, where each token goes to some experts; that of Large takes each second layer's keys and values from the
    layer before, and one expert a token."""
    theirs, ours = (flops_of_step(old("remote", code), every) for code in ("native", "remote"))
    assert ours == pytest.approx(theirs) and ours.all()
    hidden, keys, width, times = 64, 32, 128, 6 + 2 * every  # FLOPs for a weight
    large = flops_of_step(old("remote_cla", "remote"), every)
    assert ours - large == pytest.approx(times * (2 * hidden * keys + 2 * 3 * hidden * width) * TOKEN)


def test_what_is_not_known(old):
    model = old("remote", "remote")
    del model.config.num_experts
    assert flops_of_step(model) is None
    model.config.model_type = "llama"
    assert flops_of_step(model) is None
