"""The weights of a model directory, from the headers of its safetensors files: which tensors, where, of what shape and
dtype. Refused (exit code 2): files that are missing, cut, or not as their index says."""

import math
import re
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from console import Refused, read_json

INDEX = "model.safetensors.index.json"
STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors headers spell them

Stored = namedtuple("Stored", "file shape dtype nbytes")  # a tensor, as its file's header tells it


def some(items: list[str]) -> str:
    """The first few of a list, for a message."""
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


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
        odd = sorted(names.symmetric_difference(held)) if index else []
        if odd or Path(file).name != file:
            raise Refused(
                f"{directory / INDEX}: does not list what is in {file}: {some(odd)}; fetch or save both again"
            )
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
