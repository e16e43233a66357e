"""The routers of a mixture of experts: they multiply in fp32, their balance can be part of the loss
(`--router_aux_loss_coef`), and the load of the experts is logged."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from sft.messages import choice, note
from sft.model.weight_files import is_transformers_own


def moe_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{number of the layer: the module with its router (`gate`) and its `experts`}, in models of every generation."""
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "gate") and hasattr(module, "experts"):
            layers[name.rpartition(".layers.")[2].split(".")[0]] = module
    return layers


def route_in_fp32(model: PreTrainedModel) -> None:
    """Make routers multiply in fp32. transformers' hunyuan_v1_moe does so in the dtype of the weight, which ZeRO casts
    to half precision; autocast would do the same to any class."""

    def linear(weight_of: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), weight_of.weight.float())

    def without_autocast(forward, hidden_states: torch.Tensor, *args):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return forward(hidden_states, *args)

    for layer in moe_layers(model).values():
        if hasattr(layer.gate, "wg"):
            layer.gate.wg.forward = functools.partial(linear, layer.gate.wg)
        else:
            layer.gate.forward = functools.partial(without_autocast, layer.gate.forward)


def mark_moe_leaves(model: PreTrainedModel) -> None:
    """Make ZeRO-3 gather an MoE layer at once: its experts are not used by every rank in every step."""
    classes = {type(layer) for layer in moe_layers(model).values()}
    if not (classes and is_deepspeed_zero3_enabled()):
        why = "it is for ZeRO-3" if classes else "the model has no MoE layers"
        return note(f"--make_moe_param_leaf_module has no effect: {why}")
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, list(classes))
    choice("ZeRO-3 leaf modules", ", ".join(sorted(cls.__name__ for cls in classes)), "--make_moe_param_leaf_module")


class Routers(TrainerCallback):
    """Watches the routers while the loss is computed.

    Args:
        model: with or without adapter.
        coefficient: weight of the load-balancing loss; with 0 it is not computed.
        report_load: whether the load of the experts is counted and logged. That costs a collective and a
            synchronisation with the GPU at each logging step, so only where something shows it (`--report_to`).
    """

    def __init__(self, model: nn.Module, coefficient: float, report_load: bool = True):
        self.coefficient, self.report_load = coefficient, report_load
        self.watching = False
        self.mask: torch.Tensor | None = None
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # with a coefficient: each layer's logits and choice
        self.counts: dict[str, torch.Tensor] = {}  # {layer: real tokens sent to each expert since the last log}
        self.losses: list[torch.Tensor] = []  # since the last log
        for number, layer in moe_layers(model).items():
            if is_transformers_own(layer):
                layer.gate.register_forward_hook(functools.partial(self.see, number, None))
            else:  # a directory's own code: its gate drops what is over an expert's capacity, so look before that
                top_k = first_of(getattr(model.config, "moe_topk", 1))
                layer.gate.wg.register_forward_hook(functools.partial(self.see, number, top_k))

    def see(self, number: str, top_k: int | None, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook on a router, which returns logits (tokens, experts), weights and chosen experts (tokens, k);
        or, with `top_k`, on a linear layer that returns the logits, of which the largest are chosen."""
        if not self.watching:
            return
        logits, chosen = (output, output.detach().topk(top_k).indices) if top_k else (output[0], output[2])
        if self.report_load:
            self.counts[number] = self.counts.get(number, 0) + tokens_per_expert(logits, chosen, self.real(logits))
        if self.coefficient:
            self.seen.append((logits, chosen))

    @contextmanager
    def watch(self, attention_mask: torch.Tensor | None) -> Iterator[None]:
        """See the routers of one forward pass, but not when activation checkpointing repeats it. The mask is (batch,
        length), 0 where there is padding; None where there is none."""
        self.seen, self.mask, self.watching = [], attention_mask, True
        try:
            yield
        finally:
            self.watching = False

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """(tokens,) 1 for real tokens, 0 for padding."""
        return logits.new_ones(len(logits)) if self.mask is None else self.mask.flatten().to(logits)

    def loss(self) -> torch.Tensor:
        """The coefficient times the load-balancing loss of the forward pass just seen."""
        value = load_balancing_loss(self.seen, self.real(self.seen[0][0]))
        self.losses.append(value.detach())
        self.seen = []
        return self.coefficient * value

    def mean_loss(self) -> float:
        """The load-balancing loss since the last log, the mean over micro-batches and ranks. All ranks must call."""
        mean = reduce(torch.stack(self.losses).mean(), reduction="mean")
        self.losses = []
        return mean.item()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the load of each layer since the last log, of all ranks together, to what TensorBoard and the like show;
        `log_history` does not get it and stays small. One collective for all layers: all ranks must call."""
        if "loss" not in (logs or {}) or not self.counts:
            return
        sizes = [len(counts) for counts in self.counts.values()]
        total = reduce(torch.cat(list(self.counts.values()))).double().cpu()
        for number, counts in zip(self.counts, total.split(sizes)):
            share = counts / counts.sum()
            logs[f"expert_load/layer_{number}/least"] = share.min().item()
            logs[f"expert_load/layer_{number}/most"] = share.max().item()
            logs[f"expert_load/layer_{number}/entropy"] = torch.special.entr(share).sum().item()
        self.counts = {}


def first_of(value: int | list[int]) -> int:
    """The value itself. In A13B's configuration some settings are lists with one entry a layer, all alike."""
    return value[0] if isinstance(value, list) else value


def tokens_per_expert(logits: torch.Tensor, chosen: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(experts,) real tokens that were sent to each expert."""
    counts = torch.zeros(logits.shape[-1], dtype=torch.float32, device=logits.device)
    return counts.scatter_add_(0, chosen.flatten(), real.float().repeat_interleave(chosen.shape[-1]))


def load_balancing_loss(seen: list[tuple[torch.Tensor, torch.Tensor]], real: torch.Tensor) -> torch.Tensor:
    """E · Σ f_e · P_e over the E experts: equations (4) to (6) of Switch Transformer (Fedus et al. 2021), for k
    experts a token. It is k when the load is even.

    f_e is the share of real tokens that were sent to expert e, really sent: Hy3 adds a correction to its scores before
    it chooses. P_e is the mean of the softmax of the router's logits. Both are over the tokens of all layers.

    Args:
        seen: for each layer its logits (tokens, experts) and its chosen experts (tokens, k).
        real: (tokens,) 1 for real tokens, 0 for padding.
    """
    tokens = real.float().sum() * len(seen)
    sent = sum(tokens_per_expert(logits, chosen, real) for logits, chosen in seen) / tokens
    probability = sum(real.float() @ logits.float().softmax(dim=-1) for logits, _ in seen) / tokens
    return len(sent) * (sent * probability).sum()
