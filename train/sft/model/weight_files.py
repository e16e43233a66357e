"""Safetensors files: which tensors they hold, from their headers alone, and what transformers' class calls them.

Refuses (exit code 2) files that are missing, cut, or not as their index says.
"""

import copy
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sft.messages import Refused, first_few, read_json

INDEX = "model.safetensors.index.json"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors headers spell them
BIN_INDEX = "pytorch_model.bin.index.json"

Stored = namedtuple("Stored", "file shape dtype")  # a tensor, as its file's header describes it


def open_tensors(path: Path) -> Any:
    """A safetensors file, its header checked against its size; refuses one that is missing, cut or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        why = f"not a whole safetensors file ({error})" if path.exists() else "missing"
        raise Refused(f"{path}: {why}; fetch or save it again") from None


def read_headers(directory: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """(index, {name: Stored} file by file) of a directory's weights; no index is {}."""
    whole = (directory / "model.safetensors").is_file()  # loaders, too, look for it first
    index = {} if whole else read_json(directory / INDEX)
    places, tensors = index.get("weight_map", {}), {}
    for file in sorted(set(places.values())) or ["model.safetensors"]:
        handle = open_tensors(directory / file)
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            part = handle.get_slice(name)
            tensors[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
    absent = [n for n, file in places.items() if n not in tensors or tensors[n].file != file or "/" in file]
    if absent:
        why = f"lists what is not in {places[absent[0]]}: {first_few(absent)}; fetch or save both again"
        raise Refused(f"{directory / INDEX}: {why}")
    return index, tensors


def names_in_model(model: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """{name in the model: its names in files}; several where experts stand one by one, which transformers stacks."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    own = set(model.state_dict())
    found: dict[str, list[str]] = {}
    for name in names:
        renamed = name if name in own else rename_source_key(name, renamings, converters)[0]
        found.setdefault(renamed, []).append(name)
    return found


def build_on_meta(cls: type, config: Any) -> Any:
    """A model of the class on the meta device: names and shapes, no memory."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with no_init_weights(), init_empty_weights(include_buffers=True):
        return cls(config)


def is_transformers_own(module: Any) -> bool:
    """Whether a model or a part of it is of transformers' own classes, and not code that a directory brings."""
    return type(module).__module__.startswith("transformers.models.")
