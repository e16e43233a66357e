"""The arithmetic and the files of a merge: which tensors an adapter changes, by how much, and into which files.

Refused (exit code 2): an adapter that is empty, does not fit its base, or is more than LoRA or DoRA on linear layers
and routed experts; values that do not fit the dtype.
"""

import functools
import math
import os
import re
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from sft.messages import Refused, choice, first_few, read_json
from sft.model.directory import ModelDirectory
from sft.model.files import ADAPTER_FILE, write_json
from sft.model.weight_files import DTYPES, INDEX, open_tensors

SAVE_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}  # as --save_dtype and as safetensors headers spell them
# What transformers names otherwise than the files of Hy3 and Hy4 do: (in the adapter, in the base).
RENAMED = ((".mlp.shared_experts.", ".mlp.shared_mlp."), (".gate_proj", ".linear_gate"))
MERGED_TOO = (".weight", "experts.gate_up_proj", "experts.down_proj")  # ends of target_parameters that are merged
# Keys of adapter_config.json that make more of it than W + scaling * B @ A; so do other initialisations (PiSSA ...).
BEYOND_LORA = (
    "modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias", "fan_in_fan_out", "arrow_config",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config", "rank_pattern", "alpha_pattern",
)  # fmt: skip
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")

ALL = slice(None)
# What a tensor of the base gains: keys of the adapter; how many experts are stacked in these, which of them
# the tensor holds, and which rows of their lora_B are its own. A linear layer is one expert.
Update = namedtuple("Update", "lora_A lora_B magnitude experts which rows")
Parts = list[tuple[str, slice, slice]]  # (tensor of the base, which experts, rows)


class Adapter:
    """An adapter's files, opened. Refuses one that is empty or not merely LoRA or DoRA."""

    def __init__(self, directory: Path):
        self.directory = directory
        settings = read_json(directory / "adapter_config.json")
        self.file = open_tensors(directory / ADAPTER_FILE)
        self.shapes = {key: tuple(self.file.get_slice(key).get_shape()) for key in self.file.keys()}  # noqa: SIM118
        self.is_dora, self.rank = bool(settings.get("use_dora")), settings.get("r", 8)
        self.scaling = settings.get("lora_alpha", 8) / (self.rank**0.5 if settings.get("use_rslora") else self.rank)
        beyond = {key: settings[key] for key in BEYOND_LORA if settings.get(key)}
        if others := [target for target in settings.get("target_parameters") or () if not target.endswith(MERGED_TOO)]:
            beyond["target_parameters"] = others
        if (init := settings.get("init_lora_weights", True)) not in PLAIN_INITS:
            beyond["init_lora_weights"] = init
        if beyond:
            found = first_few([f"{key}={value}" for key, value in beyond.items()])
            why = "only LoRA and DoRA on linear layers and experts are merged; use it with PEFT on top of its base"
            raise Refused(f"{directory / 'adapter_config.json'}: {found}: {why}")
        if not any(math.prod(shape) for shape in self.shapes.values()):
            raise Refused(f"{directory}: the adapter holds no tensors, or only empty ones; save it again")

    @functools.lru_cache(maxsize=4)  # noqa: B019 (the experts of a layer share a factor; one object a merge)
    def factor(self, key: str) -> torch.Tensor:
        """A tensor of the adapter in fp32."""
        return self.file.get_tensor(key).float()

    def refuse(self, module: str, why: str) -> NoReturn:
        """Refuse a part of the adapter that has no place in the base."""
        fits = "the adapter does not fit the base (is it another base's?)"
        raise Refused(f"{self.directory}: {fits}: {module} ({why})")


def plan_updates(adapter: Adapter, base: ModelDirectory) -> dict[str, Update]:
    """{base tensor: its Update}; refuses unless every tensor of the adapter has its place."""
    shapes = {name: tensor.shape for name, tensor in base.tensors.items() if tensor.dtype in DTYPES}
    if base.config.get("tie_word_embeddings", False):
        shapes.pop("lm_head.weight", None)
    updates: dict[str, Update] = {}
    known = set()
    for lora_A in (key for key in sorted(adapter.shapes) if key.endswith(".lora_A.weight")):
        prefix = lora_A.removesuffix(".lora_A.weight")
        known |= {lora_A, f"{prefix}.lora_B.weight", f"{prefix}.base_layer.weight"}  # PEFT saves a head's own as well
        known |= {f"{prefix}.lora_magnitude_vector"} if adapter.is_dora else set()
        updates |= place(adapter, prefix, shapes)
    if unknown := sorted(adapter.shapes.keys() - known):
        adapter.refuse(first_few(unknown), "not of a LoRA adapter")
    if not any(adapter.file.get_tensor(update.lora_B).any() for update in updates.values()):
        print("warning: every lora_B is zero: this adapter was not trained", file=sys.stderr)
    return updates


def place(adapter: Adapter, prefix: str, shapes: dict[str, tuple]) -> dict[str, Update]:
    """{base tensor: its Update} of one adapted module, whose keys begin with `prefix`; refuses one without a place."""
    module = prefix.removeprefix("base_model.model.")
    lora_A, lora_B = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
    magnitude = f"{prefix}.lora_magnitude_vector" if adapter.is_dora else None
    shape_A, shape_B = adapter.shapes[lora_A], adapter.shapes.get(lora_B, (0,))
    delta = (*shape_B[:1], *shape_A[1:])  # the shape of lora_B @ lora_A
    rank = adapter.rank
    if re.search(r"\.experts(\.base_layer)?$", module):
        experts = shape_A[0] // rank
        parts = parts_of_experts(module.removesuffix(".base_layer"), experts, delta, shapes)
        if not parts:
            adapter.refuse(module, f"{list(delta)}, rank {rank}: the base has no such experts")
    else:
        experts, names = 1, [f"{module}.weight", *(f"{module.replace(*pair)}.weight" for pair in RENAMED)]
        name = next((name for name in names if name in shapes), None)
        if name is None:
            adapter.refuse(module, "the base has no such weight" + (" or it is tied" if module == "lm_head" else ""))
        if shapes[name] != delta:
            adapter.refuse(module, f"{list(delta)}, the base has {list(shapes[name])}")
        parts = [(name, ALL, ALL)]
    is_ranked = (shape_A[0], *shape_B[1:]) == (rank * experts, rank * experts)
    if not is_ranked or (magnitude and adapter.shapes.get(magnitude) != delta[:1]):
        adapter.refuse(module, "rank or magnitude are not as adapter_config.json says")
    return {name: Update(lora_A, lora_B, magnitude, experts, *part) for name, *part in parts}


def parts_of_experts(module: str, experts: int, delta: tuple, shapes: dict[str, tuple]) -> Parts:
    """The tensors of a layer's experts that gain `delta` (rows, columns) each; [] if they do not fit.

    PEFT calls what it adapts first and second by place and not by name; the shapes tell gate_up_proj from down_proj.
    In the files the experts are fused, one tensor a layer, or stand one by one.
    """
    for fused, ones in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        if shapes.get(f"{module}.{fused}") == (experts, *delta):
            return [(f"{module}.{fused}", ALL, ALL)]
        rows = delta[0] // len(ones)
        parts: Parts = []
        for expert in range(experts):
            for start, name in zip((0, rows), ones):
                part = slice(expert, expert + 1), slice(start, start + rows)
                parts.append((f"{module}.{expert}.{name}.weight", *part))
        one_more = f"{module}.{experts}.{ones[0]}.weight"
        if {shapes.get(name) for name, _, _ in parts} == {(rows, *delta[1:])} and one_more not in shapes:
            return parts
    return []


def merged(tensor: torch.Tensor, update: Update, adapter: Adapter, dtype: torch.dtype) -> torch.Tensor:
    """The tensor with its update, computed in fp32 and rounded once to `dtype`; fused experts one by one."""
    # As PEFT stacks experts: A by expert and rank, B by rank and expert.
    lora_A = adapter.factor(update.lora_A).unflatten(0, (update.experts, -1))[update.which]
    lora_B = adapter.factor(update.lora_B).unflatten(1, (-1, update.experts)).permute(2, 0, 1)
    lora_B = lora_B[update.which, update.rows]
    result, shape = torch.empty_like(tensor, dtype=dtype), (-1, *tensor.shape[-2:])
    for into, weight, A, B in zip(result.view(shape), tensor.view(shape), lora_A, lora_B, strict=True):
        weight = torch.addmm(weight.float(), B, A, alpha=adapter.scaling)
        if update.magnitude:  # DoRA (Liu et al. 2024, equation 5)
            weight *= (adapter.factor(update.magnitude) / torch.linalg.norm(weight, dim=1))[:, None]
        into.copy_(weight)
    return result


# ------------------------------------------------------------------------------------------------------------- files


@dataclass
class Plan:
    """What will be written."""

    dtype: str  # as headers spell it
    dtypes: dict[str, str]  # of each tensor
    files: list[tuple[str, list[str]]]  # (file, its tensors)
    total_size: int  # bytes, at most


def plan_files(base: ModelDirectory, asked: str | None, max_shard_size: int) -> Plan:
    """The base's files in the dtype that is asked for, else the base's. Tensors that stay fp32, and those that are not
    floating point, keep their own. A file above `max_shard_size` bytes is split, and then all are renumbered."""
    dtype = SAVE_DTYPES[asked] if asked else base.dtype
    why = "given" if asked else "most of the base's weights"
    choice("save_dtype", next(key for key, spelled in SAVE_DTYPES.items() if spelled == dtype), why)
    files: list[tuple[str, list[str]]] = []
    dtypes, filled, total_size = {}, 0, 0
    for name, tensor in base.tensors.items():
        dtypes[name] = tensor.dtype if tensor.dtype not in DTYPES else "F32" if name in base.fp32_names else dtype
        size = DTYPES.get(dtypes[name], torch.int64).itemsize * math.prod(tensor.shape)
        if not files or files[-1][0] != tensor.file or filled + size > max_shard_size:
            files.append((tensor.file, []))
            filled = 0
        files[-1][1].append(name)
        filled += size
        total_size += size
    if len(files) > len({file for file, _ in files}):
        last = len(files)
        files = [(f"model-{n:05d}-of-{last:05d}.safetensors", names) for n, (_, names) in enumerate(files, 1)]
    return Plan(dtype, dtypes, files, total_size)


def write_weights(
    output: Path, plan: Plan, base: ModelDirectory, adapter: Adapter, updates: dict[str, Update]
) -> None:
    """Write the merged weights, a file at a time, and their index."""
    total_size = 0
    for file, names in tqdm(plan.files, desc="merging", unit="shard"):
        source, shard = open_tensors(base.path / base.tensors[names[0]].file), {}
        for name in names:
            tensor = source.get_tensor(name)
            dtype = DTYPES.get(plan.dtypes[name], tensor.dtype)
            shard[name] = merged(tensor, updates[name], adapter, dtype) if name in updates else tensor.to(dtype)
            if (name in updates or plan.dtype == "F16") and not shard[name].isfinite().all():
                why = "the adapter is damaged, or the range too small (then give --save_dtype bf16 or fp32)"
                raise Refused(f"{name}: not finite in {shard[name].dtype}: {why}")
            total_size += shard[name].nbytes
        save_file(shard, output / file, source.metadata() or {"format": "pt"})
    index, _ = base.headers
    if index or len(plan.files) > 1:
        places = {name: file for file, names in plan.files for name in names}
        weight_map = {name: places[name] for name in (*index.get("weight_map", {}), *places)}
        metadata = index.get("metadata", {}) | {"total_size": total_size}
        write_json(output / INDEX, index | {"metadata": metadata, "weight_map": weight_map})


def check_keys(output: Path, plan: Plan, base: ModelDirectory) -> None:
    """Refuse a result whose tensors are not the base's in the planned dtypes."""
    wanted = {(name, tensor.shape, plan.dtypes[name]) for name, tensor in base.tensors.items()}
    found = {(name, tensor.shape, tensor.dtype) for name, tensor in ModelDirectory(output).tensors.items()}
    if wanted != found:
        raise Refused(f"{output}: not the base's tensors: {first_few(sorted(map(str, wanted ^ found)))}")
    choice("verify keys", f"{len(wanted)} tensors", "names and shapes are the base's, dtypes as asked for")


def check_logits(output: Path, base: ModelDirectory, adapter: Path) -> None:
    """Print the largest difference between the result's logits and those of base + adapter."""
    expected = logits(base, adapter)
    found = logits(ModelDirectory(output, trusted=base.trusted, model_code=base.model_code))
    difference = (expected - found).abs().max()
    why = "largest difference from base + adapter with PEFT on 32 fixed tokens, fp32; largest logit"
    choice("verify logits", f"{difference:.3g}", f"{why} {expected.abs().max():.3g}")


def logits(directory: ModelDirectory, adapter: Path | None = None) -> torch.Tensor:
    """fp32 logits (1, 32, vocabulary) of a model on fixed tokens, with the adapter as PEFT applies it."""
    from sft.model.pretrained import load_adapter, load_pretrained  # takes seconds to import: only here

    model: Any = load_pretrained(directory, dtype=torch.float32)
    model = load_adapter(model, adapter) if adapter else model
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    input_ids = torch.arange(1, 33, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits.cpu()


@contextmanager
def whole_or_absent(output: Path) -> Iterator[Path]:
    """A temporary directory beside `output`, which it becomes at the end; removed on any error or signal to stop, with
    the parents that were made for it."""
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    made = [parent for parent in output.parents if not parent.exists()]

    def clean_up() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # the result is in it, or another program's files
                parent.rmdir()

    def stop(number: int, _frame: Any) -> NoReturn:
        clean_up()
        print(f"\nstopped by {signal.Signals(number).name}, nothing is left at {output}", file=sys.stderr, flush=True)
        os._exit(128 + number)  # not SystemExit: torch swallows what is raised within a call of its own

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, stop) for n in signals if signal.getsignal(n) != signal.SIG_IGN}  # as under nohup
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(output)
    finally:
        clean_up()
        for number, handler in before.items():
            signal.signal(number, handler)
