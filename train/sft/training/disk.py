"""The disk: whether the checkpoints have room, and one line where it stops a save or a report.

Refused (exit code 2): a disk on which not even one checkpoint fits.
"""

import errno
import math
import os
import re
import resource
import shutil
import threading
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from sft.arguments import TrainingArguments
from sft.messages import in_units, note
from sft.training.environment import failing_together, ranks_of_this_disk, refuse_together
from sft.training.manifest import checkpoints_in, is_whole
from sft.training.progress import number_of_parameters
from sft.training.save import save_dtype

# bytes that an optimizer keeps for each trained parameter, where it is not Adam's 8
MOMENTS = {"8bit": 2, "adafactor": 0, "sgd": 0, "galore": 2, "lion": 4, "rmsprop": 4, "adagrad": 4, "apollo": 2}
# torch.save, also DeepSpeed's, does not say what the system said
TORCH_FAILED = -1
TORCH_WRITES = re.compile(r"PytorchStreamWriter|inline_container|iostream error|cannot be opened|Parent directory")


def checkpoint_bytes(model: PreTrainedModel, args: TrainingArguments) -> int:
    """Bytes that one checkpoint takes on this disk, roughly: weights + optimizer state.

    Weights: an adapter 4 a parameter; without DeepSpeed 4 a parameter of the model; with it as in the final model
    (2 with --bf16 or --fp16, else 4), and under ZeRO-1 and 2 the module once more, an adapter's frozen part left out.
    Optimizer: for each trained parameter 8 (Adam's; of others see MOMENTS), under ZeRO 4 more for the fp32 master;
    none with --save_only_model. With --save_on_each_node ZeRO's state is divided among the nodes.
    """
    is_adapter, trained = hasattr(model, "peft_config"), number_of_parameters(model, trained=True)
    saved = trained if is_adapter else number_of_parameters(model)
    total = saved * (save_dtype(args).itemsize if args.deepspeed and not is_adapter else 4)
    if args.save_only_model:
        return total
    stage = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0) if args.deepspeed else None
    moments = next((size for name, size in MOMENTS.items() if name in str(args.optim)), 8)
    state = trained * (moments + (4 if stage else 0))
    if stage and args.save_on_each_node:
        state = state * len(ranks_of_this_disk(args)) // args.world_size
    module = saved * save_dtype(args).itemsize if stage is not None and stage < 3 else 0
    return total + state + module


def check_space(model: PreTrainedModel, args: TrainingArguments, num_examples: int) -> None:
    """Warn where the checkpoints to come do not fit on the disk of output_dir; refuse where not even one does. All
    ranks must call."""
    why, output = None, Path(args.output_dir).absolute()
    if args.should_save and args.save_strategy != "no":
        size, number = checkpoint_bytes(model, args), number_to_write(args, num_examples)
        free = shutil.disk_usage(next(path for path in (output, *output.parents) if path.exists())).free
        if free < size:
            why = f"--output_dir {output}: a checkpoint takes {in_units(size)}, and {in_units(free)} are free"
        elif free < number * size:
            needed = f"{number} checkpoints of {in_units(size)} take {in_units(number * size)}"
            note(f"warning: {output}: {needed}, and {in_units(free)} are free: make room, or lower --save_total_limit")
    refuse_together(why)


def number_to_write(args: TrainingArguments, num_examples: int) -> int:
    """How many checkpoints come to lie on the disk beside those that a run goes on from. With --save_total_limit one
    more than that: the oldest is deleted after the newest is written."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * num_examples / rows)
    every = args.save_steps if args.save_steps >= 1 else max(1, args.save_steps * steps)
    number = math.ceil(steps / every) if args.save_strategy == "steps" else math.ceil(steps * rows / num_examples)
    if (args.save_total_limit or 0) > 0:
        number = min(number, args.save_total_limit + 1)
    there = sum(map(is_whole, checkpoints_in(Path(args.output_dir)))) if args.resume_from_checkpoint else 0
    return max(1, number - there)


# ------------------------------------------------------------------------------------------------ what it stops


def saving(place: Path, size: int = 0) -> AbstractContextManager[None]:
    """A save of so many bytes that all ranks begin and end together. Once it fails on one, all end: exit code 1, and
    a line that says why."""
    return failing_together(partial(why_not_saved, place, size))


def why_not_saved(place: Path, size: int, error: Exception) -> str | None:
    """One line on a save that the disk has stopped, None for any other error: the folder, the system's reason, how
    much is lacking, the newest checkpoint that is whole.

    Args:
        place: the folder that was written.
        size: bytes that it takes when it is whole.
    """
    output = place if place.name.rpartition("-")[0] != "checkpoint" else place.parent
    written = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) if place != output else 0
    free = shutil.disk_usage(output).free if output.exists() else 0
    number = error_number(error)
    if number == TORCH_FAILED:
        full, limited = free < size - written, resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        number = errno.ENOSPC if full else errno.EFBIG if limited else errno.EIO
    if number is None:
        return f"failed: {error}" if isinstance(error, OSError) else None
    why = os.strerror(number)
    if number == errno.ENOENT and not output.exists():
        why = "the directory is gone"
    if number in (errno.ENOSPC, errno.EDQUOT):
        needed = size - written - free
        why += f": {in_units(free)} are free in {output}" + f", {in_units(needed)} more are needed" * (needed > 0)
    whole = [path.name for path in checkpoints_in(output) if is_whole(path)]
    return f"failed: {place} could not be saved: {why}. Newest whole checkpoint: {whole[-1] if whole else 'none'}"


def error_number(error: BaseException | None) -> int | None:
    """The system's number of what was first wrong, None where the system has no part in it. safetensors and
    tokenizers have it in their text; torch.save, DeepSpeed's too, has none: TORCH_FAILED."""
    found = None
    while error:
        if isinstance(error, OSError) and error.errno:
            found = error.errno
        elif in_text := re.search(r"os error (\d+)", str(error)):
            found = int(in_text.group(1))
        elif found is None and TORCH_WRITES.search(str(error)):
            found = TORCH_FAILED
        error = error.__cause__ or error.__context__
    return found


def quiet_writer_thread() -> None:
    """Let TensorBoard's writer print no traceback: it raises its error in the main thread as well."""
    before = threading.excepthook
    threading.excepthook = lambda a: None if type(a.thread).__name__ == "_AsyncWriterThread" else before(a)


class Reporter:
    """A callback that reports (TensorBoard, wandb). Once it fails it is left out, and training goes on."""

    def __init__(self, callback: TrainerCallback):
        self.callback, self.failed = callback, False
        quiet_writer_thread()

    def __getattr__(self, event: str) -> Any:
        method = getattr(self.callback, event)

        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if self.failed:
                return None
            try:
                return method(args, state, control, **kwargs)
            except Exception as error:
                if event == "on_train_begin" and not isinstance(error, OSError):  # not set up
                    raise
                self.failed = True
                note(f"warning: {type(self.callback).__name__} has failed and reports no more: {error}")

        return call if event.startswith("on_") else method
