"""Safetensors files: which tensors they hold, from their headers alone, and what transformers' class calls them.

Refuses (exit code 2) files that are missing, cut, or not as their index says, and experts that cannot be stacked.
"""

import contextlib
import copy
import math
import os
import re
import shlex
from collections import Counter, namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sft.messages import Refused, first_few, read_json

INDEX = "model.safetensors.index.json"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors headers spell them
BIN_INDEX = "pytorch_model.bin.index.json"
CONVERT = f"cd {shlex.quote(str(Path(__file__).parents[2]))} && python -m sft.model.to_safetensors"

Stored = namedtuple("Stored", "file shape dtype nbytes")  # a tensor, as its file's header describes it


def open_tensors(path: Path) -> Any:
    """A safetensors file, its header checked against its size; refuses one that is missing, cut or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        why = f"not a whole safetensors file ({error})" if path.exists() else "missing"
        raise Refused(f"{path}: {why}; fetch or save it again") from None


def read_headers(directory: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """(index, {name: Stored} file by file) of a directory's weights; no index is {}."""
    index: dict[str, Any] = {}
    names_of: dict[str, set[str]] = {"model.safetensors": set()}
    if not (directory / "model.safetensors").is_file():  # loaders, too, look for it first
        if not (directory / INDEX).is_file():
            old = any(directory.glob("pytorch_model*.bin"))
            path = shlex.quote(str(directory.resolve()))
            advice = f". Convert its pytorch_model*.bin: {CONVERT} {path} NEW_DIR" if old else ""
            raise Refused(f"{directory}: holds no model.safetensors and no {INDEX}{advice}")
        index, names_of = read_json(directory / INDEX), {}
        for name, file in index.get("weight_map", {}).items():
            names_of.setdefault(file, set()).add(name)
    tensors = {}
    for file, listed in sorted(names_of.items()):
        handle = open_tensors(directory / file)
        absent = sorted(listed - set(handle.keys()))
        if absent or Path(file).name != file:
            why = f"lists what is not in {file}: {first_few(absent)}; fetch or save both again"
            raise Refused(f"{directory / INDEX}: {why}")
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            tensors[name] = describe(handle, name, file)
    check_experts(directory, tensors)
    return index, tensors


def describe(handle: Any, name: str, file: str) -> Stored:
    """A tensor of an opened file; read only where its dtype is none that a model is trained in."""
    part = handle.get_slice(name)
    shape, dtype = tuple(part.get_shape()), part.get_dtype()
    if dtype in DTYPES:
        return Stored(file, shape, dtype, DTYPES[dtype].itemsize * math.prod(shape))
    return Stored(file, shape, dtype, handle.get_tensor(name).nbytes)


def check_experts(directory: Path, tensors: dict[str, Stored]) -> None:
    """Refuse experts that differ in shape from the others of their layer: they could not be stacked."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, stored in tensors.items():
        layer = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
        if layer != name:
            layers.setdefault(layer, {})[name] = stored.shape
    for shapes in layers.values():
        usual = Counter(shapes.values()).most_common(1)[0][0]
        odd = [f"{name} {list(shape)}" for name, shape in shapes.items() if shape != usual]
        if odd:
            raise Refused(f"{directory}: experts unlike the layer's others, {list(usual)}: {first_few(odd)}")


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


def apply_umask(directory: Path) -> None:
    """Give the safetensors files of a directory the mode that the umask says. safetensors 0.8 writes 0600, which
    another user's server cannot read; goes with the release that does not."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in directory.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # some network disks have no modes
            file.chmod(0o666 & ~umask)
