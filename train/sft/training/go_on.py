"""What the Trainer forgets at a checkpoint and is put back; how a run that was stopped goes on."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from sft.messages import choice
from sft.stopping import NOTHING_SAVED
from sft.training.manifest import is_whole
from sft.training.output_dir import keep_step


def losses_so_far(state: dict[str, Any]) -> dict[str, float]:
    """Of a trainer_state.json: the sums of its steps' losses until the last logging step and since, that step, and the
    last one that was skipped."""
    if kept := state.get("stateful_callbacks", {}).get("GoOn"):
        return kept["attributes"]
    total, last = 0.0, 0  # of an earlier release: the losses since are not known, and counted as the mean
    for entry in (entry for entry in state["log_history"] if "loss" in entry):
        total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
    step = state["global_step"]
    return {"logged": total * step / max(last, 1), "unlogged": 0.0, "last_logged": step}


def follow_schedule(scheduler: Any, step: int, max_steps: int, learning_rate: float | None = None) -> None:
    """Give the optimizer the rate that the schedule now has for the next step, and say so where it was another: the
    Trainer would take the checkpoint's once more. `learning_rate`: the highest, if it is not the checkpoint's."""
    if not hasattr(scheduler, "lr_lambdas"):  # it follows the loss, or is DeepSpeed's own
        return
    if learning_rate is not None:
        scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
    before, scheduler.last_epoch = scheduler.get_last_lr()[0], (scheduler.last_epoch or step) - 1
    scheduler.step()
    if (now := scheduler.get_last_lr()[0]) != before:
        choice("next learning rate", f"{now:.4g}", f"step {step + 1} of {max_steps}; as it was planned {before:.4g}")


class GoOn(TrainerCallback, ExportableState):
    """What the Trainer forgets at a checkpoint: losses that are not logged yet, intervals that are given anew. For one
    who stops the run, what was saved last and the command that goes on."""

    def __init__(self, trainer: transformers.Trainer):
        self.trainer = trainer
        self.saved: list[Path] = []  # checkpoints of this process

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps, as losses_so_far() returns it."""
        kept = {"logged": "_total_loss_scalar", "unlogged": "unlogged", "last_logged": "_globalstep_last_logged"}
        attributes = {name: getattr(self.trainer, own, 0) for name, own in kept.items()}
        return {"args": {}, "attributes": attributes | {"last_skipped": self.trainer.finite.last_skipped}}

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        """Put back what a checkpoint kept, and follow this start's schedule and intervals."""
        if state.global_step:
            losses, trainer = losses_so_far(vars(state)), self.trainer
            trainer._total_loss_scalar, trainer._globalstep_last_logged = losses["logged"], losses["last_logged"]
            trainer._tr_loss += losses["unlogged"]
            trainer.finite.last_skipped = losses.get("last_skipped", trainer.finite.last_skipped)
            highest = args.learning_rate if args.resume_anyway else None
            scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
            follow_schedule(scheduler, state.global_step, state.max_steps, highest)
        for callback in self.trainer.callback_handler.callbacks:  # one that the checkpoint does not know
            if isinstance(callback, ExportableState):
                state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        state.compute_steps(args, state.max_steps)  # the Trainer takes the checkpoint's intervals

    def on_step_end(self, args, state, control, **kwargs):
        keep_step(args, state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def how(self, args: TrainingArguments) -> str:
        """What was saved last, and the command that goes on from it: train.sh where that has started us."""
        saved = next(filter(is_whole, reversed(self.saved)), None)  # the last one may not be whole yet
        if saved is None:
            return NOTHING_SAVED
        if args.save_only_model:
            return f"Last checkpoint: {saved}, without optimizer state (--save_only_model)"
        script, begin = shlex.quote(sys.argv[0]), os.environ.get("GO_ON_WITH")
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(args.world_size)
        if not begin and args.world_size == 1:
            begin = f"python {script}"
        elif not begin and one_node and "TORCHELASTIC_RUN_ID" in os.environ:
            begin = f"torchrun --nproc_per_node {args.world_size} {script}"
        how = "Continue with:" if begin else "To go on, start the same launcher again with:"
        command = f"{begin or script} --resume_from_checkpoint {shlex.quote(str(saved))}"
        return f"Last checkpoint: {saved}. {how}\n{command}"
