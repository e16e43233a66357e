"""What the flags' values may be, what older flags mean today, and the three dataclasses of them.

Refused here (exit code 2): a value outside its range, flags that contradict each other, evaluation without rows.
"""

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from sft.arguments import DataArguments, ModelArguments, TrainingArguments
from sft.messages import Refused, choice, note

FROM_0 = """learning_rate min_lr warmup_steps weight_decay seed data_seed router_aux_loss_coef early_stopping_patience
    max_grad_norm dataloader_num_workers save_total_limit"""
FROM_1 = """hidden_size num_layers num_attention_heads num_key_value_heads intermediate_size num_experts moe_topk
    model_max_length max_position_embeddings vocab_size lora_rank lora_alpha preprocessing_num_workers
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps dataloader_prefetch_factor"""
# Flags, the rule for their numbers, and whether it holds; none allows NaN.
RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    (FROM_0, "must be at least 0", lambda n: 0 <= n < math.inf),
    (FROM_1, "must be at least 1", lambda n: 1 <= n < math.inf),
    ("max_seq_length", "must be at least 2", lambda n: n >= 2),
    ("num_train_epochs save_steps eval_steps logging_steps", "must be above 0", lambda n: 0 < n < math.inf),
    ("lora_dropout warmup_ratio label_smoothing_factor", "must be at least 0 and below 1", lambda n: 0 <= n < 1),
    ("eval_split", "must be above 0 and below 1", lambda n: 0 < n < 1),
    ("seed data_seed", "must be below 2^32", lambda n: n < 1 << 32),
    ("max_steps", "must be at least 1, or -1 for --num_train_epochs", lambda n: n == -1 or n > 0),
)


def check_values(values: dict[str, Any]) -> None:
    """Refuse, of all flags' values, what is out of its range and what contradicts another one."""
    if values["output_dir"] is None:
        raise Refused("--output_dir is not given: say where the run's files go")
    for names, rule, holds in RANGES:
        for name in names.split():
            if values[name] is not None and not holds(values[name]):  # None: not given
                raise Refused(f"--{name} {values[name]}: {rule}")
    if values["min_lr"] > values["learning_rate"]:
        raise Refused(f"--min_lr {values['min_lr']:g} is above --learning_rate {values['learning_rate']:g}")
    if values["eval_split"] is not None and values["eval_data_file"]:
        raise Refused("--eval_split and --eval_data_file: one of them")
    if values["enable_jit_checkpoint"]:
        raise Refused("--enable_jit_checkpoint: leave it out: every run saves a checkpoint at SIGTERM, on all ranks")
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if values[name]:
            raise Refused(f"--{name}: leave it out: evaluation is part of the training, and computes as it does")
    grouping = ("group_by_length", "batch_rebalance")
    by_length = values["group_by_length"] or values["train_sampling_strategy"] in grouping
    if values["packing"] == "bin" and by_length:
        flag = "--group_by_length" if values["group_by_length"] else "--train_sampling_strategy"
        raise Refused(f"{flag} with --packing bin: bins are equally full, there is nothing to group")
    if values["trainable_params"] is not None:
        if values["use_lora"] or values["train_attention_params_only"]:
            raise Refused("--trainable_params: not beside --use_lora or --train_attention_params_only")
        try:
            re.compile(values["trainable_params"])
        except re.error as error:
            raise Refused(f"--trainable_params {values['trainable_params']}: {error}") from error


def choose_evaluation(values: dict[str, Any]) -> None:
    """With rows to evaluate on, evaluate when a checkpoint is saved, unless told otherwise; refuse what needs such
    rows where there are none."""
    if values["per_device_eval_batch_size"] is None:
        values["per_device_eval_batch_size"] = values["per_device_train_batch_size"]
    saving = str(values["save_strategy"])
    rows = values["eval_data_file"] or values["eval_split"] is not None
    needing = {"eval_strategy": values["eval_strategy"] not in (None, "no"), "save_strategy": saving == "best"}
    needing["lr_scheduler_type"] = values["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy")
    named = ("early_stopping_patience", "load_best_model_at_end", "eval_on_start", "do_eval")
    needing |= {name: bool(values[name]) for name in named}
    if not rows and (name := next((name for name, needs in needing.items() if needs), None)):
        raise Refused(f"--{name}: there are no rows to evaluate on: --eval_data_file or --eval_split")
    if values["early_stopping_patience"] and values["eval_strategy"] == "no":
        raise Refused("--early_stopping_patience: nothing is evaluated with --eval_strategy no")
    if any(needing.values()) and values["metric_for_best_model"] is None:
        values["metric_for_best_model"] = "loss"
    if values["metric_for_best_model"] not in (None, "loss", "eval_loss"):
        raise Refused(f"--metric_for_best_model {values['metric_for_best_model']}: the loss is what is measured")
    if values["eval_strategy"] is None:
        values["eval_strategy"] = "no"
        if rows:
            values["eval_strategy"] = saving if saving in ("steps", "epoch") else "epoch"
            choice("eval_strategy", values["eval_strategy"], "there are rows to evaluate on")
    if values["eval_strategy"] == "steps" and values["eval_steps"] is None:
        values["eval_steps"] = values["save_steps"]
        choice("eval_steps", f"{values['eval_steps']:g}", "as save_steps")


def use_todays_names(values: dict[str, Any]) -> None:
    """Let flags that transformers 5 renamed or dropped do what they did."""
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if new not in values:  # transformers 5.17 knows the old name alone
            continue
        if values[new] is None:
            values[new] = values[old]
        values[old] = None
    if values["warmup_ratio"] is not None:
        if values["warmup_steps"] in (0, values["warmup_ratio"]):
            values["warmup_steps"] = values["warmup_ratio"]
        else:
            note("--warmup_ratio has no effect: --warmup_steps is given")
    if values["group_by_length"]:
        values["train_sampling_strategy"] = "group_by_length"
    if values["logging_dir"] is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = values["logging_dir"]
    seen = str(values["include_num_input_tokens_seen"]).lower()
    values["include_num_input_tokens_seen"] = {"true": "all", "false": "no"}.get(seen, seen)
    if isinstance(values["liger_kernel_config"], str):
        values["liger_kernel_config"] = json.loads(values["liger_kernel_config"])


def build(values: dict[str, Any]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The three dataclasses, of all flags' values; refuses what only they show together."""

    if values["load_in_4bit"]:
        check_4_bits(values)

    def of(cls: Any) -> dict[str, Any]:
        return {f.name: values[f.name] for f in fields(cls) if f.init}

    model, data = ModelArguments(**of(ModelArguments)), DataArguments(**of(DataArguments))
    training = TrainingArguments(**of(TrainingArguments))
    # transformers 5.17 has the old names alone
    recomputes = getattr(training, "activation_checkpointing", training.gradient_checkpointing)
    kwargs = getattr(training, "activation_checkpointing_kwargs", training.gradient_checkpointing_kwargs) or {}
    if model.router_aux_loss_coef and recomputes and kwargs.get("use_reentrant"):
        raise Refused("--router_aux_loss_coef: gets no gradient with use_reentrant in --gradient_checkpointing_kwargs")
    return model, data, training


def check_4_bits(values: dict[str, Any]) -> None:
    """Refuse --load_in_4bit where it cannot run, or would be more than a frozen base."""
    if not values["use_lora"]:
        raise Refused("--load_in_4bit: weights in 4 bits cannot be trained: add --use_lora")
    for other in ("deepspeed", "fsdp"):
        if values[other]:
            raise Refused(
                f"--load_in_4bit with --{other}: packed weights cannot be divided among processes, each holds the "
                f"whole model. Leave --{other} out (DS_CONFIG=none of train.sh)"
            )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Refused("--load_in_4bit: bitsandbytes is not installed: pip install -r requirements-4bit.txt")
