"""Names of tensors as the models are released: found in transformers' classes, and saved by the same names."""

import pytest
import torch
import transformers

from sft.model.weight_files import names_in_model
from sft.training.save import with_base_names

SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
ENDS = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
MLP = [f"{name}_proj.weight" for name in ("gate", "up", "down")]
EXPERTS = [f"mlp.experts.{expert}.{name}" for expert in range(2) for name in MLP]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def layers(*groups):
    return ENDS + [f"model.layers.{number}.{name}" for number, names in enumerate(groups) for name in names]


A13B = [*NORMS, *ATTENTION, "self_attn.query_layernorm.weight", "self_attn.key_layernorm.weight", "mlp.gate.wg.weight"]
A13B += [f"mlp.shared_mlp.{name}" for name in MLP] + EXPERTS
HY3 = [*NORMS, *ATTENTION, "self_attn.q_norm.weight", "self_attn.k_norm.weight"]
HY3_MOE = ["mlp.router.gate.weight", "mlp.expert_bias", *(f"mlp.shared_mlp.{name}" for name in MLP)]
OF_THE_CLASS = ["mlp.gate.weight", "mlp.e_score_correction_bias", *(f"mlp.shared_experts.{name}" for name in MLP)]
INDEXER = ["k_norm.bias", "k_norm.weight", "weights_proj.weight", "wk.weight", "wq_b.weight"]
HY4 = [*NORMS, *(f"self_attn.indexer.{name}" for name in INDEXER), "self_attn.learnable_sink_param"]
HY4 += [f"self_attn.{name}.weight" for name in ("kv_a_layernorm", "kv_a_proj_with_mqa", "kv_b_proj", "linear_gate")]
HY4 += [f"self_attn.{name}.weight" for name in ("o_proj", "q_a_layernorm", "q_a_proj", "q_b_proj")]
HY4 += [f"hc_{part}_layer.hc_pre.hc_{name}" for part in ("attn", "mlp") for name in ("base", "fn", "scale")]
HY4_MOE = ["mlp.gate.weight", "mlp.gate.e_score_correction_bias", *(f"mlp.shared_experts.{name}" for name in MLP)]
HY4_HEAD = [f"model.hc_head.hc_head_{name}" for name in ("base", "fn", "scale")]

RELEASED = {
    "A13B": ("HunYuanMoEV1", {"num_experts": 2, "moe_topk": [1, 1]}, layers(A13B, A13B)),
    "Hy3": ("HYV3", {}, layers(HY3 + [f"mlp.{n}" for n in MLP], HY3 + HY3_MOE + EXPERTS)),
    "Hy3, fused": ("HYV3", {}, layers(HY3 + [f"mlp.{n}" for n in MLP], HY3 + HY3_MOE + FUSED)),
    "Hy3, by the names of the class": (
        "HYV3",
        {},
        layers(HY3 + [f"mlp.{n}" for n in MLP], HY3 + OF_THE_CLASS + FUSED),
    ),
    "Hy4": ("HYV4", {}, layers(HY4 + [f"mlp.{n}" for n in MLP], HY4 + HY4_MOE + FUSED) + HY4_HEAD),
}
MORE = {
    "HunYuanMoEV1": {},
    "HYV3": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
    "HYV4": {
        "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "hc_mult": 2,
        "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("loaded", ["as made", "under ZeRO-3"])
@pytest.mark.parametrize("name", RELEASED)
def test_saved_by_the_names_of_the_files(name, loaded):
    cls, config, names = RELEASED[name]
    config = getattr(transformers, f"{cls}Config")(**SIZES | MORE[cls] | config)
    model = getattr(transformers, f"{cls}ForCausalLM")(config)
    if loaded == "under ZeRO-3":  # there every conversion is remembered, used or not
        from transformers.conversion_mapping import get_model_conversion_mapping

        model._weight_conversions = get_model_conversion_mapping(model)
    found = names_in_model(model, names)
    assert found.keys() == model.state_dict().keys()
    stored = {key: files[0] for key, files in found.items() if len(files) == 1}
    saved = with_base_names(model, model.state_dict(), stored)
    assert sorted(saved) == sorted(names)
    if "experts.1.up_proj.weight" in " ".join(names):
        layer = model.model.layers[1].mlp.experts
        assert torch.equal(saved["model.layers.1.mlp.experts.1.up_proj.weight"], layer.gate_up_proj[1].chunk(2)[1])
