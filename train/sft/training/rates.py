"""The learning rate: `--min_lr` with every scheduler, and what is said of a warmup that does not do what it should."""

import json
from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from sft.messages import Refused, note

FOLLOW_THE_LOSS = ("reduce_lr_on_plateau", "greedy")
KNOW_A_LOWEST_RATE = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", *FOLLOW_THE_LOSS)
WITHOUT_WARMUP = ("constant", *FOLLOW_THE_LOSS)


def set_lowest_rate(values: dict[str, Any]) -> None:
    """Give the schedules that know a lowest rate --min_lr. The cosine ones get a share of the highest: under ZeRO-3 an
    absolute one asks the optimiser for a value that it does not have. The greedy one may climb to --learning_rate."""
    schedule = values["lr_scheduler_type"]
    if schedule not in KNOW_A_LOWEST_RATE:
        return
    own = values["lr_scheduler_kwargs"] or {}
    own = json.loads(own) if isinstance(own, str) else dict(own)
    if schedule == "greedy":
        own.setdefault("max_lr", values["learning_rate"])
    if schedule in FOLLOW_THE_LOSS:
        own.setdefault("min_lr", values["min_lr"])
    elif "min_lr_rate" not in own:
        own["min_lr_rate"] = own.pop("min_lr", values["min_lr"]) / (values["learning_rate"] or 1)
    values["lr_scheduler_kwargs"] = own


def keep_above_lowest(scheduler: Any, args: TrainingArguments, steps: int) -> None:
    """Let a scheduler of a run of so many steps go no lower than --min_lr. Refuses one that cannot."""
    if not args.min_lr or args.lr_scheduler_type in KNOW_A_LOWEST_RATE:
        return
    if not hasattr(scheduler, "lr_lambdas"):
        raise Refused(f"--min_lr: has no effect with --optim {args.optim.value}; leave it out")
    low, warmup_steps = args.min_lr / args.learning_rate, args.get_warmup_steps(steps)
    scheduler.lr_lambdas = [with_min_lr(factor, warmup_steps, low) for factor in scheduler.lr_lambdas]


def with_min_lr(factor: Callable[[int], float], warmup_steps: int, low: float) -> Callable[[int], float]:
    """The scheduler's `factor` of the learning rate, squeezed into low … 1 after the warmup."""

    def squeezed(step: int) -> float:
        if step < warmup_steps:
            return factor(step)
        return low + (1 - low) * factor(step)

    return squeezed


def report_warmup(args: TrainingArguments, steps: int) -> None:
    """Say that a warmup has no effect, or that it is longer than the run of so many steps."""
    warmup_steps, schedule = args.get_warmup_steps(steps), args.lr_scheduler_type.value
    if warmup_steps and schedule in WITHOUT_WARMUP:
        note(f"warmup has no effect with --lr_scheduler_type {schedule}")
    elif warmup_steps >= steps:
        note(f"warmup: {warmup_steps} steps of {steps}: the run ends before it reaches --learning_rate")
