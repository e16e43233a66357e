"""The weights of a model directory, from the headers of its safetensors files: which tensors, where, of what shape and
dtype, what they are called in transformers' class, and whether a base is the one that an adapter was trained on.

Refused (exit code 2): files that are missing, cut, or not as their index says; tensors that are missing, unexpected or
misshapen: they would be trained from random values, or lost when saving; another base than the adapter's.
"""

import contextlib
import copy
import json
import math
import os
import re
from collections import Counter, namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sft.messages import Refused, note, read_json

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


def on_meta(cls: type, config: Any) -> Any:
    """A model of the class on the meta device: names and shapes, no memory."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with no_init_weights(), init_empty_weights(include_buffers=True):
        return cls(config)


def check_whole(path: str | Path, cls: type, config: Any) -> None:
    """Refuse a directory whose tensors are not those of the class, under every ZeRO stage alike and before they are
    read: under ZeRO-3 from_pretrained does not tell of what is unexpected, and of shapes on one rank only."""
    if not any(Path(path).glob("*.safetensors")):
        return
    model, tensors = on_meta(cls, config), read_tensors(Path(path))[1]
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


def fingerprint(base: Path, code: str) -> dict[str, list] | None:
    """{tensor of the class: [dtype in the file, shape in the class, first 32 values in bf16]}, the same for any layout
    of the files; only the first of the routed experts. None if there is no safetensors file. `code` is native, for
    transformers' class, or remote: the directory's class has the names of the files, and its code is not run."""
    if not any(base.glob("*.safetensors")):
        return None
    config, tensors, found = read_json(base / "config.json"), read_tensors(base)[1], {}
    names = [name for name in tensors if not re.search(rf"\.experts\.[1-9]|{HARMLESS[1]}", name)]
    files, shapes = {name: [name] for name in names}, {name: tensors[name].shape for name in names}
    tied = ["lm_head.weight"] if config.get("tie_word_embeddings") else []
    if code == "native":
        from sft.model.remote_code_441 import native_class

        model = on_meta(*native_class(base, config))
        files, tied = names_in_model(model, names), model.all_tied_weights_keys
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    opened = {file: open_tensors(base / file) for file in {tensors[name].file for name in names}}
    for name in sorted((files.keys() & shapes.keys()) - set(tied)):
        parts, values = sorted(files[name]), []  # sorted: an expert's gate comes before its up
        for part in (opened[tensors[part].file].get_slice(part) for part in parts):
            size = part.get_shape()
            rows = (math.ceil(32 / max(1, math.prod(size[place + 1 :]))) for place in range(len(size)))
            values += part[tuple(map(slice, rows))].flatten()[:32].bfloat16().tolist()
        found[name] = [tensors[parts[0]].dtype, list(shapes[name]), values[:32]]
    return found


def same_tensor(one: list, other: list) -> bool:
    """Whether two entries of fingerprints are of one tensor. Rounding to fp16 on the way to bf16 moves a value by one
    step of bf16 at most, near zero by the smallest step of fp16."""
    half, pairs = "F16" in (one[0], other[0]), zip(one[2], other[2])
    return one[1] == other[1] and all(math.isclose(*pair, rel_tol=half / 2**7, abs_tol=half / 2**24) for pair in pairs)


def record_base(model: Any, args: Any, adapter_code: str) -> bytes:
    """The content of base.json. Makes the adapter name the base that is used, as a path from any directory. Refuses a
    model of other code than `adapter_code`, which trained the resumed adapter (auto: any)."""
    inner, base = model.get_base_model(), Path(args.model_name_or_path)
    code = "native" if is_transformers_own(inner) else "remote"
    if adapter_code not in ("auto", code):
        raise Refused(f"--model_code, --trust_remote_code: allow {adapter_code} code, which trained the adapter")
    path = model.peft_config["default"].base_model_name_or_path = args.hub_id or str(base.resolve())
    record = {"path": path, "class": type(inner).__name__, "code": code, "tensors": fingerprint(base, code)}
    return json.dumps(record, separators=(",", ":")).encode()


def check_base(adapter: Path, base: Path, any_base: bool) -> str:
    """The code that an adapter was trained with, as `--model_code`; auto if it has no base.json. Refuses another base
    than it was trained on; prints a line instead with `any_base`, and if there is nothing to compare."""
    if not (adapter / "base.json").is_file():
        named = Path(read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or base)
        called = {base.name, *(part.rpartition("--")[2] for part in base.parts if part.startswith("models--"))}
        if named.resolve() != base.resolve() and (named.exists() or named.name not in called):
            note(f"warning: {adapter} has no base.json, and its adapter_config.json names another base, {named}")
        return "auto"
    record = read_json(adapter / "base.json")
    code, before, why = record.get("code", "auto"), record.get("tensors"), None
    try:
        now = fingerprint(base, code)
        if before is None or now is None:
            note(f"{base}: could not be compared with the base of {adapter}: one of them has no *.safetensors")
            return code
        differ = before.keys() ^ now.keys() | {n for n in before.keys() & now if not same_tensor(before[n], now[n])}
        why = differ and f"{len(differ)} of {len(before)} tensors differ ({some(sorted(differ))})"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        why = f"it is no {record.get('class')} ({' '.join(str(error).split())[:200]})"
    if why:
        what = f"{adapter}: {base} is not the base that it was trained on ({record.get('path')}): {why}"
        if not any_base:
            raise Refused(f"{what}. Give that base, or go on with this one (--any_base)")
        note(f"--any_base: {what}")
    return code


# ------------------------------------------------------------------------------------- the files beside the weights

# What of them is a model's. Python files are where an auto_map reaches them; config.json is written anew.
OF_A_MODEL = re.compile(
    r"(?!\.|.*\.(py|env|key|log|gz|tgz|zip|tar|bak)$)("
    r"(generation|preprocessor|processor)_config\.json|(special_tokens_map|added_tokens)\.json"
    r"|(tokenizer|vocab|merges|chat_template).*\.(json|jsonl|txt|jinja)|.*\.(tiktoken|model|vocab)"
    r"|additional_chat_templates/.*\.jinja"
    r"|(?i:(.*[-_ ])?(licen[cs]e|notice)s?([-_. ].*)?))"
)
# What is no news where it stays behind: weights, and what training and merging leave.
NOT_LISTED = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf)(\.index\.json)?|.*\.tmp-\d+|.*\.lock|log_.*\.txt|loss\.png|rng_state.*"
    r"|(config|adapter_config|base|kept_in_fp32|trainer_state|.*_results)\.json|zero_to_.*\.py|latest|runs"
    r"|(checkpoint|previous)-.*|global_step.*|additional_chat_templates"
)


def code_files(directory: Path, auto_map: dict | list) -> list[str]:
    """The Python files that an auto_map reaches, their imports included, those that are missing too."""
    values = auto_map.values() if isinstance(auto_map, dict) else auto_map
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    waiting, found = [name.split(".")[0] for name in names if isinstance(name, str) and "--" not in name], []
    if waiting:
        from transformers.dynamic_module_utils import get_relative_imports  # takes seconds to import: only here
    while waiting:
        if (file := f"{waiting.pop()}.py") not in found:
            found.append(file)
            with contextlib.suppress(OSError, UnicodeDecodeError):  # a missing one: whoever runs it refuses it
                waiting += get_relative_imports(directory / file)
    return found


def model_files(directory: Path) -> dict[str, Path]:
    """{name: path} of a model directory's files beside its weights and config.json. Prints what else is there."""
    paths = [*directory.glob("*"), *directory.glob("additional_chat_templates/*")]
    found = {name: path for path in paths if not NOT_LISTED.fullmatch(name := path.relative_to(directory).as_posix())}
    configs = [path for name in ("config.json", "tokenizer_config.json") if (path := directory / name).is_file()]
    code = {file for config in configs for file in code_files(directory, read_json(config).get("auto_map") or {})}
    kept = {n: path for n, path in found.items() if path.is_file() and (n in code or OF_A_MODEL.fullmatch(n))}
    left = sorted(found.keys() - kept.keys())
    if (directory / "adapter_config.json").exists():  # PEFT's README.md, and code that came with the adapter
        left = [name for name in left if not name.endswith((".py", "README.md"))]
    if left:
        shown = ", ".join(left[:20] + ["…"] * (len(left) > 20))
        note(f"not copied from {directory}: {shown} (not files of a model)")
    return kept


def apply_umask(directory: Path) -> None:
    """Give the safetensors files of a directory the mode that the umask says. safetensors 0.8 writes 0600, which
    another user's server cannot read; goes with the release that does not."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in directory.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # some network disks have no modes
            file.chmod(0o666 & ~umask)
