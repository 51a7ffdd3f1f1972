"""The classification of queries: one implementation of each kind, for every criterion."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from maskloss.ops.reference import formulas
from maskloss.options import CLASS_FOCAL_ALPHA, CLASS_FOCAL_GAMMA
from maskloss.step import IGNORED

KINDS = ("softmax", "focal")


def softmax_loss(
    class_logits: Tensor, wanted: Tensor, weights: Tensor, total_weight: float | Tensor | None = None
) -> Tensor:
    """Compute the weighted cross-entropy of all queries of each layer: `[L]`.

        sum_q weights[g_q] * -log softmax(class_logits)[q, g_q] / total_weight

    Args:
        class_logits: `[L, B, Q, C + 1]`, float32 or float64; the last class is "no object".
        wanted: int64 `[L, B, Q]`, the class g_q of each query; the sums leave IGNORED ones out.
        weights: `[C + 1]`, the weight of each class.
        total_weight: the sum of the weights of all queries that the loss is averaged over. Default: of these queries.
            0 if there is nothing to divide.
    """
    weights = weights.to(class_logits)
    nll = cross_entropy(class_logits.flatten(0, 2), wanted.flatten(), weights, reduction="none")
    total = weight_sums(wanted, weights) if total_weight is None else total_weight
    # A total of 0 divides only zeros; bounded without waiting for a device.
    bound = total.clamp(min=torch.finfo(total.dtype).tiny) if isinstance(total, Tensor) else total or 1.0
    return nll.view(len(class_logits), -1).sum(1) / bound


def weight_sums(wanted: Tensor, weights: Tensor) -> Tensor:
    """Sum the weights `[C + 1]` of the classes of all queries of each layer, but for IGNORED ones: `[L]`."""
    return pad(weights, (0, 1))[wanted.clamp(min=-1)].flatten(1).sum(1)


def focal_sums(class_logits: Tensor, wanted: Tensor, weights: Tensor | None = None, *, ignores: bool = False) -> Tensor:
    """Sum the sigmoid focal loss of all queries and classes of each layer: `[L]`.

        sum_q sum_c weights[c] * a_t (1 - p_t)^2 bce(class_logits[q, c], [c = g_q]),  a = 0.25

    Args:
        class_logits: `[L, B, Q, C]`, float32 or float64; there is no "no object".
        wanted: int64 `[L, B, Q]`, the class g_q of each query, C for one without a target.
        weights: `[C]`, the weight of each class. Default: 1.
        ignores: whether `wanted` has IGNORED ones, which are left out.
    """
    layers, batch, queries, classes = class_logits.shape
    one_hot = class_logits.new_zeros(layers, batch, queries, classes + 1)
    hot = one_hot.scatter_(3, (wanted.clamp(min=0) if ignores else wanted)[..., None], 1)[..., :-1]
    terms = formulas.focal(class_logits, hot, CLASS_FOCAL_ALPHA, CLASS_FOCAL_GAMMA)
    terms = terms if weights is None else terms * weights.to(terms)
    return (terms.masked_fill((wanted == IGNORED)[..., None], 0) if ignores else terms).flatten(1).sum(1)
