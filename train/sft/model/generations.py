"""Whose code computes a model: transformers' class, or the one that its directory brings; which files of it run.

Hunyuan-Large and the first A13B are published with code of transformers 4.41 beside them. Where transformers' own
hunyuan_v1 classes compute the same model they are taken (`--model_code auto`): their grouped experts are several times
faster. Refuses `--model_code native` for a model that these classes do not compute.
"""

import copy
import hashlib
from pathlib import Path
from typing import Any

from sft.messages import Refused, note, read_json
from sft.model.files import code_files

LEGACY = "hunyuan"  # model_type of Hunyuan-Large and the first A13B
ROTARY_OF_OUR_CLASSES = "dynamic"  # with alpha


def brings_old_code(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a directory with code of transformers 4.41. A13B is published as `hunyuan` and
    as transformers' `hunyuan_v1_moe`, both times with that code beside it."""
    code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    return bool(code) and config.get("model_type") in (LEGACY, "hunyuan_v1_moe", "hunyuan_v1_dense")


def runs_own_code(config: dict[str, Any], model_code: str) -> bool:
    """Whether the old code of a directory runs, and not transformers' class.

    Args:
        config: the directory's config.json; brings_old_code(config) holds.
        model_code: auto, native or remote, as `--model_code`.
    """
    why = why_not_native(config)
    if model_code == "native" and why:
        raise Refused(f"--model_code native: transformers' classes do not compute this model: it has {why}")
    return model_code == "remote" or (model_code == "auto" and why is not None)


def why_not_native(config: dict[str, Any]) -> str | None:
    """Why transformers' hunyuan_v1 classes do not compute a config.json's model, or None: they do.

    Where they do, the old router still drops the assignments that are over an expert's capacity; they drop none.
    """
    if config["model_type"] != LEGACY:
        return None  # it names transformers' class itself
    experts, moe_topk = same_in_all_layers(config, "num_experts"), same_in_all_layers(config, "moe_topk")
    shared = same_in_all_layers(config, "num_shared_expert")
    rotary = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rotary.get("type", rotary.get("rope_type"))
    is_moe = experts not in (None, 1)
    for has, what in (
        (config.get("use_cla"), "cross-layer attention"),
        (config.get("use_mla"), "latent attention"),
        (not config.get("use_qk_norm"), "queries and keys that are not normalised"),
        (is_moe and moe_topk == 1, "a top-1 router, which does not normalise its weights"),
        (isinstance(moe_topk, list) or isinstance(experts, list), "layers with different experts"),
        (is_moe and shared not in (None, 1), "more than one shared expert"),
        (is_moe and not config.get("use_mixed_mlp_moe"), "no shared expert"),
        (config.get("moe_layer_num_skipped"), "layers without experts"),
        (rotary and not (kind == ROTARY_OF_OUR_CLASSES and rotary.get("alpha")), "other rotary scaling"),
        (config.get("add_classification_head"), "a classification head"),
        ((config.get("pretraining_tp") or 1) > 1, "sliced projections"),
    ):
        if has:
            return what
    return None


def same_in_all_layers(config: dict[str, Any], name: str) -> Any:
    """A setting; of a list with one entry a layer the entry if all are alike, else the list."""
    values = config.get(name)
    if isinstance(values, list) and values and all(value == values[0] for value in values):
        return values[0]
    return values


def code_that_runs(directory: Any, tokenizer: bool = True) -> list[Path]:
    """The Python files of a ModelDirectory that run where its model is loaded, and its tokenizer."""
    keys = ["AutoConfig", "AutoModelForCausalLM"] if directory.runs_own_code else []
    if directory.may_run_code and not directory.brings_old_code:
        keys = ["AutoConfig", *keys]  # also where transformers knows the model
    maps: list[tuple[Path, Any]] = [(directory.path, {key: directory.auto_map.get(key) for key in keys})]
    if tokenizer and directory.tokenizer_trusted:
        place = directory.tokenizer_path
        for file, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
            auto_map = (read_json(place / file) if (place / file).is_file() else {}).get("auto_map") or {}
            maps.append((place, auto_map if isinstance(auto_map, list) else {key: auto_map.get(key)}))
    files = dict.fromkeys(place / file for place, auto_map in maps for file in code_files(place, auto_map))
    return [file for file in files if file.is_file()]


def report_code(directory: Any, tokenizer: bool = True) -> None:
    """Print which Python files of a ModelDirectory run, each with the first digits of its sha256."""
    for file in code_that_runs(directory, tokenizer):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        note(f"code that runs = {file} (sha256 {digest[:16]}; --trust_remote_code)")


def native_class(path: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' own class for a directory of any generation, and its configuration."""
    import transformers  # takes seconds: only here

    if config.get("model_type") != LEGACY:
        native = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        return transformers.AutoModelForCausalLM._model_mapping[type(native)], native
    experts = config.get("num_experts") or 1
    experts = experts[0] if isinstance(experts, list) else experts
    cls = transformers.HunYuanMoEV1ForCausalLM if experts > 1 else transformers.HunYuanDenseV1ForCausalLM
    config = copy.deepcopy(config)  # the class changes rope_scaling
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "model_type", "architectures")}
    kept["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return cls, cls.config_class(**kept | {"num_experts": experts})
