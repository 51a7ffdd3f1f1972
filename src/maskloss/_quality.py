"""RF-DETR's classification, in which the target of a class is how good its box is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, softplus

from maskloss._tracing import active, watched

FOCAL_GAMMA, LEAST_QUALITY = 2.0, 0.01
# On a CPU this many logits are computed at a time: work space then stays in the cache, and small.
_AT_A_TIME = 1 << 16


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
    """`quality_terms`, summed: no tensor of the size of the logits is kept, or made but for their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, place: tuple[Tensor, ...], quality: Tensor) -> Tensor:
        ctx.save_for_backward(logits, *place, quality)
        sums = logits.new_empty(logits.shape[:3])
        by_query = sums.view(-1)
        for rows, x, at in _parts(logits, place):
            p = x.sigmoid()
            terms = p.square_().mul_(softplus(x))
            terms.index_put_(at, terms.new_zeros(()))
            torch.sum(terms, 1, out=by_query[rows])
        x = logits[place]
        sums[place[:3]] += softplus(x) - quality * x
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, *place, quality = ctx.saved_tensors
        found = torch.empty_like(logits, memory_format=torch.contiguous_format)
        by_class, by_query = found.view(-1, found.shape[-1]), grad.reshape(-1, 1)
        for rows, x, _ in _parts(logits, place):
            # d/dx p^2 softplus(x) = p^2 (p + 2 (1 - p) softplus(x))
            p, rise = x.sigmoid(), softplus(x).mul_(2)
            rise.addcmul_(p, rise, value=-1).add_(p)
            torch.mul(rise.mul_(p.square_()), by_query[rows], out=by_class[rows])
        found[tuple(place)] = (logits[tuple(place)].sigmoid() - quality) * grad[tuple(place[:3])]
        return found, None, None


def _parts(logits: Tensor, place: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor, tuple[Tensor, Tensor]]]:
    """Cut the queries of all layers and images into parts: which they are, their logits `[R, C]`, and the matches."""
    _, batch, queries, classes = logits.shape
    layer, image, query, label = place
    row, flat = (layer * batch + image) * queries + query, logits.reshape(-1, classes)
    size = max(_AT_A_TIME // classes, 1) if logits.device.type == "cpu" else len(flat)
    if size >= len(flat):
        yield slice(0, len(flat)), flat, (row, label)
        return
    starts = range(0, len(flat), size)
    bounds = torch.searchsorted(row, torch.tensor([*starts, len(flat)], device="cpu")).tolist()
    for start, first, last in zip(starts, bounds, bounds[1:], strict=False):
        rows = slice(start, min(start + size, len(flat)))
        yield rows, flat[rows], (row[first:last] - start, label[first:last])
