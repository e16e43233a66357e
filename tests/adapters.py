"""Tiny bases of every architecture and adapters that fit them, for the tests of merging."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "hy_v4": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "mlp_layer_types": ["dense", "sparse"], "layer_types": ["indexed_attention"] * 2, "index_topk": 64,
        "index_head_dim": 16, "index_n_heads": 2, "indexer_types": ["full", "shared"],
    },
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BOTH = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
SHARED = [f"shared_mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]


def make_base(path: Path, kind: str = "hunyuan_v1_dense", tied: bool = False, dtype: str = "float32", **options):
    """A tiny random model of `kind` with a few files beside it; options of save_pretrained."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, tie_word_embeddings=tied, **SIZES | EXPERTS[kind])
    model = AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(path, **options)
    for file in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (path / file).write_text(f"the base's {file}")
    return path


def make_adapter(path: Path, base: Path, **options) -> Path:
    """A PEFT adapter of `base` with random lora_B (and magnitude)."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(model, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    model.save_pretrained(path)
    return path


def logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 43)[None] % 64).logits


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
