"""Attention of packed rows without a T × T mask: each row by itself, its boundaries from the collator.

Registered with transformers as one attention function and one mask function. Any other call, one with an attention
mask or with keys of earlier steps, goes to transformers' `sdpa` with its mask: generation in a packed run is that of
any other.
"""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft.arguments import TrainingArguments
from sft.data.batches import RowLengths, row_boundaries
from sft.messages import choice, in_one_line, note

ROW_BY_ROW, VARLEN = "sdpa_row_by_row", "torch_varlen"


@torch.compiler.disable
def attend_row_by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: RowLengths | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row.

    Args:
        query: (1, heads, tokens, head size); key and value: (1, key heads, tokens, head size).
        row_lengths: whole numbers, so that no layer waits for the device.

    Returns:
        (1, tokens, heads, head size), and no weights.
    """
    if row_lengths is None or attention_mask is not None or query.shape[2] != sum(row_lengths.lengths):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = zip(*(states.split(row_lengths.lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], dim=1), None


def attend_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The same by one kernel of PyTorch's for all rows, on a GPU in half precision. `cu_seq_lens_q` (rows + 1,):
    where each begins, int32. Without DeepSpeed query and key arrive in fp32: rotary positions are."""
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    from torch.nn.attention.varlen import varlen_attn

    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    states = [tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value)]
    ends = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(*states, *ends, scale=scaling, window_size=(-1, 0), enable_gqa=True)[None], None


def no_mask_for_rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """None where a mask would hold nothing but the causal order and the rows, which the functions above keep apart;
    else transformers' mask."""
    if attention_mask is None and q_length == kv_length and local_size is None:
        return None
    more = {"attention_mask": attention_mask, "local_size": local_size}
    return sdpa_mask(batch_size, q_length, kv_length, *args, **more, **kwargs)


for name, function in ((ROW_BY_ROW, attend_row_by_row), (VARLEN, attend_varlen)):
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, no_mask_for_rows)


def keep_rows_apart(model: PreTrainedModel, args: TrainingArguments, use_flash_attn: bool = False) -> None:
    """Let a model that is trained on packed rows attend without a mask of all tokens, where two short rows get what
    they get with one; a line says how it attends, and why. With `use_flash_attn` and without its package by PyTorch's
    own kernel."""
    config, before = model.config, model.config._attn_implementation
    if before == "eager":
        return choice("attention of packed rows", before, "this class has no other")
    for what in ("attention_dropout", "sliding_window"):
        if before == "sdpa" and getattr(config, what, None):
            return choice("attention of packed rows", before, f"{what} is set")
    kinds = [before] if before != "sdpa" else [VARLEN] if use_flash_attn else []
    for kind in (*kinds, ROW_BY_ROW):
        why = difference_to_mask(config, kind, args)
        if why is None:
            model.set_attn_implementation(kind)
            return choice("attention of packed rows", kind, "no mask of all tokens by all tokens")
        note(f"warning: attention of packed rows: {kind} is not used on this device: {why}")
    model.set_attn_implementation("sdpa")
    return choice("attention of packed rows", "sdpa", "with a mask of all tokens by all tokens")


def difference_to_mask(config: PreTrainedConfig, kind: str, args: TrainingArguments) -> str | None:
    """How two short rows differ, in what they get or in its gradients, between an attention function and a mask; None
    where they do not."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True, config=config, layer_idx=0)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    draw, lengths = torch.Generator().manual_seed(0), [9, 15]  # the run's own numbers stay as they are
    shapes = [(1, number, sum(lengths), size) for number in (heads, key_heads, key_heads)]
    states = [torch.randn(shape, generator=draw).to(args.device, dtype).requires_grad_() for shape in shapes]
    rows = {n: v.to(args.device) if torch.is_tensor(v) else v for n, v in row_boundaries(lengths).items()}
    mask = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool().to(args.device)

    def found(name: str, mask: torch.Tensor | None, **rows: Any) -> list[torch.Tensor]:
        output, _ = ALL_ATTENTION_FUNCTIONS[name](module, *states, mask, **rows)
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), states)]

    theirs = found("sdpa", mask[None, None])
    try:
        ours = found(kind, None, **rows)
    except Exception as error:  # kernels raise anything where they cannot run, and other releases take other arguments
        return f"{type(error).__name__}: {in_one_line(error)[:200]}"
    most = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
    return None if most < 0.03 else f"it differs by {most:.0%} from a mask"
