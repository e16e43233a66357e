"""How the loss of a run is computed: by the head, in chunks of the supervised positions, or from logits."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, TrainingArguments

from sft.data.examples import IGNORE_INDEX
from sft.messages import choice
from sft.model.head import Head, put_head
from sft.model.load import without_adapter


class Loss(NamedTuple):
    """How a run's loss is computed.

    Attributes:
        at_supervised: the head runs at the supervised positions alone, see Collator.
        head: what computes the loss in chunks; None where the head gives logits.
        function: what takes the place of the model's own loss; None where that can be over a whole step.
    """

    at_supervised: bool
    head: Head | None
    function: Callable | None


def choose_loss(model: PreTrainedModel, args: TrainingArguments) -> Loss:
    """The way that model and flags allow. Where it is not in chunks, a line says why."""
    inner = without_adapter(model)
    accepted = inspect.signature(inner.forward).parameters
    at_supervised = takes_supervised_head(inner, accepted, args)
    head, why = put_head(inner), None
    if head is None:
        why = "the head has an adapter, a bias or code of its own"
    elif args.fp16:
        why = "--fp16: gradients need their scale"
    if why:
        choice("loss", "of all logits at once", why)
    if why or not at_supervised:
        head = None
    else:
        inner.loss_function = mean_of_sum
    # a class that takes no further arguments is not told the tokens of the whole step
    is_told = any(parameter.kind == parameter.VAR_KEYWORD for parameter in accepted.values())
    function = None if is_told or args.label_smoothing_factor else mean_loss
    return Loss(at_supervised, head, function)


def takes_supervised_head(model: PreTrainedModel, accepted: Any, args: TrainingArguments) -> bool:
    """Whether the head can run at the supervised positions alone: the model takes `logits_to_keep` and hands
    `shift_labels` to its loss.

    Label smoothing and Liger's kernels want logits at every position.
    """
    for needs_all, why in (
        (args.label_smoothing_factor, "--label_smoothing_factor"),
        (args.use_liger_kernel, "--use_liger_kernel"),
        (not hasattr(transformers.modeling_utils, "slice_logits_to_keep"), f"transformers {transformers.__version__}"),
        (not accepted.keys() >= {"logits_to_keep", "kwargs"}, f"{type(model).__name__} does not take logits_to_keep"),
    ):
        if needs_all:
            choice("logits", "at every position", why)
            return False
    return True


def mean_of_sum(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, **kwargs) -> torch.Tensor:
    """What takes the place of transformers' loss: the sum that a Head gave as `logits`, over the tokens."""
    if logits.dim():
        raise ValueError("the head gave logits: it was not told the targets (Head.knows)")
    return logits / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def mean_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """For models whose own loss is the mean over one batch: cross entropy of the next token, the mean over the
    supervised tokens of the whole step.

    Args:
        labels: (batch, length).
        num_items_in_batch: supervised tokens of the whole step; None: those of this batch.
    """
    logits = outputs.logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten().to(logits.device)
    total = cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets.ne(IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)
