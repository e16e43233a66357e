"""Stops at losses and gradients that are not finite.

A loss that is nan or infinite makes its own gradients nan, on the device. All ranks share the gradient norm, so all of
them see it there: an ordinary step reads nothing more than this norm, and only where it is not finite do the ranks
exchange their losses. Gradients of fp16 are left to its loss scale.
"""

import math
import sys

import torch
import transformers
from accelerate.utils import gather_object
from transformers import TrainerCallback

from sft.messages import first_few, is_first_rank, note

EXIT_NON_FINITE = 3
STEPS_APART = 100  # gradients that are not finite for a second time within so many steps end the run


class FiniteWatch(TrainerCallback):
    """Watches the losses and gradients of each step.

    Attributes:
        last_skipped: the last step that was not made, because of its gradients.
    """

    def __init__(self, trainer: transformers.Trainer):
        self.trainer = trainer
        self.last_skipped = -STEPS_APART
        self.numbers: list[list[int]] = []  # of the sequences in each batch of this step
        self.losses: list[torch.Tensor] = []  # of those batches
        self.stops = False

    def begin_step(self, numbers: list[list[int]]) -> None:
        """Keep which sequences are in the batches of the step that begins."""
        self.numbers, self.losses = numbers, []

    def keep(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, kept for check(); where it is not finite, with gradients that are nan."""
        self.losses.append(loss.detach())
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)

    def check(self, norm: float | None) -> None:
        """Let the step be made if the gradient norm is finite. Else end the run if a loss is not finite on any rank,
        or let the step be skipped. All ranks must call with the same norm.

        Args:
            norm: None where DeepSpeed runs without ZeRO, which has none; ZeRO's may be -1 for one that is not finite.
        """
        trainer = self.trainer
        trainer.optimizer._is_overflow = False  # of the step before
        if norm is not None and 0 <= norm < math.inf:
            return
        step = trainer.state.global_step + 1
        ranks = enumerate(gather_object([self.non_finite_loss()]))
        if found := [(loss, f"on rank {rank} ({rows})") for rank, (loss, rows) in ranks if loss is not None]:
            places = first_few([place for _, place in found])
            trainer.finish_save()
            stop(f"stopped: the loss is {found[0][0]} at step {step} {places}")
        scaled = trainer.accelerator.scaler or trainer.deepspeed and trainer.deepspeed.fp16_enabled()
        if norm is None or scaled:  # a scaled loss makes such gradients when its scale is too high
            return
        trainer.optimizer.zero_grad()  # ZeRO has skipped the step already
        trainer.optimizer._is_overflow = True  # so that the Trainer leaves the schedule where it is, as under ZeRO
        self.stops = step - self.last_skipped <= STEPS_APART
        self.last_skipped = step
        note(f"step {step}: the gradients are not finite, the loss is. This step is skipped")

    def non_finite_loss(self) -> tuple[float | None, str]:
        """The step's first loss on this rank that is not finite, and the rows of its batch; None where all are."""
        for loss, numbers in zip(torch.stack(self.losses).tolist(), self.numbers):
            if not math.isfinite(loss):
                return loss, first_few(self.trainer.train_dataset.places(numbers))
        return None, ""

    def on_step_end(self, args, state, control, **kwargs):
        """Have the checkpoint of a run that stops saved. Not evaluated: that could undo the saving."""
        if self.stops:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args, state, control, **kwargs):
        """End a run that stops, now that its checkpoint is saved."""
        if self.stops:
            stop(
                f"stopped: the gradients are not finite at step {state.global_step}, for the second time within "
                f"{STEPS_APART} steps. checkpoint-{state.global_step} has the weights before it"
            )


def stop(message: str) -> None:
    """End all ranks with the message of the first."""
    if is_first_rank():
        print(message, file=sys.stderr, flush=True)
    sys.exit(EXIT_NON_FINITE)
