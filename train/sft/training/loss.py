"""The loss of models whose own is the mean over one batch, and not over the whole step."""

import torch

from sft.data.examples import IGNORE_INDEX


def mean_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross entropy of the next token, the mean over the supervised tokens of the whole step.

    Args:
        labels: (batch, length).
        num_items_in_batch: supervised tokens of the whole step; None: those of this batch.
    """
    logits = outputs.logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten().to(logits.device)
    total = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = targets.ne(IGNORE_INDEX).sum()
    return total / num_items_in_batch
