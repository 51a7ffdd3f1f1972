"""The derivatives of the losses by the logits, for the backward pass; `formulas` defines the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import bce


def instance_slopes(z: Tensor, t: Tensor, w: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Differentiate `instance_losses` by the logits: d ce / dz and d dice / dz at every point, `[n, P]`."""
    s = z.sigmoid()
    slope = s - t
    if gamma >= 0:
        miss = 1 - (s * t + (1 - s) * (1 - t))
        # miss^(gamma - 1) is infinite at a perfect prediction, where the loss that it multiplies is 0.
        steep = torch.where(miss > 0, gamma * miss ** (gamma - 1) * bce(z, t) * s * (1 - s) * (2 * t - 1), 0.0)
        slope = miss**gamma * slope - steep
        slope = slope if alpha < 0 else slope * (alpha * t + (1 - alpha) * (1 - t))
    d_ce = w * slope / w.sum(-1, keepdim=True).clamp(min=1)
    overlap = 2 * (w * s * t).sum(-1, keepdim=True) + 1
    area = (w * s).sum(-1, keepdim=True) + (w * t).sum(-1, keepdim=True) + 1
    d_dice = w * s * (1 - s) * (overlap - 2 * t * area) / area**2
    return d_ce, d_dice
