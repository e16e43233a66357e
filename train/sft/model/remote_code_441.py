"""Lets the code in the directories of Hunyuan-Large and the first A13B, of transformers 4.41, run on transformers 5.

What it imports and is gone is brought back, what it leaves undefined is defined, and what transformers 5 leaves
uninitialised is computed: from_pretrained builds on the meta device, where the rotary tables (non-persistent buffers,
in no file) come to nothing and stay whatever the memory held.
"""

import copy
import re
import sys
from typing import Any

import accelerate
import transformers.utils.import_utils
from transformers import AutoConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils import logging

from sft.model.directory import ModelDirectory


def load_with_own_code(directory: ModelDirectory, **options: Any) -> tuple[PreTrainedModel, dict]:
    """The model of a directory as its own code computes it, and what from_pretrained says; options for that."""
    cls = load_class(str(directory.path), directory.config["auto_map"])
    config = AutoConfig.from_pretrained(directory.path, trust_remote_code=True)
    config.use_cache = False  # a cache is of a class that is gone
    if not (directory.config.get("rope_scaling") or directory.config.get("rope_parameters")):
        config.rope_scaling = None  # transformers 5 makes a dict of null
    directory.check_tensors(cls, config)
    model, info = cls.from_pretrained(str(directory.path), config=config, **options)
    fill_buffers(model)
    if model.generation_config:
        model.generation_config.use_cache = False
    return model, info


def load_class(path: str, auto_map: dict) -> type[PreTrainedModel]:
    """The model's class from the directory's code, made fit for transformers 5."""
    bring_back_imports()
    cls = get_class_from_dynamic_module(auto_map["AutoModelForCausalLM"], path)
    package = cls.__module__.rpartition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.startswith(package) and not hasattr(module, "logger"):
            setattr(module, "logger", logging.get_logger(name))  # noqa: B010
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
    with local_torch_dtype(model.dtype), no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
        computed = dict(type(model)(config).named_buffers())
    for name, module in model.named_modules():
        for short in module._non_persistent_buffers_set:
            buffer = getattr(module, short)
            place = re.sub(r"(?<=layers\.)\d+", lambda n: str(int(n[0]) % config.num_hidden_layers), f"{name}.{short}")
            device = model.device if buffer.device.type == "meta" else buffer.device
            setattr(module, short, computed[place].to(device))
