"""Directories with code of transformers 4.41 (Hunyuan-Large, the first A13B): whole buffers, the right loss, the
base's own shape when saved, and transformers' class where it computes the same."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import reference
from conftest import make_model_dir
from sft.model.directory import ModelDirectory
from sft.model.generations import why_not_native
from sft.model.pretrained import load_pretrained

KINDS = ("remote", "remote_cla")
STEPS, RATE = 4, 1e-3


def load(directory, model_code="auto", dtype=torch.float32):
    return load_pretrained(ModelDirectory(directory, model_code=model_code), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_buffer_is_what_the_class_computes(kind, dtype, model_dir, example_tokenizer_dir):
    directory = model_dir(kind, example_tokenizer_dir, num_hidden_layers=5)
    models = load(directory, "remote", dtype), reference.built_on_the_cpu(directory)
    ours, theirs = (dict(model.named_buffers(remove_duplicate=False)) for model in models)
    assert ours.keys() == theirs.keys() and len(ours) == 15
    for name, buffer in ours.items():
        assert torch.equal(buffer.float(), theirs[name].to(buffer.dtype).float()), name
        assert buffer.dtype == (torch.float32 if name.endswith("inv_freq") else dtype)


def test_no_rotary_scaling_at_all(make_model_dir, example_tokenizer_dir, tmp_path):
    """M7: transformers 5 makes a dict of null, in which 4.41's code looks for a type."""
    directory = make_model_dir("remote_cla", example_tokenizer_dir, tmp_path / "model", rope_scaling=None)
    model = load(directory)
    expected = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    for layer in model.model.layers:
        assert torch.allclose(layer.self_attn.rotary_emb.inv_freq, expected)
    assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_transformers_class_computes_the_same_where_nothing_is_dropped(model_dir, example_tokenizer_dir):
    """Two tokens: no expert is over its capacity. With more, the old router drops some and the logits differ."""
    directory = model_dir("remote", example_tokenizer_dir, initializer_range=0.2)
    native, remote = load(directory, "auto").eval(), load(directory, "remote").eval()
    assert type(native).__module__.startswith("transformers.models.hunyuan_v1_moe")
    ids = torch.randint(10, 300, (30, 2), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for pair in ids:
            difference = native(pair[None], use_cache=False).logits - remote(pair[None]).logits
            assert difference.abs().max() < 1e-4
        long = ids.reshape(1, -1)
        assert (native(long, use_cache=False).logits - remote(long).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"use_cla": True}, "cross-layer attention"),
        ({"moe_topk": [1, 1]}, "a top-1 router"),
        ({"moe_topk": [2, 1]}, "layers with different experts"),
        ({"use_qk_norm": False}, "not normalised"),
        ({"num_shared_expert": [2, 2]}, "more than one shared"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": None}}, "other rotary scaling"),
        ({"rope_scaling": None}, None),
        ({"num_experts": 1}, None),
    ],
)
def test_which_models_transformers_classes_compute(change, why, model_dir, example_tokenizer_dir):
    config = json.loads((model_dir("remote", example_tokenizer_dir) / "config.json").read_text()) | change
    found = why_not_native(config)
    assert found is None if why is None else why in found


WAYS = {  # name: (flags, ranks)
    "one": (["--gradient_accumulation_steps", 2], 1),
    "checkpointing": (["--gradient_accumulation_steps", 2, "--gradient_checkpointing"], 1),
    "zero2": (["--deepspeed", "ds_zero2_no_offload.json"], 2),
    "zero3": (["--deepspeed", "ds_zero3_no_offload.json", "--make_moe_param_leaf_module"], 2),
}
CASES = [
    pytest.param(kind, way, marks=[pytest.mark.needs_gxx] if way.startswith("zero") else [])
    for kind, way in [("remote_cla", "one"), ("remote", "checkpointing"), ("remote", "zero2"), ("remote_cla", "zero3")]
]


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_losses_are_those_of_the_class_built_on_the_cpu(
    kind, way, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path
):
    """Micro-batches of four rows, two a step, whatever the way: the router's capacity depends on them."""
    directory, (flags, ranks) = model_dir(kind, example_tokenizer_dir), WAYS[way]
    args = ["--model_name_or_path", directory, "--model_code", "remote", "--train_data_file", example_rows]
    args += ["--output_dir", tmp_path / "out", "--max_steps", STEPS, "--logging_steps", 1, "--learning_rate", RATE]
    args += ["--per_device_train_batch_size", 4, "--save_strategy", "no", *flags]
    run = run_train(args, launcher="torchrun" if ranks > 1 else "python", nproc=ranks)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "model code = the directory's own" in run.stdout

    rows = reference.encode_rows(example_rows, AutoTokenizer.from_pretrained(example_tokenizer_dir))
    order = reference.trainer_order(len(rows), 42, ranks, 4, 2 // ranks, STEPS)
    rate = reference.linear(RATE, STEPS)
    expected = reference.train(directory, example_rows, order, rate, example_tokenizer_dir)
    difference = max(abs(a - b) for a, b in zip(losses(tmp_path / "out"), expected, strict=True))
    print(f"{kind} {way}: largest difference {difference:.1e}")
    assert difference <= 1e-5

    base, out = json.loads((directory / "config.json").read_text()), tmp_path / "out"
    assert json.loads((out / "config.json").read_text()) == base
    assert (out / "modeling_hunyuan.py").read_bytes() == (directory / "modeling_hunyuan.py").read_bytes()
    saved, given = load_file(out / "model.safetensors"), load_file(directory / "model.safetensors")
    assert {k: t.shape for k, t in saved.items()} == {k: t.shape for k, t in given.items()}
    assert load(out, "remote").model.norm.weight.equal(saved["model.norm.weight"])


def test_what_is_saved_is_the_bases_own_shape_when_transformers_class_trains(
    model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path
):
    directory, out = model_dir("remote", example_tokenizer_dir), tmp_path / "out"
    args = ["--model_name_or_path", directory, "--train_data_file", example_rows, "--output_dir", out]
    run = run_train([*args, "--max_steps", 1, "--packing", "batch"])
    assert run.returncode == 0, run.stderr[-3000:]
    assert "model code = transformers' HunYuanMoEV1 (it computes the same model, faster)" in run.stdout
    assert json.loads((out / "config.json").read_text()) == json.loads((directory / "config.json").read_text())
    saved, given = load_file(out / "model.safetensors"), load_file(directory / "model.safetensors")
    assert {k: t.shape for k, t in saved.items()} == {k: t.shape for k, t in given.items()}


def test_label_smoothing_is_refused_where_labels_would_not_be_shifted(
    model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path
):
    args = ["--model_name_or_path", model_dir("remote", example_tokenizer_dir), "--train_data_file", example_rows]
    args += ["--output_dir", tmp_path / "out", "--label_smoothing_factor", 0.1, "--max_steps", 1]
    run = run_train([*args, "--model_code", "remote"])
    assert run.returncode == 2 and "--label_smoothing_factor: not with the code" in run.stderr, run.stderr[-2000:]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", ["auto", "remote"])
def test_transformers_own_type_with_code_beside_it(
    code, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path
):
    """A13B as it is published now. The code is of the same time, and is not run unless asked for."""
    directory, out = shutil.copytree(model_dir("remote", example_tokenizer_dir), tmp_path / "model"), tmp_path / "out"
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "hunyuan_v1_moe", "head_dim": 16}
    (directory / "config.json").write_text(json.dumps(config))
    args = ["--train_data_file", example_rows, "--max_steps", 2, "--logging_steps", 1, "--model_code", code]
    run = run_train([*args, "--model_name_or_path", directory, "--output_dir", out])
    assert run.returncode == 0, run.stderr[-3000:]
    assert ("model code = transformers' HunYuanMoEV1" in run.stdout) == (code == "auto")
    same = ["--model_name_or_path", model_dir("remote", example_tokenizer_dir), "--output_dir", tmp_path / "same"]
    assert run_train([*args, *same]).returncode == 0
    assert losses(out) == losses(tmp_path / "same")
    assert json.loads((out / "config.json").read_text()) == config


def test_without_consent_no_code_runs_and_none_is_needed(
    model_dir, example_tokenizer_dir, example_rows, run_train, run_here, losses, tmp_path
):
    """The first A13B: transformers' class computes it. Its files end whatever imports them."""
    directory = shutil.copytree(model_dir("remote", example_tokenizer_dir), tmp_path / "model")
    for file in directory.glob("*.py"):
        file.write_text("raise SystemExit(99)")
    args = ["--train_data_file", example_rows, "--max_steps", 2, "--logging_steps", 1, "--save_strategy", "no"]
    no = ["--trust_remote_code", "false"]
    run = run_train([*args, "--model_name_or_path", directory, "--output_dir", tmp_path / "out", *no])
    assert run.returncode == 0 and "code that runs" not in run.stdout, run.stderr[-3000:]
    same = ["--model_name_or_path", model_dir("remote", example_tokenizer_dir), "--output_dir", tmp_path / "same"]
    assert run_train([*args, *same]).returncode == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "same")
    for script, more in (("chat.py", ["--prompt", "1"]), ("show_rows.py", ["--file", example_rows])):
        model = [directory] if script == "chat.py" else ["--model", directory]
        assert run_here(script, [*model, *more, *no]).returncode == 0
        # the configuration's class, for which the tokenizer's loader asks
        assert run_here(script, [*model, *more]).returncode == 99


def test_an_adapter_on_a_directorys_own_code(model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path):
    directory, probe = model_dir("remote_cla", example_tokenizer_dir), tmp_path / "probe.jsonl"
    probe.write_text(example_rows.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    args = ["--model_name_or_path", directory, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_train([*args, "--max_steps", 2, "--use_lora", "--gradient_checkpointing", "--probe_file", probe])
    assert run.returncode == 0 and "answered exactly: " in run.stdout, run.stderr[-3000:]  # M10: without a cache
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # two projections of the layer that shares keys and values, four of the other
    assert len(adapter) == 12 and any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("spoil", "flags", "says"),
    [
        ("modeling_hunyuan.py", [], "its code needs modeling_hunyuan.py, which is not there"),
        ("configuration_hunyuan.py", [], "its code needs configuration_hunyuan.py, which is not there"),
        (None, ["--model_code", "native"], "--model_code native: transformers' classes do not compute this model"),
    ],
)
def test_refused(spoil, flags, says, example_tokenizer_dir, example_rows, run_here, tmp_path):
    directory = make_model_dir("remote_cla", example_tokenizer_dir, tmp_path / "model")
    if spoil:
        (directory / spoil).unlink()
    args = ["--model_name_or_path", directory, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_here("train.py", [*args, *flags])
    assert run.returncode == 2 and says in run.stderr and "Traceback" not in run.stderr, run.stderr
    shutil.rmtree(directory)
