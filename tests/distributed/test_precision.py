"""The precision rule: what is trained has fp32 masters, and each saved directory has the dtype that the flags say."""

import json

import pytest
import torch
from safetensors.torch import load_file

GUARD = {("", "zero2"), ("--bf16", "none"), ("--bf16", "zero3")}
STAGES = {"none": None, "zero2": "ds_zero2_no_offload.json", "zero3": "ds_zero3_no_offload.json"}


@pytest.fixture
def train(example_rows, run_train, tmp_path):
    """`train(model, *flags, stage=…)`: three steps, a checkpoint at the second; returns the output directory."""

    def run(model, *flags, stage="none", out="out"):
        args = ["--model_name_or_path", model, "--train_data_file", example_rows, "--output_dir", tmp_path / out]
        args += ["--max_steps", 3, "--save_steps", 2, "--logging_steps", 1, "--per_device_train_batch_size", 4, *flags]
        args += ["--deepspeed", STAGES[stage]] if STAGES[stage] else []
        done = run_train(args, launcher="python" if stage == "none" else "torchrun", nproc=1 if stage == "none" else 2)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / out

    return run


def dtypes(directory, name="model.safetensors"):
    return {tensor.dtype for tensor in load_file(directory / name).values()}


def config_dtype(directory):
    config = json.loads((directory / "config.json").read_text())
    return {config[key] for key in ("dtype", "torch_dtype") if key in config}


@pytest.mark.parametrize("kind", [pytest.param("dense", marks=pytest.mark.campaign), "moe"])
def test_a_bf16_directory_trains_like_an_fp32_one(kind, model_dir, example_tokenizer_dir, train):
    """Plain AdamW on bf16 weights would not move them at 1e-5; ours are loaded in fp32 and end at the same bits."""
    half = model_dir(kind, example_tokenizer_dir, dtype="bfloat16")
    whole = model_dir(kind, example_tokenizer_dir, dtype="bfloat16").parent / f"{kind}-whole"
    if not whole.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).save_pretrained(whole)
        AutoTokenizer.from_pretrained(half).save_pretrained(whole)
    flags = ("--learning_rate", 1e-5, "--lr_scheduler_type", "constant")
    before = load_file(half / "model.safetensors")
    ours = load_file(train(half, *flags, out="half") / "model.safetensors")
    same = load_file(train(whole, *flags, out="whole") / "model.safetensors")
    for name, tensor in ours.items():
        assert torch.equal(tensor, same[name]), name
        moved = (tensor - before[name].float()).abs().max().item()
        assert 1e-5 <= moved <= 4e-5, (name, moved)


@pytest.mark.needs_gxx
@pytest.mark.parametrize(
    ("flag", "stage"),
    [pytest.param(flag, stage, marks=[pytest.mark.campaign] * ((flag, stage) not in GUARD))
     for flag in ("", "--bf16") for stage in STAGES],
)  # fmt: skip
def test_what_is_saved_has_the_dtype_of_the_rule(flag, stage, model_dir, example_tokenizer_dir, train):
    """Whatever the directory's dtype: the base is the other one. Its fp32 router stays fp32 in a bf16 base."""
    flags, final = ([flag], torch.bfloat16) if flag else ([], torch.float32)
    checkpoint = torch.float32 if stage == "none" else final  # the weights are the masters there
    base = model_dir("moe", example_tokenizer_dir, dtype="float32" if flags else "bfloat16")
    out = train(base, *flags, stage=stage)
    assert dtypes(out) == {final}
    assert dtypes(out / "checkpoint-2") == {checkpoint}
    assert config_dtype(out) == {str(final).removeprefix("torch.")}
    assert config_dtype(out / "checkpoint-2") == {str(checkpoint).removeprefix("torch.")}
    assert "lm_head.weight" not in load_file(out / "model.safetensors"), "the head is tied"


@pytest.mark.needs_gxx
@pytest.mark.parametrize("stage", [pytest.param("zero2", marks=pytest.mark.campaign), "zero3"])
def test_tensors_that_a_half_precision_base_keeps_in_fp32_stay_so(
    stage, make_model_dir, example_tokenizer_dir, train, tmp_path
):
    from safetensors.torch import save_file

    base = make_model_dir("moe", example_tokenizer_dir, tmp_path / "base", dtype="bfloat16")
    tensors = load_file(base / "model.safetensors")
    routers = {name for name in tensors if name.endswith("gate.wg.weight")}
    tensors |= {name: tensors[name].float() * 1.0001 for name in routers}  # not representable in bf16
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    saved = load_file(train(base, "--bf16", stage=stage) / "model.safetensors")
    assert routers and {name for name, tensor in saved.items() if tensor.dtype == torch.float32} == routers
    assert any((saved[name] != saved[name].bfloat16().float()).any() for name in routers), "saved from rounded values"


@pytest.mark.needs_gxx
@pytest.mark.parametrize("stage", ["none", "zero2", pytest.param("zero3", marks=pytest.mark.campaign)])
def test_an_adapter_is_saved_from_its_master_values(stage, model_dir, example_tokenizer_dir, train):
    base = model_dir("moe", example_tokenizer_dir, dtype="bfloat16")
    out = train(base, "--bf16", "--use_lora", "--lora_rank", 4, "--learning_rate", 1e-3, stage=stage)
    for directory in (out, out / "checkpoint-2"):
        adapter = load_file(directory / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
        trained = torch.cat([tensor.flatten() for name, tensor in adapter.items() if "lora_B" in name])
        assert (trained != trained.bfloat16().float()).float().mean() > 0.9, "the adapter was rounded to bf16"
