"""What is saved is what the base is: its tensors' names, layout and fp32 tensors, the layers that the class does not
use, a config that other programs read; and it needs no base."""

import json
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

STAGES = {"none": None, "zero2": "ds_zero2_no_offload.json", "zero3": "ds_zero3_no_offload.json"}
MARKS = {"none": [], "zero2": [pytest.mark.needs_gxx], "zero3": [pytest.mark.needs_gxx]}
UNUSED = {"hy_v3": "model.layers.80.eh_proj.weight", "hy_v4": "model.mtp_layers.0.eh_proj.weight"}


@pytest.fixture
def train(example_rows, run_train, tmp_path):
    """`train(stage, out, *flags)`: three steps, a checkpoint at the second; returns (output directory, stdout)."""

    def run(stage, out, *flags):
        args = ["--train_data_file", example_rows, "--output_dir", tmp_path / out, "--max_steps", 3, "--save_steps", 2]
        args += ["--learning_rate", 1e-3, "--per_device_train_batch_size", 4, *flags]
        args += ["--deepspeed", STAGES[stage]] if STAGES[stage] else []
        done = run_train(args, launcher="python" if stage == "none" else "torchrun", nproc=1 if stage == "none" else 2)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / out, done.stdout

    return run


@pytest.fixture
def odd_base(make_model_dir, example_tokenizer_dir, tmp_path):
    """`odd_base(kind, fused)`: in bf16, a router and a correction bias in fp32 that bf16 cannot hold, and a tensor
    of a next-token-prediction layer. Returns (directory, its tensors)."""

    def make(kind, fused=False):
        base = make_model_dir(kind, example_tokenizer_dir, tmp_path / "base", dtype="bfloat16", fused=fused)
        state, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(0)
        for name in state:
            if name.endswith(("router.gate.weight", "mlp.gate.weight", "expert_bias", "e_score_correction_bias")):
                state[name] = torch.randn(state[name].shape, generator=generator) * 0.1
        state[UNUSED[kind]] = torch.randn(3, 5, generator=generator).half()  # a dtype of its own: as it is
        save_file(state, base / "model.safetensors", metadata={"format": "pt"})
        return base, state

    return make


CASES = [  # (kind, fused, stage, in every push)
    ("hy_v3", False, "none", True), ("hy_v3", True, "none", False), ("hy_v3", False, "zero2", False),
    ("hy_v3", True, "zero2", False), ("hy_v3", False, "zero3", False), ("hy_v3", True, "zero3", True),
    ("hy_v4", False, "none", False), ("hy_v4", False, "zero3", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fused", "stage"),
    [
        pytest.param(
            *case, marks=[pytest.mark.needs_gxx] * (case[2] != "none") + [pytest.mark.campaign] * (not always)
        )
        for *case, always in CASES
    ],
)
def test_the_tensors_are_the_bases(kind, fused, stage, odd_base, train):
    base, given = odd_base(kind, fused)
    out, stdout = train(stage, "out", "--model_name_or_path", base, "--bf16")
    assert "tensors copied = 1 (layers for next-token prediction" in stdout
    for directory in (out, out / "checkpoint-2"):
        saved = load_file(directory / "model.safetensors")
        assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in given.items()}
        masters = stage == "none" and directory != out
        for name, tensor in saved.items():
            if name == UNUSED[kind] or name.endswith(("expert_bias", "e_score_correction_bias")):
                assert tensor.dtype == given[name].dtype and torch.equal(tensor, given[name]), name
            elif given[name].dtype == torch.float32:  # the router: its own values, moved a little
                moved = (tensor - given[name]).abs().max()
                assert tensor.dtype == torch.float32 and 0 < moved < 0.01, name
                assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} was rounded"
            else:
                assert tensor.dtype == (torch.float32 if masters else torch.bfloat16), name
    if stage == "none":  # going on without the base: what was fp32 in it is still known
        again, _ = train(stage, "again", "--resume_from_checkpoint", out / "checkpoint-2", "--bf16")
        first, second = (load_file(directory / "model.safetensors") for directory in (out, again))
        assert all(
            torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
        )
        assert not (again / "kept_in_fp32.json").exists()
        # in the same directory, where the checkpoint is rotated away before the end
        more = ["--save_steps", 1, "--save_total_limit", 1, "--max_steps", 4, "--bf16"]
        train(stage, "out", "--resume_from_checkpoint", out / "checkpoint-2", *more)
        assert not (out / "checkpoint-2").exists()
        assert load_file(out / "model.safetensors").keys() == given.keys()


def test_an_fp32_base_keeps_the_correction_bias_in_fp32(model_dir, example_tokenizer_dir, train):
    out, _ = train("none", "out", "--model_name_or_path", model_dir("hy_v3", example_tokenizer_dir), "--bf16")
    dtypes = {name: tensor.dtype for name, tensor in load_file(out / "model.safetensors").items()}
    assert dtypes.pop("model.layers.1.mlp.expert_bias") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["hy_v3", "hy_v4"])
def test_a_missing_correction_bias_is_refused(kind, odd_base, example_rows, run_train, tmp_path):
    base, state = odd_base(kind)
    gone = next(name for name in state if name.endswith(("expert_bias", "e_score_correction_bias")))
    del state[gone]
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    args = ["--model_name_or_path", base, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_train(args)
    assert run.returncode == 2 and "1 weights are missing: " in run.stderr and "correction_bias" in run.stderr


def test_hy_v4_says_that_its_attention_is_eager(model_dir, example_tokenizer_dir, train):
    _, stdout = train("none", "out", "--model_name_or_path", model_dir("hy_v4", example_tokenizer_dir))
    assert "attention = eager (this class has no other)" in stdout


# --- by other programs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory):
    """The python of an environment with transformers 4.57 over this one's other packages."""
    folder = tmp_path_factory.mktemp("transformers") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", site], check=True, capture_output=True, text=True).stdout.strip()
    with open(f"{own}/parent.pth", "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    wanted = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2"]
    done = subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *wanted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


THEIRS = """
import sys, json, torch, transformers
assert transformers.__version__.startswith("4.57")
from transformers import AutoModelForCausalLM, AutoTokenizer
for directory in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    AutoTokenizer.from_pretrained(directory).apply_chat_template([{"role": "user", "content": "12"}])
    with torch.no_grad():
        torch.save(model.eval()(torch.arange(5, 45)[None]).logits, sys.argv[1] + directory.replace("/", "_"))
"""


@pytest.fixture
def published_base(make_model_dir, example_tokenizer_dir, tmp_path):
    """`published_base(kind)`: (directory, its config) with rope_scaling and alpha, which transformers 4 reads and
    rope_parameters not."""

    def make(kind):
        base = make_model_dir(kind, example_tokenizer_dir, tmp_path / "base")
        config = json.loads((base / "config.json").read_text())
        rope = {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}, "rope_theta": 10000.0}
        config = {key: value for key, value in config.items() if key != "rope_parameters"} | rope
        (base / "config.json").write_text(json.dumps(config))
        return base, config

    return make


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_config_is_the_bases(kind, published_base, train):
    base, config = published_base(kind)
    out, _ = train("none", "out", "--model_name_or_path", base)
    for directory in (out, out / "checkpoint-2"):
        assert json.loads((directory / "config.json").read_text()) == config


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_transformers_4_57_computes_the_same(kind, published_base, train, transformers_4, tmp_path):
    base, config = published_base(kind)
    out, _ = train("none", "out", "--model_name_or_path", base)
    shutil.rmtree(base)  # what is saved stands alone
    assert json.loads((out / "config.json").read_text()) == config
    directories = [str(out), str(out / "checkpoint-2")]
    subprocess.run(
        [transformers_4, "-c", THEIRS, f"{tmp_path}/", *directories], check=True, env={"HF_HUB_OFFLINE": "1"}
    )
    for directory in directories:
        model = AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            ours = model.eval()(torch.arange(5, 45)[None]).logits
        theirs = torch.load(f"{tmp_path}/" + directory.replace("/", "_"))
        print(f"{kind}: largest difference {(ours - theirs).abs().max():.1e}")
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_an_adapters_checkpoint_is_loaded_from_another_directory(
    make_model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path, monkeypatch
):
    """Trained with a relative path to the base."""
    make_model_dir("moe", example_tokenizer_dir, tmp_path / "base")
    args = ["--model_name_or_path", "base", "--train_data_file", example_rows, "--output_dir", "out", "--use_lora"]
    run = run_train([*args, "--max_steps", 2, "--save_steps", 2], cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for adapter in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(tmp_path / "base")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), adapter)
        assert any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
        assert AutoTokenizer.from_pretrained(adapter).chat_template
