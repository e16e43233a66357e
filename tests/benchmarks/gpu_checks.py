"""The two parts of bench_gpu.py that train.py is not needed for, each a process of its own:

    python tests/benchmarks/gpu_checks.py correct FILE [--device cpu]     # exit code 1 where a path differs
    python tests/benchmarks/gpu_checks.py ceilings FILE [--device cpu]

correct: loss and gradients of each path on the device against the CPU in fp32, with sdpa and its mask, eager experts
and all logits: tiny models of three classes, three packed rows. A difference is the norm of the gradients' difference
over their norm, or the loss's, whichever is more. Weights are bf16 values everywhere, and no token of the rows lies
within 2 % of another choice of experts, so that rounding changes no route.

ceilings: the fastest matrix products and copies, random values in bf16.

FILE gets a list of {"name", "status", "text", …}, and each line is printed as it comes.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("train", "tests")]

ALL, MOE = ("dense", "moe", "hy_v3"), ("moe", "hy_v3")
FP32, MASTERS, FROZEN = "fp32", "bf16 over fp32 weights", "bf16 weights"  # the latter two under autocast, as trained
TOLERANCE = {FP32: 1e-4, MASTERS: 2e-2, FROZEN: 2e-2}
LENGTHS = (5, 13, 9)  # of the rows
MARGIN = 0.02  # of the deviation of a router's logits
# name, classes, how it differs from the default: attention row by row, grouped_mm, no recomputation
PATHS: tuple[tuple[str, tuple[str, ...], dict], ...] = (
    ("sdpa with a mask", ALL, {"attention": "sdpa"}),
    ("sdpa_row_by_row", ALL, {}),
    ("torch_varlen", ALL, {"attention": "torch_varlen"}),
    ("flash_attention_2", ALL, {"attention": "flash_attention_2"}),
    ("experts eager", MOE, {"experts": "eager"}),
    ("experts batched_mm", MOE, {"experts": "batched_mm"}),
    ("recomputation", ALL, {"recompute": {}}),
    ("recomputation, offload", ALL, {"recompute": {"offload": True}}),
    ("4 bits", ALL, {"packed": True}),
)


class Record:
    """The results so far, in FILE after each."""

    def __init__(self, file: Path):
        self.file, self.results = file, list[dict[str, Any]]()

    def add(self, name: str, status: str, text: str, **figures: Any) -> None:
        print(f"{name}: {status}, {text}", flush=True)
        self.results.append({"name": name, "status": status, "text": text, **figures})
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.results))
        part.replace(self.file)  # whoever reads it meanwhile finds it whole


# ------------------------------------------------------------------------------------------------------ correctness


def check_paths(device: torch.device, record: Record) -> bool:
    """Whether every path that runs here gives what the CPU gives."""
    from tiny import EXAMPLE_TOKENIZER, make_model_dir

    good = True
    with tempfile.TemporaryDirectory() as folder:
        for kind in ALL:
            more = {"enable_lm_head_fp32": True} if kind == "hy_v3" else {}
            directory = make_model_dir(kind, EXAMPLE_TOKENIZER, Path(folder, kind), "bfloat16", **more)
            ids, reference = rows_and_reference(directory)
            for name, kinds, how in PATHS:
                for dtype in TOLERANCE:
                    why = why_not(device, dtype, **how)
                    if kind in kinds and why is None:
                        run = functools.partial(run_path, device, directory, ids, dtype, **how)
                        good &= check_path(f"{kind} {dtype}, {name}", run, reference, TOLERANCE[dtype], record)
                    elif kind in kinds and dtype == FROZEN:
                        record.add(f"{kind}, {name}", "not run", why)
    return good


def why_not(device: torch.device, dtype: str, attention: str = "", recompute: dict | None = None, packed=False, **_):
    """Why a path cannot run here; None where it can."""
    if device.type == "cpu" and (attention in ("torch_varlen", "flash_attention_2") or recompute):
        return "it needs a GPU"
    if attention in ("torch_varlen", "flash_attention_2") and dtype == FP32:
        return "it computes in half precision"
    package = "bitsandbytes" if packed else "flash_attn" if attention == "flash_attention_2" else "torch"
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def check_path(name: str, run: Callable, reference: dict, tolerance: float, record: Record) -> bool:
    """Record how far a path is from the CPU, or how it failed."""
    try:
        found, theirs = run()
        most = difference(found, theirs or reference)
    except Exception as error:  # whatever a kernel raises: the others are to be seen
        record.add(name, "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return False
    good = most <= tolerance
    record.add(name, "ok" if good else "FAILED", f"differs by {most:.1e} (at most {tolerance:.0e})", most=most)
    return good


def run_path(device, directory, ids, dtype, attention=None, experts="grouped_mm", recompute=None, packed=False):
    """What a path gives; and, with weights in 4 bits, what the CPU gives with the unpacked ones (else None)."""
    from sft.training.attention import ROW_BY_ROW

    options: dict[str, Any] = {}
    if packed:
        from sft.model.four_bits import in_4_bits

        options = in_4_bits(None, device)
    model = load(directory, torch.bfloat16 if dtype == FROZEN else torch.float32, **options).to(device)
    model.set_attn_implementation(attention or ROW_BY_ROW)
    if not packed and hasattr(model.config, "num_experts"):
        model.set_experts_implementation(experts)
    if recompute is not None:
        model.activation_checkpointing_enable(**recompute)
    found = loss_and_gradients(model, ids, device, autocast=dtype != FP32, supervised_head=True)
    return found, unpacked_reference(directory, ids, model) if packed else None


def load(directory: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The model as train.py loads it, without adapter."""
    from sft.model.directory import ModelDirectory
    from sft.model.moe import route_in_fp32
    from sft.model.pretrained import load_pretrained

    model = load_pretrained(ModelDirectory(directory), dtype=dtype, **options)
    route_in_fp32(model)
    return model


def unpacked_reference(directory: Path, ids: list, packed_model: Any) -> dict[str, torch.Tensor]:
    from sft.model.four_bits import Params4bit, unpack

    plain = load(directory, torch.float32)
    packed = {name: weight for name, weight in packed_model.named_parameters() if isinstance(weight, Params4bit)}
    for name, weight in packed.items():
        plain.get_parameter(name).data = unpack(weight).float().cpu()
    found = reference_of(plain, ids)
    return {name: value for name, value in found.items() if name not in packed}


def reference_of(model: Any, ids: list) -> dict[str, torch.Tensor]:
    model.set_attn_implementation("sdpa")
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    return loss_and_gradients(model, ids, torch.device("cpu"), autocast=False, supervised_head=False)


def rows_and_reference(directory: Path) -> tuple[list, dict[str, torch.Tensor]]:
    """Rows without a token between two experts, and what the CPU gives of them."""
    model = load(directory, torch.float32)
    for seed in range(100):
        draw = np.random.default_rng(seed)
        ids = [draw.integers(20, model.config.vocab_size - 1, length) for length in LENGTHS]
        with least_margin(model) as margins:
            found = reference_of(model, ids)
        if min(margins, default=1.0) > MARGIN:
            return ids, found
        model.zero_grad()
    raise RuntimeError("no rows whose tokens choose their experts clearly")


@contextlib.contextmanager
def least_margin(model: Any) -> Iterator[list[float]]:
    """A list that gets, from each router, how close a token's last chosen expert is to the first one not chosen, in
    deviations of the logits."""
    from sft.model.moe import moe_layers

    margins: list[float] = []

    def see(module: Any, inputs: Any, output: Any) -> None:
        logits, chosen = output[0].detach().sort(dim=-1, descending=True).values, output[2].shape[-1]
        margins.append(float((logits[:, chosen - 1] - logits[:, chosen]).min() / logits.std()))

    hooks = [layer.gate.register_forward_hook(see) for layer in moe_layers(model).values()]
    yield margins
    for hook in hooks:
        hook.remove()


def loss_and_gradients(model, ids, device, autocast: bool, supervised_head: bool) -> dict[str, torch.Tensor]:
    """{"": loss, name of a weight: its gradient} of packed rows whose second halves are supervised, in fp32 on the
    CPU; with `supervised_head` computed by Head as in a run."""
    from sft.data.batches import Collator
    from sft.training.loss import choose_loss

    rows = [{"input_ids": row, "labels": np.where(np.arange(len(row)) < len(row) // 2, -100, row)} for row in ids]
    batch = Collator(pad_token_id=0, packing="batch", supervised_head=supervised_head)(rows)
    del batch["numbers"]
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    knows = contextlib.nullcontext()
    if supervised_head:
        with contextlib.redirect_stdout(None):
            args: Any = SimpleNamespace(fp16=False, label_smoothing_factor=0, use_liger_kernel=False)
            knows = choose_loss(model, args).head.knows(batch["shift_labels"])
    with knows, torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = model.train()(**batch, use_cache=False).loss
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: value.detach().float().cpu() for name, value in ({"": loss} | found).items()}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of the loss, or of all gradients as one vector, whichever is more."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"other weights get a gradient: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    loss = abs(float(ours[""] / theirs[""]) - 1)
    squares = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours if name)
    most = max(loss, (squares / sum(float(value.square().sum()) for name, value in theirs.items() if name)) ** 0.5)
    return most if most == most else float("inf")


# --------------------------------------------------------------------------------------------------------- ceilings


def seconds_of(work: Callable[[], Any], device: torch.device, times: int = 20) -> float:
    """Mean seconds of one call, after three that are not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


def measure_ceilings(device: torch.device, record: Record) -> None:
    small = device.type == "cpu"
    few = 64 if small else 1  # how much smaller a CPU's are

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).bfloat16()

    def product(name: str, rows: int, inner: int, outer: int) -> None:
        a, b = random(rows // few, inner // few), random(outer // few, inner // few)
        flops = 2 * a.numel() * len(b)
        rate = flops / seconds_of(lambda: torch.nn.functional.linear(a, b), device) / 1e12
        record.add(f"{name} {len(a)} × {a.shape[1]} × {len(b)}", "ok", f"{rate:.4g} TFLOP/s", tflops=rate)

    for rows, inner, outer in ((8192, 8192, 8192), (4096, 4096, 14_336), (4096, 14_336, 4096), (4096, 4096, 4096)):
        product("product", rows, inner, outer)
    # the vocabulary is no multiple of 8, which a matrix's rows have to be for the fast kernels
    for vocabulary in (128_167, 128_192):
        product("head", 1024, 4096, vocabulary)
    for name, experts, rows, inner, outer in (("A13B", 64, 512, 4096, 6144), ("Hy-MT2", 128, 256, 2048, 1536)):
        a, b = random(experts * rows // few, inner // few), random(experts, outer // few, inner // few)
        ends = (torch.arange(experts, device=device, dtype=torch.int32) + 1) * (len(a) // experts)
        work = functools.partial(torch.nn.functional.grouped_mm, a, b.transpose(-2, -1), offs=ends)
        rate = 2 * a.numel() * b.shape[1] / seconds_of(work, device) / 1e12
        name = f"grouped_mm {name} {experts} × {len(a) // experts} × {a.shape[1]} × {b.shape[1]}"
        record.add(name, "ok", f"{rate:.4g} TFLOP/s", grouped=rate)
    size = 2**30 // few
    on_device, there = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    record_copy("copy on the device", lambda: there.copy_(on_device), 2 * size, device, record)
    if not small:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        record_copy("copy to the device", lambda: there.copy_(host, non_blocking=True), size, device, record)
        record_copy("copy to the host", lambda: host.copy_(there, non_blocking=True), size, device, record)


def record_copy(name: str, work: Callable, size: int, device: torch.device, record: Record) -> None:
    rate = size / seconds_of(work, device) / 1e9
    record.add(name, "ok", f"{rate:.0f} GB/s", rate=rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("correct", "ceilings"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    device, record = torch.device(args.device), Record(args.file)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    record.add("device", "ok", f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    if args.part == "ceilings":
        measure_ceilings(device, record)
    elif not check_paths(device, record):
        sys.exit(1)


if __name__ == "__main__":
    main()
