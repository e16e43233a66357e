"""How the loss of a step is computed: by the head in chunks, or from all logits."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sft.data.examples import IGNORE_INDEX
from sft.messages import choice
from sft.model.head import Head, put_head
from sft.model.load import without_adapter


def mean_of_sum(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, **kwargs) -> torch.Tensor:
    """What takes the place of transformers' loss: the sum that a Head gave as `logits`, over the tokens."""
    if logits.dim():
        raise ValueError("the head gave logits: it was not told the targets (Head.knows)")
    return logits / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def compute_in_chunks(model: PreTrainedModel, at_supervised: bool, fp16: bool) -> Head | None:
    """The head that computes the loss, once it is given targets; None where it gives logits, and a line why."""
    inner = without_adapter(model)
    head = put_head(inner)
    if head is None or fp16:
        why = "--fp16: gradients need their scale" if head else "the head has an adapter, a bias or code of its own"
        choice("loss", "of all logits at once", why)
    if head is None or fp16 or not at_supervised:
        return None
    inner.loss_function = mean_of_sum
    return head


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
