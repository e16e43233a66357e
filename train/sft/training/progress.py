"""Progress and throughput: the line of each logging step, the count of tokens, FLOPs and seconds."""

import os
import re
import resource
import shlex
import sys
import time
from collections.abc import Iterator
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
from sft.training.flops import flops_of_step
from sft.training.probe import Probe

# Dense bf16 FLOP/s of one device, by its name without NO_MATTER. From NVIDIA's data sheets and white papers, / 2 where
# they print it with sparsity alone. H20 and L20 have none: the figure is that of their sellers. A800 and H800 multiply
# like A100 and H100.
PEAK_FLOPS = {
    "A100": 312e12, "A100 PCIE": 312e12, "A800": 312e12, "A800 PCIE": 312e12,
    "H100": 1979e12 / 2, "H100 PCIE": 1513e12 / 2, "H100 NVL": 1671e12 / 2,
    "H800": 1979e12 / 2, "H800 PCIE": 1513e12 / 2, "H200": 1979e12 / 2, "H200 NVL": 1671e12 / 2,
    "H20": 148e12, "H20 3E": 148e12, "L20": 119.5e12, "L40S": 362.05e12, "B200": 4500e12 / 2,
    "RTX 4090": 165.2e12, "RTX 5090": 209.5e12,
}  # fmt: skip
NO_MATTER = r"NVIDIA|GEFORCE|SXM\d?|\d+GB|HBM3E?"


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
        "tokens", "supervised_tokens", "padding_share", "tokens_per_second", "flops", "mfu", "hfu", "data_wait_share",
        "seconds_to_first_step", "peak_memory_bytes", "world_size", "global_batch_size", "trainable_params",
        "total_params",
    )  # fmt: skip

    def __init__(self) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64)  # real tokens, pairs of them, supervised tokens, positions
        self.first_step: torch.Tensor | None = None  # its counts
        self.seconds = 0.0  # of all steps but the first
        self.waited = 0.0  # of these, for batches
        self.seconds_to_first_step: float | None = None

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, while the seconds until each is there are added up, its copy to the device included."""
        began = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def count(self, batches: list[dict[str, Any]], filling: int = 0) -> None:
        """Add one optimizer step's batches, of whose tokens `filling` are no row's. `attention_mask` is absent where
        there is no padding. Does not wait for the device."""
        for batch in batches:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            self.counts = self.counts.to(ids.device)
            if mask is None:
                packed = batch.get("row_lengths")
                lengths = torch.tensor(packed.lengths if packed else [ids.shape[1]] * len(ids))
            else:
                lengths = mask.sum(1)
            pairs = (lengths * (lengths + 1) // 2).sum()
            found = (lengths.sum(), pairs, batch["labels"].ne(IGNORE_INDEX).sum(), ids.numel())
            for i, number in enumerate(found):
                self.counts[i] += number
        self.counts[0] -= filling

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Add the seconds since the mark. The first step warms up: only the time until its end is kept."""
        if self.first_step is None:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.first_step, self.waited = self.counts.clone(), 0.0
            self.seconds_to_first_step = time.time() - psutil.Process().create_time()
        else:
            self.seconds += time.perf_counter() - self.mark
        self.mark = time.perf_counter()

    def skip(self, args, state, control, **kwargs):
        """Set the mark anew: what came since the last step is not training."""
        self.mark = time.perf_counter()

    on_save = on_evaluate = skip

    def results(self, trainer) -> dict[str, int | float | None]:
        """The figures for train_results.json, all ranks together; of the waiting and of the memory the worst rank's.
        All ranks must call."""
        args = trainer.args
        at_first = [0] * 4 if self.first_step is None else self.first_step.tolist()
        others = round(1e6 * self.waited), peak_memory_bytes(args.device)
        this_rank = [*self.counts.tolist(), *at_first, *others]
        ranks = trainer.accelerator.gather(torch.tensor([this_rank], device=args.device)).cpu()
        counts, timed = ranks[:, :4].sum(0), (ranks[:, :4] - ranks[:, 4:8]).sum(0)
        tokens, _, supervised, positions = counts.tolist()
        return {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "padding_share": 1 - tokens / positions if positions else 0.0,
            "tokens_per_second": timed[0].item() / self.seconds if self.seconds else None,
            **utilization(trainer, counts, timed, len(ranks) * self.seconds),
            "data_wait_share": ranks[:, 8].max().item() / 1e6 / self.seconds if self.seconds else None,
            "seconds_to_first_step": self.seconds_to_first_step,
            "peak_memory_bytes": ranks[:, 9].max().item(),
            "world_size": len(ranks),
        }


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA's peak allocation; on a CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB; psutil has no peak


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that torch gives this name; None where it is not known, as for a MIG slice."""
    words = re.split("[ -]", name.upper())
    return PEAK_FLOPS.get(" ".join(word for word in words if not re.fullmatch(NO_MATTER, word)))


def utilization(trainer: Any, counts: torch.Tensor, timed: torch.Tensor, seconds: float) -> dict[str, float | None]:
    """`flops`: what the model needs for all steps. `mfu`, `hfu`: the share of the devices' peak FLOP/s that goes into
    what it needs, and into that and recomputation. None where the model or the peak is not known.

    Args:
        counts: as Meter.counts, of all steps; `timed` without the first one.
        seconds: of the timed steps, all devices' together.
    """
    args, peak = trainer.args, None
    if args.device.type == "cuda" and (args.bf16 or args.fp16):
        peak = peak_flops(torch.cuda.get_device_name(args.device))
    recomputes = getattr(args, "activation_checkpointing", args.gradient_checkpointing)  # 5.17: the old names
    kwargs = getattr(args, "activation_checkpointing_kwargs", args.gradient_checkpointing_kwargs) or {}
    needed = flops_of_step(trainer.model)
    computed = flops_of_step(trainer.model, kwargs.get("every_n_layers", 1)) if recomputes else needed
    units = [0, 1, 2 if trainer.data_collator.supervised_head else 0]  # without it the head runs at every token
    if needed is None or computed is None:
        return dict.fromkeys(("flops", "mfu", "hfu"))
    possible = (peak or 0.0) * seconds
    mfu, hfu = (float(each @ timed[units].numpy()) / possible if possible else None for each in (needed, computed))
    return {"flops": float(needed @ counts[units].numpy()), "mfu": mfu, "hfu": hfu}


def number_of_parameters(model: PreTrainedModel, trained: bool = False) -> int:
    """Parameters of the model, or those that are trained; under ZeRO-3 their full size."""
    parameters = [p for p in model.parameters() if p.requires_grad or not trained]
    return sum(map(number_of_values, parameters))


def number_of_values(weight: torch.nn.Parameter) -> int:
    """Of a whole weight: ZeRO-3 leaves an empty tensor, --load_in_4bit two values a byte."""
    if hasattr(weight, "quant_state"):
        return weight.quant_state.shape.numel()
    return getattr(weight, "ds_numel", weight.numel())


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
