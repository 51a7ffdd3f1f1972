"""The formulas once more, in float64, through torch's own functions: what the tests compare with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample


class Expected(NamedTuple):
    ce: Tensor
    dice: Tensor
    grad: Tensor


def read(maps: Tensor, points: Tensor, mode: str = "bilinear", padding_mode: str = "zeros") -> Tensor:
    """Read maps `[N, h, w]` at points `[N, P, 2]` in float64."""
    grid = 2.0 * points.double()[:, :, None] - 1.0
    return grid_sample(maps.double()[:, None], grid, mode=mode, padding_mode=padding_mode, align_corners=False)[
        :, 0, :, 0
    ]


def cross_entropy(z: Tensor, t: Tensor, alpha: float | None = None, gamma: float | None = None) -> Tensor:
    """Element-wise cross-entropy or focal loss."""
    loss = binary_cross_entropy_with_logits(z, t, reduction="none")
    if gamma is None:
        return loss
    p = z.sigmoid()
    loss = loss * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    return loss if alpha is None else loss * (alpha * t + (1 - alpha) * (1 - t))


def instance_losses(
    logits: Tensor,
    masks: Tensor,
    points: Tensor,
    *,
    padding_mode: str = "zeros",
    target_mode: str = "bilinear",
    focal_alpha: float | None = None,
    focal_gamma: float | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Expected:
    """Losses of pairs `[N, h, w]` and `[N, H, W]`, and the gradient of weights[0] * ce + weights[1] * dice summed."""
    leaf = logits.detach().double().requires_grad_()
    z = read(leaf, points, "bilinear", padding_mode)
    t = read(masks, points, target_mode, padding_mode)
    ce = cross_entropy(z, t, focal_alpha, focal_gamma).mean(1)
    s = z.sigmoid()
    dice = 1 - (2 * (s * t).sum(1) + 1) / (s.sum(1) + t.sum(1) + 1)
    (weights[0] * ce + weights[1] * dice).sum().backward()
    assert leaf.grad is not None
    return Expected(ce.detach(), dice.detach(), leaf.grad)
