"""What is trained changes, everything else is bit by bit what it was; what is saved loads alone, in another
process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import run_script


def flags(model, rows, out, *more):
    steps = ["--max_steps", 2, "--logging_steps", 1, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3]
    return ["--model_name_or_path", model, "--train_data_file", rows, "--output_dir", out, *steps, *more]


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(
    ("stage", "ranks"), [(None, 1), pytest.param("ds_zero3_no_offload.json", 2, marks=pytest.mark.needs_gxx)]
)
def test_attention_only_changes_the_attention_and_nothing_else(
    kind, stage, ranks, model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path
):
    base = model_dir(kind, example_tokenizer_dir)
    more = ["--train_attention_params_only", "--gradient_checkpointing"] + (["--deepspeed", stage] if stage else [])
    run = run_train(
        flags(base, example_rows, tmp_path / "o", *more), launcher="torchrun" if ranks > 1 else "python", nproc=ranks
    )
    assert run.returncode == 0, run.stderr[-3000:]
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "o" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".self_attn." in name}
    results = json.loads((tmp_path / "o" / "train_results.json").read_text())
    assert results["trainable_params"] == sum(before[name].numel() for name in changed)
    assert results["total_params"] == sum(tensor.numel() for tensor in before.values())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_lora_leaves_the_model_as_it_is_and_adapts_the_attention(
    kind, model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path
):
    base = model_dir(kind, example_tokenizer_dir)
    before = (base / "model.safetensors").read_bytes()
    run = run_train(flags(base, example_rows, tmp_path / "o", "--use_lora", "--gradient_checkpointing"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert (base / "model.safetensors").read_bytes() == before
    adapter = load_file(tmp_path / "o" / "adapter_model.safetensors")
    projections = {f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"}
    assert {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in adapter} == projections
    assert all(tensor.any() for tensor in adapter.values()), "lora_B starts at zero and must have moved"
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (64, 128, 0.0)
    assert config["base_model_name_or_path"] == str(base.resolve())


def test_trainable_params_are_those_that_the_expression_finds(
    model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path
):
    """On Hy4, whose indexer gets no gradient and is never trained."""
    base = model_dir("hy_v4", example_tokenizer_dir)
    more = ["--trainable_params", r"layers\.1\.(self_attn|mlp\.experts)|^model\.norm", "--weight_decay", 0.1]
    run = run_train(flags(base, example_rows, tmp_path / "o", *more))
    assert run.returncode == 0, run.stderr[-3000:]
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "o" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    found = {
        n for n in before if ".layers.1.self_attn" in n or ".layers.1.mlp.experts" in n or n == "model.norm.weight"
    }
    assert changed == {name for name in found if ".indexer." not in name} and len(changed) > 10
    run = run_train(flags(base, example_rows, tmp_path / "p", "--trainable_params", "nothing_like_it"))
    assert run.returncode == 2 and "--trainable_params nothing_like_it: no parameter's name matches" in run.stderr


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([tokenizer.apply_chat_template(
    [{"role": "user", "content": "12"}, {"role": "assistant", "content": "34"}], return_dict=False)])
print("LOSS", model(ids, labels=ids).loss.item())
"""


@pytest.mark.needs_gxx
@pytest.mark.parametrize(
    "stage", ["ds_zero2_no_offload.json", pytest.param("ds_zero3_no_offload.json", marks=pytest.mark.campaign)]
)
def test_what_zero_saves_loads_alone_tokenizer_included(
    stage, model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path
):
    """The checkpoint of the last step and the final directory, in a new process that knows no other path."""
    base = model_dir("moe", example_tokenizer_dir)
    run = run_train(
        flags(base, example_rows, tmp_path / "o", "--deepspeed", stage, "--save_steps", 2),
        launcher="torchrun",
        nproc=2,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = []
    script = tmp_path / "reload.py"
    script.write_text(RELOAD)
    for directory in (tmp_path / "o", tmp_path / "o" / "checkpoint-2"):
        reload = run_script(script, [directory])
        assert reload.returncode == 0, reload.stderr[-2000:]
        assert "newly initialized" not in reload.stderr + reload.stdout
        said.append(float(reload.stdout.split("LOSS ")[1]))
    assert said[0] == said[1]
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "o" / name).read_bytes() == (example_tokenizer_dir / name).read_bytes()


@pytest.mark.needs_gxx
def test_a_frozen_fp32_router_is_not_rounded_by_zero(
    make_model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path
):
    """A bf16 base with an fp32 router, its attention trained under bf16 ZeRO-3: the engine rounds what it holds."""
    from safetensors.torch import save_file

    base = make_model_dir("moe", example_tokenizer_dir, tmp_path / "base", dtype="bfloat16")
    before = load_file(base / "model.safetensors")
    before |= {n: before[n].float() * 1.0001 for n in before if n.endswith("gate.wg.weight")}
    save_file(before, base / "model.safetensors", metadata={"format": "pt"})
    more = ["--train_attention_params_only", "--bf16", "--deepspeed", "ds_zero3_no_offload.json"]
    run = run_train(flags(base, example_rows, tmp_path / "o", *more), launcher="torchrun", nproc=2)
    assert run.returncode == 0, run.stderr[-3000:]
    after = load_file(tmp_path / "o" / "model.safetensors")
    changed = {n for n in before if before[n].dtype != after[n].dtype or not torch.equal(before[n], after[n])}
    assert changed and all(".self_attn." in n for n in changed)
