"""What differs on an NVIDIA GPU: the device and its memory, half precision, attention, DeepSpeed, the defaults of
train.sh, chat."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import TRAIN, run_command, run_script

pytestmark = pytest.mark.needs_gpu
STAGES = ["ds_zero2_no_offload.json", "ds_zero3_no_offload.json", "ds_zero3_offload.json"]
STEPS = 4


@pytest.fixture(scope="module")
def one_gpu():
    """The variables of a run on the first GPU alone."""
    return {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.fixture
def train(model_dir, example_tokenizer_dir, example_rows, run_train, losses, one_gpu, tmp_path):
    """`train(kind, *flags)`: four steps; returns (losses, figures, output directory, stdout)."""

    def run(kind, *flags, dtype="float32", env=None):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        args = ["--model_name_or_path", model_dir(kind, example_tokenizer_dir, dtype=dtype)]
        args += ["--train_data_file", example_rows, "--output_dir", out, "--max_steps", STEPS, "--logging_steps", 1]
        args += ["--learning_rate", 1e-3, "--per_device_train_batch_size", 4, "--save_strategy", "no", *flags]
        done = run_train(args, env=env or one_gpu)
        assert done.returncode == 0, done.stderr[-3000:]
        return losses(out), json.loads((out / "train_results.json").read_text()), out, done.stdout

    return run


@pytest.fixture
def on_the_cpu(train):
    """`on_the_cpu(kind)`: the losses of the same steps in fp32, without the GPU."""
    return lambda kind: train(kind, "--use_cpu")[0]


@pytest.mark.parametrize("kind", ["dense", "moe", "hy_v3", "hy_v4", "remote"])
def test_fp32_is_that_of_the_cpu(kind, train, on_the_cpu):
    ours, figures, out, _ = train(kind)
    assert ours == pytest.approx(on_the_cpu(kind), abs=1e-3)
    assert figures["mfu"] is None and 0 < figures["peak_memory_bytes"] < torch.cuda.mem_get_info()[1]
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(("flag", "dtype"), [("--bf16", torch.bfloat16), ("--fp16", torch.float16)])
@pytest.mark.parametrize("packing", ["none", "batch", "bin"])
def test_half_precision(flag, dtype, packing, train):
    ours, _, out, _ = train("moe", flag, "--packing", packing, "--gradient_checkpointing")
    assert ours == pytest.approx(train("moe", "--use_cpu", "--packing", packing)[0], abs=0.05)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lora", [[], ["--use_lora"]], ids=["full", "lora"])
def test_deepspeed(stage, lora, train):
    """The offload compiles an extension for the GPU's toolkit where it is used for the first time."""
    ours, figures, _, _ = train("moe", "--bf16", "--deepspeed", stage, *lora)
    assert ours == pytest.approx(train("moe", "--use_cpu", *lora)[0], abs=0.05)
    assert figures["world_size"] == 1 and figures["peak_memory_bytes"] > 0


def test_activation_offload(train):
    recomputed, figures, _, _ = train("moe", "--gradient_checkpointing")
    ours, less, _, _ = train("moe", "--gradient_checkpointing", "--activation_offload")
    assert ours == pytest.approx(recomputed, abs=1e-6)
    assert less["peak_memory_bytes"] <= figures["peak_memory_bytes"]


def test_a_frozen_base_stays_in_half_precision(train):
    stdout = train("moe", "--bf16", "--use_lora", dtype="bfloat16")[3]
    assert "dtype of the weights = auto" in stdout


def test_flash_attention(train, on_the_cpu):
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("no flash_attn: pip install --no-build-isolation -r requirements-flash-attn.txt")
    ours = train("dense", "--bf16", "--use_flash_attn", "--packing", "batch")[0]
    assert ours == pytest.approx(train("dense", "--use_cpu", "--packing", "batch")[0], abs=0.05)


def test_hidden_it_is_not_used(train, on_the_cpu):
    ours, _, _, stdout = train("dense", env={"CUDA_VISIBLE_DEVICES": ""})
    assert "device = cpu (no NVIDIA device visible: CUDA_VISIBLE_DEVICES is empty)" in stdout
    assert ours == pytest.approx(on_the_cpu("dense"), abs=1e-6)


def test_the_defaults_of_train_sh(model_dir, example_tokenizer_dir, example_rows, one_gpu, tmp_path):
    """bf16 and ZeRO-3, with a process a GPU."""
    env = one_gpu | {"MODEL_PATH": str(model_dir("moe", example_tokenizer_dir)), "OUTPUT_DIR": str(tmp_path / "out")}
    env |= {"TRAIN_DATA_FILE": str(example_rows)}
    run = run_command(["bash", str(TRAIN / "train.sh"), "--max_steps", "2"], env=env)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "DS_CONFIG = ds_zero3_no_offload.json (the default on GPUs)" in run.stdout
    assert "HOST_GPU_NUM = 1 (the GPUs of this machine)" in run.stdout
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_chat_answers_from_the_gpu(model_dir, example_tokenizer_dir, one_gpu):
    model = model_dir("moe", example_tokenizer_dir, dtype="bfloat16")
    run = run_script("chat.py", [model, "--prompt", "12", "--max_new_tokens", 4], env=one_gpu)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "device = cuda:0 (GPU)" in run.stderr


def test_what_a_gpu_has_trained_goes_on(train, tmp_path, run_train, example_rows, losses, one_gpu):
    first, _, out, _ = train("moe", "--bf16", "--save_strategy", "steps", "--save_steps", 2)
    args = ["--resume_from_checkpoint", out / "checkpoint-2", "--train_data_file", example_rows]
    run = run_train([*args, "--output_dir", tmp_path / "again"], env=one_gpu)
    assert run.returncode == 0, run.stderr[-3000:]
    assert losses(tmp_path / "again") == pytest.approx(first, abs=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: ranks that meet over NCCL need two")
@pytest.mark.parametrize("stage", [None, *STAGES[:2]])
def test_two_ranks_over_nccl(stage, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path):
    args = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir), "--train_data_file", example_rows]
    args += ["--max_steps", STEPS, "--logging_steps", 1, "--learning_rate", 1e-3, "--save_strategy", "no"]
    flags = ["--deepspeed", stage] if stage else []
    two = [*args, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", 2, "--bf16", *flags]
    run = run_train(two, launcher="torchrun", nproc=2)
    assert run.returncode == 0, run.stderr[-3000:]
    one = [*args, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 4, "--use_cpu"]
    assert run_train(one).returncode == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=0.05)
