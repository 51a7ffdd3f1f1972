"""The mask loss at sampled points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from maskloss import _inputs, distributed, layers, ops
from maskloss._abi import TARGET, Stack, accumulation_dtype
from maskloss._numbers import check_flags, is_float
from maskloss._tracing import on_host, savable
from maskloss.clips import (
    ClipOptions,
    check_clip_options,
    frames_of_divisor,
    is_whole,
    matches_of_planes,
    stack_of,
    weights_of_divisor,
    weights_of_planes,
)
from maskloss.distributed import Group
from maskloss.errors import Cause, check_device, check_layout, describe, reported
from maskloss.factors import MaskFactors
from maskloss.layers import Layer
from maskloss.matches import Matches, Pairs, check_fit
from maskloss.options import DICE_WEIGHT, MASK_WEIGHT, MaskKeywords, MaskOptions, mask_options, told
from maskloss.outputs import InstanceLosses, LayerTerms, MaskLossOutput
from maskloss.points import PointSampling, check_points
from maskloss.step import Step
from maskloss.targets import MaskTargets
from maskloss.targets.collate import Batch


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
        clips: what the terms of clips and volumes are made of. Default `ClipOptions()`.
        options: how points are read, the focal loss and the backend, as one `MaskOptions`.
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
        self.ce_weight, self.dice_weight = _inputs.check_weights(ce_weight=ce_weight, dice_weight=dice_weight)
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
        best_of: bool = False,
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
            mask_logits: `[N, h, w]` or `[N, 1, h, w]`, prediction n belongs to target n; or `[N, M, h, w]` with
                `best_of`; or `[B, Q, h, w]`, dense or as `MaskFactors`, along with `matches`. Those of clips and
                volumes are `[N, T, h, w]`, or `[B, Q, T, h, w]`.
            masks: the targets: `[N, H, W]` or `[N, 1, H, W]`, bool, integers or float, or `MaskTargets`; with `matches`
                the targets of a batch, `MaskTargets` or a list of `[T, H, W]`. Those of clips are `[N, T, H, W]`.
            matches: pairs of (queries, targets) of each image, as DETR's matchers return them, or `Matches`.
            best_of: of M candidates for each target only the one with the lowest weighted loss counts, and gets a
                gradient, as in SAM. Their points are chosen from the same candidates. Default False.
            points: float `[N, P, 2]`, (x, y) in [0, 1]^2: read here, and draw nothing. In the order of the matches; of
                clips `[N * T, P, 2]`, the frames of an instance one after the other; of whole clips and of volumes
                `[N, P, 3]`, (x, y, z).
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
        check_flags(best_of=best_of)
        logits, targets, matched, candidates = self._paired(mask_logits, masks, matches, best_of)
        if num_instances is not None:
            _inputs.check_count("num_instances", num_instances)
        batch = Batch(targets, matched.index.new_empty(0))
        step = Step.begin(batch, [logits], image_ids=image_ids, seed=seed, generator=generator, group=group)
        targets = step.targets  # which knows the frames of clips without targets too
        instances = len(matched) // candidates
        if points is not None:
            whole = is_whole(self.clips, logits)
            check_points(points, instances * (1 if whole else targets.frames), logits.device, 3 if whole else 2)
            points = points.repeat_interleave(candidates, dim=0) if best_of else points
        weights = None
        if instance_weights is not None:
            weights = check_instance_weights(instance_weights, instances, logits)
        if num_instances is None:
            counted = weights if best_of else weights_of_divisor(self.clips, matched, targets, weights)
            count = float(instances) if counted is None else counted.sum()
            times = frames_of_divisor(self.clips, targets)
            divisor = step.divisor(count, times=times, weighted=counted is not None)
        else:
            divisor = distributed.at_least_one(num_instances)
        best = None
        if best_of:
            losses, best = self._best(self.instance_losses([logits], matched, step, points), candidates)
            terms = losses if weights is None else weighted(losses, weights)
            ce, dice = terms.ce.sum() / divisor, terms.dice.sum() / divisor
        else:
            reduction = ops.Reduction(self.ce_weight, self.dice_weight, divisor, weights)
            [ce], [dice], losses = self.layer_terms([logits], matched, step, reduction, points)
        total = self.ce_weight * ce + self.dice_weight * dice
        return MaskLossOutput(total, ce, dice, losses, step.seed, best)

    def _best(self, losses: InstanceLosses, candidates: int) -> tuple[InstanceLosses, Tensor]:
        """Keep the losses of the best of each instance's candidates, and say which it is, `[N]`."""
        ce, dice = (term.view(-1, candidates) for term in losses)
        best = (self.ce_weight * ce + self.dice_weight * dice).detach().argmin(1, keepdim=True)
        return InstanceLosses(ce.gather(1, best)[:, 0], dice.gather(1, best)[:, 0]), best[:, 0]

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
            points: float `[N, P, 2]`, or None to draw them; of clips `[N * T, P, 2]`, of whole ones `[N, P, 3]`.

        Returns:
            The terms. Those of the instances of clips are `[N, T]`.
        """
        shape: tuple[int, ...] = (len(matches),)
        stack = stack_of(self.clips, logits, step.targets)
        if logits[0].ndim == 5 and stack is None:
            frames, shape = step.targets.frames, (*shape, step.targets.frames)
            reduction = reduction._replace(
                weights=weights_of_planes(self.clips, matches, step.targets, reduction.weights)
            )
            matches, step = matches_of_planes(matches, frames), step.with_targets(step.by_plane())
        losses = self.instance_losses(logits, matches, step, points, reduction, stack)
        terms = losses if reduction.weights is None else weighted(losses, reduction.weights)
        # Both terms of all layers at once: on a GPU every small operation costs a launch.
        ce, dice = (matches.by_layer(_inputs.stack(terms)) / reduction.divisor).unbind()
        if len(shape) > 1:
            losses = InstanceLosses(losses.ce.view(shape), losses.dice.view(shape))
        return LayerTerms(ce, dice, losses)

    def instance_losses(
        self,
        logits: Sequence[Layer],
        matches: Matches,
        step: Step,
        points: Tensor | None = None,
        reduction: ops.Reduction | None = None,
        stack: Stack | None = None,
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
        ce, dice = layers.mask_loss(logits, matches, job, backend, reduction, stack)
        return InstanceLosses(ce, dice)

    def extra_repr(self) -> str:
        """Show the options in `print(module)`."""
        weights = f"ce_weight={self.ce_weight}, dice_weight={self.dice_weight}"
        return f"{weights}, {self.sampling}, {self.options}{told(self.clips)}"

    def _paired(
        self,
        mask_logits: Layer,
        masks: Tensor | MaskTargets | Sequence[Tensor],
        matches: Matches | Pairs | None,
        best_of: bool,
    ) -> tuple[Layer, MaskTargets, Matches, int]:
        """Convert all forms of the call to one: logits `[B, Q, h, w]`, targets, matches, and candidates per target."""
        four = isinstance(mask_logits, Tensor) and mask_logits.ndim == 4
        if best_of and (matches is not None or not four):
            raise Cause(
                "best_of needs mask_logits [N, M, h, w], M candidates for each target, without matches",
                f"got {describe(mask_logits)}" if matches is None else "matches were given",
                "best_of=False is the loss of one prediction for each target",
            )
        if matches is None and getattr(masks, "ndim", 0) == 4 and masks.shape[1] == 1:  # type: ignore[union-attr]
            masks = masks[:, 0]  # type: ignore[index, call-overload]
        targets = masks if isinstance(masks, MaskTargets) else MaskTargets.from_masks(masks)
        if matches is None:
            clips = four and not best_of and targets.present is not None
            several = four and not best_of and not clips and mask_logits.shape[1] != 1
            if isinstance(mask_logits, MaskFactors) or several:
                raise Cause(
                    "mask_logits [B, Q, h, w] need matches",
                    "matches is None",
                    "give the (queries, targets) of each image, or pick the matched predictions: [N, h, w]; "
                    "best_of=True if they are candidates [N, M, h, w]",
                )
            candidates = mask_logits.shape[1] if best_of else 1
            mask_logits = mask_logits.flatten(0, 1) if four and not clips else mask_logits
            _inputs.check_maps("mask_logits", mask_logits, "[N, T, h, w]" if clips else "[N, h, w]")
            count = len(mask_logits) // max(candidates, 1)
            if len(targets) != 1 or targets.num_masks != count or candidates < 1:
                raise Cause(
                    "mask_logits and masks must pair up",
                    f"{count} predictions but {targets.num_masks} targets in {len(targets)} image(s)",
                    "give one target mask for each prediction, or matches along with [B, Q, h, w] logits",
                )
            check_device("masks", targets.device, mask_logits.device)
            _inputs.check_targets(targets, mask_logits[None])
            pairs = Matches.one_to_one(len(mask_logits), mask_logits.device)
            if candidates > 1:
                pairs.index[:, TARGET] //= candidates
            return mask_logits[None], targets, pairs, candidates
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
        return mask_logits, targets, matches.to(mask_logits.device), 1


def check_instance_weights(weights: Tensor, count: int, logits: Layer) -> Tensor:
    """Check instance weights, bool or float `[N]`, and cast them to the dtype of the losses; they get no gradient."""
    check_layout("instance_weights", weights)
    fits = isinstance(weights, Tensor) and tuple(weights.shape) == (count,)
    if not fits or not (weights.dtype == torch.bool or is_float(weights)):
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
