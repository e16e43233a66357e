"""The arithmetic and the files of a merge: which tensors an adapter changes, by how much, and into which files."""

import argparse
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from sft.messages import Refused, choice, read_json
from sft.model.weight_files import (
    CORRECTION_BIAS,
    INDEX,
    STORED,
    Stored,
    open_tensors,
    read_tensors,
    some,
)

DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}  # as --save_dtype and as safetensors headers spell them
# What transformers names otherwise than the files of Hy3 and Hy4 do: (in the adapter, in the base).
RENAMED = ((".mlp.shared_experts.", ".mlp.shared_mlp."), (".gate_proj", ".linear_gate"))
# Keys of adapter_config.json that make more of it than W + scaling * B @ A; so do other initialisations (PiSSA ...).
BEYOND_LORA = (
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "lora_bias",
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
)
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")

# What it gains: keys of the adapter, a factor; of stacked experts how many there are, which one the tensor is (None:
# all, fused), which rows of their lora_B are its own.
Update = namedtuple("Update", "lora_A lora_B magnitude scaling experts expert rows", defaults=(0, None, slice(None)))


def read_base(base: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Stored]]:
    """(config, index, {name: Stored} file by file) of a model directory, from headers alone; no index is {}. Refuses a
    directory that is quantised, not safetensors or not whole."""
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise Refused(f"{base / 'config.json'}: has a quantization_config; a quantised base cannot be merged into")
    index, tensors = read_tensors(base)
    if index and (unlisted := sorted(tensors.keys() - index["weight_map"].keys())):
        file = tensors[unlisted[0]].file
        raise Refused(f"{base / INDEX}: does not list what is in {file}: {some(unlisted)}; fetch or save both again")
    return config, index, tensors


def plan_updates(adapter: Path, tensors: dict[str, Stored], tied: bool) -> tuple[Any, dict[str, Update]]:
    """(the adapter's opened file, {base tensor: Update}); refuses unless every tensor of the adapter has its place."""
    settings, file = read_json(adapter / "adapter_config.json"), open_tensors(adapter / "adapter_model.safetensors")
    merged_too = (".weight", "experts.gate_up_proj", "experts.down_proj")
    settings["target_parameters"] = [p for p in settings.get("target_parameters") or [] if not p.endswith(merged_too)]
    beyond = [key for key in BEYOND_LORA if settings.get(key)]
    beyond += ["init_lora_weights"] if settings.get("init_lora_weights", True) not in PLAIN_INITS else []
    if beyond:
        found = some([f"{key}={settings[key]}" for key in beyond])
        raise Refused(
            f"{adapter / 'adapter_config.json'}: {found}: only LoRA and DoRA on linear layers and experts are merged; "
            "use this adapter with PEFT on top of its base"
        )
    keys = file.keys()
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    if not any(math.prod(shape) for shape in shapes.values()):
        raise Refused(f"{adapter}: the adapter holds no tensors, or only empty ones; save it again")

    def setting(name: str, patterns: str, module: str) -> float:  # as PEFT resolves it, default included
        matching = (key for key in settings.get(patterns) or {} if re.match(rf"(.*\.)?({key})$", module))
        return next((settings[patterns][key] for key in matching), settings.get(name, 8))

    updates, unfit, known, dora = {}, [], set(), bool(settings.get("use_dora"))
    for lora_A in (key for key in shapes if key.endswith(".lora_A.weight")):
        prefix = lora_A.removesuffix(".lora_A.weight")
        lora_B, magnitude = f"{prefix}.lora_B.weight", f"{prefix}.lora_magnitude_vector" if dora else None
        known |= {lora_A, lora_B, magnitude, f"{prefix}.base_layer.weight"}  # PEFT saves a head's own weight as well
        module = prefix.removeprefix("base_model.model.")
        names = [f"{module}.weight", *(f"{module.replace(*pair)}.weight" for pair in RENAMED)]
        name = next((name for name in names if name in tensors), names[0])
        rank, delta = setting("r", "rank_pattern", module), (*shapes.get(lora_B, (0,))[:1], *shapes[lora_A][1:])
        alpha = setting("lora_alpha", "alpha_pattern", module)
        scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        if re.search(r"\.experts(\.base_layer)?$", module):
            experts, parts = expert_parts(module.removesuffix(".base_layer"), delta, tensors)
            if not parts or (shapes[lora_A][0], *shapes[lora_B][1:]) != (rank * experts, rank * experts):
                unfit.append(f"{module} ({list(delta)}, rank {rank}: the base has no such experts)")
            for name, expert, rows in parts:
                updates[name] = Update(lora_A, lora_B, None, scaling, experts, expert, rows)
        elif name not in tensors or (tied and name == "lm_head.weight"):
            unfit.append(f"{module} (the base has no such weight{', it is tied' if 'lm_head' in name else ''})")
        elif tensors[name].dtype not in STORED or tensors[name].shape != delta:
            unfit.append(f"{module} ({list(delta)}, the base has {tensors[name].dtype} {list(tensors[name].shape)})")
        elif (shapes[lora_A][0], *shapes[lora_B][1:]) != (rank, rank) or (dora and shapes.get(magnitude) != delta[:1]):
            unfit.append(f"{module} (rank or magnitude are not as adapter_config.json says)")
        else:
            updates[name] = Update(lora_A, lora_B, magnitude, scaling)
    unfit += sorted(shapes.keys() - known)
    if unfit:
        raise Refused(f"{adapter}: the adapter does not fit the base (is it another base's?): {some(unfit)}")
    if not any(file.get_tensor(update.lora_B).any() for update in updates.values()):
        print("warning: every lora_B is zero: this adapter was not trained", file=sys.stderr)
    return file, updates


def expert_parts(
    module: str, delta: tuple[int, ...], tensors: dict[str, Stored]
) -> tuple[int, list[tuple[str, int | None, slice]]]:
    """(number of experts, [(base tensor, which expert, rows of lora_B)]) of an adapter on a layer's stacked experts.

    PEFT calls what it adapts first and second by place and not by name; the shapes tell gate_up_proj from down_proj.
    In the files the experts are fused, one tensor a layer, or stand one by one.

    Args:
        delta: (rows, columns) of what one expert gains.
    """
    for fused, ones in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        if (stored := tensors.get(f"{module}.{fused}")) and stored.shape[1:] == delta:
            return stored.shape[0], [(f"{module}.{fused}", None, slice(None))]
        if (stored := tensors.get(f"{module}.0.{ones[0]}.weight")) is None:
            continue
        rows, columns = stored.shape
        if (rows * len(ones), columns) == delta:
            experts = sum(f"{module}.{expert}.{ones[0]}.weight" in tensors for expert in range(len(tensors)))
            return experts, [
                (f"{module}.{expert}.{one}.weight", expert, slice(place * rows, (place + 1) * rows))
                for expert in range(experts)
                for place, one in enumerate(ones)
            ]
    return 0, []


def plan_files(tensors: dict[str, Stored], sizes: dict[str, int], limit: int) -> list[tuple[str, list[str]]]:
    """[(file to write, its tensors)]: the base's files; one above `limit` bytes is split, all are renumbered."""
    parts, filled = [], 0
    for name, tensor in tensors.items():
        if not parts or parts[-1][0] != tensor.file or filled + sizes[name] > limit:
            parts.append((tensor.file, []))
            filled = 0
        parts[-1][1].append(name)
        filled += sizes[name]
    if len(parts) == len({file for file, _ in parts}):
        return parts
    return [(f"model-{number:05d}-of-{len(parts):05d}.safetensors", part[1]) for number, part in enumerate(parts, 1)]


def merged(
    tensor: torch.Tensor, update: Update, factor: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """The tensor with its update, computed in fp32 and rounded once to `dtype`; fused experts one by one.

    Args:
        factor: gives a tensor of the adapter in fp32.
    """
    lora_A, lora_B = factor(update.lora_A), factor(update.lora_B)
    if update.experts:  # as PEFT stacks them: A by expert and rank, B by rank and expert
        lora_A = lora_A.unflatten(0, (update.experts, -1))
        lora_B = lora_B.unflatten(1, (-1, update.experts)).permute(2, 0, 1)[:, update.rows]
        if update.expert is None:
            result = torch.empty_like(tensor, dtype=dtype)
            for expert, weight in enumerate(tensor):
                result[expert] = torch.addmm(weight.float(), lora_B[expert], lora_A[expert], alpha=update.scaling)
            return result
        lora_A, lora_B = lora_A[update.expert], lora_B[update.expert]
    weight = torch.addmm(tensor.float(), lora_B, lora_A, alpha=update.scaling)
    if update.magnitude:
        weight *= (factor(update.magnitude) / torch.linalg.norm(weight, dim=1))[:, None]
    return weight.to(dtype)


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A temporary directory beside `output`, which it becomes at the end; removed on any error or signal to stop, with
    the parents that were made for it."""
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    made = [parent for parent in output.parents if not parent.exists()]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # as under nohup

    def clean_up() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # the result is in it, or another program's files
                parent.rmdir()

    def stop(number: int, _frame: Any) -> NoReturn:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second signal must not cut the clean-up short
        clean_up()
        print(f"\nstopped by {signal.Signals(number).name}, nothing is left at {output}", file=sys.stderr, flush=True)
        os._exit(128 + number)  # not SystemExit: torch swallows what is raised within a call of its own

    try:
        for number in before:
            signal.signal(number, stop)
        temporary.mkdir(parents=True)
        yield temporary
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # whole from here on
        temporary.rename(output)
    finally:
        clean_up()
        for number, handler in before.items():
            signal.signal(number, handler)


def logits(model_path: Path, model_code: str, adapter: Path | None = None) -> torch.Tensor:
    """fp32 logits (1, 32, vocabulary) of a model directory on fixed tokens, with the adapter as PEFT applies it."""
    from sft.model.remote_code_441 import load_any  # takes seconds to import: only here

    model = load_any(model_path, model_code, dtype=torch.float32)[0]
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    input_ids = torch.arange(1, 33, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits.cpu()


def byte_size(text: str) -> int:
    """Bytes in "5GB", "500MB" or a plain number, decimal as Hugging Face counts them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def choose_dtype(asked: str | None, config: dict, tensors: dict[str, Stored]) -> tuple[str, set[str]]:
    """The dtype of the result, as headers spell it: what is asked for, else the base's; and the names of the tensors
    that keep their own: what a half-precision base keeps in fp32, and what is not floating point."""
    stored = Counter()
    for tensor in tensors.values():
        stored[tensor.dtype] += tensor.nbytes
    told = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    bases, why = next((key for key in STORED if str(STORED[key]) == f"torch.{told}"), ""), "config.json of the base"
    if bases not in stored:  # not told, or not so
        bases, why = max(STORED, key=lambda dtype: stored[dtype]), "most of the base's weights"
    keep = {
        name
        for name, tensor in tensors.items()
        if tensor.dtype not in STORED or (tensor.dtype == "F32" and (bases != "F32" or name.endswith(CORRECTION_BIAS)))
    }
    saved, why = (DTYPES[asked], "given") if asked else (bases, why)
    choice("save_dtype", next(key for key in DTYPES if DTYPES[key] == saved), why)
    return saved, keep
