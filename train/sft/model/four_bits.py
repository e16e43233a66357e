"""A frozen base in 4 bits (`--load_in_4bit`): NF4 with nested statistics (Dettmers et al. 2023, QLoRA, section 3), for
linear layers and for the fused routed experts, which bitsandbytes itself leaves as they are.

Weights are packed one by one as they are read. Forward and backward each unpack a weight, multiply as the plain model
would, and drop it again: the result is that of a model whose weights are the unpacked ones. The router, the head,
norms and embeddings stay as they are, and so do Hy4's indexer and what PEFT adapts by its weight.

Refused (exit code 2): other classes, which may use a weight directly (code that a directory brings); adapters on the
fused experts, for which PEFT needs them whole.
"""

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Params4bit
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from sft.messages import Refused, choice
from sft.model.lora import FUSED, find_targets, is_named, kind_of, rewritten_by_peft
from sft.model.weight_files import is_transformers_own

NAME = "nf4_with_experts"  # in transformers' registries
EXACT = ("hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4")  # tests/integration/test_four_bits.py
PACKED = ("attention", "MLP", "shared experts", "routed experts")  # kinds of linear layers
BLOCK = 64  # values that share a scale
PIECE = 1 << 20  # values that are packed at once


def in_4_bits(lora_targets: list[str] | None, device: torch.device) -> dict[str, Any]:
    """The options with which from_pretrained packs weights as it reads them, on the device that they stay on.

    Args:
        lora_targets: where the adapter goes, as `--lora_target_modules`, or as an adapter's configuration names it.
    """
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    config.quant_method, config.lora_targets = NAME, lora_targets
    return {"quantization_config": config, "device_map": {"": device}}


@register_quantizer(NAME)
class Quantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer for bitsandbytes, with layers of our own and with the fused experts."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not is_transformers_own(model) or model.config.model_type not in EXACT:
            raise Refused(
                f"--load_in_4bit: {type(model).__name__} may not compute the same on packed weights, transformers' "
                "own Hunyuan classes do. Leave it out, or pass --model_code native where they know the model"
            )
        whole = adapted_by_weight(model, self.quantization_config.lora_targets)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and kind_of(name) in PACKED and name not in whole:
                model.set_submodule(name, PackedLinear.like(module))
        if any(name.endswith(FUSED) for name, _ in model.named_parameters()):
            model.set_experts_implementation(NAME)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is packed: the weight of a PackedLinear, or a layer's fused experts."""
        place, _, name = param_name.rpartition(".")
        return param_name.endswith(FUSED) or isinstance(model.get_submodule(place), PackedLinear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return Pack()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Let everything after this see an ordinary model: the packed layers know by themselves what they are."""
        packed = [p for p in model.parameters() if isinstance(p, Params4bit)]
        values = sum(p.quant_state.shape.numel() for p in packed)
        choice("4 bits", f"{len(packed)} weights, {values:,} values", "--load_in_4bit: NF4, statistics nested")
        self.remove_quantization_config(model)


def adapted_by_weight(model: PreTrainedModel, lora_targets: list[str] | None) -> set[str]:
    """Names of the linear layers that PEFT adapts by their weight, which it needs whole. Refuses the fused experts."""
    wanted = lora_targets and ["experts" if t in FUSED else t.removesuffix(".weight") for t in lora_targets]
    names = find_targets(model, wanted)
    if any(is_named(name, "experts") for name in names):
        raise Refused(
            "--lora_target_modules experts: not with --load_in_4bit: PEFT adapts fused experts by their whole weight. "
            "Adapt other layers, or leave --load_in_4bit out"
        )
    whole = rewritten_by_peft(model, names)
    if whole:
        choice("not in 4 bits", f"{len(whole)} layers of the shared experts", "PEFT adapts them by their weight")
    return whole


class Pack(ConversionOps):
    """What from_pretrained does to a weight once it is read, and fused if it is that of experts."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """{name: weight} → {name: packed weight}, on the weight's device."""
        return {name: pack(value[0] if isinstance(value, list) else value) for name, value in input_dict.items()}


def pack(weight: torch.Tensor) -> Params4bit:
    """A weight of any shape, packed: half a byte a value, and about 0.13 bits a value for its nested statistics.

    The same as bitsandbytes' `quantize_4bit` of the whole weight, but piece by piece: on a CPU that takes seven times
    the weight's size while it packs.
    """
    pieces = [quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4") for piece in weight.flatten().split(PIECE)]
    scales = torch.cat([state.absmax for _, state in pieces])
    offset = scales.mean()
    nested, of_nested = quantize_blockwise(scales - offset, blocksize=256)
    state = QuantState(
        nested, weight.shape, pieces[0][1].code, BLOCK, "nf4", weight.dtype, offset=offset, state2=of_nested
    )
    values = torch.cat([packed for packed, _ in pieces])
    return Params4bit(values, quant_state=state, blocksize=BLOCK, quant_type="nf4", bnb_quantized=True)


def unpack(packed: Params4bit) -> torch.Tensor:
    """The weight, in the shape and dtype that it was packed from."""
    return dequantize_4bit(packed.data, packed.quant_state)


# -------------------------------------------------------------------------------------------------------- multiply


class PackedProduct(torch.autograd.Function):
    """`linear(inputs, weight)` with a packed weight that gets no gradient. The weight is unpacked in the forward pass
    and again in the backward pass: between them only the packed one is kept.

    With `ends` the weight is (experts, out, in), and the inputs are sorted by expert: `ends` (experts,) says where
    each expert's inputs end.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, packed: Params4bit, bias: Any, ends: Any) -> torch.Tensor:
        ctx.packed, ctx.ends, ctx.dtype = packed, ends, inputs.dtype
        if ends is None:
            return nn.functional.linear(inputs, unpack(packed), bias)  # under autocast in its dtype
        return _grouped_linear(inputs, unpack(packed), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        weight = unpack(ctx.packed)
        if ctx.ends is None:
            of_inputs = gradient @ weight.to(gradient.dtype)
        else:
            of_inputs = _grouped_linear(gradient, weight, ctx.ends, is_transposed=True)
        return of_inputs.to(ctx.dtype), None, None, None


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed."""

    @classmethod
    def like(cls, module: nn.Linear) -> "PackedLinear":
        """A layer of the same shape, on the meta device until its weight is read."""
        options = {"device": "meta", "dtype": module.weight.dtype}
        return cls(module.in_features, module.out_features, module.bias is not None, **options).requires_grad_(False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return PackedProduct.apply(input, self.weight, self.bias, None)


def packed_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The routed experts of a layer, as transformers' grouped_mm computes them.

    Args:
        experts: with packed `gate_up_proj` (experts, 2 · width, hidden) and `down_proj` (experts, hidden, width).
        hidden_states: (tokens, hidden); returns the same shape.
        top_k_index, top_k_weights: (tokens, k) each token's experts, and their shares.
    """
    tokens, k = top_k_index.shape
    chosen, order = top_k_index.flatten().sort()
    numbers = torch.arange(experts.num_experts, device=chosen.device)
    ends = torch.searchsorted(chosen, numbers, right=True).int()
    inner = PackedProduct.apply(hidden_states[order // k], experts.gate_up_proj, None, ends)
    outer = PackedProduct.apply(experts._apply_gate(inner), experts.down_proj, None, ends)
    weighted = outer * top_k_weights.flatten()[order, None]
    return weighted[order.argsort()].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, packed_experts)
