"""What happens beside the steps: the progress line, the count of tokens and seconds, the stop at a non-finite loss."""

import math
import os
import re
import resource
import sys
import time

import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from sft.model.moe import first_of

# dense bf16 FLOP/s of one device, by a part of its name (the makers' data sheets)
PEAK_FLOPS = {
    "H20": 148e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
}
EXIT_NON_FINITE = 3


class ProgressLine(ProgressCallback):
    """The Trainer's progress bar (none with --disable_tqdm), and one line a logging step with step and loss in
    full."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        kinds = [kind for kind in ("loss", "eval_loss") if kind in (logs or {})]
        if not state.is_world_process_zero or not kinds:
            return
        parts = [f"step {state.global_step}/{state.max_steps}"] + [f"{kind} {logs[kind]:.6f}" for kind in kinds]
        parts += [f"{key} {logs[key]:.4g}" for key in ("grad_norm", "learning_rate", "epoch") if key in logs]
        (self.training_bar.write if self.training_bar is not None else print)("  ".join(parts))

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def stop_if_not_finite(loss: float, step: int) -> None:
    """End the run with exit code 3 when a loss is nan or infinite. Every rank must see the same value."""
    if not math.isfinite(loss):
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: the loss is {loss} at step {step}", file=sys.stderr, flush=True)
        sys.exit(EXIT_NON_FINITE)


class StopOnNonFinite(TrainerCallback):
    """Look at each loss that is logged; what is not yet logged is looked at before it is saved (trainer.py)."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            stop_if_not_finite(logs["loss"], state.global_step)


class Meter(TrainerCallback):
    """Tokens and seconds of the steps, padding, evaluation and saving left out."""

    FIGURES = ("tokens", "supervised_tokens", "padding_share", "tokens_per_second", "mfu", "seconds_to_first_step")
    FIGURES += ("peak_memory_bytes", "world_size", "global_batch_size", "trainable_params", "total_params")

    def __init__(self):
        self.counts = torch.zeros(3, dtype=torch.int64)  # real tokens, supervised tokens, positions
        self.first_step_tokens = None
        self.seconds = 0.0  # of all steps but the first
        self.seconds_to_first_step = None

    def count(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Add one optimizer step's batches. `attention_mask` is absent where there is no padding."""
        for batch in batches:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            real = ids.new_tensor(ids.numel()) if mask is None else mask.sum()
            supervised = batch["labels"].ne(-100).sum()
            self.counts = self.counts.to(ids.device) + torch.stack([real, supervised, ids.new_tensor(ids.numel())])

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Add the seconds since the mark; the first step, which warms up, only gives the time until it was made."""
        if self.first_step_tokens is None:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.first_step_tokens = self.counts[0].clone()
            self.seconds_to_first_step = time.time() - psutil.Process().create_time()
        else:
            self.seconds += time.perf_counter() - self.mark
        self.mark = time.perf_counter()

    def skip(self, args, state, control, **kwargs):
        """What came since the last step is not training."""
        self.mark = time.perf_counter()

    on_save = on_evaluate = skip

    def results(self, trainer) -> dict[str, int | float | None]:
        """The figures for train_results.json, all ranks together. All ranks must call."""
        first = torch.zeros(1, dtype=torch.int64) if self.first_step_tokens is None else self.first_step_tokens[None]
        memory = torch.tensor([peak_memory_bytes(trainer.args.device)])
        mine = torch.cat([part.to(trainer.args.device) for part in (self.counts, first, memory)])
        ranks = trainer.accelerator.gather(mine[None]).cpu()
        tokens, supervised, positions, first = ranks[:, :4].sum(0).tolist()
        rate = (tokens - first) / self.seconds if self.seconds else None
        return {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "padding_share": 1 - tokens / positions if positions else 0.0,
            "tokens_per_second": rate,
            "mfu": rate and model_flops_utilization(trainer.model, rate, trainer.args, len(ranks)),
            "seconds_to_first_step": self.seconds_to_first_step,
            "peak_memory_bytes": ranks[:, 4].max().item(),
            "world_size": len(ranks),
        }


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA's peak allocation; on a CPU the process's peak resident size (Linux counts it in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_flops_utilization(model: torch.nn.Module, tokens_per_second: float, args, devices: int) -> float | None:
    """Share of the devices' peak that the model's own arithmetic uses; None where the peak is not known.

    A token costs 2 FLOPs for each weight that it meets in the forward pass, 2 for the gradients of activations, and 2
    for each weight that is trained (Kaplan et al. 2020, section 2.1); of routed experts it meets top_k of num_experts.
    Attention scores and recomputation are left out.
    """
    if args.device.type != "cuda" or not (args.bf16 or args.fp16):
        return None
    name = torch.cuda.get_device_name(args.device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)
    if peak is None:
        return None
    config = model.config
    chosen = getattr(config, "moe_topk", None) or getattr(config, "num_experts_per_tok", 1)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", 1)
    share = first_of(chosen) / first_of(experts)
    flops = 0.0
    for path, weight in model.named_parameters():
        if "embed_tokens" not in path or getattr(config, "tie_word_embeddings", False):
            met = getattr(weight, "ds_numel", weight.numel()) * (share if ".experts." in path else 1)
            flops += met * (6 if weight.requires_grad else 4)
    return flops * tokens_per_second / (peak * devices)
