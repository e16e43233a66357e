"""FLOPs of a training step, from the model's configuration and from what of the model is trained.

A product of an m × k and a k × n matrix costs 2·m·k·n FLOPs, and in the backward pass as many again for each factor
that needs a gradient: none for a frozen weight, none before the first trained one (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1). Causal attention has l(l+1)/2 pairs of tokens in a row of l tokens, and two products a
pair, score and value. MFU counts what the model needs (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), HFU what
is computed, recomputed layers included (Korthikanti et al. 2022, arXiv:2205.05198, section 6.3).

Not counted: padding, embeddings, whatever is no product of matrices, recomputation inside attention kernels, and what
PEFT does besides an adapter's two products (DoRA's norms; for fused weights the sum of weight and adapter). For Hy4
the indexer is counted, and attention to all earlier tokens: transformers computes it and masks those not chosen.
"""

from typing import Any

import numpy as np
from transformers import PreTrainedModel

from sft.model.moe import first_of

TOKEN, PAIR, TARGET = np.eye(3)
# Keys of the configuration: experts, those that a token is sent to, width of one, shared ones (1 where it has none).
EXPERTS = {
    "hunyuan_v1_dense": (),
    "hunyuan_v1_moe": ("num_experts", "moe_topk", "intermediate_size", "num_shared_expert"),
    "hunyuan": ("num_experts", "moe_topk", "intermediate_size", "num_shared_expert"),  # old code of A13B and Large
    "hy_v3": ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts"),
    "hy_v4": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts"),
}


def flops_of_step(model: PreTrainedModel, recompute_every: int = 0) -> np.ndarray | None:
    """(3,) FLOPs of forward and backward pass: for each token, for each pair of a token and one that it attends to,
    for each position of the head. None where the class, or a key of old code's configuration, is not known.

    Args:
        model: with or without adapter.
        recompute_every: one in so many layers is recomputed, not reentrant (transformers' default); 0: none.
    """
    try:
        return Step(model, recompute_every).flops() if model.config.model_type in EXPERTS else None
    except AttributeError:
        return None


class Step:
    """A step, product by product. `x` says whether an input needs a gradient; methods return whether a result does."""

    def __init__(self, model: PreTrainedModel, recompute_every: int):
        self.config: Any = model.config
        self.kind, self.hidden, self.every = model.config.model_type, model.config.hidden_size, recompute_every
        self.total = self.forward = self.last = np.zeros(3)  # of the step, a layer's forward pass, a product's
        self.trained: set[str] = set()  # names of weights
        self.ranks: dict[str, int] = {}  # of adapters, by the name of what they are on
        for name, weight in model.named_parameters(remove_duplicate=False):
            place = name.removeprefix("base_model.model.").replace(".base_layer", "").removesuffix(".weight")
            adapted, is_adapter, _ = place.partition(".lora_A.")
            if is_adapter:
                self.ranks[adapted] = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves an empty tensor
            elif weight.requires_grad:
                self.trained.add(place)

    def flops(self) -> np.ndarray:
        x = "model.embed_tokens" in self.trained or self.every > 0  # transformers then wants the embeddings' gradient
        for number in range(self.config.num_hidden_layers):
            self.forward = np.zeros(3)
            x = self.layer(number, f"model.layers.{number}", x)
            if self.every and number % self.every == 0:
                is_only_added = self.kind in ("hunyuan_v1_dense", "hy_v3")  # the last result: not computed again
                self.total = self.total + self.forward - is_only_added * self.last
        x = self.mix_streams("model.hc_head.hc_fn", 1, x) or "model.norm" in self.trained
        self.linear("lm_head", self.hidden, self.config.vocab_size, x, TARGET)
        return self.total

    def product(self, size: np.ndarray, first: bool, second: bool) -> bool:
        self.last = 2 * size
        self.forward = self.forward + self.last
        self.total = self.total + self.last * (1 + first + second)
        return first or second

    def linear(self, place: str, inner: int, outer: int, x: bool, unit: np.ndarray = TOKEN, rank: int = 0) -> bool:
        y = self.product(inner * outer * unit, x, place in self.trained)
        if rank := rank or self.ranks.get(place, 0):
            self.product(rank * inner * unit, x, True)
            y = self.product(rank * outer * unit, True, True)
        return y

    def layer(self, number: int, place: str, x: bool) -> bool:
        x = self.mix_streams(f"{place}.attn_hc.fn", 2, x) or f"{place}.input_layernorm" in self.trained
        attend = self.latent_attention if self.kind == "hy_v4" else self.attention
        x = attend(number, f"{place}.self_attn", x)
        x = self.mix_streams(f"{place}.ffn_hc.fn", 2, x) or f"{place}.post_attention_layernorm" in self.trained
        return self.feed_forward(number, f"{place}.mlp", x)

    def mix_streams(self, place: str, outputs: int, x: bool) -> bool:
        """Hy4 has several streams of hidden states."""
        streams = self.config.hc_mult if self.kind == "hy_v4" else 0
        return self.linear(place, streams * self.hidden, outputs * streams, x) if streams else x

    def attention(self, number: int, place: str, x: bool) -> bool:
        c, heads = self.config, self.config.num_attention_heads
        size = getattr(c, "head_dim", None) or getattr(c, "attention_head_dim", None) or self.hidden // heads
        query = self.linear(f"{place}.q_proj", self.hidden, heads * size, x)
        if not getattr(c, "use_cla", False) or number % c.cla_share_factor == 0:  # else those of an earlier layer
            names, width = (f"{place}.k_proj", f"{place}.v_proj"), c.num_key_value_heads * size
            self.key, self.value = (self.linear(name, self.hidden, width, x) for name in names)
        score = self.product(heads * size * PAIR, query, self.key)
        attended = self.product(heads * size * PAIR, score, self.value)
        return self.linear(f"{place}.o_proj", heads * size, self.hidden, attended)

    def latent_attention(self, number: int, place: str, x: bool) -> bool:
        c, heads = self.config, self.config.num_attention_heads
        nope, rope, size = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        gate = self.linear(f"{place}.gate_proj", self.hidden, heads * size, x)
        query = self.linear(f"{place}.q_a_proj", self.hidden, c.q_lora_rank, x)
        query = self.linear(f"{place}.q_b_proj", c.q_lora_rank, heads * (nope + rope), query)
        key = self.linear(f"{place}.kv_a_proj_with_mqa", self.hidden, c.kv_lora_rank + rope, x)
        value = self.linear(f"{place}.kv_b_proj", c.kv_lora_rank, heads * (nope + size), key)
        if c.indexer_types[number] == "full":  # without gradient
            width = c.index_n_heads * c.index_head_dim
            weights = c.q_lora_rank * width + self.hidden * (c.index_head_dim + c.index_n_heads)
            self.product(weights * TOKEN + (width + c.index_n_heads) * PAIR, False, False)
        score = self.product(heads * (nope + rope) * PAIR, query, value)
        attended = self.product(heads * size * PAIR, score, value)
        return self.linear(f"{place}.o_proj", heads * size, self.hidden, attended or gate)

    def feed_forward(self, number: int, place: str, x: bool) -> bool:
        c, is_new = self.config, self.kind in ("hy_v3", "hy_v4")
        keys = () if is_new and c.mlp_layer_types[number] == "dense" else EXPERTS[self.kind]
        if not keys or (self.kind == "hunyuan" and first_of(c.num_experts) == 1):
            return self.mlp(place, c.intermediate_size, x)
        experts, chosen, width, shared = (first_of(getattr(c, key, 1)) for key in keys)
        y = self.linear(f"{place}.gate" if is_new else f"{place}.gate.wg", self.hidden, experts, x)
        if self.kind == "hunyuan":
            shared *= c.use_mixed_mlp_moe
            y |= self.mlp(f"{place}.experts.0", width, x, chosen * TOKEN)
        else:  # fused
            rank = self.ranks.get(f"{place}.experts", 0) // experts
            inner = self.linear(f"{place}.experts.gate_up_proj", self.hidden, 2 * width, x, chosen * TOKEN, rank)
            y |= self.linear(f"{place}.experts.down_proj", width, self.hidden, inner, chosen * TOKEN, rank)
        return y | self.mlp(f"{place}.shared_experts" if is_new else f"{place}.shared_mlp", shared * width, x)

    def mlp(self, place: str, width: int, x: bool, unit: np.ndarray = TOKEN) -> bool:
        y = self.linear(f"{place}.gate_proj", self.hidden, width, x, unit)
        y |= self.linear(f"{place}.up_proj", self.hidden, width, x, unit)
        return self.linear(f"{place}.down_proj", width, self.hidden, y, unit)
