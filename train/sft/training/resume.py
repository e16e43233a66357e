"""Going on from a checkpoint: its model and state, the steps that are left, what the Trainer forgets.

Refused (exit code 2): a directory that is no checkpoint or not a whole one. plan.py has the flags of its run.
"""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from sft.messages import NOTHING_SAVED, Refused, choice, end_by_ctrl_c, note, read_json
from sft.model.weight_files import open_tensors
from sft.training.save import Companions, save_dtype


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's trainer_state.json; refuses a directory that has none."""
    file = checkpoint / "trainer_state.json"
    state = read_json(file) if file.is_file() else {}
    if not {"global_step", "log_history"} <= set(state) or (checkpoint / "train_results.json").exists():
        why = "it has no whole trainer_state.json" if checkpoint.is_dir() else "no such directory"
        inner = max(checkpoint.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, default=None)
        why = f"it is a run's directory: give {inner}" if inner else why
        raise Refused(f"--resume_from_checkpoint {checkpoint}: is not a checkpoint ({why})")
    return state


def find_checkpoint(args, training: TrainingArguments) -> str | None:
    """With --resume_from_checkpoint, take model and tokenizer from there; an adapter's base from its config if none is
    given.

    Returns the checkpoint's directory, or None.
    """
    if training.resume_from_checkpoint is None:
        if args.use_lora and args.model_name_or_path is None:
            raise Refused("--use_lora: an adapter needs a model: give --model_name_or_path")
        return None
    directory = Path(training.resume_from_checkpoint)
    if not args.use_lora:
        given = Path(args.model_name_or_path or directory, "config.json")
        kinds = [read_json(file).get("model_type") for file in (given, directory / "config.json") if file.is_file()]
        if len(set(kinds)) > 1:
            raise Refused(f"--model_name_or_path {given.parent}: is a {kinds[0]}, the checkpoint is a {kinds[1]}")
        args.model_name_or_path = str(directory)
    else:
        open_tensors(directory / "adapter_model.safetensors")
        if args.model_name_or_path is None:
            args.model_name_or_path = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        if args.model_name_or_path is None:
            raise Refused(f"{directory}: its adapter_config.json names no base: give --model_name_or_path")
    args.tokenizer_name_or_path = args.tokenizer_name_or_path or str(directory)
    return str(directory)


def check_training_state(directory: str, args: TrainingArguments) -> None:
    """Refuse a checkpoint that lacks a part of the training's state: the Trainer would begin it afresh and not say so.

    The optimiser's, the scheduler's, each rank's random state. What torch.save writes is a zip file, which ends in a
    table: one that is cut has none.
    """
    checkpoint, advice = Path(directory), "To begin anew from its weights, give it as --model_name_or_path"
    deepspeed, world_size = bool(args.deepspeed), args.world_size
    engine = args.hf_deepspeed_config.config if deepspeed else {}
    here = range(world_size)  # the ranks whose states are on this disk
    if args.save_on_each_node:
        first = args.process_index - args.local_process_index
        here = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    ranks = [""] if world_size == 1 else [f"_{rank}" for rank in here]
    own_scheduler = engine.get("scheduler") or engine.get("optimizer")  # then it is in the engine's states
    needed = [] if own_scheduler else [checkpoint / "scheduler.pt"]
    needed += [*(checkpoint / f"rng_state{rank}.pth" for rank in ranks)]
    if not deepspeed:
        needed.insert(0, checkpoint / "optimizer.pt")
    elif (checkpoint / "latest").is_file():
        states = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
        needed += [states, *states.glob("*.pt")]
        number = len(list(states.glob("*optim_states.pt")))
        fits = number == world_size or args.save_on_each_node and number == len(here)
        if states.is_dir() and not fits and engine.get("zero_optimization", {}).get("stage", 0) > 0:
            raise Refused(
                f"--resume_from_checkpoint {directory}: holds the optimizer states of {number} of {len(here)} ranks. "
                + advice
            )
    else:
        needed.insert(0, checkpoint / "latest")
    for file in needed:
        why = "missing" if not file.exists() else "not whole"
        if why == "missing" or not (file.is_dir() or zipfile.is_zipfile(file)):
            raise Refused(f"--resume_from_checkpoint {directory}: {file.name} is {why}. {advice}")
    note(f"going on from {directory}: weights, optimiser, scheduler, data position and random state")


def steps_left(checkpoint: str, args: TrainingArguments, num_examples: int, given: frozenset[str]) -> int:
    """Optimizer steps from a checkpoint to the end that its run planned, or that is given; refuses one that lacks a
    part of the training's state, if there are any."""
    state = read_trainer_state(Path(checkpoint))
    end = state["max_steps"]
    if given & {"max_steps", "num_train_epochs"}:  # counted as the Trainer counts them
        whole = math.floor if args.dataloader_drop_last else math.ceil
        batches = whole(whole(num_examples / args.per_device_train_batch_size) / args.world_size)
        epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        end = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    if end > state["global_step"]:
        check_training_state(checkpoint, args)
    return max(0, end - state["global_step"])


def finish_from(
    checkpoint: Path, args: TrainingArguments, companions: Companions, base: str | None, figures: dict
) -> None:
    """Write the final files of a run whose last step is in `checkpoint`: no step is left to make.

    Args:
        base: what an adapter's files are to name as its base; None: as in the checkpoint.
        figures: for train_results.json, beside the step and the mean loss.
    """
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    state = read_trainer_state(checkpoint)
    best = checkpoint.with_name(Path(state.get("best_model_checkpoint") or checkpoint).name)
    weights = best if args.load_best_model_at_end and best.is_dir() else checkpoint
    adapter = (checkpoint / "adapter_config.json").is_file()
    dtype = torch.float32 if adapter else save_dtype(args)
    for file in weights.glob("*.safetensors"):
        save_file(companions.cast(load_file(file), dtype), output / file.name, metadata={"format": "pt"})
    for name in ("config.json", "model.safetensors.index.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, output / name)
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("base.json", "path")):
        if (checkpoint / name).is_file():
            content = read_json(checkpoint / name) | ({key: base} if base else {})
            text = json.dumps(content, indent=2 if name == "adapter_config.json" else None)
            (output / name).write_text(text, encoding="utf-8")
    companions.write(output, None if adapter else dtype)
    shutil.copyfile(checkpoint / "trainer_state.json", output / "trainer_state.json")
    if not (output / "train_results.json").exists():
        losses = losses_so_far(state)
        figures |= {"global_step": state["global_step"], "train_loss": losses["logged"] + losses["unlogged"]}
        figures["train_loss"] /= state["global_step"]
        (output / "train_results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ what goes on


def losses_so_far(state: dict[str, Any]) -> dict[str, float]:
    """Of a trainer_state.json: the sums of its steps' losses until the last logging step and since, and that step."""
    if kept := state.get("stateful_callbacks", {}).get("GoOn"):
        return kept["attributes"]
    total, last = 0.0, 0  # of an earlier release: the losses since are not known, and counted as the mean
    for entry in (entry for entry in state["log_history"] if "loss" in entry):
        total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
    step = state["global_step"]
    return {"logged": total * step / max(last, 1), "unlogged": 0.0, "last_logged": step}


def follow_schedule(scheduler: Any, step: int, max_steps: int) -> None:
    """Give the optimizer the rate that the schedule now has for the next step, and say so where it was another: the
    Trainer would take the checkpoint's once more."""
    if not hasattr(scheduler, "lr_lambdas"):  # it follows the loss, or is DeepSpeed's own
        return
    before, scheduler.last_epoch = scheduler.get_last_lr()[0], scheduler.last_epoch - 1
    scheduler.step()
    if (now := scheduler.get_last_lr()[0]) != before:
        choice("next learning rate", f"{now:.4g}", f"step {step + 1} of {max_steps}; as it was planned {before:.4g}")


class GoOn(TrainerCallback, ExportableState):
    """What the Trainer forgets at a checkpoint: losses that are not logged yet, intervals that are given anew. At
    Ctrl-C, what was saved last and the command that goes on."""

    def __init__(self, trainer: transformers.Trainer, train_data_file: list[str]):
        self.trainer, self.train_data_file, self.saved = trainer, train_data_file, None

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps, as losses_so_far() returns it."""
        kept = {"logged": "_total_loss_scalar", "unlogged": "unlogged", "last_logged": "_globalstep_last_logged"}
        return {"args": {}, "attributes": {name: getattr(self.trainer, own, 0) for name, own in kept.items()}}

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        """Put back what a checkpoint kept, follow this start's schedule and intervals, and wait for Ctrl-C."""
        if state.global_step:
            losses, trainer = losses_so_far(vars(state)), self.trainer
            trainer._total_loss_scalar, trainer._globalstep_last_logged = losses["logged"], losses["last_logged"]
            trainer._tr_loss += losses["unlogged"]
            follow_schedule(getattr(lr_scheduler, "scheduler", lr_scheduler), state.global_step, state.max_steps)
        for callback in self.trainer.callback_handler.callbacks:  # one that the checkpoint does not know
            if isinstance(callback, ExportableState):
                state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        state.compute_steps(args, state.max_steps)  # the Trainer takes the checkpoint's intervals
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as under nohup
            end, begin = os.pipe()
            os.set_blocking(begin, False)
            signal.set_wakeup_fd(begin, warn_on_full_buffer=False)
            signal.signal(signal.SIGINT, lambda *_: None)
            threading.Thread(target=self.wait, args=(end, args, state), daemon=True).start()

    def wait(self, end: int, args: TrainingArguments, state: TrainerState) -> None:
        """Until Ctrl-C. In a thread: the main one may be in a collective, which does not end once a peer has gone."""
        while os.read(end, 1)[0] != signal.SIGINT:
            pass
        how_to_go_on = self.command(args) if self.saved else NOTHING_SAVED
        end_by_ctrl_c(f" at step {state.global_step}. {how_to_go_on}")

    def on_save(self, args, state, control, **kwargs):
        self.saved = str(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def command(self, args: TrainingArguments) -> str:
        """What was saved last, and the command that goes on from it: train.sh where that has started us."""
        if args.save_only_model:
            return f"Last checkpoint: {self.saved}, without optimizer state (--save_only_model)"
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
        launcher = "python" if args.world_size == 1 else f"torchrun --nproc_per_node {ranks}"
        begin = os.environ.get("GO_ON_WITH") or f"{launcher} {shlex.quote(sys.argv[0])}"
        flags = ["--resume_from_checkpoint", str(self.saved), "--train_data_file", *self.train_data_file]
        flags += ["--output_dir", args.output_dir]
        return f"Last checkpoint: {self.saved}. Continue with:\n{begin} {shlex.join(flags)}"
