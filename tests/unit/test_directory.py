"""A model directory: whose code runs, what stays fp32, which files are a model's."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sft.messages import Refused
from sft.model.directory import ModelDirectory
from sft.model.load import may_run_code
from sft.training.output_dir import files_of_a_run, set_aside

ROUTER, BIAS, WEIGHT = "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.expert_bias", "model.norm.weight"
OLD_CODE = {"AutoConfig": "configuration_hunyuan.C", "AutoModelForCausalLM": "modeling_hunyuan.M"}
A13B = {"model_type": "hunyuan", "auto_map": OLD_CODE, "use_qk_norm": True}
LARGE = A13B | {"use_cla": True}
NEW = {"model_type": "hunyuan_v1_dense"}
OTHERS = {"model_type": "hy_v3", "auto_map": OLD_CODE}


def directory(path, config=NEW, tensors=None, **options):
    """A directory with this config.json and {name: dtype} of tensors of 8 values; the first has 800."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if tensors:
        state = {name: torch.zeros(8, dtype=dtype) for name, dtype in tensors.items()}
        first = next(iter(tensors))
        state[first] = torch.zeros(800, dtype=tensors[first])
        save_file(state, path / "model.safetensors")
    return ModelDirectory(path, **options)


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "tensors", "expected", "fp32"),
    [
        ("bfloat16", {WEIGHT: BF16, ROUTER: F32, BIAS: F32}, "BF16", {ROUTER, BIAS}),
        (None, {WEIGHT: BF16, ROUTER: F32, BIAS: F32}, "BF16", {ROUTER, BIAS}),
        ("float32", {WEIGHT: F32, ROUTER: F32, BIAS: F32}, "F32", {BIAS}),
        ("bfloat16", {WEIGHT: F32, ROUTER: F32, BIAS: F32}, "F32", {BIAS}),  # it says so, and is not
        ("float32", {WEIGHT: BF16, ROUTER: F32}, "BF16", {ROUTER}),  # here, too
        ("float16", {WEIGHT: torch.float16}, "F16", set()),
        ("bfloat16", {WEIGHT: BF16, BIAS: BF16}, "BF16", {BIAS}),
    ],
)
def test_what_stays_fp32_in_half_precision(dtype, tensors, expected, fp32, tmp_path):
    model = directory(tmp_path / "model", NEW | ({"dtype": dtype} if dtype else {}), tensors)
    assert (model.dtype, model.fp32_names) == (expected, fp32)
    saved = model.cast({name: torch.ones(8) for name in tensors}, BF16)
    assert {name for name, value in saved.items() if value.dtype == F32} == fp32 | ({BIAS} & tensors.keys())


def test_a_checkpoint_of_masters_names_what_stays_fp32(tmp_path):
    model = directory(tmp_path / "model", NEW | {"dtype": "float32"}, {WEIGHT: F32, ROUTER: F32})
    (tmp_path / "model" / "kept_in_fp32.json").write_text(json.dumps({"tensors": [ROUTER]}))
    assert model.fp32_names == {ROUTER}


def test_layers_that_no_class_has_are_saved_as_they_are(tmp_path):
    extra = ("model.layers.2.eh_proj.weight", "model.mtp_layers.0.eh_proj.weight")
    model = directory(tmp_path / "model", NEW | {"num_hidden_layers": 2}, {WEIGHT: BF16} | dict.fromkeys(extra, F32))
    assert model.unused == set(extra)
    assert model.cast(model.values(model.unused), BF16)[extra[0]].dtype == F32


@pytest.mark.parametrize(
    ("config", "model_code", "trusted", "own"),
    [
        (A13B, "auto", True, False),
        (A13B, "remote", True, True),
        (A13B, "auto", False, False),
        (LARGE, "auto", True, True),
        (NEW, "auto", True, False),
        (OTHERS, "auto", True, True),
        (OTHERS, "native", True, False),
        (OTHERS, "auto", False, False),
    ],
)
def test_whose_code_runs(config, model_code, trusted, own, tmp_path):
    model = directory(tmp_path / "model", config, model_code=model_code, trusted=trusted)
    assert model.runs_own_code == own


def test_native_code_for_what_it_does_not_compute_is_refused(tmp_path):
    with pytest.raises(Refused, match="--model_code native: .* cross-layer attention"):
        _ = directory(tmp_path / "model", LARGE, model_code="native").runs_own_code


@pytest.mark.parametrize("given", [None, True, False])
def test_one_decision_a_directory(given):
    """M15: a tokenizer from a hub does not switch the local model's own code off."""
    args = SimpleNamespace(trust_remote_code=given, hub_ids={"/cache/tokenizer": "someone/tokenizer"})
    assert may_run_code(args, "/local/model") == (given is not False)
    assert may_run_code(args, "/cache/tokenizer") == (given is True)


def test_an_earlier_model_is_set_aside_whole(tmp_path, capsys):
    """M13: its code and its tokenizer would otherwise stand beside the new one."""
    out, config = tmp_path / "out", {"auto_map": {"AutoModelForCausalLM": "modeling_old.M"}}
    stays = ("log_1.txt", "notes.md", "mine.py", "runs/events", "loss.png")
    goes = ("modeling_old.py", "helper.py", "tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE")
    goes += ("model.safetensors", "checkpoint-3/config.json", "training_args.bin", "additional_chat_templates/a.jinja")
    for name in (*stays, *goes):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("from .helper import x" if name == "modeling_old.py" else "{}")
    (out / "config.json").write_text(json.dumps(config))
    set_aside(out, files_of_a_run(out))
    (earlier,) = out.glob("previous-*")
    assert all((out / name).exists() and not (earlier / name).exists() for name in stays)
    assert all((earlier / name).exists() and not (out / name).is_file() for name in (*goes, "config.json"))
    assert capsys.readouterr().out == ""
