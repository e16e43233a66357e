"""merge_lora_weight.py: it computes what PEFT does, writes what the base looks like, and leaves all or nothing."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters import ATTENTION, BOTH, SHARED, logits, make_adapter, make_base, tensors
from conftest import run_command
from sft import messages
from sft.messages import Refused
from sft.model import to_safetensors
from tiny import fuse_experts

pytestmark = pytest.mark.usefixtures("one_thread")
INDEX = "model.safetensors.index.json"


# --- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hunyuan_v1_dense", {}),
        ("hunyuan_v1_dense", {"target_modules": "all-linear", "use_rslora": True}),
        ("hunyuan_v1_dense", {"use_dora": True}),
        ("hunyuan_v1_moe", {}),
        ("hunyuan_v1_moe", {"use_rslora": True, "use_dora": True}),
        ("hy_v3", {"target_modules": "all-linear"}),
        ("hy_v4", {"target_modules": "all-linear"}),
        ("hunyuan_v1_moe", BOTH),
        ("hunyuan_v1_moe", BOTH | {"target_modules": ATTENTION, "use_rslora": True}),
        ("hunyuan_v1_moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
        ("hunyuan_v1_moe", {"target_modules": ["q_proj"], "target_parameters": SHARED}),
        ("hy_v3", BOTH | {"target_modules": ["shared_experts.up_proj"]}),
        ("hy_v3 fused", BOTH),
        ("hy_v4", BOTH),
    ],
    ids=["dense", "dense-all-rs", "dense-dora", "moe", "moe-rs-dora", "hy3-all", "hy4-all",
         "moe-experts", "moe-experts-rs", "moe-one-of-two", "moe-shared", "hy3-experts", "hy3-fused", "hy4-experts"],
)  # fmt: skip
def test_logits_equal_those_of_peft(kind, options, tied, merge, tmp_path):
    base = make_base(tmp_path / "base", kind.split()[0], tied)
    if "fused" in kind:
        fuse_experts(base)
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    code, _, err = merge("--base_model_path", base, "--adapter_model_path", adapter, "--output_path", tmp_path / "out")
    assert code == 0, err
    expected = logits(base, adapter)
    assert (expected - logits(base)).abs().max() > 1e-2  # the adapter does something
    assert (expected - logits(tmp_path / "out")).abs().max() < 1e-5
    shapes = [{name: tensor.shape for name, tensor in tensors(path).items()} for path in (base, tmp_path / "out")]
    assert shapes[0] == shapes[1]


def test_an_untied_head_is_merged(merge, tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    assert merge("--adapter_model_path", adapter, "--verify", "keys")[0] == 0
    assert (logits(base, adapter) - logits(tmp_path / "adapter-merged")).abs().max() < 1e-5


def test_a_bf16_base_is_rounded_once(pair, merge, tmp_path):
    base, adapter = pair
    assert merge("--adapter_model_path", adapter, "--output_path", tmp_path / "same")[0] == 0
    assert merge("--adapter_model_path", adapter, "--output_path", tmp_path / "fp32", "--save_dtype", "fp32")[0] == 0
    before, same, fp32 = tensors(base), tensors(tmp_path / "same"), tensors(tmp_path / "fp32")
    assert before.keys() == same.keys() == fp32.keys()
    changed = {name for name in before if not torch.equal(before[name], same[name])}
    assert changed == {f"model.layers.{layer}.self_attn.{name}.weight" for layer in (0, 1) for name in ATTENTION}
    for name in before:
        assert fp32[name].dtype == torch.float32
        assert same[name].dtype == torch.bfloat16
        assert torch.equal(fp32[name].bfloat16(), same[name])
    for path, dtype in (("same", "bfloat16"), ("fp32", "float32")):
        config = json.loads((tmp_path / path / "config.json").read_text())
        assert list(config.items()) == [
            (key, dtype if key == "dtype" else value)
            for key, value in json.loads((base / "config.json").read_text()).items()
        ]


def test_what_the_base_keeps_in_fp32_stays_so(pair, merge, tmp_path):
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]
    for file in base.glob("*.safetensors"):
        held = load_file(file)
        held = {name: tensor.float() if "gate.wg" in name else tensor for name, tensor in held.items()}
        save_file(held, file, metadata={"format": "pt"})
    code, out, _ = merge("--base_model_path", base, "--adapter_model_path", adapter, "--output_path", tmp_path / "out",
                         "--save_dtype", "fp16", "--verify", "keys")  # fmt: skip
    assert code == 0
    assert "verify keys = " in out
    for name, tensor in tensors(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if "gate.wg" in name else torch.float16), name


def test_the_adapters_tokenizer_wins(pair, merge, tmp_path):
    """M3: of an adapter that was trained with another one. Nothing of the base's is left beside it."""
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    own = {"tokenizer_config.json": "{}", "vocab.json": "the adapter's", "generation_config.json": "the adapter's"}
    for name, text in own.items():
        (adapter / name).write_text(text)
    assert merge("--adapter_model_path", adapter)[0] == 0
    merged = {path.name: path.read_text() for path in (tmp_path / "adapter-merged").glob("*[!s]") if path.is_file()}
    assert merged["vocab.json"] == "the adapter's" and merged["generation_config.json"] != "the adapter's"
    assert not {"tokenizer.json", "chat_template.jinja"} & merged.keys() and merged["LICENSE"] == "the base's LICENSE"


@pytest.mark.parametrize("kind", [pytest.param("whole", marks=pytest.mark.campaign), "in two files"])
def test_a_base_in_bin_files(kind, merge, tmp_path):
    """M8: what merge advises is a command that works, and then it merges."""
    base = make_base(tmp_path / "a base", tied=True)
    adapter, state = make_adapter(tmp_path / "adapter", base), load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # as such files have it, one memory
    parts = [sorted(state)] if kind == "whole" else [sorted(state)[:5], sorted(state)[5:]]
    names = ["pytorch_model.bin"] if kind == "whole" else [f"pytorch_model-{i}-of-2.bin" for i in (1, 2)]
    for name, part in zip(names, parts):
        torch.save({key: state[key] for key in part}, base / name)
    places = {key: name for name, part in zip(names, parts) for key in part}
    if kind != "whole":
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    code, _, err = merge("--adapter_model_path", adapter, "--output_path", tmp_path / "out")
    assert code == 2 and "Convert its pytorch_model*.bin: " in err
    command = (
        err.split(": ")[-1].strip().replace("python", sys.executable, 1).replace("NEW_DIR", str(tmp_path / "new"))
    )
    assert run_command(["bash", "-c", command]).returncode == 0
    for wrong in ([], [base, tmp_path / "new"], [tmp_path / "new", tmp_path / "newer"]):
        with pytest.raises(Refused):
            to_safetensors.main([str(path) for path in wrong])
    assert merge("--adapter_model_path", adapter, "--base_model_path", tmp_path / "new")[0] == 0
    assert (logits(tmp_path / "new", adapter) - logits(tmp_path / "adapter-merged")).abs().max() < 1e-5
    assert tensors(tmp_path / "new")["model.norm.weight"].equal(state["model.norm.weight"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_a_checkpoint_of_masters_names_stays_fp32(dtype, pair, merge, tmp_path):
    """M11: its base keeps routers in fp32 beside weights in half precision."""
    base = make_base(tmp_path / "base", "hunyuan_v1_moe")
    adapter = make_adapter(tmp_path / "adapter", base)
    routers = sorted(name for name in tensors(base) if "gate.wg" in name)
    (base / "kept_in_fp32.json").write_text(json.dumps({"tensors": routers}))
    assert merge("--adapter_model_path", adapter, "--save_dtype", dtype, "--verify", "keys")[0] == 0
    merged = tmp_path / "adapter-merged"
    kept = {name for name, tensor in tensors(merged).items() if tensor.dtype == torch.float32}
    assert routers and kept == set(tensors(base) if dtype == "fp32" else routers)
    names = merged / "kept_in_fp32.json"
    assert names.exists() == (dtype == "fp32") and (
        not names.exists() or json.loads(names.read_text())["tensors"] == routers
    )


def test_the_router_correction_of_hy3_stays_fp32(merge, tmp_path):
    base = make_base(tmp_path / "base", "hy_v3")
    adapter = make_adapter(tmp_path / "adapter", base)
    assert merge("--adapter_model_path", adapter, "--save_dtype", "bf16")[0] == 0
    dtypes = {name: tensor.dtype for name, tensor in tensors(tmp_path / "adapter-merged").items()}
    assert dtypes.pop("model.layers.1.mlp.expert_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


@pytest.mark.parametrize(("key", "value"), [("torch_dtype", "bfloat16"), ("x", 1)])
def test_old_dtype_key_and_a_dtype_that_config_json_does_not_tell(key, value, pair, merge, tmp_path):
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"} | {key: value}))
    _, out, _ = merge("--base_model_path", base, "--adapter_model_path", adapter, "--output_path", tmp_path / "out")
    assert "save_dtype = bf16 (most of the base's weights)" in out
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert merged[key] == value and "dtype" not in merged


def test_what_an_index_does_not_list_is_merged_and_listed(pair, merge, tmp_path):
    base = shutil.copytree(pair[0], tmp_path / "base")
    index = json.loads((base / INDEX).read_text())
    place = index["weight_map"].pop("model.norm.weight")
    (base / INDEX).write_text(json.dumps(index))
    code, _, err = merge("--base_model_path", base, "--adapter_model_path", pair[1], "--output_path", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]["model.norm.weight"] == place


def test_verify_logits_prints_the_largest_difference(pair, merge, tmp_path):
    code, out, err = merge("--adapter_model_path", pair[1], "--output_path", tmp_path / "out", "--save_dtype", "fp32",
                           "--verify", "logits")  # fmt: skip
    assert code == 0, err
    assert float(re.search(r"verify logits = (\S+) ", out)[1]) < 1e-5


# --- what it writes ------------------------------------------------------------------------------------------------


def test_shards_index_and_other_files_are_the_bases(pair, merge, tmp_path):
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]
    for file in ("checkpoint-2/config.json", "checkpoint-2/model.safetensors", "runs/events", "train_results.json",
                 "log_1.txt", ".cache/x", "assets/picture.png", "assets/old.bin", "training_args.bin",
                 "a.py"):  # fmt: skip
        (base / file).parent.mkdir(exist_ok=True)
        (base / file).write_text(file)
    code, out, err = merge("--base_model_path", base, "--adapter_model_path", adapter, "--output_path", base / "out",
                           "--save_dtype", "fp32")  # fmt: skip
    assert code == 0, err
    assert "shard" in err  # the progress bar
    files = {str(file.relative_to(base / "out")) for file in (base / "out").rglob("*") if file.is_file()}
    assert files == {file.name for file in pair[0].iterdir()}
    assert f"not copied from {base}: .cache, a.py, assets (not files of a model)\n" in out
    assert (base / "out" / "chat_template.jinja").read_text() == "the base's chat_template.jinja"
    before, after = (json.loads((path / INDEX).read_text()) for path in (base, base / "out"))
    assert list(after["weight_map"].items()) == list(before["weight_map"].items())
    assert after["metadata"] == before["metadata"] | {"total_size": 2 * before["metadata"]["total_size"]}
    for file in {*after["weight_map"].values()}:
        with safe_open(base / "out" / file, "pt") as handle:
            assert {*handle.keys()} == {name for name, place in before["weight_map"].items() if place == file}
            assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("source", ["sharded", "single"])
def test_a_shard_above_max_shard_size_is_split(source, pair, merge, tmp_path):
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]
    if source == "single":
        save_file(tensors(base), base / "model.safetensors", metadata={"format": "pt"})
        for file in (INDEX, *{*json.loads((base / INDEX).read_text())["weight_map"].values()}):
            (base / file).unlink()
    shards = len([*base.glob("*.safetensors")])
    code, _, err = merge("--base_model_path", base, "--adapter_model_path", adapter, "--output_path", tmp_path / "out",
                         "--max_shard_size", "20KB", "--verify", "keys")  # fmt: skip
    assert code == 0, err
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > shards
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert sum(tensor.nbytes for tensor in held.values()) <= 20_000
        weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
        assert {*held} == {name for name, place in weight_map.items() if place == file}
    assert (logits(base, adapter) - logits(tmp_path / "out")).abs().max() < 0.1  # loads; the rest is bf16 rounding


def test_unset_paths_are_chosen_and_printed(pair, merge, tmp_path, monkeypatch):
    base, adapter = pair
    output = tmp_path / "output"
    monkeypatch.setattr(messages, "OUTPUT_ROOT", output)
    code, _, err = merge()
    assert (code, "no adapter under" in err, "--adapter_model_path" in err) == (2, True, True)
    runs = ("killed.tmp-1", "b/checkpoint-10-x", "b/checkpoint-10", "b/checkpoint-9", "c", "a")  # newest first
    for age, name in enumerate(runs):
        shutil.copytree(adapter, output / name)
        os.utime(output / name / "adapter_model.safetensors", (1e9 - age, 1e9 - age))
    shutil.copytree(base, output / "example")
    code, out, err = merge()
    assert code == 0, err
    assert f"adapter_model_path = {output}/b/checkpoint-10 (newest under train/output)" in out
    assert f"base_model_path = {base} (named by adapter_config.json)" in out
    assert f"output_path = {output}/b/checkpoint-10-merged (<adapter>-merged)" in out
    shutil.copytree(adapter, output / "b", dirs_exist_ok=True)  # its top counts before its checkpoints
    os.utime(output / "b" / "adapter_model.safetensors", (1, 1))
    code, out, err = merge()
    assert f"adapter_model_path = {output}/c (newest under train/output)" in out
    assert f"output_path = {output}/c-merged (<adapter>-merged)" in out
    assert code == 0, err


def test_an_untrained_adapter_is_warned_of(pair, merge, tmp_path):
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    held = load_file(adapter / "adapter_model.safetensors")
    held = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in held.items()}
    save_file(held, adapter / "adapter_model.safetensors")
    code, _, err = merge("--adapter_model_path", adapter)
    assert code == 0
    assert "warning: every lora_B is zero" in err
