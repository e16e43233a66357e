"""Whether the output directory is free: no other job, no other run, no model that no run has written.

Refused (exit code 2): what is not; also one that is, or would be moved with, the model to train.
"""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from transformers import TrainingArguments

from sft.messages import Refused, first_few, note, read_json
from sft.model.files import files_of_a_model
from sft.processes import LOCK, STARTED, write_step
from sft.training.environment import from_all_ranks, refuse_together
from sft.training.manifest import checkpoints_in, is_torn, remove, step_of

# What a run puts at the top of its directory, beside the files of a model.
RUN_FILES = (
    "checkpoint-*", "*.safetensors*", "config.json", "adapter_config.json", "train*_results.json",
    "trainer_state.json", "training_args.bin", "base.json", "kept_in_fp32.json",
)  # fmt: skip
MODEL_MARKS = ("config.json", "adapter_config.json", "tokenizer_config.json", "*.safetensors", "pytorch_model*.bin")
FINAL_FILES = ("train_results.json", "trainer_state.json")  # of a finished run
STOP_FILE = "stop"  # asks the run to stop
locks: dict[Path, IO] = {}  # {path: open file}, for as long as this process lives


@contextlib.contextmanager
def refusing_together() -> Iterator[None]:
    """A block that all ranks begin and end together: what one of them refuses, or the system refuses it, all do."""
    why = None
    try:
        yield
    except Refused as refusal:
        why = str(refusal)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        why = f"--output_dir: {place}cannot be written ({error.strerror}). Choose another directory"
    refuse_together(why)


def check_output_dir(args: TrainingArguments, model_path: str | None, tokenizer_path: str | None) -> bool:
    """Refuse an output directory that cannot be written, holds another run, or that overwriting would take the model
    from.

    Returns whether there is an earlier run to set aside, once the new one is about to begin. With --auto_resume a
    finished run stays as it is: ends the process. All ranks must call.
    """
    lock_output_dir(args)
    if from_all_ranks(args.auto_resume and is_finished(args))[0]:
        note(f"{args.output_dir}: the run is finished, it stays as it is")
        sys.exit(0)
    return holds_earlier_run(args, model_path, tokenizer_path)


@refusing_together()
def holds_earlier_run(args: TrainingArguments, model_path: str | None, tokenizer_path: str | None) -> bool:
    """What check_output_dir refuses and returns, on this rank."""
    output, resumed = Path(args.output_dir), step_begun(args) > 0
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise Refused(f"--output_dir {output}: {place} is not a directory that can be written")
    if resumed:
        return False
    for flag, path in (("model", model_path), ("tokenizer", tokenizer_path)):
        own = path and Path(path).resolve()
        if not own or not own.exists():
            continue
        if args.overwrite_output_dir and own.is_relative_to(output.resolve()):
            raise Refused(f"--{flag}_name_or_path {path}: lies in --output_dir: --overwrite_output_dir would move it")
        if own == output.resolve():
            raise Refused(f"--output_dir {output}: is the {flag}'s own directory, its files would be overwritten")
    held = sorted(file.name for mark in MODEL_MARKS for file in output.glob(mark))
    done = (output / "train_results.json").exists()
    runs = done or any(output.glob("checkpoint-*"))
    if held and not runs and not (output / LOCK).exists():
        raise Refused(
            f"--output_dir {output}: contains a model that no run has written ({first_few(held)}). It would be "
            "overwritten: choose another directory"
        )
    if not (held or runs) or args.auto_resume and not done:  # then its checkpoints are torn
        return False
    if not args.overwrite_output_dir:
        raise Refused(
            f"--output_dir {output}: holds another run. Choose another directory, go on with it "
            "(--resume_from_checkpoint), or set it aside (--overwrite_output_dir)"
        )
    return True


def is_finished(args: TrainingArguments) -> bool:
    """Whether a run has written its final files in output_dir, at the step of the checkpoint that would go on or at a
    later one, and no more steps are asked for now."""
    results, state = (read_if_whole(Path(args.output_dir, name)) for name in FINAL_FILES)
    done = results.get("global_step", -1)
    if done != state.get("global_step") or done < step_begun(args):
        return False
    longer = done < args.max_steps if args.max_steps > 0 else state["epoch"] < args.num_train_epochs
    return not longer or has_stopped_early(state, args)


def has_stopped_early(state: dict[str, Any], args: TrainingArguments) -> bool:
    """Whether a run ends at the step of its trainer_state.json, for as many evaluations without a better loss as
    --early_stopping_patience says."""
    kept = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    counter = kept["attributes"]["early_stopping_patience_counter"] if kept else 0
    return bool(args.early_stopping_patience) and counter >= args.early_stopping_patience


def read_if_whole(file: Path) -> dict[str, Any]:
    """The object in a json file; an empty one where the file is missing or damaged."""
    try:
        return read_json(file)
    except Refused:
        return {}


@refusing_together()
def lock_output_dir(args: TrainingArguments, begin: bool = False) -> None:
    """Refuse an output directory that another job writes to, and keep others out until this process ends. All ranks
    must call.

    The kernel holds the lock (flock), on a file that stays. It is made when the run is about to `begin`.
    """
    path = Path(args.output_dir, LOCK)
    if not args.should_save or path in locks or not (begin or path.exists()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    locks[path] = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")  # noqa: SIM115
    try:
        fcntl.flock(locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        locks.pop(path).close()
        why = "another running job uses it. Choose another directory, or end that job"
        raise Refused(f"--output_dir {path.parent}: {why}") from None
    except OSError as error:
        note(f"{path.parent}: is not locked, its file system has no locks ({error.strerror})")


@refusing_together()
def begin_output_dir(args: TrainingArguments, earlier_run: bool) -> None:
    """Keep other jobs out, and set an earlier run aside: this one begins. Where it goes on, checkpoints that are newer
    than its own are of steps that it makes anew, and it is finished no more. All ranks must call."""
    lock_output_dir(args, begin=True)
    if args.should_save:
        make_way(args, earlier_run)
    keep_step(args, 0)


def make_way(args: TrainingArguments, earlier_run: bool) -> None:
    """Remove an old file `stop`, and set aside what is not this run's any more."""
    output = Path(args.output_dir)
    stop = output / STOP_FILE
    if stop.exists() and stop.stat().st_mtime < float(os.environ[STARTED]):
        stop.unlink()
        note(f"{stop}: removed, because it is older than this start")
    if earlier_run:
        place = set_aside(output, files_of_a_run(output))
        return note(f"--overwrite_output_dir: the earlier run in {output} was moved to {place}")
    begun, moved = step_begun(args), [output / name for name in FINAL_FILES if (output / name).exists()]
    for checkpoint in [path for path in checkpoints_in(output) if step_of(path) > begun]:
        if is_torn(checkpoint):
            remove(checkpoint)
            note(f"{checkpoint.name}: was not whole, removed")
        else:
            moved.append(checkpoint)
    if moved:
        names, place = ", ".join(path.name for path in moved), set_aside(output, moved)
        note(f"{names}: moved to {place}, because the run goes on from step {begun}")


def step_begun(args: TrainingArguments) -> int:
    """The step of the checkpoint in output_dir that the run goes on from, 0 where there is none."""
    here = checkpoints_in(Path(args.output_dir)) if args.resume_from_checkpoint else []
    return next((step_of(path) for path in here if path.samefile(args.resume_from_checkpoint)), 0)


def keep_step(args: TrainingArguments, step: int) -> None:
    """Keep the step that was made in the lock, for the launcher, which may start the job again."""
    if lock := locks.get(Path(args.output_dir, LOCK)):
        write_step(lock.fileno(), step)


def files_of_a_run(output: Path) -> list[Path]:
    """Checkpoints, final model and results; not logs and curves."""
    found = [file for pattern in RUN_FILES for file in output.glob(pattern)]
    return [*found, *files_of_a_model(output, quiet=True).values()]


def set_aside(output: Path, files: list[Path]) -> Path:
    """Move what an output directory holds into `previous-<time>/` in it, and return that."""
    place = output / time.strftime("previous-%Y%m%d-%H%M%S")
    for file in files:
        target = place / file.relative_to(output)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    return place
