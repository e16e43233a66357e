"""A model with random weights, in the architecture that the flags describe (no --model_name_or_path).

Refused (exit code 2): what transformers' hunyuan_v1_dense and hunyuan_v1_moe cannot express.
"""

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sft.arguments import ModelArguments
from sft.messages import Refused, choice


def check_architecture(args: ModelArguments) -> None:
    """Refuse architecture flags that hunyuan_v1_dense and hunyuan_v1_moe cannot express."""
    moe = args.num_experts > 1
    kind = "hunyuan_v1_moe" if moe else "hunyuan_v1_dense"
    width, heads = args.intermediate_size, args.num_attention_heads
    for wrong, flag, why in (
        (args.use_cla, "use_cla", "has no cross-layer attention"),
        (args.use_qk_norm is False, "use_qk_norm false", "always normalises queries and keys"),
        (moe and args.num_shared_expert not in (None, 1), "num_shared_expert", "has one shared expert"),
        (moe and args.use_mixed_mlp_moe is False, "use_mixed_mlp_moe false", "has a shared expert"),
        (args.moe_intermediate_size not in (None, width), "moe_intermediate_size", "has experts of intermediate_size"),
        (args.moe_layer_num_skipped != 0, "moe_layer_num_skipped", "has experts in every layer"),
        (args.moe_topk > args.num_experts, "moe_topk", f"has only {args.num_experts} experts to choose from"),
        (args.hidden_size % heads, "hidden_size", f"needs a multiple of {heads} heads"),
        (heads % (args.num_key_value_heads or 1), "num_key_value_heads", "shares each among as many heads"),
    ):
        if wrong:
            raise Refused(f"--{flag}: {kind}, which is built from the architecture flags, {why}")


def build_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, **options) -> PreTrainedModel:
    """The model; `options` (dtype, attn_implementation) as from_config takes them."""
    vocab_size = args.vocab_size or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise Refused(f"--vocab_size {vocab_size}: the tokenizer has {len(tokenizer)} tokens")
    shape = dict(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads,
        head_dim=args.hidden_size // args.num_attention_heads,
        max_position_embeddings=args.max_position_embeddings or args.model_max_length,
        tie_word_embeddings=args.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = "hunyuan_v1_dense"
    if args.num_experts > 1:
        kind, shape = "hunyuan_v1_moe", shape | dict(num_experts=args.num_experts, moe_topk=args.moe_topk)
    config = AutoConfig.for_model(kind, **shape)
    why = f"built from the architecture flags, with random weights: --num_experts {args.num_experts}"
    choice("model", config.model_type, why)
    return AutoModelForCausalLM.from_config(config, **options)
