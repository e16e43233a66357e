"""Lets the code in the directories of Hunyuan-Large and the first A13B, of transformers 4.41, run on transformers 5.

What it imports and is gone is brought back, what it leaves undefined is defined, and what transformers 5 leaves
uninitialised is computed: from_pretrained builds on the meta device, where the rotary tables (non-persistent buffers,
in no file) come to nothing and stay whatever the memory held.

Where transformers' own hunyuan_v1 classes compute the same model, they are taken instead (`--model_code auto`): their
grouped experts are several times faster. Refused: a directory whose code names a file that it lacks, and
`--model_code native` for a model that these classes do not compute.
"""

import copy
import re
import sys
from pathlib import Path

import accelerate
import torch
import transformers.utils.import_utils
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils import logging

from sft.messages import Refused, choice, read_json
from sft.model.moe import first_of
from sft.model.weight_files import check_whole, code_files

LEGACY = "hunyuan"  # model_type of Hunyuan-Large and the first A13B


def brings_old_code(config: dict) -> bool:
    """Whether a config.json is that of a directory with code of transformers 4.41. A13B is published as `hunyuan` and
    as transformers' `hunyuan_v1_moe`, both times with that code beside it."""
    code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    return bool(code) and config.get("model_type") in (LEGACY, "hunyuan_v1_moe", "hunyuan_v1_dense")


def load_any(path: str | Path, model_code: str = "auto", **options) -> tuple[PreTrainedModel, dict]:
    """The model of a directory of any generation, and what from_pretrained says; its code may run, but for native."""
    config = read_json(Path(path) / "config.json")
    if brings_old_code(config):
        check_code(Path(path), config["auto_map"])
        return from_pretrained(str(path), config, model_code, **options)
    trust = model_code != "native"
    return AutoModelForCausalLM.from_pretrained(path, **options, trust_remote_code=trust, output_loading_info=True)


def from_pretrained(path: str, config: dict, model_code: str, **options) -> tuple[PreTrainedModel, dict]:
    """The model and what from_pretrained says of it.

    Args:
        config: the directory's config.json.
        model_code: auto, native or remote, as `--model_code`.
        options: for from_pretrained of the class.
    """
    if runs_own_code(config, model_code):
        why = (config["model_type"] == LEGACY and not_native(config)) or "--model_code remote"
        choice("model code", "the directory's own", why)
        cls = load_class(path, config["auto_map"])
        own = AutoConfig.from_pretrained(path, trust_remote_code=True)
        own.use_cache = False  # a cache is of a class that is gone
        check_whole(path, cls, own)
        model, info = cls.from_pretrained(path, config=own, **options, output_loading_info=True)
        fill_buffers(model)
        if model.generation_config:
            model.generation_config.use_cache = False
        return model, info
    cls, native = native_class(path, config)
    kind = cls.__name__.removesuffix("ForCausalLM")
    choice("model code", f"transformers' {kind}", "it computes the same model, faster")
    check_whole(path, cls, native)
    return cls.from_pretrained(path, config=native, **options, output_loading_info=True)


def native_class(path: str | Path, config: dict) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """transformers' own class for a directory of any generation, and its configuration."""
    if config.get("model_type") != LEGACY:
        native = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return AutoModelForCausalLM._model_mapping[type(native)], native
    experts = first_of(config.get("num_experts") or 1)
    cls = transformers.HunYuanMoEV1ForCausalLM if experts > 1 else transformers.HunYuanDenseV1ForCausalLM
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "model_type", "architectures")}
    kept["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return cls, cls.config_class(**kept | {"num_experts": experts})


def runs_own_code(config: dict, model_code: str) -> bool:
    """Whether the directory's code runs, and not transformers' class."""
    why = not_native(config) if config["model_type"] == LEGACY else None  # the others name transformers' class
    if model_code == "native" and why:
        raise Refused(f"--model_code native: transformers' classes do not compute this model: it has {why}")
    return model_code == "remote" or (model_code == "auto" and why is not None)


def not_native(config: dict) -> str | None:
    """Why transformers' hunyuan_v1 classes do not compute the model of a `hunyuan` config.json, or None: they do.

    Where they do, the old router still drops the assignments that are over an expert's capacity; they drop none.
    """

    def one(name: str):
        """The setting, which may be a list with one entry a layer, all alike."""
        values = config.get(name)
        if not isinstance(values, list):
            return values
        return values[0] if values and all(value == values[0] for value in values) else values

    rope = config.get("rope_scaling") or config.get("rope_parameters")
    moe = one("num_experts") not in (None, 1)
    for has, what in (
        (config.get("use_cla"), "cross-layer attention"),
        (config.get("use_mla"), "latent attention"),
        (not config.get("use_qk_norm"), "queries and keys that are not normalised"),
        (moe and one("moe_topk") == 1, "a top-1 router, which does not normalise its weights"),
        (isinstance(one("moe_topk"), list) or isinstance(one("num_experts"), list), "layers with different experts"),
        (moe and one("num_shared_expert") not in (None, 1), "more than one shared expert"),
        (moe and not config.get("use_mixed_mlp_moe"), "no shared expert"),
        (config.get("moe_layer_num_skipped"), "layers without experts"),
        (
            rope and not (rope.get("type", rope.get("rope_type")) == "dynamic" and rope.get("alpha")),
            "other rotary scaling",
        ),
        (config.get("add_classification_head"), "a classification head"),
        ((config.get("pretraining_tp") or 1) > 1, "sliced projections"),
    ):
        if has:
            return what
    return None


def check_code(directory: Path, auto_map: dict) -> None:
    """Refuse a directory whose `auto_map`, or a file that it names, names a file that is not there."""
    for file in code_files(directory, auto_map):
        if not (directory / file).is_file():
            raise Refused(f"{directory}: its code needs {file}, which is not there")


def load_class(path: str, auto_map: dict) -> type[PreTrainedModel]:
    """The model's class from the directory's code, made fit for transformers 5."""
    bring_back_imports()
    cls = get_class_from_dynamic_module(auto_map["AutoModelForCausalLM"], path)
    package = cls.__module__.rpartition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.startswith(package) and not hasattr(module, "logger"):
            module.logger = logging.get_logger(name)
    for base in cls.__mro__:  # a list until transformers 5: what is tied, and not to what
        if isinstance(tied := base.__dict__.get("_tied_weights_keys"), list):
            base._tied_weights_keys = dict.fromkeys(tied, "model.embed_tokens.weight")
    return add_generation_mixin_to_remote_model(cls)


def bring_back_imports() -> None:
    """`is_torch_fx_available`, which transformers 5 dropped. Goes when no model directory imports it any more."""
    if not hasattr(transformers.utils.import_utils, "is_torch_fx_available"):
        transformers.utils.import_utils.is_torch_fx_available = lambda: False


def fill_buffers(model: PreTrainedModel) -> None:
    """Give every non-persistent buffer the value that its class computes on the CPU.

    The class is built a second time, with real buffers and weights without memory, and as few layers as differ. Goes
    when from_pretrained computes such buffers itself.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = min(config.num_hidden_layers, max(1, getattr(config, "cla_share_factor", 1)))
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
            computed = dict(type(model)(config).named_buffers())
    finally:
        torch.set_default_dtype(default)
    for name, module in model.named_modules():
        for short in module._non_persistent_buffers_set:
            buffer = getattr(module, short)
            place = re.sub(r"(?<=layers\.)\d+", lambda n: str(int(n[0]) % config.num_hidden_layers), f"{name}.{short}")
            device = model.device if buffer.device.type == "meta" else buffer.device
            setattr(module, short, computed[place].to(device))
