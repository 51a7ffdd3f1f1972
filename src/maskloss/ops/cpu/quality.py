# mypy: allow-untyped-defs
"""The classification in which the target of a class is how good its box is, on CPU tensors, and its kernel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .arguments import array_of, float_of
from .compile import helper, kernel
from .formulas import sigmoid_softplus
from .memory import bare
from .threads import launch, take

# Queries of one work item.
_SOME = 64
# How many pixels of masks can be looked at while the logit of a class is (see `launch`).
_PER_CLASS = 3


@helper(fastmath={"contract", "reassoc", "nsz"})
def _sum_negative(x, n, slopes):
    """Sum p^2 softplus(x) over classes; `slopes` gets the derivatives, if it has room for them."""
    one, total = x.dtype.type(1), x.dtype.type(0)
    if slopes.shape[0] < n:
        for c in range(n):
            p, softplus = sigmoid_softplus(x[c])
            total += p * p * softplus
        return total
    for c in range(n):
        p, softplus = sigmoid_softplus(x[c])
        total += p * p * softplus
        slopes[c] = p * p * (p + (one - p) * (softplus + softplus))
    return total


@kernel
def _quality_sums(counter, items, _values, _coordinates, _integers, logits, label, quality, sums, slopes):
    """Sums over the classes of queries, from logits `[R, C]`; `slopes`, if it has rows, gets their derivatives.

    `label` is the class of a query's target, -1 for one without a target. A work item is some queries.
    """
    logits, label, quality, slopes = bare(logits), bare(label), bare(quality), bare(slopes)
    rows, classes = logits.shape
    wanted = slopes.shape[0] > 0
    while True:
        item = take(counter)
        if item >= items:
            break
        for row in range(item * _SOME, min((item + 1) * _SOME, rows)):
            x, matched = logits[row], label[row]
            found = slopes[row] if wanted else x[:0]
            before = classes if matched < 0 else matched
            total = _sum_negative(x, before, found)
            if matched >= 0:
                after = matched + 1
                total += _sum_negative(x[after:], classes - after, found[after:])
                p, softplus = sigmoid_softplus(x[matched])
                total += softplus - quality[row] * x[matched]
                if wanted:
                    found[matched] = p - quality[row]
            sums[row] = total


def quality_sums(
    logits: Tensor, rows: Tensor, labels: Tensor, quality: Tensor, *, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums of the terms of each query of logits `[..., Q, C]`: `[..., Q]`; and their derivatives, `[..., Q, C]`.

    `rows` `[N]` are the queries that have a target, counted through, with its class and its quality.
    """
    given, dtype = array_of(logits).reshape(-1, logits.shape[-1]), float_of(logits.dtype)
    label, weight, sums = np.full(len(given), -1, np.int64), np.zeros(len(given), dtype), np.empty(len(given), dtype)
    label[array_of(rows)], weight[array_of(rows)] = array_of(labels), array_of(quality)
    found = torch.empty(logits.shape if slopes else (0, logits.shape[-1]), dtype=logits.dtype)
    args = (given, label, weight, sums, array_of(found).reshape(-1, found.shape[-1]))
    items = -(-len(given) // _SOME)
    launch(_quality_sums, items, (dtype, dtype), (0, 0, 0), args, _PER_CLASS * given.size)
    return torch.from_numpy(sums).view(logits.shape[:-1]), found if slopes else None
