"""What the loss does with one instance, as numbers: every picture of this package shows some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from maskloss import functional
from maskloss.errors import Cause, describe, reported
from maskloss.loss import MaskLoss

# A picture needs no kernels, and these would be compiled for it first.
_BACKEND = "reference"


class Inspection(NamedTuple):
    """One instance under the loss: K candidates, P points.

    Attributes:
        logits: the prediction, `[h, w]`.
        target: its target, `[H, W]`, float.
        candidates: `[K, 2]`, (x, y) in [0, 1]^2; none if no point is chosen by uncertainty.
        candidate_z: the logits there, `[K]`.
        threshold: the largest |z| of a chosen candidate; nan without candidates.
        points: `[P, 2]`, the chosen candidates first.
        num_uncertain: how many of them are chosen candidates.
        z: the logits at the points, `[P]`.
        t: the target there, `[P]`.
        weight: 0 at points in an ignore region, else 1, `[P]`.
        loss: cross-entropy (or focal loss) of each point times its weight, `[P]`.
        ce: its mean, over points that count.
        dice: Dice of the instance.
        ce_weight: weight of `ce` in the total.
        dice_weight: weight of `dice` in the total.
    """

    logits: Tensor
    target: Tensor
    candidates: Tensor
    candidate_z: Tensor
    threshold: float
    points: Tensor
    num_uncertain: int
    z: Tensor
    t: Tensor
    weight: Tensor
    loss: Tensor
    ce: float
    dice: float
    ce_weight: float
    dice_weight: float

    @property
    def total(self) -> float:
        """The weighted sum of both terms."""
        return self.ce_weight * self.ce + self.dice_weight * self.dice

    @property
    def ce_of_uncertain(self) -> float:
        """What the chosen candidates contribute to `ce`; the uniform points contribute the rest."""
        return float(self.loss[: self.num_uncertain].sum() / self.weight.sum().clamp(min=1))


@reported("inspect_points")
@torch.no_grad()
def inspect_points(
    mask_logits: Tensor,
    masks: Tensor,
    *,
    loss: MaskLoss | None = None,
    ignore: Tensor | None = None,
    window: tuple[float, float, float, float] | None = None,
    seed: int = 0,
) -> list[Inspection]:
    """Compute the loss of pairs once more, and keep all that it looked at.

    Args:
        mask_logits: `[N, h, w]`, float; prediction n belongs to target n.
        masks: `[N, H, W]`, bool, uint8 or float in [0, 1]. Instance n draws the points of target n of image 0.
        loss: with the sampling, weights and options. Default `MaskLoss()`.
        ignore: bool `[H, W]`, where points weigh nothing. Default: nowhere.
        window: left, top, width and height of the part of [0, 1]^2 in which points are drawn. Default: all of it.
        seed: 64-bit seed of the points.

    Returns:
        One `Inspection` for each instance. No gradient.

    Raises:
        MaskLossError: tensors that do not pair up, or of another rank or dtype.

    Example:
        >>> import torch
        >>> [found] = inspect_points(torch.full((1, 8, 8), -4.0), torch.zeros(1, 32, 32), seed=1)
        >>> len(found.candidates), len(found.points), f"{found.ce:.4f}"
        (37632, 12544, '0.0506')
    """
    loss = MaskLoss() if loss is None else loss
    _check_pairs(mask_logits, masks)
    logits, targets = mask_logits.detach().float(), masks.float()
    options, sampling = loss.options, loss.sampling

    def draw(sampled: object) -> Tensor:
        return functional.uncertain_points(
            logits,
            sampling=sampled,  # type: ignore[arg-type]
            padding_mode=options.padding_mode,
            window=window,
            seed=seed,
            backend=_BACKEND,
        )

    def read(maps: Tensor, at: Tensor, mode: str = "bilinear", padding: str | None = None) -> Tensor:
        padding = options.padding_mode if padding is None else padding
        return functional.point_sample(maps, at, mode=mode, padding_mode=padding, backend=_BACKEND)

    points = draw(sampling)
    candidates = points[:, :0]
    if sampling.num_uncertain:
        # Of which all are kept, so that they come back as they were drawn.
        count = sampling.num_candidates
        candidates = draw(replace(sampling, num_points=count, oversample_ratio=1.0, importance_ratio=1.0))
    z, t = read(logits, points), read(targets, points, options.target_mode)
    weight = torch.ones_like(z)
    if ignore is not None:
        weight = 1 - read(ignore.float().expand(len(z), -1, -1), points, "nearest")
    per_point = _per_point(z, t, loss) * weight
    ce = per_point.sum(1) / weight.sum(1).clamp(min=1)
    dice = functional.mask_dice(z, t, weight, dice=options.dice)
    candidate_z = read(logits, candidates) if candidates.shape[1] else candidates[..., 0]
    return [
        Inspection(
            logits=logits[n],
            target=targets[n],
            candidates=candidates[n],
            candidate_z=candidate_z[n],
            threshold=float(z[n, : sampling.num_uncertain].abs().max()) if sampling.num_uncertain else float("nan"),
            points=points[n],
            num_uncertain=sampling.num_uncertain,
            z=z[n],
            t=t[n],
            weight=weight[n],
            loss=per_point[n],
            ce=float(ce[n]),
            dice=float(dice[n]),
            ce_weight=loss.ce_weight,
            dice_weight=loss.dice_weight,
        )
        for n in range(len(logits))
    ]


def _check_pairs(mask_logits: Tensor, masks: Tensor) -> None:
    for name, value in (("mask_logits", mask_logits), ("masks", masks)):
        if not isinstance(value, Tensor) or value.ndim != 3 or len(value) != len(mask_logits):
            raise Cause(
                "mask_logits and masks must pair up",
                f"got {describe(mask_logits)} and {describe(masks)}",
                "give [N, h, w] and [N, H, W]",
            )
        swapped = not value.is_floating_point() if name == "mask_logits" else bool(((value < 0) | (value > 1)).any())
        if swapped:
            raise Cause(
                "mask_logits must be float, and masks in [0, 1]",
                f"got {describe(mask_logits)} and {describe(masks)}",
                "inspect_points(mask_logits, masks): predictions come first",
            )


def _per_point(z: Tensor, t: Tensor, loss: MaskLoss) -> Tensor:
    """Compute the cross-entropy or focal loss of each point: of instances with one point each."""
    alpha, gamma = loss.options.focal_alpha, loss.options.focal_gamma
    if gamma is None:
        return functional.mask_bce(z[..., None], t[..., None])
    return functional.mask_focal(z[..., None], t[..., None], alpha=alpha, gamma=gamma)


def spread(points: Sequence[Tensor] | Tensor, area: float = 1.0) -> float:
    """Marker area (pt²) at which this many points do not drown the picture."""
    return float(min(14.0, max(0.35, 4000.0 * area / max(len(points), 1) ** 0.9)))
