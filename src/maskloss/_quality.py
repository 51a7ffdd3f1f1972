"""RF-DETR's classification, in which the target of a class is how good its box is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, softplus

from maskloss import ops
from maskloss._tracing import active, watched

FOCAL_GAMMA, LEAST_QUALITY = 2.0, 0.01


def quality_sums(logits: Tensor, place: tuple[Tensor, ...], iou: Tensor, alpha: float) -> Tensor:
    """Sum the classification over the classes of each query: `[L, B, Q]`.

    A matched class has the target q = max(p^alpha * IoU^(1 - alpha), 0.01), all others the target 0 and the weight p^2:

        q softplus(-x) + (1 - q) softplus(x)    where matched,    p^2 softplus(x)    elsewhere

    Args:
        logits: x, `[L, B, Q, C]`.
        place: layer, image, query and class of the matches, `[N]` each, sorted; a query has one match at most.
        iou: of the matches' boxes, `[N]`; no gradient flows to it.
        alpha: the share of the probability in the quality.
    """
    p = logits.detach()[place].sigmoid()
    quality = (p**alpha * iou.detach() ** (1 - alpha)).clamp(min=LEAST_QUALITY)
    if torch.compiler.is_compiling() or active() or watched():
        return quality_terms(logits, place, quality).sum(-1)
    sums: Tensor = _QualitySums.apply(logits, place, quality)  # type: ignore[no-untyped-call]
    return sums


def quality_terms(logits: Tensor, place: tuple[Tensor, ...], quality: Tensor) -> Tensor:
    """Compute what `quality_sums` adds up, `[L, B, Q, C]`, as it is defined.

    Written with log-sigmoids: the logarithm of a rounded probability is infinite.
    """
    positive = torch.zeros_like(logits).index_put(place, quality)
    negative = (logits.sigmoid() ** FOCAL_GAMMA).index_put(place, 1 - quality)
    return -positive * logsigmoid(logits) - negative * logsigmoid(-logits)


class _QualitySums(torch.autograd.Function):
    """`quality_terms`, summed.

    Both passes need the same sigmoids and softplus, so the first one computes the derivatives along with the sums, and
    keeps them: they become the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, place: tuple[Tensor, ...], quality: Tensor) -> Tensor:
        ctx.save_for_backward(logits, *place, quality)
        sums, ctx.slopes = _sums_and_slopes(logits, place, quality, slopes=ctx.needs_input_grad[0])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        slopes, ctx.slopes = ctx.slopes, None  # the first backward pass takes them
        if slopes is None:
            logits, *place, quality = ctx.saved_tensors
            slopes = _sums_and_slopes(logits, tuple(place), quality, slopes=True)[1]
        return slopes.mul_(grad.unsqueeze(-1)), None, None


def _sums_and_slopes(
    logits: Tensor, place: tuple[Tensor, ...], quality: Tensor, *, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum `quality_terms` over the classes, `[L, B, Q]`, and compute its derivatives, `[L, B, Q, C]`, if asked for."""
    layer, image, query, label = place
    if type(logits) is Tensor and logits.device.type == "cpu" and ops.has_host_kernels():
        row = (layer * logits.shape[1] + image) * logits.shape[2] + query
        return ops.quality_sums(logits, row, label, quality, slopes=slopes)
    p, rise = logits.sigmoid(), softplus(logits)
    squares = p.square()
    terms = squares * rise
    x = logits[place]
    terms[place] = softplus(x) - quality * x
    if not slopes:
        return terms.sum(-1), None
    # d/dx p^2 softplus(x) = p^2 (p + 2 (1 - p) softplus(x))
    found = rise.mul_(2).addcmul_(p, rise, value=-1).add_(p).mul_(squares)
    found[place] = x.sigmoid() - quality
    return terms.sum(-1), found
