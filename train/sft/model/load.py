"""A model ready to train: loaded from a directory or built from flags, its adapter, what is frozen.

Refused (exit code 2): what directory.py and pretrained.py refuse, FlashAttention where it cannot run, packing where
rows would run together.
"""

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, is_flash_attn_4_available

from sft.arguments import ModelArguments, TrainingArguments
from sft.messages import Refused, choice, note
from sft.model.adapter_base import record_base
from sft.model.directory import ModelDirectory
from sft.model.from_flags import build_model, check_architecture
from sft.model.lora import add_adapter, find_targets
from sft.model.moe import mark_moe_leaves, moe_layers, route_in_fp32
from sft.model.pretrained import load_pretrained

# --------------------------------------------------------------------------------------------------------- directories


def open_directory(args: ModelArguments) -> ModelDirectory:
    """The directory of the model to train, and its tokenizer's. Refuses one that cannot be trained, before anything is
    loaded from it."""
    path, tokenizer = args.model_name_or_path, args.tokenizer_name_or_path
    if path is None and tokenizer is None:
        either = "neither --model_name_or_path nor --tokenizer_name_or_path is given"
        raise Refused(f"{either}: one of them brings the tokenizer")
    directory = ModelDirectory(
        path,
        tokenizer,
        trusted=may_run_code(args, path),
        tokenizer_trusted=may_run_code(args, tokenizer or path),
        model_code=args.model_code,
        name=f"--model_name_or_path {path}",
        hub_id=args.hub_ids.get(path or ""),
    )
    if path is None:
        check_architecture(args)
    directory.check()
    if tokenizer and not Path(tokenizer).is_dir():
        raise Refused(f"--tokenizer_name_or_path {tokenizer}: no such directory (looked in {Path.cwd()})")
    return directory


def may_run_code(args: ModelArguments, path: str | None) -> bool:
    """Whether code that a directory brings may run: as --trust_remote_code says, else that of a local one alone."""
    return path not in args.hub_ids if args.trust_remote_code is None else args.trust_remote_code


def check_own_code(directory: ModelDirectory, packing: str, label_smoothing: float) -> None:
    """Refuse what code that a directory brings does wrong: packing, where attention runs across rows (transformers'
    classes know them by `position_ids`), and label smoothing, for which the Trainer does not shift the labels."""
    flag = f"--packing {packing}" if packing != "none" else "--label_smoothing_factor" if label_smoothing else None
    if flag and directory.runs_own_code:
        native = "pass --trust_remote_code false where transformers knows the model"
        raise Refused(f"{flag}: not with the code that a directory brings. Leave it out, or {native}")


# ------------------------------------------------------------------------------------------------------------- weights


def load_model(
    args: ModelArguments,
    training: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    directory: ModelDirectory,
    checkpoint: Path | None = None,
) -> PreTrainedModel:
    """The model that is trained, with its adapter and with what stays as it is frozen.

    Seed before calling: a model built from flags and an adapter draw their first values here. Under ZeRO-3 parameters
    are partitioned as they are made, because transformers knows the DeepSpeed file from `training`.

    Args:
        checkpoint: of an adapter that is trained on; else the adapter that `args` names is, if any.
    """
    attention = flash_attention() if args.use_flash_attn else None
    options: dict[str, Any] = {"dtype": load_dtype(args, training), "attn_implementation": attention}
    if directory.path is None:
        model = build_model(args, tokenizer, **options)
    else:
        note_ignored_architecture(args)
        if args.use_lora and args.lora_target_modules and not args.adapter:
            directory.examine = partial(find_targets, wanted=args.lora_target_modules)
        if args.load_in_4bit:
            from sft.model.four_bits import in_4_bits

            options |= in_4_bits(args.lora_target_modules, training.device)
        model = load_pretrained(directory, **options)
    if moe_layers(model):
        route_in_fp32(model)
    elif args.router_aux_loss_coef:
        note("--router_aux_loss_coef has no effect: the model has no routers")
    if args.router_aux_loss_coef and model.config.model_type in ("hy_v3", "hy_v4"):
        why = "Tencent trains Hy3 and Hy4 without a balancing loss; a correction bias balances their experts"
        note(f"warning: --router_aux_loss_coef: {why}. Leave it out unless that is meant")
    why = "the model's default" if model._supports_sdpa else "this class has no other"
    choice("attention", model.config._attn_implementation, "--use_flash_attn" if attention else why)
    if args.use_lora:
        model = add_adapter(model, args, checkpoint or args.adapter)
        directory.added["base.json"] = record_base(model, directory)
        if args.train_attention_params_only:
            note("--train_attention_params_only has no effect: with --use_lora only the adapter is trained")
    else:
        freeze(model, args)
    if args.make_moe_param_leaf_module:
        mark_moe_leaves(model)
    return model


def note_ignored_architecture(args: ModelArguments) -> None:
    """Say once which architecture flags are ignored because a model is given."""
    names = list(ModelArguments.__dataclass_fields__)
    names = names[names.index("hidden_size") : names.index("use_lora")]
    given = [f"--{name}" for name in names if name in args.given]
    if given:
        note(f"ignored: {' '.join(given)} (the architecture is that of --model_name_or_path)")


def load_dtype(args: ModelArguments, training: TrainingArguments) -> torch.dtype | str:
    """The precision rule: what is trained has fp32 master values.

    Without DeepSpeed the weights are the masters; under ZeRO the optimiser holds them and the engine casts the weights
    itself. Only a frozen base may stay in the directory's dtype, and only where --bf16 or --fp16 asks for half
    precision.
    """
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    if half is None:
        dtype, why = torch.float32, "neither --bf16 nor --fp16 is given"
    elif training.deepspeed:
        dtype, why = half, "the optimiser of ZeRO holds fp32 masters"
    elif args.use_lora:
        dtype, why = "auto", "a frozen base stays as its directory has it; the adapter is fp32"
    else:
        dtype, why = torch.float32, "trained without DeepSpeed, the weights are the masters; computed under autocast"
    choice("dtype of the weights", str(dtype).removeprefix("torch."), why)
    return dtype


def flash_attention() -> str | None:
    """transformers' name of the FlashAttention that a package brings; None where there is none."""
    installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_4": is_flash_attn_4_available}
    return next((name for name, is_available in installed.items() if is_available()), None)


def check_flash_attention(training: TrainingArguments, packing: str) -> None:
    """Refuse --use_flash_attn where it cannot run, with the reason."""
    if training.device.type != "cuda":
        raise Refused(f"--use_flash_attn: FlashAttention needs an NVIDIA GPU, this run is on {training.device.type}")
    if not (training.bf16 or training.fp16):
        raise Refused("--use_flash_attn: FlashAttention computes in half precision: add --bf16 (or --fp16)")
    if flash_attention() is None and (packing == "none" or find_spec("torch.nn.attention.varlen") is None):
        how = "pip install -r requirements-flash-attn.txt, or add --packing batch: PyTorch's own takes packed rows"
        raise Refused(f"--use_flash_attn: neither flash_attn nor flash-attn-4 is installed: {how}")


# -------------------------------------------------------------------------------------------------- what is trained


def freeze(model: PreTrainedModel, args: ModelArguments) -> None:
    """Freeze what is not trained: all but what the flags say, and what gets no gradient (Hy4's indexer)."""
    pattern = r"\.self_attn\." if args.train_attention_params_only else args.trainable_params or ""
    trained = {name for name, _ in model.named_parameters() if re.search(pattern, name) and ".indexer." not in name}
    if not trained:
        name, _ = next(model.named_parameters())
        raise Refused(f"--trainable_params {pattern}: no parameter's name matches, e.g. {name}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trained
    if pattern:
        choice("trained", f"{len(trained)} tensors", f"their names match {pattern}")


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "peft_config") else model
