"""merge_lora_weight.py: it computes what PEFT does, writes what the base looks like, and leaves all or nothing."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sft import messages
from tiny import fuse_experts

TRAIN = Path(__file__).resolve().parents[2] / "train"
SCRIPT = TRAIN / "merge_lora_weight.py"
INDEX = "model.safetensors.index.json"
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "hy_v4": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "mlp_layer_types": ["dense", "sparse"], "layer_types": ["indexed_attention"] * 2, "index_topk": 64,
        "index_head_dim": 16, "index_n_heads": 2, "indexer_types": ["full", "shared"],
    },
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BOTH = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
SHARED = [f"shared_mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]


def make_base(path: Path, kind: str = "hunyuan_v1_dense", tied: bool = False, dtype: str = "float32", **options):
    """A tiny random model of `kind` with a few files beside it; options of save_pretrained."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, tie_word_embeddings=tied, **SIZES | EXPERTS[kind])
    model = AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(path, **options)
    for file in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (path / file).write_text(f"the base's {file}")
    return path


def make_adapter(path: Path, base: Path, **options) -> Path:
    """A PEFT adapter of `base` with random lora_B (and magnitude)."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(model, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    model.save_pretrained(path)
    return path


def logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 43)[None] % 64).logits


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices are slower on several threads, most of all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def merge(run_here):
    """Runs the script as `python merge_lora_weight.py` does, in this process; returns (exit code, stdout, stderr)."""

    def run(*args, script: Path = SCRIPT) -> tuple[int, str, str]:
        done = run_here(script, args)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(base in shards, adapter) that fit each other; copy before changing."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_base(folder / "base", "hunyuan_v1_moe", dtype="bfloat16", max_shard_size="30KB")
    return base, make_adapter(folder / "adapter", base)


# --- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hunyuan_v1_dense", {}),
        ("hunyuan_v1_dense", {"target_modules": "all-linear", "use_rslora": True}),
        ("hunyuan_v1_dense", {"use_dora": True}),
        ("hunyuan_v1_dense", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 64}}),
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
    ids=["dense", "dense-all-rs", "dense-dora", "dense-patterns", "moe", "moe-rs-dora", "hy3-all", "hy4-all",
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


def test_the_router_correction_of_hy3_stays_fp32(merge, tmp_path):
    base = make_base(tmp_path / "base", "hy_v3")
    adapter = make_adapter(tmp_path / "adapter", base)
    assert merge("--adapter_model_path", adapter, "--save_dtype", "bf16")[0] == 0
    dtypes = {name: tensor.dtype for name, tensor in tensors(tmp_path / "adapter-merged").items()}
    assert dtypes.pop("model.layers.1.mlp.expert_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_old_dtype_key_and_a_dtype_that_config_json_does_not_tell(pair, merge, tmp_path):
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]
    config = json.loads((base / "config.json").read_text())
    told, untold = "config.json of the base", "most of the base's weights"
    for key, value, why in (("torch_dtype", "bfloat16", told), ("x", 1, untold)):
        (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"} | {key: value}))
        _, out, _ = merge("--base_model_path", base, "--adapter_model_path", adapter, "--output_path", tmp_path / key)
        assert f"save_dtype = bf16 ({why})" in out
        assert json.loads((tmp_path / key / "config.json").read_text())[key] == value
        assert "dtype" not in json.loads((tmp_path / key / "config.json").read_text())


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


# --- what it refuses -----------------------------------------------------------------------------------------------


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(path: Path, change) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def unlist(index: Path) -> None:
    held = json.loads(index.read_text())
    del held["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(held))


def first(change):
    """A change of the adapter's first lora_A alone."""
    return lambda held: held | {name: change(held[name]) for name in sorted(held)[:1]}


SHARD = "model-00002-of-00005.safetensors"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
EXPERT_PAIR = {
    "base_model.model.model.layers.1.mlp.experts.lora_A.weight": (16, 40),
    "base_model.model.model.layers.1.mlp.experts.lora_B.weight": (32, 16),
}
HEAD = {"base_model.model.lm_head.lora_A.weight": (4, 32), "base_model.model.lm_head.lora_B.weight": (64, 4)}


def without(part):
    return lambda held: {name: tensor for name, tensor in held.items() if part not in name}


def renamed(old, new):
    return lambda held: {name.replace(old, new): tensor for name, tensor in held.items()}


def more(shapes):
    return lambda held: held | {name: torch.ones(shape) for name, shape in shapes.items()}


REFUSED = {  # what is done to (base b, adapter a, output o), and what is said
    "no-adapter": (lambda b, a, o: shutil.rmtree(a), f"adapter: holds no {TENSORS}"),
    "no-adapter-file": (lambda b, a, o: (a / TENSORS).unlink(), f"adapter: holds no {TENSORS}"),
    "no-adapter-config": (lambda b, a, o: (a / CONFIG).unlink(), f"{CONFIG}: not a readable json object"),
    "cut-adapter-config": (lambda b, a, o: (a / CONFIG).write_text("{"), f"{CONFIG}: not a readable json object"),
    "empty-adapter": (lambda b, a, o: save_file({}, a / TENSORS), "the adapter holds no tensors"),
    "zero3-adapter": (
        lambda b, a, o: edit_tensors(a / TENSORS, lambda held: {name: held[name][:0] for name in held}),
        "the adapter holds no tensors",
    ),
    "cut-adapter": (lambda b, a, o: os.truncate(a / TENSORS, 2000), f"{TENSORS}: not a whole safetensors file"),
    "other-names": (
        lambda b, a, o: edit_tensors(a / TENSORS, renamed("q_proj", "x_proj")),
        "layers.0.self_attn.x_proj (the base has no such weight)",
    ),
    "other-shape": (
        lambda b, a, o: edit_tensors(a / TENSORS, first(lambda tensor: tensor[:, :16].contiguous())),
        "layers.0.self_attn.k_proj ([16, 16], the base has BF16 [16, 32])",
    ),
    "other-rank": (lambda b, a, o: edit_json(a / CONFIG, r=8), "k_proj (rank or magnitude are not as"),
    "no-lora-B": (lambda b, a, o: edit_tensors(a / TENSORS, without("k_proj.lora_B")), "k_proj ([0, 32], the base"),
    "no-lora-A": (lambda b, a, o: edit_tensors(a / TENSORS, without("k_proj.lora_A")), "attn.k_proj.lora_B.weight"),
    "no-magnitude": (lambda b, a, o: edit_json(a / CONFIG, use_dora=True), "k_proj (rank or magnitude are not as"),
    "bias": (
        lambda b, a, o: edit_tensors(a / TENSORS, more({"base_model.model.x.q_proj.bias": (2,)})),
        "base_model.model.x.q_proj.bias",
    ),
    "nan": (
        lambda b, a, o: edit_tensors(a / TENSORS, first(lambda tensor: tensor * float("nan"))),
        "k_proj.weight: not finite in torch.bfloat16",
    ),
    "modules-to-save": (
        lambda b, a, o: edit_json(a / CONFIG, modules_to_save=["lm_head"]),
        f"{CONFIG}: modules_to_save=['lm_head']: only LoRA and DoRA",
    ),
    "other-parameters": (
        lambda b, a, o: edit_json(a / CONFIG, target_parameters=["experts.bias"]),
        "target_parameters=['experts.bias']: only LoRA and DoRA",
    ),
    "other-experts": (
        lambda b, a, o: edit_tensors(a / TENSORS, more(EXPERT_PAIR)),
        "layers.1.mlp.experts ([32, 40], rank 4: the base has no such experts)",
    ),
    "pissa": (lambda b, a, o: edit_json(a / CONFIG, init_lora_weights="pissa"), "init_lora_weights=pissa"),
    "tied-head": (
        lambda b, a, o: (edit_json(b / "config.json", tie_word_embeddings=1), edit_tensors(a / TENSORS, more(HEAD))),
        "lm_head (the base has no such weight, it is tied)",
    ),
    "no-base": (lambda b, a, o: shutil.rmtree(b), "not a directory here; give --base_model_path"),
    "no-config": (lambda b, a, o: (b / "config.json").unlink(), "config.json: not a readable json object"),
    "no-weights": (lambda b, a, o: (b / INDEX).unlink(), "holds no model.safetensors and no"),
    "quantised": (lambda b, a, o: edit_json(b / "config.json", quantization_config={"b": 4}), "quantization_config"),
    "no-shard": (lambda b, a, o: (b / SHARD).unlink(), f"{SHARD}: missing"),
    "cut-shard": (lambda b, a, o: os.truncate(b / SHARD, 9000), f"{SHARD}: not a whole safetensors file"),
    "unlisted": (lambda b, a, o: unlist(b / INDEX), f"{INDEX}: does not list what is in model-00005-of-00005"),
    "renamed": (lambda b, a, o: edit_tensors(b / SHARD, renamed("mlp", "mpl")), f"lists what is not in {SHARD}"),
    "full-output": (lambda b, a, o: (o.mkdir(), (o / "x").touch()), "is there and not empty"),
    "file-output": (lambda b, a, o: o.touch(), "is there and not empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_nothing_written(case, pair, merge, tmp_path):
    spoil, says = REFUSED[case]
    base, adapter = (shutil.copytree(path, tmp_path / path.name) for path in pair)
    output = tmp_path / "out"
    spoil(base, adapter, output)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = merge("--base_model_path", base, "--adapter_model_path", adapter, "--output_path", output)
    assert code == 2
    assert says in err
    assert err.count("refused: ") == 1
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--unknown", "1"], "unrecognized arguments: --unknown 1"),
        (["--adapter", "x"], "unrecognized arguments: --adapter x"),
        (["--save_dtype", "int8"], "--save_dtype: invalid choice: 'int8'"),
        (["--max_shard_size", "5 apples"], "'5 apples' is not a size like 5GB"),
        (["--max_shard_size", "0"], "'0' is not a size"),
        (["--output_path", "{base}"], "is the base itself"),
        (["--output_path", "{adapter}/"], "is the adapter itself"),
    ],
)
def test_refused_flags(flags, says, pair, merge):
    base, adapter = pair
    before = [(file, file.stat().st_mtime) for path in pair for file in sorted(path.iterdir())]
    flags = [flag.format(base=base, adapter=adapter) for flag in flags]
    code, _, err = merge("--adapter_model_path", adapter, *flags)
    assert (code, err.count("refused: "), err.count("\n")) == (2, 1, 1)
    assert says in err
    assert before == [(file, file.stat().st_mtime) for path in pair for file in sorted(path.iterdir())]
    assert not adapter.with_name("adapter-merged").exists()


def test_a_value_beyond_fp16_is_refused(pair, merge, tmp_path):
    base = shutil.copytree(pair[0], tmp_path / "base")
    edit_tensors(base / SHARD, lambda held: {name: tensor + 1e5 for name, tensor in held.items()})
    args = ["--base_model_path", base, "--adapter_model_path", pair[1], "--output_path", tmp_path / "out"]
    code, _, err = merge(*args, "--save_dtype", "fp16")
    assert (code, "not finite in torch.float16" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert merge(*args)[0] == 0


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_leaves_nothing(when, pair, merge, tmp_path, monkeypatch):
    if when == "before":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    else:
        written = []

        def full(held, path, metadata):
            if written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            written.append(save_file(held, path, metadata))

        monkeypatch.setattr(safetensors.torch, "save_file", full)
    code, _, err = merge("--adapter_model_path", pair[1], "--output_path", tmp_path / "deep" / "out")
    assert code == 2
    assert ("make room" if when == "before" else "No space left on device") in err
    assert not [*tmp_path.iterdir()], "the parents that it made go too"


def test_only_the_parents_that_it_made_go(pair, merge, tmp_path):
    base = shutil.copytree(pair[0], tmp_path / "base")
    edit_tensors(base / SHARD, lambda held: {name: tensor + 1e5 for name, tensor in held.items()})
    (tmp_path / "before").mkdir()
    args = ["--base_model_path", base, "--adapter_model_path", pair[1], "--save_dtype", "fp16", "--output_path"]
    code, _, err = merge(*args, tmp_path / "before" / "a" / "b" / "out")
    assert (code, "not finite in torch.float16" in err) == (2, True)
    assert [*(tmp_path / "before").iterdir()] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_leaves_nothing(number, pair, tmp_path):
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]
    ballast = {f"model.ballast.{part}": torch.ones(2**20) for part in range(100)}  # 400 MB: time to be stopped in
    save_file(tensors(base) | ballast, base / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, SCRIPT, "--base_model_path", base, "--adapter_model_path", adapter]
    command += ["--output_path", tmp_path / "deep" / "out", "--max_shard_size", "4MB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while process.poll() is None and not [*tmp_path.glob("deep/out.tmp-*/*00003-of-*")]:
            time.sleep(0.001)
        process.send_signal(number)
        err = process.communicate()[1]
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name}, nothing is left at" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# --- how it is called ----------------------------------------------------------------------------------------------


def test_it_starts_without_transformers_and_peft():
    check = "import sys, merge_lora_weight; print({'transformers', 'peft', 'datasets'} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", check], cwd=TRAIN, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def run_shell(*args, cwd: Path, **variables) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.endswith("_PATH")} | variables
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(TRAIN / "merge_lora_weight.sh"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_shell_script_takes_variables_and_flags_from_any_directory(pair, tmp_path):
    here = tmp_path / "a folder"
    for path in pair:
        shutil.copytree(path, here / path.name)
    variables = {"BASE_MODEL_PATH": "base", "ADAPTER_MODEL_PATH": "adapter", "OUTPUT_PATH": "my out"}
    variables |= {"SAVE_DTYPE": "bf16"}
    run = run_shell("--save_dtype", "fp16", cwd=here, **variables)  # the flag wins
    assert run.returncode == 0, run.stderr
    assert {tensor.dtype for tensor in tensors(here / "my out").values()} == {torch.float16}
    run = run_shell(cwd=here, **variables)
    assert (run.returncode, "my out: is there and not empty" in run.stderr) == (2, True)
    assert run_shell("--output_path", "second", cwd=here, **variables).returncode == 0
    assert {tensor.dtype for tensor in tensors(here / "second").values()} == {torch.bfloat16}
    edited = (TRAIN / "merge_lora_weight.sh").read_text()
    for name in variables:
        assert re.search(rf"^{name}=\$\{{{name}:-\}}", edited, re.MULTILINE)  # can be edited at the top
