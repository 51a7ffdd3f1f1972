"""The mathematics, in one sitting: what is computed from logits z and targets t at the points of the instances.

Plain PyTorch in any float dtype, differentiable; s is the sigmoid, w are the weights of the points, 0 or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def position(coordinate: Tensor, size: Tensor | int) -> Tensor:
    """Map a coordinate in [0, 1] to pixels: the center of pixel i is at i."""
    return coordinate * size - 0.5


def interpolate(corners: tuple[Tensor, Tensor, Tensor, Tensor], fx: Tensor, fy: Tensor) -> Tensor:
    """Interpolate linearly along x, then along y. The order of the operations is part of the definition."""
    v00, v01, v10, v11 = corners
    top = v00 + fx * (v01 - v00)
    bottom = v10 + fx * (v11 - v10)
    return top + fy * (bottom - top)


def uncertainty(z: Tensor) -> Tensor:
    """Compute U(z) = -|z|, the highest where the sigmoid is near 1/2."""
    return -z.abs()


def bce(z: Tensor, t: Tensor) -> Tensor:
    """Compute -[t log s(z) + (1 - t) log(1 - s(z))] in its stable form, max(z, 0) - z t + log1p(exp(-|z|)).

    The derivative is s(z) - t at 0, too: that of `maximum` is 1/2 there, and that of `clamp` would be 1.
    """
    return torch.maximum(z, z.new_zeros(())) - z * t + (-z.abs()).exp().log1p()


def power(base: Tensor, exponent: float) -> Tensor:
    """Compute base ** exponent for a base of at least 0, also where the derivative is infinite: at 0, below 1.

    What such a power multiplies in a focal loss is 0 there as well, and infinity times 0 would be NaN.
    """
    if not 0 < exponent < 1:
        return base**exponent
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0) ** exponent, base)


def focal(z: Tensor, t: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute the focal loss a_t (1 - p_t)^gamma bce(z, t); alpha < 0 leaves a_t out, gamma < 0 is plain BCE."""
    loss = bce(z, t)
    if gamma < 0:
        return loss
    s = z.sigmoid()
    loss = loss * power(1 - (s * t + (1 - s) * (1 - t)), gamma)
    return loss if alpha < 0 else loss * (alpha * t + (1 - alpha) * (1 - t))


def overlap(s: Tensor, t: Tensor, kind: str) -> Tensor:
    """Compute how much two values in [0, 1] have in common, for a kind of Dice. Where t is 0 or 1 both are equal."""
    return torch.minimum(s, t) if kind == "semimetric" else s * t


def area(values: Tensor, kind: str) -> Tensor:
    """Compute what values in [0, 1] count in the denominator of a kind of Dice."""
    return values * values if kind == "soft" else values


def dice(z: Tensor, t: Tensor, w: Tensor, kind: str = "standard") -> Tensor:
    """Compute 1 - (2 sum o + 1) / (sum a(s) + sum a(t) + 1) over the last dimension, with point weights w, 0 or 1.

    "standard" has o = s t and a(x) = x, "soft" a(x) = x^2, "semimetric" o = min(s, t). The last two are smallest at
    s = t, for any t in [0, 1]; the first one is so where t is 0 or 1, and there "semimetric" equals it.
    """
    s, t = z.sigmoid() * w, t * w
    return 1 - (2 * overlap(s, t, kind).sum(-1) + 1) / (area(s, kind).sum(-1) + area(t, kind).sum(-1) + 1)


def instance_losses(
    z: Tensor, t: Tensor, w: Tensor, alpha: float, gamma: float, kind: str = "standard"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice of each instance `[n]` from logits, targets and weights at its points `[n, P]`."""
    ce = (focal(z, t, alpha, gamma) * w).sum(-1) / w.sum(-1).clamp(min=1)
    return ce, dice(z, t, w, kind)


def pairwise_costs(
    z: Tensor, t: Tensor, w: Tensor, alpha: float, gamma: float, kind: str = "standard"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy, Dice `[..., Q, T]` of all pairs: logits `[..., Q, P]`, targets `[..., T, P]`, weights `[..., P]`.

    bce(z, t) = softplus(z) - z t is linear in t, so a matrix product does it for all pairs at once. The focal cost
    is a_1 (1 - s)^gamma softplus(-z) t + a_0 s^gamma softplus(z) (1 - t), linear as well.
    """
    s = z.sigmoid()
    w = w.unsqueeze(-2)
    count = w.sum(-1, keepdim=True).clamp(min=1)
    weighted = (t * w).transpose(-1, -2)
    negative = softplus(z)
    if gamma < 0:
        slope = z
    else:
        on, off = (1.0, 1.0) if alpha < 0 else (alpha, 1 - alpha)
        negative, positive = off * power(s, gamma) * negative, on * power(1 - s, gamma) * softplus(-z)
        slope = negative - positive
    ce = ((negative * w).sum(-1, keepdim=True) - slope @ weighted) / count
    total = area(s * w, kind).sum(-1, keepdim=True) + area(weighted, kind).sum(-2, keepdim=True)
    if kind == "semimetric":  # no product of matrices
        common = overlap((s * w).unsqueeze(-1), weighted.unsqueeze(-3), kind).sum(-2)
    else:
        common = s @ weighted
    return ce, 1 - (2 * common + 1) / (total + 1)
