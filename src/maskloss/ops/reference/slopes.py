"""The derivatives of the losses by the logits, for the backward pass; `formulas` defines the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import area, bce, overlap


def instance_slopes(z: Tensor, t: Tensor, w: Tensor, alpha: float, gamma: float, kind: str) -> tuple[Tensor, Tensor]:
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
    common = 2 * (overlap(w * s, w * t, kind)).sum(-1, keepdim=True) + 1
    total = area(w * s, kind).sum(-1, keepdim=True) + area(w * t, kind).sum(-1, keepdim=True) + 1
    by_common = (1 - (s - t).sign()) / 2 if kind == "semimetric" else t
    by_area = 2 * s if kind == "soft" else 1
    d_dice = w * s * (1 - s) * (common * by_area - 2 * by_common * total) / total**2
    return d_ce, d_dice
