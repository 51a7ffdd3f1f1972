"""The mathematics as functions, one per formula: plain PyTorch, any float dtype, any device, differentiable.

Notation: N instances with P points each, z a logit, s(z) = 1 / (1 + exp(-z)), t a target value in [0, 1], w the weight
of a point (1, or 0 where it is to be ignored), a the focal loss's weight of the foreground (not the sampling's alpha,
which is the share of uncertain points).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskloss import _inputs, ops, options
from maskloss._numbers import is_float, is_number
from maskloss.errors import Cause, check_layout, describe, reported
from maskloss.matches import Matches
from maskloss.ops.reference import formulas
from maskloss.points import PointSampling, check_coordinates, draw_seed

__all__ = [
    "PairwiseCost", "class_cost", "focal_class_cost", "mask_bce", "mask_dice", "mask_focal", "pairwise_mask_cost",
    "point_sample", "uncertain_points", "uncertainty",
]  # fmt: skip


@reported("point_sample")
def point_sample(
    maps: Tensor,
    points: Tensor,
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    backend: str | None = None,
) -> Tensor:
    """Read maps at points.

    A point (x, y) in [0, 1]^2 lies at pixel coordinates (x * w - 0.5, y * h - 0.5), as
    `grid_sample(maps, 2 * points - 1, align_corners=False)` has it. The leading dimensions are aligned from the left,
    where missing ones count as 1, and broadcast: points of a batch serve all of its channels, as in `grid_sample`.

    Args:
        maps: `[..., h, w]`, float.
        points: `[..., P, 2]`, (x, y), float. Points outside [0, 1]^2 are allowed.
        mode: "bilinear" or "nearest".
        padding_mode: what lies outside the map: "zeros", or "border", its nearest pixel.
        backend: "reference", "cpu" or "gpu"; default: by device.

    Returns:
        `[..., P]`, float32, or float64 for float64 maps: `[N, P]` for maps `[N, h, w]`, `[N, C, P]` for maps
        `[N, C, h, w]`, both with points `[N, P, 2]`. Gradients flow to the maps, not to the points.

    Raises:
        MaskLossError: wrong rank, dtype or device, leading dimensions that do not broadcast, an unknown mode.

    Source:
        PointRend (Kirillov et al., 2020), section 3.1.

    Example:
        >>> maps = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
        >>> point_sample(maps, torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]))
        tensor([[1.5000, 2.0000]])
    """
    _inputs.check_maps("maps", maps, "[..., h, w]")
    _inputs.check_choice("mode", mode, options.TARGET_MODES)
    _inputs.check_choice("padding_mode", padding_mode, options.PADDING_MODES)
    check_coordinates(points, "[..., P, 2]", maps.device)
    lead = _broadcast(maps.shape[:-2], points.shape[:-2])
    flat = maps.reshape(-1, *maps.shape[-2:])
    index = torch.arange(len(flat), device=maps.device).view(_aligned(maps.shape[:-2], len(lead)))
    each = points.reshape(*_aligned(points.shape[:-2], len(lead)), *points.shape[-2:])
    each = each.expand(*lead, *points.shape[-2:]).reshape(-1, *points.shape[-2:])
    chosen = ops.choose_backend(maps.device, backend)
    values: Tensor = ops.point_sample(flat, index.expand(lead).reshape(-1), each, mode, padding_mode, chosen)
    return values.view(*lead, points.shape[-2])


@reported("uncertainty")
def uncertainty(z: Tensor) -> Tensor:
    """Compute how uncertain predictions are: U(z) = -|z|, highest where s(z) is near 1/2.

    Args:
        z: logits, any shape, float.

    Returns:
        The shape and dtype of `z`. Differentiable, though the choice of points passes no gradient.

    Raises:
        MaskLossError: anything but a float tensor.

    Source:
        PointRend (Kirillov et al., 2020), section 3.1, for one class.

    Example:
        >>> uncertainty(torch.tensor([-2.0, 0.5]))
        tensor([-2.0000, -0.5000])
    """
    check_layout("z", z)
    if not is_float(z):
        raise Cause("z must be float", f"got {describe(z)}", "z are logits, before any sigmoid")
    return formulas.uncertainty(z)


@reported("uncertain_points")
def uncertain_points(
    logits: Tensor,
    *,
    sampling: PointSampling | None = None,
    padding_mode: str = "zeros",
    window: tuple[float, float, float, float] | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw the points of the loss: the most uncertain candidates, and uniform points.

    `sampling.num_candidates` uniform points are drawn, the logits are sampled there, and the `sampling.num_uncertain`
    with the highest U(z) = -|z| are kept, ties to the one drawn first; `sampling.num_random` fresh ones are added.
    Both kinds lie as `sampling.layout` says.

    Args:
        logits: `[N, h, w]`, float. Instance n draws the points of target n of image 0 in layer 0.
        sampling: numbers of points; default `PointSampling()`.
        padding_mode: "zeros" or "border".
        window: left, top, width and height of the part of [0, 1]^2 in which points are drawn. Default: all of it.
        seed: 64-bit seed; the points are a function of it and of the logits.
        generator: where to draw a seed from; default: torch's default generator.
        backend: "reference", "cpu" or "gpu"; default: by device.

    Returns:
        float32 `[N, P, 2]`, (x, y) in the window: first the uncertain points in the order in which they were drawn,
        then the uniform ones. No gradient.

    Raises:
        MaskLossError: wrong rank or dtype, an unknown mode, a window that is empty or leaves [0, 1]^2, seed and
            generator both given.

    Source:
        PointRend (Kirillov et al., 2020), section 3.1. Uncertainty is taken from the sampled logit.

    Example:
        >>> logits = torch.linspace(-4, 4, 64).repeat(1, 64, 1)
        >>> points = uncertain_points(logits, sampling=PointSampling(num_points=8), seed=0)
        >>> points.shape, bool(((points[0, :6, 0] - 0.5).abs() < 0.2).all())
        (torch.Size([1, 8, 2]), True)
    """
    _inputs.check_maps("logits", logits, "[N, h, w]")
    _inputs.check_choice("padding_mode", padding_mode, options.PADDING_MODES)
    sampling = _inputs.check_sampling(sampling)
    backend = ops.choose_backend(logits.device, backend)
    count, device = len(logits), logits.device
    index = Matches.one_to_one(count, device).index
    everywhere = torch.arange(4, device=device).ge(2).float()[None]  # 0, 0, 1, 1, made there
    image = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad():
        points: Tensor = ops.uncertain_points(
            ops.Instances([logits[None]], index, [count]),
            ops.Draw(
                image,
                draw_seed(seed, generator, device),
                sampling.num_points,
                sampling.num_candidates,
                sampling.num_uncertain,
                sampling.layout,
            ),
            everywhere if window is None else _window_row(window, device),
            padding_mode,
            backend,
        )
    return points


@reported("mask_bce")
def mask_bce(z: Tensor, t: Tensor, w: Tensor | None = None) -> Tensor:
    """Compute the binary cross-entropy of each instance, the mean over its points.

        sum_p w (max(z, 0) - z t + log1p(exp(-|z|))) / max(sum_p w, 1)

    Args:
        z: logits `[..., P]`, float.
        t: targets `[..., P]` in [0, 1].
        w: weights in {0, 1} that broadcast to `[..., P]`; default: 1.

    Returns:
        `[...]`, in the dtype of `z`. Gradients flow to `z` and `t`.

    Raises:
        MaskLossError: shapes that differ, or a dtype that is not float.

    Source:
        Mask2Former (Cheng et al., 2022), section 3.2.2; the stable form of the sigmoid cross-entropy.

    Example:
        >>> mask_bce(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([0.4100])
    """
    return _mean_focal(z, t, w, -1.0, -1.0)


@reported("mask_focal")
def mask_focal(
    z: Tensor,
    t: Tensor,
    w: Tensor | None = None,
    *,
    alpha: float | None = options.CLASS_FOCAL_ALPHA,
    gamma: float = options.CLASS_FOCAL_GAMMA,
) -> Tensor:
    """Compute the focal loss of each instance, the mean over its points.

        sum_p w a_t (1 - p_t)^gamma bce(z, t) / max(sum_p w, 1)
        p_t = s t + (1 - s)(1 - t),  a_t = a t + (1 - a)(1 - t)

    Args:
        z: logits `[..., P]`, float.
        t: targets `[..., P]` in [0, 1].
        w: weights in {0, 1} that broadcast to `[..., P]`; default: 1.
        alpha: a, the weight of the foreground, in [0, 1]; None leaves a_t out. Default 0.25.
        gamma: focusing exponent, at least 0. Default 2.

    Returns:
        `[...]`, in the dtype of `z`. Gradients flow to `z` and `t`.

    Raises:
        MaskLossError: shapes that differ, a dtype that is not float, alpha or gamma out of range.

    Source:
        Lin et al., "Focal loss for dense object detection" (2017), with soft targets as torchvision takes them.

    Example:
        >>> mask_focal(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([0.0219])
    """
    return _mean_focal(z, t, w, *_inputs.focal_numbers(alpha, gamma))


@reported("mask_dice")
def mask_dice(z: Tensor, t: Tensor, w: Tensor | None = None, *, dice: str = "standard") -> Tensor:
    """Compute the Dice loss of each instance.

        1 - (2 sum_p w s(z) t + 1) / (sum_p w s(z) + sum_p w t + 1)

    Where t is between 0 and 1, its minimum is not at s = t. Two other kinds have it there: "soft" has s^2 and t^2 in
    the denominator, "semimetric" has min(s, t) in place of s t, which is the same where t is 0 or 1.

    Args:
        z: logits `[..., P]`, float.
        t: targets `[..., P]` in [0, 1].
        w: weights in {0, 1} that broadcast to `[..., P]`; default: 1.
        dice: "standard" (default), "soft" or "semimetric".

    Returns:
        `[...]` in [0, 1), in the dtype of `z`. Gradients flow to `z` and `t`.

    Raises:
        MaskLossError: shapes that differ, a dtype that is not float, or an unknown kind.

    Source:
        V-Net (Milletari et al., 2016), without squares and with 1 added above and below, as in DETR and Mask2Former;
        "soft" has V-Net's squares. "semimetric": Wang et al., "Dice semimetric losses" (2023), the first of their two.

    Example:
        >>> mask_dice(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.3333])
    """
    _inputs.check_choice("dice", dice, options.DICE_KINDS)
    return formulas.dice(z, t, _inputs.paired_weights(z, t, w), dice)


class PairwiseCost(NamedTuple):
    """The mask terms of the matching cost of all pairs.

    Attributes:
        ce: cross-entropy `[..., Q, T]`.
        dice: Dice `[..., Q, T]`.
    """

    ce: Tensor
    dice: Tensor


@reported("pairwise_mask_cost")
def pairwise_mask_cost(
    z: Tensor,
    t: Tensor,
    w: Tensor | None = None,
    *,
    focal_alpha: float | None = None,
    focal_gamma: float | None = None,
    dice: str = "standard",
) -> PairwiseCost:
    """Compute cross-entropy and Dice of all pairs of predictions and targets.

        ce[q, t] = mask_bce(z[q], t[t]),  dice[q, t] = mask_dice(z[q], t[t])

    both through matrix products, since bce(z, t) = softplus(z) - z t is linear in t (`dice="semimetric"` is not, and
    looks at every pair at every point). With `focal_gamma` ce is the focal
    cost, linear in t too, which for t in {0, 1} is that of `mask_focal`:

        ce[q, t] = mean_p [a t (1 - s)^gamma softplus(-z) + (1 - a)(1 - t) s^gamma softplus(z)]

    Args:
        z: logits `[..., Q, P]`, float.
        t: targets `[..., T, P]` in [0, 1], at the same points.
        w: weights of the points in {0, 1} that broadcast to `[..., P]`; default: 1.
        focal_alpha: a, the weight of the foreground, in [0, 1]; needs `focal_gamma`. Default None: both factors are 1.
        focal_gamma: take the focal cost with this exponent, at least 0. Default None: cross-entropy.
        dice: the kind of Dice, see `mask_dice`.

    Returns:
        Two tensors `[..., Q, T]`, in the dtype of `z`.

    Raises:
        MaskLossError: numbers of points that differ, a dtype that is not float, alpha or gamma out of range.

    Source:
        Mask2Former (Cheng et al., 2022), section 3.2.2; the focal cost as in MaskFormer (Cheng et al., 2021).

    Example:
        >>> cost = pairwise_mask_cost(torch.tensor([[4.0, -4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> cost.ce
        tensor([[0.0181, 4.0181]])
    """
    _inputs.check_floats(z, t)
    term = options.MaskOptions(focal_alpha=focal_alpha, focal_gamma=focal_gamma, dice=dice).term
    if z.ndim < 2 or t.ndim < 2 or z.shape[-1] != t.shape[-1]:
        raise Cause(
            "z and t must be [..., Q, P] and [..., T, P]",
            f"got {list(z.shape)} and {list(t.shape)}",
            "sample both at the same P points",
        )
    weights = _inputs.point_weights(w, (*z.shape[:-2], z.shape[-1]), z)
    return PairwiseCost(*formulas.pairwise_costs(z, t.to(z.dtype), weights, *term.focal, dice))


@reported("class_cost")
def class_cost(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the class term of the matching cost: -softmax(class_logits)[label].

    The probability itself and not its logarithm, so that the term is of the size of the mask terms and bounded.

    Args:
        class_logits: `[..., Q, C + 1]`, float; the last class is "no object".
        labels: int64 `[..., T]` in [0, C).

    Returns:
        `[..., Q, T]` in [-1, 0].

    Raises:
        MaskLossError: wrong rank or dtype. Labels are not looked at: `MaskCriterion` checks them.

    Source:
        DETR (Carion et al., 2020), section 3.1.

    Example:
        >>> class_cost(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([2]))
        tensor([[-0.2500]])
    """
    _inputs.check_classes(class_logits, labels)
    return -_at_labels(class_logits.softmax(-1), labels)


@reported("focal_class_cost")
def focal_class_cost(
    class_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float | None = options.CLASS_FOCAL_ALPHA,
    gamma: float = options.CLASS_FOCAL_GAMMA,
) -> Tensor:
    """Compute the class term of the matching cost of models that classify with sigmoids.

        p = s(class_logits)[label]
        a (1 - p)^gamma (-log(p + 1e-8)) - (1 - a) p^gamma (-log(1 - p + 1e-8))

    the cost of predicting the target's class minus the cost of not predicting it. The 1e-8 bounds the term.

    Args:
        class_logits: `[..., Q, C]`, float; there is no "no object".
        labels: int64 `[..., T]` in [0, C).
        alpha: a, the weight of the foreground, in [0, 1]; None makes both factors 1. Default 0.25.
        gamma: focusing exponent, at least 0. Default 2.

    Returns:
        `[..., Q, T]`.

    Raises:
        MaskLossError: wrong rank or dtype, alpha or gamma out of range. Labels are not looked at.

    Source:
        Deformable DETR (Zhu et al., 2021), after the focal loss (Lin et al., 2017); also in MaskDINO and RF-DETR.

    Example:
        >>> focal_class_cost(torch.tensor([[0.0, 3.0]]), torch.tensor([0, 1]))
        tensor([[-0.0866, -2.0747]])
    """
    _inputs.check_classes(class_logits, labels)
    a, exponent = _inputs.focal_numbers(alpha, gamma)
    on, off = (1.0, 1.0) if a < 0 else (a, 1 - a)
    x = _at_labels(class_logits, labels)
    # Not 1 - p, which has lost most of its digits where p is close to 1.
    p, rest = x.sigmoid(), (-x).sigmoid()
    hit, miss = formulas.power(rest, exponent), formulas.power(p, exponent)
    return on * hit * -(p + 1e-8).log() - off * miss * -(rest + 1e-8).log()


def _aligned(shape: Sequence[int], rank: int) -> list[int]:
    """Align leading dimensions from the left: missing ones count as 1."""
    return [*shape, *[1] * (rank - len(shape))]


def _broadcast(maps: Sequence[int], points: Sequence[int]) -> list[int]:
    """Broadcast leading dimensions, aligned from the left."""
    rank = max(len(maps), len(points))
    pairs = list(zip(_aligned(maps, rank), _aligned(points, rank), strict=True))
    if any(left != right and 1 not in (left, right) for left, right in pairs):
        raise Cause(
            "the leading dimensions of maps and points must broadcast",
            f"maps have {list(maps)}, points {list(points)}, aligned from the left",
            "maps [N, C, h, w] take points [N, P, 2]; use points.unsqueeze to add a dimension",
        )
    return [right if left == 1 else left for left, right in pairs]


def _window_row(window: Sequence[float], device: torch.device) -> Tensor:
    """Check a window, and convert it to what the operations take, float32 `[1, 4]`."""
    fits = isinstance(window, Sequence) and len(window) == 4 and all(map(is_number, window))
    if not fits or not all(0 <= low < low + size <= 1 + 1e-6 for low, size in zip(window[:2], window[2:], strict=True)):
        raise Cause(
            "window must be (left, top, width, height) within [0, 1]^2",
            f"got {describe(window)}",
            "give fractions of the image, (0, 0, 1, 1) is all of it",
        )
    return torch.tensor([tuple(window)], dtype=torch.float32, device=device)


def _at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Read logits or probabilities `[..., Q, C]` at labels `[..., T]`: `[..., Q, T]`."""
    where = labels.long().clamp(0, values.shape[-1] - 1).unsqueeze(-2)
    return values.gather(-1, where.expand(*values.shape[:-1], -1))


def _mean_focal(z: Tensor, t: Tensor, w: Tensor | None, alpha: float, gamma: float) -> Tensor:
    weights = _inputs.paired_weights(z, t, w)
    return (formulas.focal(z, t, alpha, gamma) * weights).sum(-1) / weights.sum(-1).clamp(min=1)
