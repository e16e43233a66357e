"""Attention of packed rows without a T × T mask: each row by itself, its boundaries from the collator.

Registered with transformers as one attention function and one mask function. Any other call, one with an attention
mask or with keys of earlier steps, goes to transformers' `sdpa` with its mask: generation in a packed run is that of
any other.
"""

from types import SimpleNamespace

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft.arguments import TrainingArguments
from sft.messages import choice

ROW_BY_ROW = "sdpa_row_by_row"


@torch.compiler.disable
def attend_row_by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: list[int] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row.

    Args:
        query: (1, heads, tokens, head size); key and value: (1, key heads, tokens, head size).
        row_lengths: tokens of each row, whole numbers, so that no layer waits for the device.

    Returns:
        (1, tokens, heads, head size), and no weights.
    """
    if row_lengths is None or attention_mask is not None or query.shape[2] != sum(row_lengths):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], dim=1), None


def no_mask_for_rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """None where nothing but the causal order, and rows that attend_row_by_row keeps apart, would be masked; else
    transformers' mask."""
    if attention_mask is None and q_length == kv_length and local_size is None:
        return None
    more = {"attention_mask": attention_mask, "local_size": local_size}
    return sdpa_mask(batch_size, q_length, kv_length, *args, **more, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(ROW_BY_ROW, attend_row_by_row)
ALL_MASK_ATTENTION_FUNCTIONS.register(ROW_BY_ROW, no_mask_for_rows)


def keep_rows_apart(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Let a model that is trained on packed rows attend row by row where that is what it does with a mask; a line says
    which it is."""
    config, before = model.config, model.config._attn_implementation
    if before != "sdpa":
        why = f"{before}, which knows no other way" if before == "eager" else before
    elif getattr(config, "attention_dropout", 0):
        why = "attention_dropout would draw other numbers"
    elif getattr(config, "sliding_window", None):
        why = "the model's window slides"
    elif not is_as_with_mask(config, args.device, torch.bfloat16 if args.bf16 else torch.float32):
        why = "on this device it gives other values row by row"
    else:
        model.set_attn_implementation(ROW_BY_ROW)
        return choice("attention of packed rows", "row by row", "no mask of all tokens by all tokens")
    return choice("attention of packed rows", before, why)


def is_as_with_mask(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether two short rows get the same, row by row and with a mask."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    draw, lengths = torch.Generator().manual_seed(0), [9, 15]  # the run's own numbers stay as they are
    shapes = [(1, number, sum(lengths), size) for number in (heads, key_heads, key_heads)]
    states = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    mask = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool().to(device)
    ours, _ = attend_row_by_row(module, *states, None, row_lengths=lengths)
    theirs, _ = sdpa_attention_forward(module, *states, mask[None, None])
    return torch.allclose(ours, theirs, atol=1e-5 if dtype == torch.float32 else 2e-2)
