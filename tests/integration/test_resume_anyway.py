"""Every argument that decides what is computed, given otherwise on resume: refused with both values, or, with
--resume_anyway, said and used. None is ignored."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from sft.training.fields import BY_CONTENT, DECIDES, FIXED

# Another value of each; the run's are in `first`, else the defaults.
OTHER = {
    "max_seq_length": 48, "eval_split": 0.2, "train_on": "last", "overlong": "drop", "bad_rows": "skip",
    "history": "answers", "packing": "none", "use_flash_attn": True, "load_in_4bit": True,
    "router_aux_loss_coef": 0.5, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1, "average_tokens_across_devices": False, "learning_rate": 3e-3, "min_lr": 5e-4,
    "lr_scheduler_type": "linear", "lr_scheduler_kwargs": '{"num_cycles": 0.3}', "warmup_steps": 2,
    "warmup_ratio": 0.5, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3,
    "max_grad_norm": 0.01, "label_smoothing_factor": 0.2, "neftune_noise_alpha": 5, "tf32": "true",
    "torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default",
    "use_liger_kernel": True, "liger_kernel_config": '{"rope": true}', "use_cache": True, "full_determinism": True,
    "seed": 3, "data_seed": 3, "ignore_data_skip": True, "dataloader_drop_last": True, "dataloader_in_order": False,
    "train_sampling_strategy": "sequential", "group_by_length": True,
    "model_code": "native", "use_cla": True, "cla_share_factor": 2, "hidden_size": 64, "num_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 99, "max_position_embeddings": 99,
    "model_max_length": 99, "vocab_size": 999, "tie_word_embeddings": False, "use_qk_norm": True, "num_experts": 8,
    "moe_topk": 2, "num_shared_expert": 1, "use_mixed_mlp_moe": True, "moe_intermediate_size": 9,
    "moe_layer_num_skipped": 1, "use_lora": True, "lora_rank": 8, "lora_alpha": 8, "lora_dropout": 0.1,
    "lora_target_modules": "q_proj", "use_rslora": True, "use_dora": True, "trainable_params": "mlp",
    "train_attention_params_only": True, "optim": "sgd", "optim_args": "a=1", "optim_target_modules": "mlp",
    "bf16": True, "fp16": True, "deepspeed": "ds_zero2_no_offload.json", "fsdp": "full_shard", "fsdp_config": "{}",
    "parallelism_config": "{}", "accelerator_config": '{"split_batches": true}', "auto_find_batch_size": True,
}  # fmt: skip
NOT_FLAGS = {"parallelism_config"}  # no text is one
# refused with --resume_anyway too: this machine cannot do it, or a run without adapter
NOT_HERE = {"use_flash_attn", "tf32", "use_liger_kernel", "load_in_4bit"}
NOT_TRIED = {"liger_kernel_config", *NOT_FLAGS}  # has no effect alone
# What the weights after two more steps cannot show.
NOT_SEEN = {"overlong", "bad_rows", "average_tokens_across_devices", "use_cache"}
NOT_SEEN |= {"full_determinism", "dataloader_drop_last", "dataloader_in_order", "torch_compile_backend", "train_on"}
NOT_SEEN |= {"history"}
QUICK = ("learning_rate", "weight_decay", "packing", "seed", "lora_rank", "bf16")


@pytest.fixture(scope="module")
def first(model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path_factory):
    """(output directory of 5 steps with checkpoint-3, arguments that go on from it)."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_bytes(b"".join(example_rows.read_bytes().splitlines(True)[:60]))
    out = tmp_path_factory.mktemp("first") / "out"
    flags = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir), "--train_data_file", rows]
    flags += ["--max_steps", 5, "--save_steps", 3, "--learning_rate", 1e-3, "--min_lr", 1e-4, "--report_to", "none"]
    flags += ["--lr_scheduler_type", "cosine", "--per_device_train_batch_size", 2, "--weight_decay", 0.1]
    flags += ["--gradient_accumulation_steps", 2, "--max_seq_length", 64, "--packing", "batch"]
    run = run_train([*flags, "--output_dir", out])
    assert run.returncode == 0, run.stderr[-3000:]
    return out, ["--resume_from_checkpoint", out / "checkpoint-3"]


def test_each_is_given_otherwise_here():
    assert {*OTHER, *BY_CONTENT} == set(DECIDES)


def flag(name):
    return [f"--{name}"] if OTHER[name] is True else [f"--{name}", OTHER[name]]


@pytest.mark.parametrize("name", OTHER)
def test_another_value_is_refused(name, first, run_here, tmp_path):
    """With --resume_anyway as well, where the checkpoint does not fit it."""
    args = [*first[1], "--output_dir", tmp_path / "out", *flag(name)]
    run = run_here("train.py", args)
    assert run.returncode == 2 and f"--{name}" in run.stderr, run.stderr
    assert "(the run: " in run.stderr or name in NOT_FLAGS, run.stderr
    assert ("--resume_anyway" in run.stderr) == (name not in FIXED) or name in NOT_FLAGS
    if name in FIXED:
        run = run_here("train.py", [*args, "--resume_anyway"])
        assert run.returncode == 2 and f"--{name}" in run.stderr, run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.campaign)
        for name in OTHER
        if name not in {*FIXED, *NOT_TRIED}
    ],
)
def test_goes_on_anyway_with_the_given_value(name, first, run_train, tmp_path):
    run = run_train([*first[1], "--output_dir", tmp_path, "--resume_anyway", *flag(name)])
    if name in NOT_HERE:
        assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr[-2000:]
        return
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"--resume_anyway: not exact, these differ from the run: --{name} " in run.stdout
    one, two = (load_file(out / "model.safetensors") for out in (first[0], tmp_path))
    same = all(torch.equal(one[key], two[key]) for key in one)
    assert not same or name in NOT_SEEN


@pytest.mark.parametrize("name", BY_CONTENT)
def test_other_content(
    name, first, make_model_dir, example_tokenizer_dir, example_rows, run_here, run_train, tmp_path
):
    """Rows, base, tokenizer: by what they hold, wherever they lie."""
    if name == "train_data_file":
        other = tmp_path / "rows.jsonl"
        other.write_bytes(b"".join(example_rows.read_bytes().splitlines(True)[1:61]))
    elif name == "model_name_or_path":
        other = make_model_dir("moe", example_tokenizer_dir, tmp_path / "twin", seed=5)
    else:
        other = shutil.copytree(example_tokenizer_dir, tmp_path / "tokenizer")
        (other / "chat_template.jinja").write_text("!" + (other / "chat_template.jinja").read_text())
    args = [*first[1], "--output_dir", tmp_path / "out", f"--{name}", other]
    run = run_here("train.py", args)
    assert run.returncode == 2 and f"--{name}" in run.stderr + f"--{name}" * (name != "train_data_file"), run.stderr
    assert "the run" in run.stderr and not (tmp_path / "out").exists()
    run = run_train([*args, "--resume_anyway"])
    assert run.returncode == 0 and "--resume_anyway: not exact" in run.stdout, run.stderr[-2000:]


def test_state_that_is_missing(first, run_train, tmp_path):
    """Named, and with --resume_anyway begun afresh."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        checkpoint = shutil.copytree(first[0] / "checkpoint-3", tmp_path / name / "checkpoint-3")
        (checkpoint / name).unlink()
        args = ["--resume_from_checkpoint", checkpoint, "--output_dir", tmp_path / name / "out"]
        run = run_train(args)
        assert run.returncode == 2 and f"{name}" in run.stderr and "missing" in run.stderr, run.stderr
        run = run_train([*args, "--resume_anyway"])
        assert run.returncode == 0 and f"{name} is missing: begun afresh" in run.stdout, run.stderr[-2000:]
