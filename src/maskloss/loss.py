"""The mask loss at sampled points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from maskloss import _inputs, distributed, layers, ops
from maskloss._abi import accumulation_dtype
from maskloss._tracing import on_host, savable
from maskloss.clips import (
    ClipOptions,
    check_clip_options,
    frames_of_divisor,
    matches_of_planes,
    weights_of_divisor,
    weights_of_planes,
)
from maskloss.distributed import Group
from maskloss.errors import Cause, check_device, check_layout, describe, reported
from maskloss.factors import MaskFactors
from maskloss.layers import Layer
from maskloss.matches import Matches, Pairs, check_fit
from maskloss.options import DICE_WEIGHT, MASK_WEIGHT, MaskKeywords, MaskOptions, mask_options
from maskloss.points import PointSampling, check_points
from maskloss.step import Step
from maskloss.targets import MaskTargets
from maskloss.targets.clips import planes


class InstanceLosses(NamedTuple):
    """The losses of each instance, before anything is weighted or summed.

    Attributes:
        ce: cross-entropy `[N]`, the mean over an instance's points.
        dice: Dice `[N]`.
    """

    ce: Tensor
    dice: Tensor


class LayerTerms(NamedTuple):
    """The mask terms of decoder layers.

    Attributes:
        ce: `[L]`, the sums of each layer's cross-entropies, divided.
        dice: `[L]`, the same for Dice.
        per_instance: both terms of every instance, not weighted.
    """

    ce: Tensor
    dice: Tensor
    per_instance: InstanceLosses


class MaskLossOutput(NamedTuple):
    """What `MaskLoss` returns.

    Attributes:
        total: `[]`, ce_weight * ce + dice_weight * dice.
        ce: `[]`, the sum of the instances' cross-entropies, divided by the number of instances.
        dice: `[]`, the same for Dice.
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
        clips: which frames of clips count, and what divides the sums. Default `ClipOptions()`.
        options: how points are read, focal loss and backend, as a group; `MaskOptions` says what there is.
        kwargs: the same options one by one.

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
        ce_weight: float = MASK_WEIGHT,
        dice_weight: float = DICE_WEIGHT,
        sampling: PointSampling | None = None,
        clips: ClipOptions | None = None,
        options: MaskOptions | None = None,
        **kwargs: Unpack[MaskKeywords],
    ) -> None:
        super().__init__()
        _inputs.check_weight("ce_weight", ce_weight)
        _inputs.check_weight("dice_weight", dice_weight)
        self.ce_weight, self.dice_weight = float(ce_weight), float(dice_weight)
        self.sampling = _inputs.check_sampling(sampling)
        self.clips = check_clip_options(clips)
        self.options = mask_options(options, **kwargs)

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
        group: Group = None,
    ) -> MaskLossOutput:
        """Compute the loss of pairs, or of matched queries.

        Args:
            mask_logits: `[N, h, w]`, prediction n belongs to target n; or `[B, Q, h, w]`, dense or as `MaskFactors`,
                along with `matches`. Those of clips are `[B, Q, T, h, w]`.
            masks: the targets: `[N, H, W]`, bool, uint8 or float, or `MaskTargets`; with `matches` the targets of a
                batch, `MaskTargets` or a list of `[T, H, W]`.
            matches: pairs of (queries, targets) of each image, as DETR's matchers return them, or `Matches`.
            points: float `[N, P, 2]`, (x, y) in [0, 1]^2: read here, and draw nothing. In the order of the matches; of
                clips `[N * T, P, 2]`, the frames of an instance one after the other.
            instance_weights: bool or float `[N]`, v_i at least 0, in the order of the matches: the terms become
                `sum_i v_i ce_i / N` with N = sum_i v_i, so that an instance of weight 2 counts as two, and one of
                weight 0 (or False) as none, whatever its logits are. No gradient flows to the weights.
            num_instances: what the sums are divided by, instead of `max(N / R, 1)` with N counted over all R ranks:
                for gradient accumulation the instances of the whole step over all ranks, divided by R
                (`step_totals(...).instances`); bounded below by 1.
            image_ids: global numbers of the images, `[B]`, in [0, 2^32); points depend on them. Default: rank * B + b.
            seed: 64-bit seed of the points.
            generator: where to draw a seed from. Default: torch's default generator.
            group: the process group over whose ranks to count N; False: this rank alone. Default None: all ranks if a
                gradient is wanted, else this one (see `step`).

        Returns:
            The weighted total, both terms, the terms of each instance, and the seed. float32, or float64 for float64
            logits. Gradients flow to `mask_logits`. Without instances everything is 0, connected to the graph.

        Raises:
            MaskLossError: wrong rank, dtype or device, numbers that do not pair up, or an index out of range.
        """
        logits, targets, matched = self._paired(mask_logits, masks, matches)
        if num_instances is not None:
            _inputs.check_count("num_instances", num_instances)
        labels = matched.index.new_empty(0)
        step = Step.begin(targets, labels, [logits], image_ids=image_ids, seed=seed, generator=generator, group=group)
        if points is not None:
            check_points(points, len(matched) * targets.frames, logits.device)
        weights = None
        if instance_weights is not None:
            weights = check_instance_weights(instance_weights, len(matched), logits)
        if num_instances is None:
            counted = weights_of_divisor(self.clips, matched, targets, weights)
            count = float(len(matched)) if counted is None else counted.sum()
            times = frames_of_divisor(self.clips, targets)
            divisor = step.divisor(count, times=times, weighted=counted is not None)
        else:
            divisor = distributed.at_least_one(num_instances)
        reduction = ops.Reduction(self.ce_weight, self.dice_weight, divisor, weights)
        [ce], [dice], losses = self.layer_terms([logits], matched, step, reduction, points)
        return MaskLossOutput(self.ce_weight * ce + self.dice_weight * dice, ce, dice, losses, step.seed)

    def layer_terms(
        self,
        logits: Sequence[Layer],
        matches: Matches,
        step: Step,
        reduction: ops.Reduction,
        points: Tensor | None = None,
    ) -> LayerTerms:
        """Compute both terms of each decoder layer; inputs are not checked.

        Args:
            logits: one `[B, Q, h, w]` per layer, dense or as `MaskFactors`.
            matches: the instances of all layers, on the device of the logits.
            step: targets, numbers and seed.
            reduction: the weights of the instances, and what their sums are divided by. How the caller will weigh the
                two terms is only a guess: gradients cost less where it is right.
            points: float `[N, P, 2]`, or None to draw them; of clips `[N * T, P, 2]`.

        Returns:
            The terms. Those of the instances of clips are `[N, T]`.
        """
        shape: tuple[int, ...] = (len(matches),)
        if logits[0].ndim == 5:
            frames, shape = step.targets.frames, (*shape, step.targets.frames)
            reduction = reduction._replace(
                weights=weights_of_planes(self.clips, matches, step.targets, reduction.weights)
            )
            matches, step = matches_of_planes(matches, frames), replace(step, targets=planes(step.targets))
        losses = self.instance_losses(logits, matches, step, points, reduction)
        terms = losses if reduction.weights is None else weighted(losses, reduction.weights)
        # Both terms of all layers at once: on a GPU every small operation costs a launch.
        ce, dice = (by_layer(_inputs.stack(terms), matches) / reduction.divisor).unbind()
        return LayerTerms(ce, dice, InstanceLosses(losses.ce.view(shape), losses.dice.view(shape)))

    def instance_losses(
        self,
        logits: Sequence[Layer],
        matches: Matches,
        step: Step,
        points: Tensor | None = None,
        reduction: ops.Reduction | None = None,
    ) -> InstanceLosses:
        """Compute both terms of each instance, in the order of the matches (see `layer_terms`)."""
        targets, sampling = step.targets, self.sampling
        num_points = sampling.num_points if points is None else points.shape[1]
        numbers = (num_points, sampling.num_candidates, sampling.num_uncertain, sampling.layout)
        job = ops.Job(
            ops.Targets(targets.encoding, *targets.tensors),
            ops.Draw(step.image_ids, step.seed, *numbers),
            self.options.term,
            points,
        )
        backend = ops.choose_backend(logits[0].device, self.options.backend)
        ce, dice = layers.mask_loss(logits, matches, job, backend, reduction)
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
        """Convert both forms of the call to one: logits `[B, Q, h, w]`, targets, matches."""
        targets = masks if isinstance(masks, MaskTargets) else MaskTargets.from_masks(masks)
        if matches is None:
            if isinstance(mask_logits, MaskFactors) or (isinstance(mask_logits, Tensor) and mask_logits.ndim == 4):
                raise Cause(
                    "mask_logits [B, Q, h, w] need matches",
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
    """Check instance weights, bool or float `[N]`, and cast them to the dtype of the losses; they get no gradient."""
    check_layout("instance_weights", weights)
    fits = isinstance(weights, Tensor) and tuple(weights.shape) == (count,)
    if not fits or not (weights.dtype == torch.bool or weights.is_floating_point()):
        raise Cause(
            "instance_weights must be a bool or float tensor [N]",
            f"got {describe(weights)} for {count} instances",
            "False or 0 leaves an instance out",
        )
    check_device("instance_weights", weights.device, logits.device)
    weights = savable(weights.detach().to(accumulation_dtype(logits.dtype)))
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


def by_layer(values: Tensor, matches: Matches) -> Tensor:
    """Sum values of instances `[K, N]` by layer: `[K, L]`."""
    sizes = matches.layer_sizes
    if matches.is_even:
        return values.view(len(values), len(sizes), -1).sum(2)
    return torch.stack([part.sum(1) for part in values.split(list(sizes), dim=1)], dim=1)
