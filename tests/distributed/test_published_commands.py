"""Command lines of the guides published with the models, as they stand: they start and train, here on a CPU."""

import json

import pytest

LORA = (
    "--do_train --model_name_or_path M --tokenizer_name_or_path T --train_data_file D "
    "--deepspeed S --output_dir O --overwrite_output_dir --per_device_train_batch_size 1 "
    "--gradient_accumulation_steps 1 "
    "--gradient_checkpointing --lr_scheduler_type cosine_with_min_lr --logging_steps 1 --max_steps 4 --save_steps 2 "
    "--learning_rate 1e-5 --min_lr 1e-6 --warmup_ratio 0.01 --save_strategy steps --save_safetensors False --use_lora "
    "--lora_rank 64 --lora_alpha 128 --lora_dropout 0.1 --hidden_size 6400 --intermediate_size 18304 "
    "--model_max_length 4096 --max_seq_length 4096 --moe_topk 1 --num_experts 2 --num_attention_heads 80 "
    "--num_key_value_heads 8 --num_layers 4 --cla_share_factor 2 --use_cla --use_mixed_mlp_moe --num_shared_expert 1 "
    "--use_qk_norm --bf16"
)
FULL = (
    "--do_train --model_name_or_path M --tokenizer_name_or_path T --train_data_file D "
    "--deepspeed S --output_dir O --overwrite_output_dir --per_device_train_batch_size 1 "
    "--gradient_accumulation_steps 1 "
    "--gradient_checkpointing --lr_scheduler_type cosine_with_min_lr --logging_steps 1 --max_steps 4 --save_steps 2 "
    "--learning_rate 1e-5 --min_lr 1e-6 --warmup_ratio 0.01 --save_strategy steps --save_safetensors True "
    "--model_max_length 4096 --max_seq_length 4096 --bf16 --model_size 7B"
)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
ZERO3 = {"stage": 3, "stage3_max_reuse_distance": "auto", "stage3_gather_16bit_weights_on_model_save": False}
FILES = {  # what of them today's DeepSpeed would not take
    "hy3.json": {"zero_optimization": ZERO3 | OFFLOAD},
    "zero2.json": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": "auto", "min_loss_scale": 1e-10}},
}
FOLDERS = {  # of the four: flags, class, DeepSpeed file
    "large": (LORA, "moe", "ds_zero3_offload_no_auto.json"),
    "a13b": (FULL, "moe", "ds_zero3_offload_no_auto.json"),
    "dense": (FULL, "dense", "zero2.json"),
    "hy3": (FULL, "hy_v3", "hy3.json"),
}
GUARD = {("large", "deepspeed"), ("hy3", "torchrun")}
TABLE = [
    pytest.param(name, launcher, marks=[] if (name, launcher) in GUARD else [pytest.mark.campaign])
    for name in FOLDERS
    for launcher in ("deepspeed", "torchrun", "python")
]


@pytest.mark.needs_gxx
@pytest.mark.parametrize(("name", "launcher"), TABLE)
def test_starts_and_trains_as_it_stands(
    name, launcher, model_dir, example_tokenizer_dir, example_rows, run_train, losses, tmp_path
):
    flags, kind, file = FOLDERS[name]
    if file in FILES:
        auto = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
        (tmp_path / file).write_text(json.dumps(FILES[file] | auto | {"bf16": {"enabled": "auto"}}))
        file = tmp_path / file
    places = {"M": model_dir(kind, example_tokenizer_dir, dtype="bfloat16"), "T": example_tokenizer_dir, "S": file}
    places |= {"D": example_rows, "O": tmp_path / "out"}
    args = [str(places.get(word, word)) for word in flags.split()]
    run = run_train(args, launcher=launcher, nproc=1 if launcher == "python" else 2, cold=True)
    assert run.returncode == 0, run.stderr[-3000:]
    said = losses(tmp_path / "out")
    assert len(said) == 4 and all(0 < loss < 10 for loss in said)
    assert {p.name for p in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert (tmp_path / "out" / "checkpoint-4" / "latest").is_file(), (
        "DeepSpeed was not switched off by what came before"
    )
    weights = "adapter_model.safetensors" if flags is LORA else "model.safetensors"
    assert (tmp_path / "out" / weights).is_file()
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["world_size"] == (1 if launcher == "python" else 2)
    if flags is LORA:  # of a given model the architecture flags say nothing, and that is said once
        assert run.stdout.count("ignored: --hidden_size") == 1
        assert run.stdout.count("--save_safetensors: no effect") == 1
    else:
        assert run.stdout.count("--model_size: no effect") == 1
