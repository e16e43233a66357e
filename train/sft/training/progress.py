"""Progress and throughput: the line of each logging step, the count of tokens and seconds."""

import os
import re
import resource
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from sft.data.examples import IGNORE_INDEX
from sft.messages import in_units, note, on_terminal
from sft.model.files import write_json
from sft.model.moe import first_of
from sft.training.probe import Probe

# dense bf16 FLOP/s of one device, by a part of its name (the makers' data sheets)
PEAK_FLOPS = {"H20": 148e12, "H100 PCIe": 756e12, "A100": 312e12, "A800": 312e12}
PEAK_FLOPS |= dict.fromkeys(("H100", "H200", "H800"), 989e12)


class ProgressLine(ProgressCallback):
    """On a terminal a bar (none with `--disable_tqdm`), and at each logging step a line with step, loss, tokens/s (the
    first rank's times the ranks) and the time that is left."""

    def __init__(self, meter: "Meter"):
        super().__init__()
        self.meter, self.evaluated = meter, 0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            hidden = args.disable_tqdm or not on_terminal()
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, leave=False, disable=hidden
            )
        self.current_step = self.first_step = state.global_step
        self.began, self.logged = time.perf_counter(), (0, 0.0)  # tokens and seconds

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.evaluated += 1
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(f"evaluating: {self.evaluated} of {len(eval_dataloader)}")

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated = 0
        if self.training_bar is not None:
            self.training_bar.set_postfix_str("")

    def on_log(self, args, state, control, logs=None, **kwargs):
        kinds = [kind for kind in ("loss", "eval_loss") if kind in (logs or {})]
        if not state.is_world_process_zero or not kinds:
            return
        parts = [f"step {state.global_step}/{state.max_steps}"]
        parts += [f"{kind} {logs[kind]:.6f}" for kind in kinds]
        parts += [f"{key} {logs[key]:.4g}" for key in ("grad_norm", "learning_rate", "epoch") if key in logs]
        if "loss" in kinds:
            (tokens, seconds), before = (int(self.meter.counts[0]), self.meter.seconds), self.logged
            self.logged = tokens, seconds
            if seconds > before[1]:
                parts.append(f"tokens/s {(tokens - before[0]) * args.world_size / (seconds - before[1]):.0f}")
            left = (state.max_steps - state.global_step) * (time.perf_counter() - self.began)
            parts.append(f"left {timedelta(seconds=round(left / (state.global_step - self.first_step)))}")
        tqdm.write("  ".join(parts))  # above the bar, where there is one


class Meter(TrainerCallback):
    """Counts the tokens of the steps, and their seconds without evaluation and saving."""

    FIGURES = (
        "tokens", "supervised_tokens", "padding_share", "tokens_per_second", "mfu", "seconds_to_first_step",
        "peak_memory_bytes", "world_size", "global_batch_size", "trainable_params", "total_params",
    )  # fmt: skip

    def __init__(self) -> None:
        self.counts = torch.zeros(3, dtype=torch.int64)  # real tokens, supervised tokens, positions
        self.first_step_tokens: torch.Tensor | None = None
        self.seconds = 0.0  # of all steps but the first
        self.seconds_to_first_step: float | None = None

    def count(self, batches: list[dict[str, torch.Tensor]], filling: int = 0) -> None:
        """Add one optimizer step's batches, of whose tokens `filling` are no row's. `attention_mask` is absent where
        there is no padding."""
        self.counts[0] -= filling
        for batch in batches:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            positions = ids.new_tensor(ids.numel())
            real = positions if mask is None else mask.sum()
            supervised = batch["labels"].ne(IGNORE_INDEX).sum()
            self.counts = self.counts.to(ids.device) + torch.stack([real, supervised, positions])

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Add the seconds since the mark. The first step warms up: only the time until its end is kept."""
        if self.first_step_tokens is None:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.first_step_tokens = self.counts[0].clone()
            self.seconds_to_first_step = time.time() - psutil.Process().create_time()
        else:
            self.seconds += time.perf_counter() - self.mark
        self.mark = time.perf_counter()

    def skip(self, args, state, control, **kwargs):
        """Set the mark anew: what came since the last step is not training."""
        self.mark = time.perf_counter()

    on_save = on_evaluate = skip

    def results(self, trainer) -> dict[str, int | float | None]:
        """The figures for train_results.json, all ranks together. All ranks must call."""
        device = trainer.args.device
        first_step_tokens = 0 if self.first_step_tokens is None else self.first_step_tokens.item()
        this_rank = [*self.counts.tolist(), first_step_tokens, peak_memory_bytes(device)]
        ranks = trainer.accelerator.gather(torch.tensor([this_rank], device=device)).cpu()
        tokens, supervised, positions, first_step_tokens = ranks[:, :4].sum(0).tolist()
        rate = (tokens - first_step_tokens) / self.seconds if self.seconds else None
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
    """CUDA's peak allocation; on a CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB; psutil has no peak


def model_flops_utilization(model: torch.nn.Module, tokens_per_second: float, args, devices: int) -> float | None:
    """The share of the devices' peak FLOP/s that the model's own arithmetic uses; None where the peak is not known.

    Per token each weight costs 2 FLOPs in the forward pass, 2 for the gradients of activations, and 2 more if it is
    trained (Kaplan et al. 2020, section 2.1). Of the routed experts' weights top_k / num_experts count. Attention
    scores and recomputation are left out.
    """
    if args.device.type != "cuda" or not (args.bf16 or args.fp16):
        return None
    name = torch.cuda.get_device_name(args.device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)
    if peak is None:
        return None
    config = model.config
    chosen = getattr(config, "moe_topk", 0) or getattr(config, "num_experts_per_tok", 1)
    experts = getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 1)
    share_of_experts = first_of(chosen) / first_of(experts)
    flops = 0.0
    for path, weight in model.named_parameters():
        if "embed_tokens" in path and not getattr(config, "tie_word_embeddings", False):
            continue  # looked up, not multiplied
        size = getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 leaves an empty tensor
        used = size * share_of_experts if ".experts." in path else size
        flops += used * (6 if weight.requires_grad else 4)
    return flops * tokens_per_second / (peak * devices)


def number_of_parameters(model: PreTrainedModel, trained: bool = False) -> int:
    """Parameters of the model, or those that are trained; under ZeRO-3 their full size."""
    parameters = [p for p in model.parameters() if p.requires_grad or not trained]
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def write_results(trainer: Any, metrics: dict[str, float], probe: Probe | None, figures: dict[str, Any]) -> None:
    """Write train_results.json, `figures` of the rows and those of the run, and say how it went. All ranks must
    call."""
    figures |= {
        "train_loss": metrics["train_loss"],
        "global_step": trainer.state.global_step,
        "global_batch_size": trainer.get_total_train_batch_size(trainer.args),
        "trainable_params": number_of_parameters(trainer.model, trained=True),
        "total_params": number_of_parameters(trainer.model),
        **trainer.meter.results(trainer),
        **(probe.results() if probe else {}),
    }
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir, "train_results.json"), figures)
        if probe:
            probe.print_some()
    report_end(trainer, figures, metrics["train_runtime"])


def report_end(trainer: Any, figures: dict[str, Any], seconds: float) -> None:
    """Say how a run went that has ended, and what may come next."""
    output, rate = Path(trainer.args.output_dir), figures["tokens_per_second"]
    said = [f"train_loss {figures['train_loss']:.6f}", f"{timedelta(seconds=round(seconds))}"]
    said += [f"{rate:.0f} tokens/s"] if rate else []
    said.append(f"at most {in_units(figures['peak_memory_bytes'])} of memory")
    if best := trainer.state.best_model_checkpoint:
        said.append(f"best {Path(best).name} ({trainer.args.metric_for_best_model} {trainer.state.best_metric:.6f})")
    note(", ".join(said))
    scripts, place = Path(sys.argv[0]).parent, shlex.quote(str(output))
    if trainer.is_adapter:
        note(f"to merge it: bash {shlex.quote(str(scripts / 'merge_lora_weight.sh'))} --adapter_model_path {place}")
    talk = f"--adapter {place}" if trainer.is_adapter else place
    if trainer.args.save_strategy != "no":
        begin = os.environ.get("GO_ON_WITH") or f"python {shlex.quote(sys.argv[0])}"
        note(f"to train it further: {begin} --resume_from_checkpoint {place} --max_steps {2 * figures['global_step']}")
    note(f"to talk to it: python {shlex.quote(str(scripts / 'chat.py'))} {talk}")
