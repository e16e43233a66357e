"""A run that is asked to stop: all ranks agree on a step, write one whole checkpoint and end with exit code 75.

Asked by a signal to any rank (sft/stopping.py), or by a file `stop` in the output directory. In the same way a rank
tells the others that the last checkpoint could not be made whole: all end with exit code 1.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from sft import stopping
from sft.messages import note
from sft.training.go_on import GoOn
from sft.training.output_dir import STOP_FILE
from sft.training.probe import Probe

ASKED, NOT_SAVED = 1, 2  # what a rank says at a step; the greatest counts


class StopOnRequest(TrainerCallback):
    """Stops the run on request. It is the last callback: what the others do at a step is done before."""

    def __init__(self, go_on: GoOn):
        self.go_on = go_on
        self.said = torch.zeros((), dtype=torch.uint8)  # once all ranks have answered: the greatest that one has said
        self.answers: distributed.Work | None = None  # until then
        self.group: distributed.ProcessGroup | None = None  # of several ranks; the CPU's, beside that of the training
        self.agreed = False
        self.stopping = False  # this step's checkpoint is the last

    def on_train_begin(self, args, state, control, **kwargs):
        """From here on a signal is a request, on all ranks at once."""
        if args.world_size > 1:
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))
            distributed.barrier(self.group)
        stopping.take_as_request(lambda: f"stopped at once at step {state.global_step}. {self.go_on.how(args)}")

    def on_step_end(self, args, state, control, **kwargs):
        """Stop where any rank was asked before the last step's end: the answer is read one step later, because waiting
        for it would cost time at each step. The last step of a run finishes it."""
        asked = stopping.requested.is_set() or args.should_save and os.path.exists(Path(args.output_dir, STOP_FILE))
        mine = NOT_SAVED if self.go_on.trainer.rest_of_save.has_failed() else ASKED * bool(asked)
        last = state.global_step >= state.max_steps
        greatest = self.greatest() if self.group else mine
        if greatest == NOT_SAVED:
            self.go_on.trainer.finish_save()  # says why
        self.agreed = self.agreed or greatest == ASKED
        if self.group and not last and not self.agreed:
            self.said.fill_(mine)
            self.answers = distributed.all_reduce(self.said, distributed.ReduceOp.MAX, group=self.group, async_op=True)
        if self.agreed and not last and not state.epoch.is_integer():  # else the epoch's end comes first
            self.stop(args, control)

    def greatest(self) -> int:
        """The greatest that a rank said when all were last asked; 0 where they were not."""
        if self.answers is None:
            return 0
        self.answers.wait()
        self.answers = None
        return int(self.said)

    def stop(self, args, control) -> None:
        """Let the Trainer save and stop."""
        if args.save_strategy == "best":  # an evaluation at this step would save only what is better
            args.save_strategy = SaveStrategy.STEPS
        control.should_save = control.should_training_stop = self.stopping = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopping:  # in the middle of the epoch
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.agreed and state.global_step < state.max_steps:
            self.stop(args, control)

    def on_save(self, args, state, control, **kwargs):
        """Leave out what the Trainer does at the end of a run: it would load the best weights, delete this checkpoint
        beside the best one, and ask for the answers after training."""
        if self.stopping:
            state.best_model_checkpoint = None  # the checkpoint has it
            self.go_on.trainer.remove_callback(Probe)

    def on_train_end(self, args, state, control, **kwargs):
        """End the process, with the command that goes on as the last line."""
        self.greatest()  # one that is under way
        if self.stopping:
            note(f"stopped on request at step {state.global_step}. {self.go_on.how(args)}")
            sys.exit(stopping.EXIT_STOPPED)
