"""What the Trainer forgets at a checkpoint and is put back; how a run that was stopped goes on."""

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from sft.messages import choice
from sft.stopping import NOTHING_SAVED, go_on_from
from sft.training.manifest import checkpoints_in, is_whole
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
    """What the Trainer forgets at a checkpoint: losses that are not logged yet, evaluations without a better loss,
    where the best checkpoint is, intervals that are given anew. For one who stops the run, what was saved last and the
    command that goes on."""

    def __init__(self, trainer: transformers.Trainer, best: Path | None = None):
        self.trainer = trainer
        self.best = best  # the best checkpoint before this process
        self.save_later = False  # at the epoch's end
        if best:  # the Trainer looks where it was saved, and says that it is gone
            logger = logging.getLogger("transformers.trainer")
            logger.addFilter(lambda record: "does not exist anymore" not in record.getMessage())

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
            state.best_model_checkpoint = self.best and str(self.best)
            args.eval_on_start = False  # the run has done that
        for name, callback in self.stateful():
            kept = state.stateful_callbacks.setdefault(name, callback.state())  # the checkpoint may not know it
            if isinstance(callback, EarlyStoppingCallback):
                patience = callback.early_stopping_patience  # may be given anew
                vars(callback).update(kept["args"] | kept["attributes"], early_stopping_patience=patience)
        state.compute_steps(args, state.max_steps)  # the Trainer takes the checkpoint's intervals

    def stateful(self) -> list[tuple[str, Any]]:
        """The callbacks whose state trainer_state.json keeps, with their names there."""
        callbacks = self.trainer.callback_handler.callbacks
        return [(type(callback).__name__, callback) for callback in callbacks if isinstance(callback, ExportableState)]

    def on_step_end(self, args, state, control, **kwargs):
        """Put a checkpoint at an epoch's end off until that has been evaluated and logged: a run that goes on from it
        does neither."""
        keep_step(args, state.global_step)
        self.save_later = control.should_save and state.epoch.is_integer() and not self.trainer.finite.stops
        control.should_save = control.should_save and not self.save_later

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self.save_later

    def on_train_end(self, args, state, control, **kwargs):
        """Let the final trainer_state.json have the callbacks' states of now, and not of the last checkpoint."""
        state.stateful_callbacks |= {name: callback.state() for name, callback in self.stateful()}

    def how(self, args: TrainingArguments) -> str:
        """What was saved last, and the command that goes on from it: train.sh where that has started us."""
        saved = next(filter(is_whole, reversed(checkpoints_in(Path(args.output_dir)))), None)
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
        return go_on_from(saved, begin or script, how)
