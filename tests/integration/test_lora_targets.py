"""--lora_target_modules means the same on every class and lands where it says; the saved adapter gives the same logits
with plain PEFT."""

import argparse
import json
from collections import Counter

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import legacy_remote_code
from console import Refused
from lora import add_adapter, kind_of

KINDS = ("dense", "moe", "hy_v3", "hy_v4", "remote_cla")
# adapted modules by part of the model: of two layers, hy_v3's and hy_v4's first without experts, hy_v4 with other
# attention, remote_cla's second layer without keys and values of its own
EXPECTED = {
    None: {"dense": (8, 0, 0), "moe": (8, 0, 0), "hy_v3": (8, 0, 0), "hy_v4": (10, 0, 0), "remote_cla": (6, 0, 0)},
    "q_proj": {"dense": (2, 0, 0), "moe": (2, 0, 0), "hy_v3": (2, 0, 0), "remote_cla": (2, 0, 0)},
    "gate_proj": {"dense": (0, 2, 0), "moe": (0, 2, 0), "hy_v3": (0, 2, 0), "remote_cla": (0, 2, 0)},
    "all-linear": {"dense": (8, 6, 0), "moe": (8, 6, 0), "hy_v3": (8, 6, 0), "remote_cla": (6, 6, 0)},
    "shared_mlp": {"moe": (0, 6, 0), "hy_v3": (0, 3, 0), "hy_v4": (0, 3, 0), "remote_cla": (0, 6, 0)},
    "experts": {"moe": (0, 0, 4), "hy_v3": (0, 0, 2), "hy_v4": (0, 0, 2), "remote_cla": (0, 0, 24)},
}
CASES = [(target, kind, counts) for target, kinds in EXPECTED.items() for kind, counts in kinds.items()]


def load(directory):
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] == "hunyuan":
        return legacy_remote_code.from_pretrained(str(directory), config, "remote", dtype=torch.float32)[0]
    return AutoModelForCausalLM.from_pretrained(directory)


def arguments(directory, targets, **more):
    values = dict(lora_rank=4, lora_alpha=8, lora_dropout=0.0, use_rslora=False, use_dora=False)
    values |= {"lora_target_modules": targets, "model_name_or_path": str(directory)} | more
    return argparse.Namespace(**values)


@pytest.mark.parametrize(("target", "kind", "counts"), CASES)
def test_it_lands_where_it_says(target, kind, counts, model_dir, example_tokenizer_dir, tmp_path):
    directory = model_dir(kind, example_tokenizer_dir)
    model = add_adapter(load(directory), arguments(directory, target and [target]), None)
    found = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
            if "lora_A" in name:
                found[kind_of(name.removeprefix("base_model.model.").split(".lora_A")[0])] += 1
    experts = found["routed experts"]
    assert (found["attention"], found["MLP"] + found["shared experts"], experts) == counts, found
    assert not (found["router"] or found["indexer"] or found["head"])

    model.eval().save_pretrained(tmp_path)
    ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    again = PeftModel.from_pretrained(load(directory), tmp_path).eval()
    plain = load(directory).eval()
    with torch.no_grad():
        ours, theirs, base = (m(input_ids=ids, use_cache=False).logits for m in (model, again, plain))
    assert torch.allclose(ours, theirs, atol=1e-6) and (ours - base).abs().max() > 1e-3
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(directory)


@pytest.mark.parametrize(
    ("targets", "more", "says"),
    [
        (["q_porj"], {}, "--lora_target_modules q_porj: no such module; there are down_proj, gate_proj, k_proj"),
        (["experts"], {"lora_dropout": 0.1}, "--lora_dropout: PEFT cannot do it on experts"),
        (["q_proj", "experts"], {"use_dora": True}, "--use_dora: PEFT cannot do it on experts"),
        (["shared_mlp"], {"use_dora": True}, "--use_dora: PEFT cannot do it on shared_mlp"),
    ],
)
def test_refused(targets, more, says, model_dir, example_tokenizer_dir):
    directory = model_dir("moe", example_tokenizer_dir)
    with pytest.raises(Refused, match=says):
        add_adapter(load(directory), arguments(directory, targets, **more), None)


def test_dora_and_rslora_on_attention(model_dir, example_tokenizer_dir):
    directory = model_dir("moe", example_tokenizer_dir)
    model = add_adapter(load(directory), arguments(directory, None, use_dora=True, use_rslora=True), None)
    assert sum("lora_magnitude_vector" in name for name, _ in model.named_parameters()) == 8
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 8 / 4**0.5
