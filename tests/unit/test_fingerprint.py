"""What tells one base from another: the same for any dtype, layout and place, another for any other weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_model_dir
from sft.messages import Refused
from sft.model.adapter_base import check_base, fingerprint, is_same_tensor
from sft.model.directory import ModelDirectory
from sft.model.pretrained import load_pretrained
from tiny import fuse_experts

CASES = [("dense", "native"), ("moe", "native"), ("hy_v3", "native"), ("remote", "native"), ("remote", "remote")]
CASES += [pytest.param("hy_v4", "native", marks=pytest.mark.campaign)]
UNUSED = {"hy_v3": "model.layers.80.eh_proj.weight", "hy_v4": "model.mtp_layers.0.eh_proj.weight"}


def rewrite(directory, change):
    """The one weight file of a directory, after `change` on its tensors."""
    state = load_file(directory / "model.safetensors")
    save_file(change(state) or state, directory / "model.safetensors", metadata={"format": "pt"})


def split(directory):
    """The tensors in four files, in no order, as a hub has them."""
    state, places = load_file(directory / "model.safetensors"), {}
    for number in range(4):
        names = sorted(state)[number::4]
        save_file({name: state[name] for name in names}, directory / f"part-{number}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(names, f"part-{number}.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def add_what_no_class_has(directory):
    """A tied head, rotary frequencies, and for Hy3 and Hy4 a next-token-prediction layer."""
    extra = {"lm_head.weight": torch.ones(3, 3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    if kind := next((kind for kind in UNUSED if kind in (directory / "config.json").read_text()), None):
        extra[UNUSED[kind]] = torch.ones(3, 3)
    rewrite(directory, lambda state: state | extra)


def cast(dtype):
    return lambda directory: rewrite(directory, lambda state: {name: t.to(dtype) for name, t in state.items()})


SAME = {
    "elsewhere": lambda directory: None,
    "bf16": cast(torch.bfloat16),
    "fp16": cast(torch.float16),
    "fused experts": fuse_experts,
    "in four files": split,
    "tensors that the class lacks": add_what_no_class_has,
    "fused, bf16, in four files": lambda directory: (
        fuse_experts(directory),
        SAME["bf16"](directory),
        split(directory),
    ),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory, example_tokenizer_dir):
    """`base_of(kind)`: a base in fp32 with values of its own in every tensor. Do not write into it."""
    made = {}

    def spread(state):
        generator = torch.Generator().manual_seed(5)
        return {name: t + torch.randn(t.shape, generator=generator) * 0.02 for name, t in state.items()}

    def get(kind):
        if kind not in made:
            made[kind] = make_model_dir(kind, example_tokenizer_dir, tmp_path_factory.mktemp("base") / kind)
            rewrite(made[kind], spread)
        return made[kind]

    return get


def record(folder, base, code):
    """An adapter's directory of which only base.json is there."""
    content = {
        "path": "/trained/here",
        "class": "AnyClass",
        "code": code,
        "tensors": fingerprint(ModelDirectory(base), code),
    }
    folder.mkdir(exist_ok=True)
    (folder / "base.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("kind", "code"), CASES)
def test_it_is_what_the_loaded_class_holds(kind, code, base_of):
    """The files' way and the model's give the same names, shapes and values."""
    base = base_of(kind)
    model = load_pretrained(ModelDirectory(base, model_code=code), dtype=torch.float32)
    expected = {
        name: ["F32", list(t.shape), t.flatten()[:32].bfloat16().tolist()]
        for name, t in model.state_dict().items()
        if name != "lm_head.weight" and not any(f".experts.{number}." in name for number in (1, 2, 3))
    }
    assert fingerprint(ModelDirectory(base), code) == expected and len(expected) > 20


@pytest.mark.parametrize(
    ("kind", "code", "change"),
    [
        pytest.param(kind, code, change, marks=[pytest.mark.campaign] * (kind == "hy_v4"))
        for kind, code in [*CASES[:-1], ("hy_v4", "native")]
        for change in SAME
        if "fused" not in change or (kind in ("moe", "hy_v3", "remote") and code == "native")
    ],
)
def test_the_same_base(kind, code, change, base_of, tmp_path, capsys):
    adapter = record(tmp_path / "adapter", base_of(kind), code)
    other = shutil.copytree(base_of(kind), tmp_path / "other")
    SAME[change](other)
    for one, base in ((adapter, other), (record(tmp_path / "back", other, code), base_of(kind))):
        base = ModelDirectory(base)
        check_base(one, base, any_base=False)
        assert base.model_code == code and capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "code"), CASES)
def test_one_tensor_changed_is_another_base(kind, code, dtype, base_of, tmp_path):
    """Any one of them, in its first or 32nd value, by one step of bf16; in fp16 by more than rounding may do."""
    other = shutil.copytree(base_of(kind), tmp_path / "other")
    cast(dtype)(other)
    adapter, given = record(tmp_path / "adapter", other, code), load_file(other / "model.safetensors")
    names = fingerprint(ModelDirectory(other), code)
    for number, name in enumerate(given):
        if ".experts." in name and (".experts.0." not in name or "up_proj" in name):
            continue  # the first expert's gate stands for the layer
        changed = given[name].clone()
        place = min(number % 2 * 31, changed.numel() - 1)
        value = changed.view(-1)[place].clone()
        step = (value.bfloat16().view(torch.int16) + 1).view(torch.bfloat16)
        changed.view(-1)[place] = value + 0.5 if dtype == torch.float16 else step
        save_file(given | {name: changed}, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(Refused, match="is not the base that it was trained on") as refusal:
            check_base(adapter, ModelDirectory(other), any_base=False)
        assert f"/trained/here): 1 of {len(names)} tensors differ (" in str(refusal.value), name
        assert "--any_base" in str(refusal.value) and str(other) in str(refusal.value)


def test_another_seed_shape_or_class(base_of, example_tokenizer_dir, tmp_path, capsys):
    adapter = record(tmp_path / "adapter", base_of("moe"), "native")
    make_model_dir("moe", example_tokenizer_dir, tmp_path / "seed", seed=1)
    make_model_dir("moe", example_tokenizer_dir, tmp_path / "shape", num_hidden_layers=1)
    shutil.copytree(base_of("moe"), tmp_path / "class")
    config = json.loads((tmp_path / "class" / "config.json").read_text())
    (tmp_path / "class" / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    for other, why in (
        (tmp_path / "seed", "of 30 tensors differ (model."),
        (tmp_path / "shape", "of 30 tensors differ (model."),
        (base_of("dense"), "of 30 tensors differ (model."),
        (tmp_path / "class", "it is no AnyClass ("),
    ):
        with pytest.raises(Refused, match="is not the base that it was trained on") as refusal:
            check_base(adapter, ModelDirectory(other), any_base=False)
        assert why in str(refusal.value)
        capsys.readouterr()
        check_base(adapter, ModelDirectory(other), any_base=True)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1 and said[0].startswith("--any_base: ") and why in said[0]


def test_rounding_by_way_of_fp16_is_no_difference_and_more_is():
    """Over all magnitudes that fp16 holds, its subnormal numbers included."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator) * 10 ** torch.empty(100_000).uniform_(
        -9, 4, generator=generator
    )

    def entry(dtype, tensor):
        return [dtype, [len(tensor)], tensor.bfloat16().tolist()]

    half = values.half()
    assert half.bfloat16().ne(values.bfloat16()).any()
    assert is_same_tensor(entry("F32", values), entry("F16", half)) and is_same_tensor(
        entry("F16", half), entry("BF16", half)
    )
    assert not is_same_tensor(entry("F32", values), entry("F32", half))
    normal = values[(values.abs() > 1e-3) & (values.abs() < 1e4)].bfloat16()
    steps = (normal.view(torch.int16) + 3).view(torch.bfloat16)
    for number in range(100):
        one, other = normal[number : number + 1], steps[number : number + 1]
        assert not is_same_tensor(entry("F16", one), entry("F16", other))
        assert not is_same_tensor(entry("F32", one), entry("BF16", (one.view(torch.int16) + 1).view(torch.bfloat16)))


def test_a_base_in_other_files_cannot_be_compared(base_of, tmp_path, capsys):
    old = shutil.copytree(base_of("dense"), tmp_path / "old")
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    assert fingerprint(ModelDirectory(old), "native") == {}
    for adapter, base in (
        (record(tmp_path / "one", base_of("dense"), "native"), old),
        (record(tmp_path / "two", old, "native"), base_of("dense")),
    ):
        check_base(adapter, ModelDirectory(base), any_base=False)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "could not be compared" in said and str(base) in said


@pytest.mark.parametrize(
    "content",
    ['{"code": "nat', '{"code": "native", "tensors": [1]}', '{"code": "native", "tensors": {"model.norm.weight": 5}}']
    + [json.dumps({"code": "native", "tensors": {"model.norm.weight": ["F32", [64], ["x"]]}})],
)
def test_a_damaged_base_json_is_refused(content, base_of, tmp_path):
    (tmp_path / "base.json").write_text(content)
    with pytest.raises(Refused, match=str(tmp_path)):
        check_base(tmp_path, ModelDirectory(base_of("dense")), any_base=False)


def test_without_base_json_the_name_is_compared(tmp_path, capsys, monkeypatch):
    """A path that is here must be the same directory; one that is not here, or a hub id, may have moved."""
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub" / "models--tencent--Hunyuan-7B" / "snapshots" / "abc"
    for directory in (tmp_path / "a" / "Hunyuan-7B", tmp_path / "b" / "Hunyuan-7B", snapshot, tmp_path / "adapter"):
        directory.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "Hunyuan-7B")
    here = tmp_path / "a" / "Hunyuan-7B"
    for named, base, warned in (
        (str(here), here, False),
        ("link", here, False),
        (str(here), tmp_path / "link", False),
        ("/gone/Hunyuan-7B", here, False),
        ("tencent/Hunyuan-7B", here, False),
        ("tencent/Hunyuan-7B", snapshot, False),
        (None, here, False),
        (str(tmp_path / "b" / "Hunyuan-7B"), here, True),
        ("/gone/Hunyuan-7B-Pretrain", here, True),
        ("tencent/Hunyuan-7B-Pretrain", snapshot, True),
    ):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
        check_base(tmp_path / "adapter", ModelDirectory(base), any_base=False)
        said = capsys.readouterr().out
        assert said.count("\n") == warned and (not warned or said.startswith("warning: ") and named in said), named
