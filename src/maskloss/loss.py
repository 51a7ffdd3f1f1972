"""The mask loss at sampled points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskloss import _inputs, distributed, layers, ops
from maskloss._abi import accumulation_dtype
from maskloss._tracing import on_host
from maskloss.errors import Cause, check_device, describe, reported
from maskloss.factors import MaskFactors
from maskloss.layers import Layer
from maskloss.matches import Matches, Pairs, check_fit
from maskloss.points import PointSampling, check_points, draw_seed
from maskloss.targets import MaskTargets


class InstanceLosses(NamedTuple):
    """The losses of each instance, before anything is weighted or summed.

    Attributes:
        ce: cross-entropy `[N]`, the mean over an instance's points.
        dice: Dice `[N]`.
    """

    ce: Tensor
    dice: Tensor


class MaskLossOutput(NamedTuple):
    """What `MaskLoss` returns.

    Attributes:
        total: `[]`, ce_weight * ce + dice_weight * dice.
        ce: `[]`, the sum of the instances' cross-entropies, divided by the number of instances.
        dice: `[]`, likewise for Dice.
        per_instance: both terms of each instance, `[N]` each.
        seed: int64 `[]`, the seed of the points; passing it again draws them again.
    """

    total: Tensor
    ce: Tensor
    dice: Tensor
    per_instance: InstanceLosses
    seed: Tensor


class MaskLoss(nn.Module):
    """Cross-entropy plus Dice between predicted masks and their targets, at sampled points.

        total = ce_weight * sum_i ce_i / N + dice_weight * sum_i dice_i / N

    For each of N instances the points are drawn as `PointSampling` says, logits and targets are read there
    bilinearly, each at its own resolution, and `ce_i` and `dice_i` are computed as `functional.mask_bce` and
    `functional.mask_dice` say. No gradient flows through the choice of points.

    Args:
        ce_weight: weight of the cross-entropy, at least 0. Default 5.
        dice_weight: weight of Dice, at least 0. Default 5.
        sampling: numbers and layout of points. Default `PointSampling()`: 12544, of 3 times as many candidates, 75%
            uncertain, independent.
        padding_mode: what lies outside a map: "zeros" (default) or "border", its nearest pixel.
        target_mode: how targets are read: "bilinear" (default) or "nearest".
        focal_alpha: alpha of the focal loss in [0, 1]; needs `focal_gamma`. Default None: no class balance.
        focal_gamma: take the focal loss with this exponent in place of the cross-entropy. Default None: off.
        backend: "reference", "cpu" or "gpu". Default: by device, or MASKLOSS_BACKEND.

    Raises:
        MaskLossError: an option outside its range.

    Source:
        Mask2Former (Cheng et al., 2022), section 3.2.2, and PointRend (Kirillov et al., 2020), section 3.1. A
        non-finite logit at a candidate point always shows in the loss and in the gradient.

    Example:
        >>> logits = torch.full((2, 8, 8), -4.0, requires_grad=True)
        >>> masks = torch.zeros(2, 32, 32, dtype=torch.bool)
        >>> out = MaskLoss(sampling=PointSampling(num_points=64))(logits, masks, seed=0)
        >>> out.total.backward()
        >>> f"{out.ce.item():.4f} {out.dice.item():.4f}"
        '0.0489 0.7494'
    """

    @reported("MaskLoss")
    def __init__(
        self,
        *,
        ce_weight: float = _inputs.MASK_WEIGHT,
        dice_weight: float = _inputs.DICE_WEIGHT,
        sampling: PointSampling | None = None,
        padding_mode: str = "zeros",
        target_mode: str = "bilinear",
        focal_alpha: float | None = None,
        focal_gamma: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _inputs.check_weight("ce_weight", ce_weight)
        _inputs.check_weight("dice_weight", dice_weight)
        self.ce_weight, self.dice_weight = float(ce_weight), float(dice_weight)
        self.sampling = _inputs.check_sampling(sampling)
        self.options = _inputs.MaskOptions(padding_mode, target_mode, focal_alpha, focal_gamma, backend)

    @reported("MaskLoss")
    def forward(
        self,
        mask_logits: Layer,
        masks: Tensor | MaskTargets | Sequence[Tensor],
        matches: Matches | Pairs | None = None,
        *,
        points: Tensor | None = None,
        instance_weights: Tensor | None = None,
        num_instances: float | Tensor | None = None,
        image_ids: Tensor | Sequence[int] | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MaskLossOutput:
        """Compute the loss of pairs, or of matched queries.

        Args:
            mask_logits: `[N, h, w]`, prediction n goes with target n; or `[B, Q, h, w]`, dense or as `MaskFactors`,
                along with `matches`.
            masks: the targets: `[N, H, W]`, bool, uint8 or float, or `MaskTargets`; with `matches` the targets of a
                batch, `MaskTargets` or a list of `[T, H, W]`.
            matches: pairs of (queries, targets) of each image, as DETR's matchers return them, or `Matches`.
            points: float `[N, P, 2]`, (x, y) in [0, 1]^2: read here, and draw nothing. In the order of the matches.
            instance_weights: bool or float `[N]`, v_i at least 0, in the order of the matches: the terms become
                `sum_i v_i ce_i / N` with N = sum_i v_i, so that an instance of weight 2 counts as two, and one of
                weight 0 (or False) as none, whatever its logits are. No gradient flows to the weights.
            num_instances: what the sums are divided by, in place of `max(N / R, 1)` with N counted over all R ranks:
                for gradient accumulation the instances of the whole step over all ranks, divided by R
                (`step_totals(...).instances`); bounded below by 1.
            image_ids: global numbers of the images, `[B]`, in [0, 2^32); points depend on them. Default: rank * B + b.
            seed: 64-bit seed of the points.
            generator: where to draw a seed from. Default: torch's default generator.

        Returns:
            The weighted total, both terms, the terms of each instance, and the seed. float32, or float64 for float64
            logits. Gradients flow to `mask_logits`. Without instances everything is 0, connected to the graph.

        Raises:
            MaskLossError: wrong rank, dtype or device, numbers that do not pair up, or an index out of range.
        """
        logits, targets, matched = self._paired(mask_logits, masks, matches)
        drawn = draw_seed(seed, generator, logits.device)
        numbers = distributed.image_numbers(image_ids, logits.shape[0], logits.device)
        if points is not None:
            check_points(points, len(matched), logits.device)
        count: float | Tensor = float(len(matched))
        weights = None
        if instance_weights is not None:
            weights = check_instance_weights(instance_weights, len(matched), logits)
            count = weights.sum()
        if num_instances is None:
            num_instances = distributed.mean_over_ranks([count], logits.device)[0]
        else:
            _inputs.check_count("num_instances", num_instances)
        divisor = distributed.at_least_one(num_instances)
        reduction = ops.Reduction(self.ce_weight, self.dice_weight, divisor, weights)
        losses = self.instance_losses([logits], matched, targets, numbers, drawn, points, reduction)
        terms = losses if weights is None else weighted(losses, weights)
        ce, dice = terms.ce.sum() / divisor, terms.dice.sum() / divisor
        return MaskLossOutput(self.ce_weight * ce + self.dice_weight * dice, ce, dice, losses, drawn)

    def instance_losses(
        self,
        logits: Sequence[Layer],
        matches: Matches,
        targets: MaskTargets,
        image_ids: Tensor,
        seed: Tensor,
        points: Tensor | None = None,
        reduction: ops.Reduction | None = None,
    ) -> InstanceLosses:
        """Compute the losses of the matched instances of several decoder layers at once; inputs are not checked.

        Args:
            logits: one `[B, Q, h, w]` per layer, dense or as `MaskFactors`.
            matches: the instances of all layers, on the device of the logits.
            targets: the targets of the batch.
            image_ids: int64 `[B]`.
            seed: int64 `[]`.
            points: float `[N, P, 2]`, or None to draw them.
            reduction: how they will be summed, if that is known before: gradients then cost less.

        Returns:
            Both terms of each instance, in the order of the matches.
        """
        options, sampling = self.options, self.sampling
        num_points = sampling.num_points if points is None else points.shape[1]
        ce, dice = layers.mask_loss(
            logits,
            matches,
            ops.Targets(targets.encoding, *targets.tensors),
            ops.Draw(image_ids, seed, num_points, sampling.num_candidates, sampling.num_uncertain, sampling.layout),
            ops.Term(options.padding_mode, options.target_mode, *options.focal),
            points,
            ops.choose_backend(logits[0].device, options.backend),
            reduction,
        )
        return InstanceLosses(ce, dice)

    def extra_repr(self) -> str:
        """Show the options in `print(module)`."""
        return f"ce_weight={self.ce_weight}, dice_weight={self.dice_weight}, {self.sampling}, {self.options}"

    def _paired(
        self,
        mask_logits: Layer,
        masks: Tensor | MaskTargets | Sequence[Tensor],
        matches: Matches | Pairs | None,
    ) -> tuple[Layer, MaskTargets, Matches]:
        """Bring both forms of the call into one: logits `[B, Q, h, w]`, targets, matches."""
        targets = masks if isinstance(masks, MaskTargets) else MaskTargets.from_masks(masks)
        if matches is None:
            if isinstance(mask_logits, MaskFactors) or (isinstance(mask_logits, Tensor) and mask_logits.ndim == 4):
                raise Cause(
                    "mask_logits [B, Q, h, w] go with matches",
                    "matches is None",
                    "give the (queries, targets) of each image, or pick the matched predictions: [N, h, w]",
                )
            _inputs.check_maps("mask_logits", mask_logits, "[N, h, w]")
            count = len(mask_logits)
            if len(targets) != 1 or targets.num_masks != count:
                raise Cause(
                    "mask_logits and masks must pair up",
                    f"{count} predictions but {targets.num_masks} targets in {len(targets)} image(s)",
                    "give one target mask for each prediction, or matches along with [B, Q, h, w] logits",
                )
            check_device("masks", targets.device, mask_logits.device)
            return mask_logits[None], targets, Matches.one_to_one(count, mask_logits.device)
        _inputs.check_layers("mask_logits", [mask_logits], "[B, Q, h, w]")
        _inputs.check_targets(targets, mask_logits)
        if not isinstance(matches, Matches):
            matches = Matches.from_pairs(matches, num_queries=mask_logits.shape[1], num_targets=targets.num_targets)
        elif len(matches.layer_sizes) != 1:
            raise Cause(
                "matches must be those of one decoder layer",
                f"they have {len(matches.layer_sizes)} layers",
                "use MaskCriterion for several decoder layers, or take the pairs of one: matches.pairs(layer)",
            )
        check_fit(matches, mask_logits.shape[1], targets.num_targets)
        return mask_logits, targets, matches.to(mask_logits.device)


def check_instance_weights(weights: Tensor, count: int, logits: Layer) -> Tensor:
    """Bring weights of instances, bool or float `[N]`, to the dtype of their losses; no gradient flows to them."""
    fits = isinstance(weights, Tensor) and tuple(weights.shape) == (count,)
    if not fits or not (weights.dtype == torch.bool or weights.is_floating_point()):
        raise Cause(
            "instance_weights must be a bool or float tensor [N]",
            f"got {describe(weights)} for {count} instances",
            "False or 0 leaves an instance out",
        )
    check_device("instance_weights", weights.device, logits.device)
    weights = weights.detach().to(accumulation_dtype(logits.dtype))
    if on_host(weights) and not bool((weights >= 0).all() & weights.isfinite().all()):
        raise Cause(
            "instance_weights must be finite and at least 0",
            f"they reach from {float(weights.min()):g} to {float(weights.max()):g}",
            "0 leaves an instance out",
        )
    return weights


def weighted(losses: InstanceLosses, weights: Tensor) -> InstanceLosses:
    """Weigh the losses of instances; a NaN in one of weight 0 must not come through, and 0 * NaN would."""
    zero = losses.ce.new_zeros(())
    return InstanceLosses(*(torch.where(weights == 0, zero, term) * weights for term in losses))
