"""The weights of a model directory, from the headers of its safetensors files: which tensors, where, of what shape and
dtype, and what they are called in transformers' class.

Refused (exit code 2): files that are missing, cut, or not as their index says; tensors that are missing, unexpected or
misshapen: they would be trained from random values, or lost when saving.
"""

import copy
import math
import re
from collections import Counter, namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from console import Refused, read_json

INDEX = "model.safetensors.index.json"
# Unexpected, and no harm: a tied head may stand in the file as well (ZeRO-2 writes it), and old files hold the rotary
# frequencies, which are computed.
HARMLESS = (r"^lm_head\.weight$", r"rotary_emb\.inv_freq$")
# The router's correction of Hy3 and Hy4, by both its names: fp32 in any base.
CORRECTION_BIAS = ("e_score_correction_bias", "expert_bias")
STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors headers spell them

Stored = namedtuple("Stored", "file shape dtype nbytes")  # a tensor, as its file's header tells it


def some(items: list[str]) -> str:
    """The first few of a list, for a message."""
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def is_transformers_own(module: Any) -> bool:
    """Whether a model or a part of it is of transformers' own classes, and not code that a directory brings."""
    return type(module).__module__.startswith("transformers.models.")


def open_tensors(path: Path) -> Any:
    """A safetensors file, its header checked against its size; refuses one that is missing, cut or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        why = f"not a whole safetensors file ({error})" if path.exists() else "missing"
        raise Refused(f"{path}: {why}; fetch or save it again") from None


def read_tensors(directory: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """(index, {name: Stored} file by file) of a model directory; no index is {}."""
    index, listed = {}, {"model.safetensors": set()}
    if not (directory / "model.safetensors").is_file():  # loaders, too, look for it first
        if not (directory / INDEX).is_file():
            raise Refused(
                f"{directory}: holds no model.safetensors and no {INDEX}. Convert pytorch_model.bin with "
                "AutoModelForCausalLM.from_pretrained(BASE, dtype='auto').save_pretrained(NEW) and copy the tokenizer "
                "there"
            )
        index, listed = read_json(directory / INDEX), {}
        for name, file in index.get("weight_map", {}).items():
            listed.setdefault(file, set()).add(name)
    tensors = {}
    for file, names in sorted(listed.items()):
        handle = open_tensors(directory / file)
        held = handle.keys()
        if (absent := sorted(names - set(held)) if index else []) or Path(file).name != file:
            why = f"lists what is not in {file}: {some(absent)}; fetch or save both again"
            raise Refused(f"{directory / INDEX}: {why}")
        for name in held:
            part = handle.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            size = STORED[dtype].itemsize * math.prod(shape) if dtype in STORED else handle.get_tensor(name).nbytes
            tensors[name] = Stored(file, shape, dtype, size)
    check_experts(directory, tensors)
    return index, tensors


def check_experts(directory: Path, tensors: dict[str, Stored]) -> None:
    """Refuse experts that differ in shape from the others of their layer: they could not be stacked."""
    alike: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, stored in tensors.items():
        if (general := re.sub(r"\.experts\.\d+\.", ".experts.*.", name)) != name:
            alike.setdefault(general, {})[name] = stored.shape
    for shapes in alike.values():
        if len(counts := Counter(shapes.values())) > 1:
            usual = counts.most_common(1)[0][0]
            odd = [f"{name} {list(shape)}" for name, shape in shapes.items() if shape != usual]
            raise Refused(f"{directory}: experts unlike the layer's others, {list(usual)}: {some(odd)}")


def names_in_model(model: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """{name in the model: its names in files}; several where experts stand one by one, which transformers stacks."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    own, found = set(model.state_dict()), {}
    for name in names:
        renamed = name if name in own else rename_source_key(name, renamings, converters)[0]
        found.setdefault(renamed, []).append(name)
    return found


def check_whole(path: str | Path, cls: type, config: Any) -> None:
    """Refuse a directory whose tensors are not those of the class, under every ZeRO stage alike and before they are
    read: under ZeRO-3 from_pretrained does not tell of what is unexpected, and of shapes on one rank only."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    if not any(Path(path).glob("*.safetensors")):
        return
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with no_init_weights(), init_empty_weights(include_buffers=True):
        model = cls(config)
    tensors = read_tensors(Path(path))[1]
    files, shapes = names_in_model(model, tensors), {name: tuple(t.shape) for name, t in model.state_dict().items()}
    ignored = [*HARMLESS, *(model._keys_to_ignore_on_load_unexpected or ())]
    odd = {"missing": sorted(shapes.keys() - files.keys() - set(model.all_tied_weights_keys))}
    odd["unexpected"] = [
        name
        for key in sorted(files.keys() - shapes.keys())
        for name in files[key]
        if not any(re.search(pattern, name) for pattern in ignored)
    ]
    odd["mismatched"] = []
    for key in sorted(shapes.keys() & files.keys()):
        stored = [tensors[name].shape for name in files[key]]
        if sum(map(math.prod, stored)) != math.prod(shapes[key]) or (len(stored) == 1 and stored[0] != shapes[key]):
            odd["mismatched"].append(key)
    for kind, names in odd.items():
        if names:
            raise Refused(f"--model_name_or_path {path}: {len(names)} weights are {kind}: {some(names)}")
