"""The weights that are saved: in which dtype, by which names, and how they are gathered from the ranks."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion


def save_dtype(args: TrainingArguments) -> torch.dtype:
    """The dtype of the final model: half precision where a flag asks for it."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def with_base_names(
    model: PreTrainedModel, state: dict[str, torch.Tensor], stored: dict[str, str]
) -> dict[str, torch.Tensor]:
    """The state by the names of the base's files; what they hold in another form, experts one by one, as transformers
    takes it apart.

    Args:
        stored: {name in the model: name in the base's files}.
    """
    known = {stored[name]: value for name, value in state.items() if name in stored}
    others = {name: value for name, value in state.items() if name not in stored}
    return known | (revert_weight_conversion(model, others) if others else {})


def master_values(model: PreTrainedModel, names: set[str], keep: bool) -> dict[str, torch.Tensor]:
    """The named parameters' fp32 values from the optimiser of ZeRO, on the CPU of the ranks that `keep` them. All
    ranks must call."""
    from deepspeed.utils import safe_get_full_fp32_param

    values = {}
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        value = safe_get_full_fp32_param(parameter)  # collective
        if keep and value is not None:
            values[name] = value.detach().float().cpu()
    return values


def gathered_state(model: PreTrainedModel, keep: bool) -> dict[str, torch.Tensor]:
    """The whole state under ZeRO-3, on the CPU of the ranks that `keep` it; DeepSpeed's own way gives it to rank 0
    alone. A parameter at a time. All ranks must call."""
    import deepspeed

    state = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    if keep:
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state |= {name: buffer.cpu() for name, buffer in model.state_dict().items() if name not in names}
    return state


def write_on_this_rank(model: PreTrainedModel) -> None:
    """Let save_pretrained write weights where the caller is, for --save_on_each_node: transformers 5.23 does so on
    global rank 0 alone. Goes with the release that asks for the node (tests/unit/test_arguments.py says when)."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process


def write_deepspeed_latest(checkpoint: Path) -> None:
    """Write `latest`, from which DeepSpeed finds its states: 0.19.8 does so on global rank 0 alone, on a node's own
    disk too. Goes with the release that does it on every node."""
    states = sorted(checkpoint.glob("global_step*"))
    if states and not (checkpoint / "latest").exists():
        (checkpoint / "latest").write_text(states[-1].name, encoding="utf-8")
