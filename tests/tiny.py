"""Tiny tokenizers and models, as directories: each is in a generation's or a chat format's own manner."""

import json
import shutil
from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
ASSETS = TESTS / "assets"
SHARED = REPO.parent / "shared"
EXAMPLE_TOKENIZER = REPO / "train" / "example" / "tokenizer"


# ------------------------------------------------------------------------------------------------------- tokenizers


def make_hy_tokenizer(out: Path) -> Path:
    """Writes a tokenizer directory with code of its own and the real vocabulary (128,167 tokens); needs ../shared."""
    out.mkdir(parents=True, exist_ok=True)
    for file in (*(ASSETS / "hy_tokenizer").glob("*.*"), SHARED / "data" / "hy.tiktoken"):
        # Contents only: files of a read-only folder would give a read-only copy.
        shutil.copyfile(file, out / file.name)
    return out


# What the formats of tests/assets/chat_templates call their special tokens: (begin, end of a turn, others).
FORMATS = {
    "dense": ("<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>",
              ["<｜hy_place▁holder▁no▁3｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>"]),
    "7b": ("<|startoftext|>", "<|eos|>", ["<|extra_4|>", "<|startoftext|>", "<|extra_0|>"]),
    "hy3": ("<｜hy_begin_of_sentence:test｜>", "<｜hy_eos:test｜>",
            ["<｜hy_User:test｜>", "<｜hy_Assistant:test｜>", "<｜reasoning_mode:test｜>",
             "<think:test>", "</think:test>"]),
    "mt": ("<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>",
           ["<｜hy_place▁holder▁no▁3｜>", "<｜hy_place▁holder▁no▁8｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>"]),
    "opens_think": ("<|im_start|>", "<|im_end|>", ["<think>", "</think>"]),
}  # fmt: skip


def chat_template(name: str) -> str:
    """A format's template; 7B's is that of the smaller ones with other tokens, as released."""
    file = ASSETS / "hy_tokenizer" / "chat_template.jinja"
    if name == "example":
        file = EXAMPLE_TOKENIZER / "chat_template.jinja"
    elif name != "hy":
        file = ASSETS / "chat_templates" / f"{'dense' if name == '7b' else name}.jinja"
    template = file.read_text(encoding="utf-8")
    if name == "7b":
        for old, new in zip(FORMATS["dense"][2], FORMATS["7b"][2]):
            template = template.replace(old, new)
    return template


def make_format_tokenizer(name: str, out: Path) -> Path:
    """Writes a byte-level BPE tokenizer, learned from the READMEs, with a format's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    begin, end, others = FORMATS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=list(dict.fromkeys([begin, end, "<pad>", *others])),
    )  # fmt: skip
    tokenizer.train([str(REPO / "README.md"), str(REPO / "README_CN.md")], trainer)
    options = {"bos_token": begin, "eos_token": end, "pad_token": "<pad>", "chat_template": chat_template(name)}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(out)
    return Path(out)


# ----------------------------------------------------------------------------------------------------------- models


def make_model_dir(
    kind: str,
    tokenizer_dir: Path,
    out: Path,
    dtype: str = "float32",
    tie: bool = True,
    vocab_size: int | None = None,
    seed: int = 0,
    fused: bool = False,
    **config,
) -> Path:
    """Writes a randomly initialised model with the tokenizer beside it, and returns `out`.

    Args:
        kind: `dense` (HunYuanDenseV1), `moe` (HunYuanMoEV1: 4 experts, top-2, one shared expert), `hy_v3` or `hy_v4`
            (one dense and one MoE layer; Hy4 with a sparse indexer that keeps 8 tokens), `remote` or `remote_cla`
            (assets/hunyuan_remote, as the first A13B and as Large).
        tokenizer_dir: its files are copied; its special tokens are the model's.
        dtype: of the weights on disk, by torch's name.
        tie: whether the head is the embedding.
        vocab_size: rows of the embedding; default the tokenizer's length.
        fused: lay the routed experts out as one tensor a layer, as Tencent's converter does for Hy3.
        config: further or other keys of the model's configuration. `head_dim` follows `hidden_size` and
            `num_attention_heads` unless given.
    """
    import torch
    import transformers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=True)
    keys = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "vocab_size": vocab_size or len(tokenizer),
        "tie_word_embeddings": tie,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "eod_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "moe":
        keys |= {"num_experts": 4, "moe_topk": 2}
    elif kind == "hy_v3":
        keys |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    elif kind == "hy_v4":
        keys |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "q_lora_rank": 32}
        keys |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32, "hc_mult": 2}
        keys |= {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2}
    keys |= config
    keys.setdefault("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    if kind in ("remote", "remote_cla"):
        return make_remote_dir(kind, keys, tokenizer_dir, out, dtype, seed)
    name = {"dense": "HunYuanDenseV1", "moe": "HunYuanMoEV1", "hy_v3": "HYV3", "hy_v4": "HYV4"}[kind]
    config_class, model_class = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**keys))
    model.to(getattr(torch, dtype)).save_pretrained(out)
    if fused:
        fuse_experts(Path(out))
    for file in Path(tokenizer_dir).iterdir():
        if file.is_file() and file.name != "config.json":
            shutil.copyfile(file, Path(out) / file.name)
    return Path(out)


def fuse_experts(directory: Path) -> None:
    """Lay the four routed experts of a one-file directory out as one tensor a layer."""
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(directory / "model.safetensors")
    layers = {name.split(".experts.")[0] for name in state if ".experts." in name}
    for layer in sorted(layers):
        gate, up, down = (
            torch.stack([state.pop(f"{layer}.experts.{expert}.{name}.weight") for expert in range(4)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        state |= {f"{layer}.experts.gate_up_proj": torch.cat([gate, up], dim=1), f"{layer}.experts.down_proj": down}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def make_remote_dir(kind: str, keys: dict, tokenizer_dir: Path, out: Path, dtype: str, seed: int) -> Path:
    """A directory with code of its own (assets/hunyuan_remote): A13B's architecture, or Large's (top-1, CLA)."""
    import torch
    from safetensors.torch import save_file

    out = Path(out)
    out.mkdir(parents=True)
    for folder in (tokenizer_dir, ASSETS / "hunyuan_remote"):
        for file in Path(folder).iterdir():
            if file.is_file() and file.name != "config.json":
                shutil.copyfile(file, out / file.name)
    layers = keys["num_hidden_layers"]
    moe = {"moe_topk": [2] * layers, "num_shared_expert": [1] * layers, "use_cla": False, "cla_share_factor": 2}
    if kind == "remote_cla":
        moe = {"moe_topk": 1, "num_shared_expert": 1, "use_cla": True, "cla_share_factor": 2}
    rope = {"rope_theta": 10000.0, "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}}
    keys = (
        {"use_qk_norm": True, "num_experts": 4, "use_mixed_mlp_moe": True, "initializer_range": 0.02}
        | rope
        | moe
        | keys
    )
    code = {"AutoConfig": "configuration_hunyuan.HunYuanConfig"}
    code |= {"AutoModelForCausalLM": "modeling_hunyuan.HunYuanMoEV1ForCausalLM"}
    config = keys | {"model_type": "hunyuan", "architectures": ["HunYuanMoEV1ForCausalLM"], "auto_map": code}
    config |= {"torch_dtype": dtype, "transformers_version": "4.41.2", "rms_norm_eps": 1e-5}
    (out / "config.json").write_text(json.dumps(config, indent=2))

    h, f, e, v = keys["hidden_size"], keys["intermediate_size"], keys["num_experts"], keys["vocab_size"]
    d = h // keys["num_attention_heads"]
    mlp = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
    shapes = {"model.embed_tokens": (v, h), "model.norm": (h,)}
    if not keys["tie_word_embeddings"]:
        shapes["lm_head"] = (v, h)
    for i in range(layers):
        layer = {"input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (h, h)}
        layer |= {"self_attn.o_proj": (h, h), "self_attn.query_layernorm": (d,), "self_attn.key_layernorm": (d,)}
        if not keys["use_cla"] or i % keys["cla_share_factor"] == 0:
            layer |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (d * keys["num_key_value_heads"], h))
        layer |= {"mlp.gate.wg": (e, h)} | {f"mlp.shared_mlp.{k}": s for k, s in mlp.items()}
        layer |= {f"mlp.experts.{x}.{k}": s for x in range(e) for k, s in mlp.items()}
        shapes |= {f"model.layers.{i}.{k}": s for k, s in layer.items()}
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"{k}.weight": torch.ones(s)
        if len(s) == 1
        else torch.randn(s, generator=generator) * keys["initializer_range"]
        for k, s in shapes.items()
    }
    half = {k: t if ".wg." in k else t.to(getattr(torch, dtype)) for k, t in state.items()}  # the router stays fp32
    save_file(half, out / "model.safetensors", metadata={"format": "pt"})
    return out
