"""An output head that computes its loss at the supervised positions in chunks of them: no logits are kept.

The gradients are computed with the loss, chunk by chunk, as in the fused losses that others write as kernels: memory
does not grow with vocabulary × positions. Where the model's config says `enable_lm_head_fp32` (Hy3, Hy-MT2-30B-A3B)
the head computes in fp32, which transformers 5.23 does not.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from sft.messages import choice
from sft.model.weight_files import is_transformers_own

LOGITS = {"cuda": 2**27, "cpu": 2**25}  # at once: 512 and 128 MB in fp32; with fewer each product takes longer


class SumOfLosses(torch.autograd.Function):
    """Cross entropy of hidden (positions, width) through weight (vocabulary, width) against targets (positions,):
    the sum, in fp32. `dtype` is that of the two matrices where they are multiplied."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        matrix, size = weight.to(dtype), max(1, LOGITS.get(hidden.device.type, 2**26) // len(weight))
        for i in range(0, len(hidden), size):
            part, wanted = hidden[i : i + size].to(dtype), targets[i : i + size, None]
            logits = linear(part, matrix).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(-1, wanted)).sum()
            if of_hidden is None and of_weight is None:
                continue
            slope = logits.sub_(log_sum).exp_()  # softmax minus one at the target
            slope = slope.scatter_add_(-1, wanted, slope.new_full((len(part), 1), -1.0)).to(dtype)
            if of_hidden is not None:
                of_hidden[i : i + size] = slope @ matrix
            if of_weight is not None:
                if dtype == of_weight.dtype:  # without a second matrix of the weight's size
                    torch.addmm(of_weight, slope.T, part, out=of_weight)
                else:
                    of_weight += slope.T @ part
        ctx.gradients, ctx.dtypes = [of_hidden, of_weight], (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx, factor):
        gradients, ctx.gradients = ctx.gradients, None  # autograd takes over what nobody else holds
        # in fp32: half precision would round the factor, and with it the length of the whole gradient
        scaled = (None if g is None else g.mul_(factor).to(dtype) for g, dtype in zip(gradients, ctx.dtypes))
        return *scaled, None, None


class Head(torch.nn.Linear):
    """An output head that gives the sum of the losses, and no logits, while it knows the `targets` (positions,)."""

    targets: torch.Tensor | None = None
    in_fp32: bool = False

    @contextlib.contextmanager
    def knows(self, targets: torch.Tensor) -> Iterator[None]:
        self.targets = targets
        try:
            yield
        finally:
            self.targets = None

    @torch.compiler.disable
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (…, vocabulary) of hidden (…, width); with targets the sum () in fp32, of (positions, width)."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        dtype = torch.float32 if self.in_fp32 else dtype
        with torch.autocast(kind, enabled=False):
            if self.targets is None:
                return linear(hidden.to(dtype), self.weight.to(dtype))
            weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
            return SumOfLosses.apply(hidden, weight, self.targets, dtype)


def put_head(model: PreTrainedModel) -> Head | None:
    """Put Head in the place of the model's head, whose weight it takes; None where that is no plain matrix."""
    theirs = model.get_output_embeddings()
    if isinstance(theirs, Head):
        return theirs
    if type(theirs) is not torch.nn.Linear or theirs.bias is not None or not is_transformers_own(model):
        return None
    ours = Head(theirs.in_features, theirs.out_features, bias=False, device="meta")
    ours.weight, ours.in_fp32 = theirs.weight, getattr(model.config, "enable_lm_head_fp32", False)
    model.set_output_embeddings(ours)
    if ours.in_fp32:
        choice("dtype of the head", "float32", "enable_lm_head_fp32 in config.json")
    return ours
