"""train.py with losses and gradients that are not finite.

    FAULTS='[{"step": 3, "rank": 1, "batch": 0, "what": "loss", "value": "nan"}]' python tests/not_finite.py FLAGS

`what` is `loss`, or `gradient`, which leaves the loss finite. A loss that is `inf` has finite gradients of its own.
With LOSS_SCALE the loss of --fp16 is scaled as on a GPU; accelerate leaves that out on a CPU.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
import transformers

TRAIN = Path(__file__).resolve().parents[1] / "train"
plain_loss = transformers.Trainer.compute_loss
plain_accelerator = transformers.Trainer.create_accelerator_and_postprocess


def compute_loss(trainer, model, inputs, *args, **kwargs):
    """The Trainer's loss and outputs, with the fault of this step, rank and batch."""
    loss, outputs = plain_loss(trainer, model, inputs, *args, **kwargs)
    place = {"step": trainer.state.global_step + 1, "rank": trainer.args.process_index}
    place["batch"] = len(trainer.finite.losses)
    for fault in json.loads(os.environ["FAULTS"]):
        if all(fault[key] == value for key, value in place.items()):
            value = float(fault["value"])
            if fault["what"] == "loss":
                loss = loss + value
            else:
                loss.register_hook(lambda gradient, value=value: gradient * value)
    return loss, outputs


def create_accelerator_and_postprocess(trainer):
    plain_accelerator(trainer)
    if os.environ.get("LOSS_SCALE"):
        trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu"), True


if __name__ == "__main__":
    sys.path.insert(0, str(TRAIN))
    sys.argv[0] = str(TRAIN / "train.py")
    transformers.Trainer.compute_loss = compute_loss
    transformers.Trainer.create_accelerator_and_postprocess = create_accelerator_and_postprocess
    runpy.run_path(sys.argv[0], run_name="__main__")
