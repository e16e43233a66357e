"""merge_lora_weight.py: what it refuses, with nothing written; how it is stopped and called."""

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
import torch
from safetensors.torch import load_file, save_file

from adapters import tensors
from sft import merging

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN = Path(__file__).resolve().parents[2] / "train"
SCRIPT = TRAIN / "merge_lora_weight.py"
INDEX = "model.safetensors.index.json"


# --- what it refuses -----------------------------------------------------------------------------------------------


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(path: Path, change) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


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
        "layers.0.self_attn.k_proj ([16, 16], the base has [16, 32])",
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
    "rank-pattern": (
        lambda b, a, o: edit_json(a / CONFIG, rank_pattern={"q_proj": 2}),
        "rank_pattern={'q_proj': 2}: only LoRA and DoRA",
    ),
    "pissa": (lambda b, a, o: edit_json(a / CONFIG, init_lora_weights="pissa"), "init_lora_weights=pissa"),
    "tied-head": (
        lambda b, a, o: (edit_json(b / "config.json", tie_word_embeddings=1), edit_tensors(a / TENSORS, more(HEAD))),
        "lm_head (the base has no such weight or it is tied)",
    ),
    "no-base": (lambda b, a, o: shutil.rmtree(b), "not a directory here; give --base_model_path"),
    "no-config": (lambda b, a, o: (b / "config.json").unlink(), "has no config.json"),
    "no-weights": (lambda b, a, o: (b / INDEX).unlink(), f"{INDEX}: not a readable json object"),
    "quantised": (lambda b, a, o: edit_json(b / "config.json", quantization_config={"b": 4}), "quantization_config"),
    "no-shard": (lambda b, a, o: (b / SHARD).unlink(), f"{SHARD}: missing"),
    "cut-shard": (lambda b, a, o: os.truncate(b / SHARD, 9000), f"{SHARD}: not a whole safetensors file"),
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

        monkeypatch.setattr(merging, "save_file", full)
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
