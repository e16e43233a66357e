"""--lora_target_modules means the same on every class and lands where it says; the saved adapter gives the same logits
with plain PEFT."""

import argparse
import json
from collections import Counter

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import reference
from sft.messages import Refused
from sft.model.directory import ModelDirectory
from sft.model.lora import add_adapter, kind_of
from sft.model.pretrained import load_pretrained

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
        return load_pretrained(ModelDirectory(directory, model_code="remote"), dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(directory)


def arguments(directory, targets, **more):
    values = dict(lora_rank=4, lora_alpha=8, lora_dropout=0.0, use_rslora=False, use_dora=False)
    values |= {"lora_target_modules": targets, "model_name_or_path": str(directory), "hub_id": None} | more
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
        (["q_porj"], {}, "--lora_target_modules q_porj: no such module; there are down_proj, experts, gate_proj"),
        (["lm_head"], {}, "--lora_target_modules lm_head: the head is the embedding's own weight"),
        (["embed_tokens"], {}, "embed_tokens: adapters are put on linear layers that are trained, not on a Embedding"),
        (["wg"], {}, "--lora_target_modules wg: adapters are put on .* not on a router"),
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


RANKS = {"zero2": 2, "zero3": 2, "offload": 2, "one": 1}
FILES = {"zero2": "ds_zero2_no_offload.json", "zero3": "ds_zero3_no_offload.json", "offload": "ds_zero3_offload.json"}
ALWAYS = (("moe", "zero2"),)  # the others with the campaign


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        pytest.param(
            kind, stage,
            marks=[pytest.mark.needs_gxx] * (stage != "one") + [pytest.mark.campaign] * ((kind, stage) not in ALWAYS),
        )
        for kind in ("dense", "moe", "hy_v3", "hy_v4", "remote_cla") for stage in RANKS
    ],
)  # fmt: skip
def test_what_is_saved_under_every_stage(
    kind, stage, model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path
):
    """All targets at once: no tensor is empty, each has its shape, all of lora_B is trained, and plain PEFT evaluates
    to the loss that the run's own last evaluation had."""
    directory, out = model_dir(kind, example_tokenizer_dir), tmp_path / "out"
    lines = example_rows.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    targets = ["all-linear"] + ["experts"] * (kind != "dense")
    args = ["--model_name_or_path", directory, "--train_data_file", example_rows, "--output_dir", out, "--use_lora"]
    args += ["--lora_rank", 4, "--lora_target_modules", *targets, "--max_steps", 4, "--learning_rate", 1e-2]
    args += ["--eval_data_file", tmp_path / "eval.jsonl", "--eval_strategy", "steps", "--eval_steps", 4]
    args += ["--per_device_eval_batch_size", 1, "--make_moe_param_leaf_module"]
    args += ["--deepspeed", FILES[stage]] if stage in FILES else []
    run = run_train(args, launcher="torchrun" if RANKS[stage] > 1 else "python", nproc=RANKS[stage], timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    model = PeftModel.from_pretrained(load(directory), out)
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert tensor.numel() and tensor.dtype == torch.float32, name
        untouched = ".experts." in name and kind == "remote_cla"  # an expert that no token was sent to
        assert "lora_B" not in name or untouched or tensor.any(), name
    rows = reference.encode_rows(tmp_path / "eval.jsonl", AutoTokenizer.from_pretrained(example_tokenizer_dir))
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    expected = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    difference = abs(reference.mean_loss(model, rows, 4) - expected)
    print(f"{kind} {stage}: largest difference {difference:.1e}")
    assert difference <= 1e-6
