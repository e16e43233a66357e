"""What happens beside the steps: the progress line, the count of tokens and seconds, the stop at a non-finite loss,
the answers to prompts before and after."""

import json
import math
import os
import re
import resource
import sys
import time
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from console import Refused
from router import first_of

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


class Probe(TrainerCallback):
    """Let the model answer known prompts before and after training, and score the answers.

    Each row of the file is a conversation whose last message is the expected reply; an answer is right if the text in
    `<answer>` equals the expected one's. Greedy, all rows in one batch, on every rank alike (under ZeRO-3 all must
    take part).
    """

    def __init__(self, file: str, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 128):
        try:
            lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
            rows = [json.loads(line)["messages"] for line in lines]
            self.expected = [answer_in(messages[-1]["content"]) for messages in rows]
            self.questions = [messages[-2]["content"] for messages in rows]
            asked = [messages[:-1] for messages in rows]
            prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in asked]
        except Exception as error:  # a template may raise anything
            raise Refused(f"--probe_file {file}: not a jsonl of conversations ({type(error).__name__})") from error
        if not rows:
            raise Refused(f"--probe_file {file}: is empty")
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        width = max(map(len, prompts))
        self.prompts = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts])
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        self.before = self.after = None

    @torch.no_grad()
    def answers(self, model: torch.nn.Module, device: torch.device) -> list[str]:
        """The model's greedy answers, one a prompt."""
        training = model.training
        model.eval()
        replies = model.generate(
            input_ids=self.prompts.to(device),
            attention_mask=self.mask.to(device),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.pad,
        )[:, self.prompts.shape[1] :]
        model.train(training)
        return [answer_in(text) for text in self.tokenizer.batch_decode(replies, skip_special_tokens=True)]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.answers(model, args.device)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.after = self.answers(model, args.device)

    def results(self) -> dict[str, int]:
        """The figures for train_results.json: prompts, and how many were answered exactly before and after."""

        def correct(answers: list[str]) -> int:
            return sum(a == e for a, e in zip(answers, self.expected))

        return {
            "example_prompts": len(self.expected),
            "example_correct_before": correct(self.before),
            "example_correct_after": correct(self.after),
        }

    def print_some(self, number: int = 4) -> None:
        """Show a few prompts with the answers before and after, and the score."""
        score = self.results()
        step = max(1, len(self.expected) // number)
        for i in range(0, step * number, step):
            before, after = (" ".join(answers[i].split())[:30] for answers in (self.before, self.after))
            print(f"  {self.questions[i]}\n    before: {before or '(nothing)'}\n    after:  {after or '(nothing)'}")
        print(
            f"Prompts that are not among the rows, answered exactly: {score['example_correct_before']} of "
            f"{score['example_prompts']} before training, {score['example_correct_after']} after",
            flush=True,
        )


def answer_in(reply: str) -> str:
    """The text inside <answer>…</answer>, or the whole reply where there is no such block."""
    return reply.rpartition("<answer>")[2].partition("</answer>")[0].strip()
