"""Where a LoRA adapter is put: `--lora_target_modules`, meaning the same on every class.

PEFT left to itself does not do that. On hunyuan_v1_moe it takes `gate_proj`, `up_proj` and `down_proj` for the fused
experts, however they are written, and a name that matches only some of what it says is accepted without a word. So
targets are found here, module by module, and handed over in the form that lands on them.

Refused: a name that no module has, or one that gets no adapter; a tied head, because the embedding is the same weight
and nothing could be merged; experts with dropout or DoRA, which PEFT cannot do on fused weights.
"""

from collections import Counter
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from sft.arguments import ModelArguments
from sft.messages import Refused, choice, first_few
from sft.model.pretrained import load_adapter

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT_ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]  # hy_v4
REWRITTEN = ("gate_proj", "up_proj", "down_proj", "gate")  # what PEFT turns into the fused experts on hunyuan_v1_moe
FUSED = ("experts.gate_up_proj", "experts.down_proj")
PARTS = {  # of the model, by the first of these that is in a linear layer's name; the head has none
    ".indexer.": "indexer",  # gets no gradient
    ".mlp.experts.": "routed experts",
    ".shared_mlp.": "shared experts",
    ".shared_experts.": "shared experts",
    ".mlp.gate.": "router",
    ".router.": "router",
    ".self_attn.": "attention",
    ".mlp.": "MLP",
}
MEANS = {  # targets that are not the name of a module
    "all-linear": ("attention", "shared experts", "MLP"),
    "shared_mlp": ("shared experts",),
    "experts": ("routed experts",),
}
BY_NAME = ("attention", "shared experts", "MLP", "head")  # where a target that is a name may lie


def kind_of(name: str) -> str:
    """What part of the model a linear module belongs to, by its place."""
    return next((kind for part, kind in PARTS.items() if part in f".{name}."), "head")


def find_targets(model: PreTrainedModel, wanted: list[str] | None) -> set[str]:
    """The names of the modules to adapt: linear layers, and with `experts` also those that hold fused experts.

    Args:
        wanted: names, `all-linear`, `shared_mlp`, `experts`; None: the attention's projections.
    """
    kinds = {name: kind_of(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fused = [name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith(FUSED)]
    kinds |= dict.fromkeys(fused, "routed experts")
    if wanted is None:
        wanted = LATENT_ATTENTION if any(name.endswith(".kv_b_proj") for name in kinds) else ATTENTION
    names = set()
    for target in wanted:
        if target in MEANS:
            found = {n for n, kind in kinds.items() if kind in MEANS[target]}
        else:
            found = {n for n, kind in kinds.items() if kind in BY_NAME and is_named(n, target)}
        if not found:
            there = sorted({n.rpartition(".")[2] for n, kind in kinds.items() if kind not in ("router", "indexer")})
            others = {kinds.get(n, type(m).__name__) for n, m in model.named_modules() if is_named(n, target)}
            only = f"adapters are put on linear layers that are trained, not on a {first_few(sorted(others))}"
            why = only if others else "no such module"
            raise Refused(f"--lora_target_modules {target}: {why}; there are {', '.join(there)}")
        if "lm_head" in found and "lm_head.weight" in model.all_tied_weights_keys:
            why = "the head is the embedding's own weight (tie_word_embeddings): an adapter on it could not be merged"
            raise Refused(f"--lora_target_modules {target}: {why}. Leave it out")
        names |= found
    return names


def rewritten_by_peft(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Those of the linear layers that PEFT would turn into the fused experts: they are adapted by their weights, whose
    names it leaves alone."""
    return {n for n in names if model.config.model_type == "hunyuan_v1_moe" and n.rpartition(".")[2] in REWRITTEN}


def is_named(name: str, target: str) -> bool:
    """Whether a module has this name, or ends in it."""
    return f".{name}".endswith(f".{target}")


def add_adapter(model: PreTrainedModel, args: ModelArguments, adapter: Path | None) -> PreTrainedModel:
    """Freeze the model and put an adapter on it, or take up the one in the directory `adapter`."""
    from peft import LoraConfig, get_peft_model

    if adapter is not None:
        return take_up(model, args, adapter)
    names = find_targets(model, args.lora_target_modules)
    counts = Counter(map(kind_of, names))
    why = " ".join(args.lora_target_modules or ["the attention's projections"])
    choice("LoRA", ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())), why)
    # PEFT takes fused experts by the names of their weights, and leaves a weight by its own name as it is.
    fused = {name for name in names if is_named(name, "experts")}
    rewritten = rewritten_by_peft(model, names)
    parameters = [f"{name}.weight" for name in sorted(rewritten)] + (list(FUSED) if fused else [])
    for wrong, flag in ((args.lora_dropout, "--lora_dropout"), (args.use_dora, "--use_dora")):
        if parameters and wrong:
            what = "experts" if fused else "shared_mlp, on this class,"
            raise Refused(f"{flag}: PEFT cannot do it on {what}: leave it out, or them")
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        target_modules=sorted(names - rewritten - fused),  # PEFT shortens a long list
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def take_up(model: PreTrainedModel, args: ModelArguments, adapter: Path) -> PreTrainedModel:
    """The model with an adapter to train on. Refuses --lora_target_modules that mean others than it has."""
    given = args.adapter and "lora_target_modules" in args.given
    asked = find_targets(model, args.lora_target_modules) if given else None
    model = load_adapter(model, adapter, is_trainable=True)
    modules = model.get_base_model().named_modules()
    adapted = {name.removesuffix(".base_layer") for name, module in modules if hasattr(module, "lora_A")}
    if asked and asked != adapted:
        targets = " ".join(args.lora_target_modules or [])
        raise Refused(f"--lora_target_modules {targets}: not what the adapter {adapter} is on: leave the flag out")
    return model
