"""What is done with the routers of a mixture of experts: they multiply in fp32, their balance is a loss
(`--router_aux_loss_coef`), and how evenly they load the experts is logged."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from sft.model.weight_files import is_transformers_own


def moe_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{number of the layer: its module with router (`gate`) and `experts`}, of every generation."""
    layers = {
        n: module for n, module in model.named_modules() if hasattr(module, "gate") and hasattr(module, "experts")
    }
    return {name.rpartition(".layers.")[2].split(".")[0]: module for name, module in layers.items()}


def route_in_fp32(model: PreTrainedModel) -> None:
    """Let routers multiply in fp32 whatever their weight's dtype is: ZeRO casts the weight to half precision, which
    transformers' hunyuan_v1_moe then multiplies in, and autocast would do so on any class."""

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


class Routers(TrainerCallback):
    """Watches the routers while the loss is computed.

    Args:
        model: with or without adapter.
        coefficient: of the load-balancing loss; 0: it is not computed.
    """

    def __init__(self, model: nn.Module, coefficient: float):
        self.coefficient, self.watching, self.mask = coefficient, False, None
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # with a coefficient: each layer's logits and choice
        self.counts: dict[str, torch.Tensor] = {}  # of each layer: real tokens sent to each expert since the last log
        self.losses: list[torch.Tensor] = []  # since the last log
        for number, layer in moe_layers(model).items():
            if is_transformers_own(layer):
                layer.gate.register_forward_hook(
                    lambda gate, args, output, number=number: self.see(number, output[0], output[2])
                )
            else:  # a directory's own code: before what is over an expert's capacity is dropped
                k = first_of(getattr(model.config, "moe_topk", 1))
                layer.gate.wg.register_forward_hook(
                    lambda wg, args, logits, number=number, k=k: self.see(number, logits, logits.topk(k).indices)
                )

    def see(self, number: str, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        """A router's logits (tokens, experts) and the experts that it chose (tokens, k)."""
        if self.watching:
            counts = tokens_per_expert(logits, chosen, self.real(logits))
            self.counts[number] = self.counts[number] + counts if number in self.counts else counts
            if self.coefficient:
                self.seen.append((logits, chosen))

    @contextmanager
    def watch(self, attention_mask: torch.Tensor | None) -> Iterator[None]:
        """See the routers of one forward pass; not again when checkpointing repeats it.

        Args:
            attention_mask: (batch, length), 0 where there is padding; None: there is none.
        """
        self.seen, self.watching, self.mask = [], True, attention_mask
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
        """The load-balancing loss since the last log, all ranks' and micro-batches' mean. All ranks must call."""
        mean = reduce(torch.stack(self.losses).mean(), reduction="mean")
        self.losses = []
        return mean.item()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Give the load of each layer to those that report (TensorBoard); the log's own history stays small."""
        if "loss" not in (logs or {}):
            return
        for number, counts in self.counts.items():
            share = reduce(counts).double().cpu()
            share /= share.sum()
            logs[f"expert_load/layer_{number}/least"] = share.min().item()
            logs[f"expert_load/layer_{number}/most"] = share.max().item()
            logs[f"expert_load/layer_{number}/entropy"] = torch.special.entr(share).sum().item()
        self.counts = {}


def first_of(value: int | list[int]) -> int:
    """A setting of A13B's configuration may be a list with one entry a layer, all alike."""
    return value[0] if isinstance(value, list) else value


def tokens_per_expert(logits: torch.Tensor, chosen: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(experts,) real tokens that were sent to each expert."""
    counts = torch.zeros(logits.shape[-1], dtype=torch.float32, device=logits.device)
    return counts.scatter_add_(0, chosen.flatten(), real.float().repeat_interleave(chosen.shape[-1]))


def load_balancing_loss(seen: list[tuple[torch.Tensor, torch.Tensor]], real: torch.Tensor) -> torch.Tensor:
    """E · Σ f_e · P_e over the E experts, equations (4) to (6) of Switch Transformer (Fedus et al. 2021) for k experts
    a token: f_e is the share of real tokens sent to expert e (they add up to k), P_e the mean of the softmax of the
    router's logits, both over the tokens of all layers, as transformers computes it for its own classes. k when even.

    f comes from the experts that were really chosen: Hy3 adds a correction to its scores before it chooses.

    Args:
        seen: for each layer its logits (tokens, experts) and its chosen experts (tokens, k).
        real: (tokens,) 1 for real tokens, 0 for padding.
    """
    tokens = real.float().sum() * len(seen)
    sent = sum(tokens_per_expert(logits, chosen, real) for logits, chosen in seen) / tokens
    probability = sum(real.float() @ logits.float().softmax(dim=-1) for logits, _ in seen) / tokens
    return len(sent) * (sent * probability).sum()
