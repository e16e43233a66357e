"""Whose code computes a model: transformers' class, or the one that its directory brings; which files of it run.

Hunyuan-Large and the first A13B are published with code of transformers 4.41 beside them. Where transformers' own
hunyuan_v1 classes compute the same model they are taken (`--model_code auto`): their grouped experts are several times
faster.
"""

import copy
import hashlib
from pathlib import Path
from typing import Any

from sft.messages import note, read_json
from sft.model.files import code_files

LEGACY = "hunyuan"  # model_type of Hunyuan-Large and the first A13B


def why_not_native(config: dict[str, Any]) -> str | None:
    """Why transformers' hunyuan_v1 classes do not compute a config.json's model, or None: they do.

    Where they do, the old router still drops the assignments that are over an expert's capacity; they drop none.
    """
    if config["model_type"] != LEGACY:
        return None  # it names transformers' class itself
    experts, moe_topk = of_all_layers(config, "num_experts"), of_all_layers(config, "moe_topk")
    rotary = config.get("rope_scaling") or config.get("rope_parameters") or {}
    is_dynamic = rotary.get("type", rotary.get("rope_type")) == "dynamic" and rotary.get("alpha")
    is_moe = experts not in (None, 1)
    for has, what in (
        (config.get("use_cla"), "cross-layer attention"),
        (config.get("use_mla"), "latent attention"),
        (not config.get("use_qk_norm"), "queries and keys that are not normalised"),
        (is_moe and moe_topk == 1, "a top-1 router, which does not normalise its weights"),
        (isinstance(moe_topk, list) or isinstance(experts, list), "layers with different experts"),
        (is_moe and of_all_layers(config, "num_shared_expert") not in (None, 1), "more than one shared expert"),
        (is_moe and not config.get("use_mixed_mlp_moe"), "no shared expert"),
        (config.get("moe_layer_num_skipped"), "layers without experts"),
        (rotary and not is_dynamic, "other rotary scaling"),
        (config.get("add_classification_head"), "a classification head"),
        ((config.get("pretraining_tp") or 1) > 1, "sliced projections"),
    ):
        if has:
            return what
    return None


def of_all_layers(config: dict[str, Any], name: str) -> Any:
    """A setting; of a list with one entry a layer the entry if all are alike, else the list."""
    value = config.get(name)
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def native_class(directory: Any) -> tuple[Any, Any]:
    """transformers' own class for a ModelDirectory of any generation, and its configuration."""
    import transformers  # takes seconds: only here

    config = directory.config
    if config.get("model_type") != LEGACY:
        native = transformers.AutoConfig.from_pretrained(directory.path, trust_remote_code=False)
        return transformers.AutoModelForCausalLM._model_mapping[type(native)], native
    experts = of_all_layers(config, "num_experts") or 1
    cls = transformers.HunYuanMoEV1ForCausalLM if experts > 1 else transformers.HunYuanDenseV1ForCausalLM
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "model_type", "architectures")}
    kept |= {"head_dim": config["hidden_size"] // config["num_attention_heads"], "num_experts": experts}
    return cls, cls.config_class(**copy.deepcopy(kept))  # the class changes rope_scaling


def report_code(directory: Any) -> None:
    """Print which Python files of a ModelDirectory run where its model and its tokenizer are loaded, each with the
    first digits of its sha256."""
    keys = ("AutoConfig", "AutoModelForCausalLM") if directory.runs_own_code else ()
    maps: list[tuple[Path, Any]] = [(directory.path, {key: directory.auto_map.get(key) for key in keys})]
    if directory.tokenizer_trusted:
        place = directory.tokenizer_path
        for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
            auto_map = (read_json(place / name) if (place / name).is_file() else {}).get("auto_map") or {}
            maps.append((place, auto_map if isinstance(auto_map, list) else {key: auto_map.get(key)}))
    files = [place / name for place, auto_map in maps for name in code_files(place, auto_map)]
    for file in dict.fromkeys(files):
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            note(f"code that runs = {file} (sha256 {digest[:16]}; --trust_remote_code)")
