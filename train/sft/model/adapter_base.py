"""Whether a base is the one that an adapter was trained on (base.json).

Refuses (exit code 2) another base, and code of another kind than the one that trained the adapter.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import xxhash

from sft.messages import Refused, first_few, in_one_line, note, read_json
from sft.model.directory import HARMLESS, ModelDirectory
from sft.model.generations import native_class
from sft.model.weight_files import build_on_meta, is_transformers_own, names_in_model

VALUES = 32  # of each tensor that are compared


def fingerprint(base: ModelDirectory, code: str) -> dict[str, list]:
    """{tensor of the class: [dtype in the file, shape in the class, first 32 values in bf16]}, the same for any layout
    of the files; of the routed experts the first alone. {} if there is no safetensors file.

    Args:
        code: native, for transformers' class, or remote: the directory's class has the names of the files, and its
            code is not run.
    """
    names = [name for name in base.tensors if not re.search(rf"\.experts\.[1-9]|{HARMLESS[1]}", name)]
    if code == "native" and names:
        model = build_on_meta(*native_class(base))
        files, tied = names_in_model(model, names), model.all_tied_weights_keys
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    else:
        files, shapes = {name: [name] for name in names}, {name: base.tensors[name].shape for name in names}
        tied = ["lm_head.weight"] if base.config.get("tie_word_embeddings") else []
    found = {}
    for name in sorted((files.keys() & shapes.keys()) - set(tied)):
        parts = sorted(files[name])  # sorted: an expert's gate comes before its up
        values = [value for part in parts for value in first_values(base, part)]
        found[name] = [base.tensors[parts[0]].dtype, list(shapes[name]), values[:VALUES]]
    return found


def base_digest(base: ModelDirectory) -> str | None:
    """A hash of the fingerprint, whatever dtype the files have."""
    found = fingerprint(base, "remote" if base.runs_own_code else "native")
    values = {name: entry[1:] for name, entry in found.items()}
    return xxhash.xxh3_128_hexdigest(json.dumps(values).encode()) if values else None


def first_values(base: ModelDirectory, name: str) -> list[float]:
    """The first values of a tensor in bf16, read without the rest of it."""
    part = base.opened[base.tensors[name].file].get_slice(name)
    shape = part.get_shape()
    rows = [math.ceil(VALUES / max(1, math.prod(shape[place + 1 :]))) for place in range(len(shape))]
    return part[tuple(map(slice, rows))].flatten()[:VALUES].bfloat16().tolist()


def is_same_tensor(one: list, other: list) -> bool:
    """Whether two entries of fingerprints are of one tensor. Rounding to fp16 on the way to bf16 moves a value by one
    step of bf16 at most, near zero by the smallest step of fp16."""
    by_fp16 = "F16" in (one[0], other[0])
    relative, absolute = (2**-7, 2**-24) if by_fp16 else (0, 0)
    pairs = zip(one[2], other[2])
    return one[1] == other[1] and all(math.isclose(*pair, rel_tol=relative, abs_tol=absolute) for pair in pairs)


def record_base(model: Any, base: ModelDirectory) -> bytes:
    """The content of base.json. Makes the adapter name the base that is used, as a path from any directory."""
    inner = model.get_base_model()
    code = "native" if is_transformers_own(inner) else "remote"
    path = model.peft_config["default"].base_model_name_or_path = base.base_name
    record = {"path": path, "class": type(inner).__name__, "code": code, "tensors": fingerprint(base, code)}
    return json.dumps(record, separators=(",", ":")).encode()


def check_base(adapter: Path, base: ModelDirectory, any_base: bool) -> None:
    """Refuse another base than the adapter was trained on; with `any_base`, and if there is nothing to compare, a line
    says so instead. The base is then computed by the code that trained the adapter; refused where a flag wants other
    code."""
    if not (adapter / "base.json").is_file():
        return warn_of_another_name(adapter, base.path)
    record = read_json(adapter / "base.json")
    code, trained_on = record.get("code", "auto"), record.get("tensors")
    why = None
    try:
        now = fingerprint(base, code)
        if trained_on and now:
            both = trained_on.keys() & now
            differ = trained_on.keys() ^ now.keys() | {n for n in both if not is_same_tensor(trained_on[n], now[n])}
            if differ:
                why = f"{len(differ)} of {len(trained_on)} tensors differ ({first_few(sorted(differ))})"
        else:
            note(f"{base.path}: could not be compared with the base of {adapter}: one of them has no *.safetensors")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        why = f"it is no {record.get('class')} ({in_one_line(error)})"
    if why:
        what = f"{adapter}: {base.path} is not the base that it was trained on ({record.get('path')}): {why}"
        if not any_base:
            raise Refused(f"{what}. Give that base, or go on with this one (--any_base)")
        note(f"--any_base: {what}")
    if base.model_code not in ("auto", code) and code != "auto":
        raise Refused(f"--model_code {base.model_code}: the adapter was trained with {code} code: leave the flag out")
    if code != "auto":
        base.model_code = code


def warn_of_another_name(adapter: Path, base: Path) -> None:
    """Of an adapter without base.json: warn if it names a base of another name or another directory."""
    named = Path(read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or base)
    names = {base.name, *(part.rpartition("--")[2] for part in base.parts if part.startswith("models--"))}
    if named.resolve() != base.resolve() and (named.exists() or named.name not in names):
        note(f"warning: {adapter} has no base.json, and its adapter_config.json names another base, {named}")


def named_base(adapter: Path, given: str | None, flag: str) -> Path:
    """The base's directory: the given one, else the one that the adapter names. Refuses one that is not here."""
    named = given or read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    if not named or not Path(named).is_dir():
        raise Refused(f"{adapter}: its base {named!r} is not a directory here; give {flag}")
    return Path(named)
