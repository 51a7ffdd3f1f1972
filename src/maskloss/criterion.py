"""The whole criterion: match once, then classification and mask loss over all decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from typing_extensions import Unpack

from maskloss import _classification, _inputs, distributed, ops
from maskloss._abi import accumulation_dtype
from maskloss._classification import Partial
from maskloss._numbers import check_integer
from maskloss.clips import ClipOptions, check_same_unit, frames_of_divisor, weights_of_divisor
from maskloss.distributed import Group, StepTotals
from maskloss.errors import Cause, reported
from maskloss.layers import Layer, places, spread, with_masks
from maskloss.loss import MaskLoss, check_instance_weights
from maskloss.matcher import HungarianMatcher, check_layers_of_masks, check_matcher, stack_costs
from maskloss.matches import Matches, Pairs
from maskloss.options import (
    CLASS_WEIGHT,
    DICE_WEIGHT,
    MASK_WEIGHT,
    MaskKeywords,
    MaskOptions,
    TargetRules,
    mask_options,
    told,
)
from maskloss.outputs import CriterionOutput, LayerTerms
from maskloss.points import PointSampling
from maskloss.step import Step, check_weights_of_totals, of_groups
from maskloss.targets.collate import Entries, collate, joined_weights

NO_OBJECT_WEIGHT = 0.1


class MaskCriterion(nn.Module):
    """The training loss of a query model: matching, classification and mask loss, for every decoder layer.

        total = sum over layers of class_weight * L_class + mask_weight * L_mask + dice_weight * L_dice

    `L_class` is, for classification "softmax", the cross-entropy over C + 1 classes, in which unmatched queries have
    the class "no object" and the weight `no_object_weight`, divided by the sum of the weights of the queries:

        L_class = sum_q omega[g_q] * -log softmax(class_logits)[q, g_q] / sum_q omega[g_q]

    For "focal" it is the sigmoid focal loss with a = 0.25 and gamma = 2, summed over queries and classes and divided by
    the number of instances; there is no "no object". `L_mask` and `L_dice` are the cross-entropy and Dice of `MaskLoss`
    over the matched instances, divided by their number. All divisors are those of all ranks together.

    Float masks on a GPU are treated as soft: checking whether they are binary would synchronize. Between the passes,
    soft masks keep twelve times the memory of binary ones, which should be bool, or packed with
    `MaskTargets.from_masks(masks, soft=False)`.

    Args:
        num_classes: C, without "no object".
        class_weight: weight of the classification, at least 0. Default 2.
        mask_weight: weight of the masks' cross-entropy. Default 5.
        dice_weight: weight of Dice. Default 5.
        no_object_weight: weight of "no object" in the classification "softmax", at least 0. Default 0.1.
        classification: "softmax" (default) or "focal".
        class_weights: the weights of the classes, `[C]`, tensor or sequence, finite and at least 0. For "softmax" they
            are omega above, along with `no_object_weight`; for "focal" they multiply the terms of each class, and the
            divisor stays the number of instances. Default None: all 1.
        sampling: numbers and layout of points; the default matcher takes `num_points` and `layout` from it. Default
            `PointSampling()`.
        clips: what the mask terms of clips and volumes are made of. Default `ClipOptions()`.
        groups: groups of queries, each matched to all targets on its own, in training mode (see `HungarianMatcher`);
            instances are counted over all of them. Default 1, or what the matcher has.
        matcher: how to match. Its `match` is called: a subclass that overrides `forward` and not `match` is an error.
            Default: `HungarianMatcher` with the weights and options given here.
        ignore_value: the value of void pixels in masks and label maps that are packed here (see
            `MaskTargets.from_masks`). Default None.
        ignore_label: the label of targets whose class is unknown, 255 or -1 for instance: they are matched by their
            masks, which are learned, and their queries have no classification. Default None.
        drop_empty: a target whose mask is empty, after a crop for instance, counts as one without a mask: it is matched
            by its class alone and has no mask terms. Default False: an empty mask is learned, as in Mask2Former.
        options: how points are read, the focal loss of the masks and the backend, as one `MaskOptions`.
        kwargs: the same options one by one.

    Raises:
        MaskLossError: an option outside its range, options that contradict each other.

    Source:
        Mask2Former (Cheng et al., 2022), section 3.2.2 and its weights. Differences: instances are counted as matched
        ones (it counts targets), the classification is normalized over all ranks (it is over one rank there), and
        the layers share the matcher's points. "focal": Deformable DETR (Zhu et al., 2021), MaskDINO (Li et al., 2023).

    Example:
        >>> criterion = MaskCriterion(num_classes=3, sampling=PointSampling(num_points=64))
        >>> masks = torch.zeros(1, 32, 32, dtype=torch.bool)
        >>> masks[0, 8:24, 8:24] = True
        >>> targets = [{"masks": masks, "labels": torch.tensor([2])}]
        >>> class_logits, mask_logits = torch.zeros(1, 5, 4), torch.zeros(1, 5, 16, 16)
        >>> out = criterion(class_logits, mask_logits, targets, seed=0)
        >>> {name: round(value.item(), 4) for name, value in out.as_dict().items()}
        {'loss_class': 1.3863, 'loss_mask': 0.6931, 'loss_dice': 0.6575}
    """

    @reported("MaskCriterion")
    def __init__(
        self,
        num_classes: int,
        *,
        class_weight: float = CLASS_WEIGHT,
        mask_weight: float = MASK_WEIGHT,
        dice_weight: float = DICE_WEIGHT,
        no_object_weight: float = NO_OBJECT_WEIGHT,
        classification: str = "softmax",
        class_weights: Tensor | Sequence[float] | None = None,
        sampling: PointSampling | None = None,
        clips: ClipOptions | None = None,
        groups: int | None = None,
        matcher: HungarianMatcher | None = None,
        ignore_value: int | None = None,
        ignore_label: int | None = None,
        drop_empty: bool = False,
        options: MaskOptions | None = None,
        **kwargs: Unpack[MaskKeywords],
    ) -> None:
        super().__init__()
        hint = "do not count 'no object'"
        self.num_classes = check_integer("num_classes", num_classes, 1, hint=hint)
        self.class_weight, self.mask_weight, self.dice_weight, self.no_object_weight = _inputs.check_weights(
            class_weight=class_weight,
            mask_weight=mask_weight,
            dice_weight=dice_weight,
            no_object_weight=no_object_weight,
        )
        _inputs.check_choice("classification", classification, _classification.KINDS)
        if classification == "focal" and no_object_weight != NO_OBJECT_WEIGHT:
            raise Cause(
                'no_object_weight belongs to classification "softmax"',
                f'classification="focal", no_object_weight={no_object_weight!r}',
                'sigmoids have no class "no object"; leave it out',
            )
        self.classification = classification
        # Not a buffer, which `module.half()` would round; it moves to the logits with the first step.
        self._class_weights = None if class_weights is None else _inputs.class_weights(class_weights, self.num_classes)
        sampling = _inputs.check_sampling(sampling)
        self.rules = TargetRules(ignore_value, ignore_label, drop_empty)
        group = mask_options(options, **kwargs)
        self.mask_loss = MaskLoss(
            ce_weight=mask_weight, dice_weight=dice_weight, sampling=sampling, clips=clips, options=group
        )
        if matcher is not None:
            self.matcher = check_matcher(matcher, classification, groups)
            self.rules.check_matcher(matcher.rules)
        else:
            self.matcher = HungarianMatcher(
                class_weight=class_weight,
                mask_weight=mask_weight,
                dice_weight=dice_weight,
                groups=1 if groups is None else groups,
                num_points=sampling.num_points,
                layout=sampling.layout,
                classification=classification,
                clips=clips,
                options=group,
                ignore_value=ignore_value,
                ignore_label=ignore_label,
                drop_empty=drop_empty,
            )
        check_same_unit(clips, self.matcher.clips)

    @reported("MaskCriterion")
    def forward(
        self,
        class_logits: Tensor | Sequence[Tensor],
        mask_logits: Layer | Sequence[Layer | None],
        targets: Entries | Mapping[str, Any],
        *,
        matches: Matches | Pairs | Sequence[Pairs] | None = None,
        extra_costs: Sequence[Tensor] | None = None,
        instance_weights: Tensor | Sequence[Tensor] | None = None,
        unlabeled: Sequence[Tensor | None] | None = None,
        annotated_classes: Sequence[Any] | None = None,
        totals: StepTotals | None = None,
        image_ids: Tensor | Sequence[int] | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        group: Group = None,
    ) -> CriterionOutput:
        """Compute all losses of a step.

        Args:
            class_logits: `[B, Q, C + 1]` (`[B, Q, C]` for classification "focal"), or a sequence over decoder layers,
                the final one last.
            mask_logits: `[B, Q, h, w]`, dense or as `MaskFactors`, or a sequence over decoder layers; h and w may
                differ by layer. Where some layers are dense, factors of the others are formed. A layer without masks
                has None: it is matched by its classes and `extra_costs`, and has no mask terms. Those of clips are
                `[B, Q, T, h, w]`: a query has one class, and a mask in each of T frames.
            targets: one dict per image: "labels" int64 `[T]` in [0, C), and "masks": a `MaskTargets` of the image,
                dense `[T, H, W]`, or a label map `[H, W]` along with "ids" (default: all that occur in it but 0). A
                target with "has_mask" False, bool `[T]`, or with "boxes" and no "masks", is matched by its class and
                `extra_costs` alone and has no mask terms. Or, already collated, one dict with "masks": the
                `MaskTargets` of the batch, and "labels": a list of `[T]`. The dense masks of a clip are
                `[N, T, H, W]`, with labels `[N]`, its label map is `[T, H, W]`.
            matches: which query belongs to which target, instead of running the matcher: `Matches`, a pair
                (queries, targets) for each image as DETR's matchers return them, or a list with such a list for each
                layer. Those of a single layer hold for all layers. Several queries may share a target; they share its
                points too.
            extra_costs: more terms of the matching cost (see `HungarianMatcher`); not along with `matches`.
            instance_weights: weights of the targets in both mask terms: for each image bool or float `[T]`, finite and
                at least 0, in the order of its targets, or one `[T_all]`. N becomes the sum of the matched instances'
                weights, so that an instance of weight 2 counts as two, and one of weight 0 (or False) as none, whatever
                its logits are. The classification does not change: a target without a mask still has a class.
            unlabeled: for each image the region in which there may be objects that nobody annotated, bool `[H, W]` of
                the size of its masks (of their canvas, if they have one), or None. Another size raises an error, or,
                where masks were packed on a device, fails an assertion of the device; an image without masks may have
                any. A query without a target is taught "no object" by one minus the share of its predicted mask that
                lies there (seen at the matcher's points, without a gradient). For "softmax" it has that weight in the
                mean too, which totals cannot know.
            annotated_classes: for each image the numbers of the classes that were annotated in it, or None for all. For
                "softmax", a query without a target learns to be no object, or of another class; for "focal" it learns
                nothing of the others. Targets of other classes teach theirs all the same. Both may stand in the
                targets instead, as "unlabeled" and "annotated_classes" of each image.
            totals: the step's totals, for gradient accumulation (`step_totals`). Default: this batch over all ranks.
            image_ids: global numbers of the images, `[B]`, in [0, 2^32); points depend on them. Default: rank * B + b.
            seed: 64-bit seed of the points.
            generator: where to draw a seed from. Default: torch's default generator.
            group: the process group over whose ranks to count; False: this rank alone. Default None: all ranks if a
                gradient is wanted, else this one. `step` tells totals, image_ids, seed and group to a whole block.

        Returns:
            The weighted total, the unweighted terms of each layer, and the matches. Gradients flow to both logits.

        Raises:
            MaskLossError: wrong rank, dtype or device, numbers that do not pair up, labels outside the classes (seen
                by the matching, and on a CPU), or totals without the weights that are used here.
        """
        softmax = self.classification == "softmax"
        stacked, logits = check_layers_of_masks(class_logits, mask_logits, no_object=softmax)
        if stacked.shape[3] != self.num_classes + softmax:
            raise Cause(
                f"class_logits must have num_classes{' + 1' * softmax} = {self.num_classes + softmax} entries",
                f"got {stacked.shape[3]}",
                'num_classes excludes "no object". Softmax logits have one extra entry for it; sigmoid logits do not',
            )
        _, present = with_masks(logits)
        batch = collate(targets, self.rules.ignore_value, present[0])
        step = Step.begin(
            batch._replace(annotated=batch.annotated.update(unlabeled, annotated_classes)),
            [*present, stacked],
            self.rules,
            totals=totals,
            image_ids=image_ids,
            seed=seed,
            generator=generator,
            group=group,
        )
        found = self._matches(matches, extra_costs, stacked, logits, step)
        wanted = step.wanted_classes(found, stacked.shape[:3], self.num_classes)
        weights = None
        if instance_weights is not None:
            joined = joined_weights(instance_weights, step.targets)
            weights = check_instance_weights(joined, step.targets.num_masks, present[0])
        matched = step.mask_weights(found, weights, accumulation_dtype(present[0].dtype))
        points = self.matcher.num_points, self.matcher.layout
        partial = _classification.partial_of(step, logits, self.num_classes, *points, softmax=softmax)
        weighed_by = None if instance_weights is None else "instance_weights"
        counts = self._counts(step, found, matched, weighed_by, wanted, stacked, partial)
        layers, (ce, dice, losses) = self._mask_terms(step, found, logits, weights, matched, counts)
        loss_class = self._classify(stacked, wanted, counts, partial)
        factors = (self.class_weight, self.mask_weight, self.dice_weight)
        summed = torch.add(self.class_weight * loss_class, ce, alpha=self.mask_weight)
        total = torch.add(summed, dice, alpha=self.dice_weight).sum()
        return CriterionOutput(total, loss_class, ce, dice, losses, found, step.seed, factors, layers)

    def _matches(
        self,
        given: Matches | Pairs | Sequence[Pairs] | None,
        extra_costs: Sequence[Tensor] | None,
        class_logits: Tensor,
        mask_logits: Sequence[Layer | None],
        step: Step,
    ) -> Matches:
        """Match, or take matches that were made elsewhere."""
        if given is None:
            groups, queries = self.matcher.groups_now, class_logits.shape[2]
            largest = ops.widest(step.targets.num_targets)
            if groups > 1 and step.totals is not None and largest > queries // groups:
                raise Cause(
                    "with totals and groups, no image may have more targets than a group has queries",
                    f"{largest} targets for {queries // groups} queries in each of {groups} groups",
                    "totals count each target once for every group: leave them out, or raise the number of queries",
                )
            extra = None if extra_costs is None else stack_costs(extra_costs, class_logits, step.targets)
            return self.matcher.match(class_logits, mask_logits, step, extra)
        if extra_costs is not None:
            raise Cause("give matches or extra_costs, not both", "both were given", "with matches nothing is matched")
        return step.given(given, len(mask_logits), class_logits.shape[2], self.num_classes)

    def _counts(
        self,
        step: Step,
        matches: Matches,
        weights: Tensor | None,
        weighed_by: str | None,
        wanted: Tensor,
        logits: Tensor,
        partial: Partial,
    ) -> StepTotals:
        """Take the step's totals, or count this batch over the ranks; of layers that differ, `[L]`.

        `weights` are those of the matched instances in the mask terms, `weighed_by` the option that has said so.
        """
        weighs_classes = self._weighs_classes
        counted = weights_of_divisor(self.mask_loss.clips, matches, step.targets, weights)
        if step.totals is None:
            queries: float | Tensor = float(wanted.shape[1] * wanted.shape[2])
            if self.classification == "softmax" and partial.shares is not None:
                untaught = torch.where(wanted == self.num_classes, partial.shares, 0.0).flatten(1).sum(1)
                queries = queries - untaught
            class_weight = None
            if weighs_classes:
                class_weight = _classification.weight_sums(wanted, self._query_weights(logits, no_object=0.0))
            return step.counted(matches, queries, logits.dtype, counted, class_weight)
        # Other micro-batches may have weights where this one has none: all of its instances weigh 1.
        used_by: dict[str, str | None] = {"class_weight": weighs_classes}
        if counted is not None:
            usual = weighed_by or ("drop_empty" if self.rules.drop_empty else '"has_mask" of the targets')
            used_by["instance_weight"] = "clips" if weights is None else usual
        check_weights_of_totals(step.totals, **used_by)
        if not matches.is_even:
            raise Cause(
                "totals need the same number of matches in every layer",
                f"the layers have {list(matches.layer_sizes)} pairs",
                "leave totals out, or give every layer the same number of pairs",
            )
        return of_groups(step.totals, self.matcher.groups_now)

    def _mask_terms(
        self,
        step: Step,
        matches: Matches,
        logits: Sequence[Layer | None],
        weights: Tensor | None,
        matched: Tensor | None,
        counts: StepTotals,
    ) -> tuple[tuple[int, ...], LayerTerms]:
        """Compute the mask terms of all layers, 0 where there are no masks, and say which layers have some.

        `weights` are those of all targets, `matched` those of the matched instances.
        """
        clips = self.mask_loss.clips
        instances = counts.instances if counts.instance_weight is None else counts.instance_weight
        divisor = distributed.at_least_one(instances * frames_of_divisor(clips, step.targets))
        layers, given = with_masks(logits)
        shown = matches.of_layers(layers)
        if shown is not matches:
            matched = step.mask_weights(shown, weights, accumulation_dtype(given[0].dtype))
            if isinstance(divisor, Tensor) and divisor.ndim:
                divisor = divisor[places(layers, divisor.device)]
        reduction = ops.Reduction(self.mask_weight, self.dice_weight, divisor, matched)
        terms = self.mask_loss.layer_terms(given, shown, step, reduction)
        if shown is not matches:
            ce, dice = (spread(term, layers, len(logits)) for term in terms[:2])
            terms = terms._replace(ce=ce, dice=dice)
        return layers, terms

    def _classify(self, class_logits: Tensor, wanted: Tensor, counts: StepTotals, partial: Partial) -> Tensor:
        """Compute the classification of each layer, `[L]`, from `[L, B, Q, C (+ 1)]` and the classes `[L, B, Q]`."""
        if self.classification == "focal":
            weights, ignores = self._moved_class_weights(class_logits), self.rules.ignore_label is not None
            sums = _classification.focal_sums(class_logits, wanted, weights, ignores=ignores, partial=partial)
            return sums / distributed.at_least_one(counts.instances)
        # The sum of the weights; without class weights known without asking the device.
        unmatched = counts.queries - counts.instances
        matched = counts.instances if counts.class_weight is None else counts.class_weight
        weight = matched + self.no_object_weight * unmatched
        return _classification.softmax_loss(class_logits, wanted, self._query_weights(class_logits), weight, partial)

    @property
    def _weighs_classes(self) -> str | None:
        """Name the option by which the divisor of the classification depends on the labels, if it does."""
        if self.classification != "softmax":
            return None
        by_label = None if self.rules.ignore_label is None else "ignore_label"
        return by_label if self._class_weights is None else "class_weights"

    def _query_weights(self, like: Tensor, no_object: float | None = None) -> Tensor:
        """Return the weights of all classes and of "no object", `[C + 1]`, with the dtype and device of logits."""
        weights = self._moved_class_weights(like)
        if weights is None:
            weights = like.new_ones(self.num_classes)
        return pad(weights, (0, 1), value=self.no_object_weight if no_object is None else no_object)

    @property
    def class_weights(self) -> Tensor | None:
        """The weights of the classes, `[C]`; None where all weigh 1."""
        return self._class_weights

    def _moved_class_weights(self, like: Tensor) -> Tensor | None:
        if self._class_weights is None:
            return None
        if self._class_weights.device != like.device:
            self._class_weights = self._class_weights.to(like.device)
        return self._class_weights.to(like.dtype)

    def extra_repr(self) -> str:
        """Show the options in `print(module)`."""
        parts = [f"num_classes={self.num_classes}", f"class_weight={self.class_weight}"]
        parts += [f"mask_weight={self.mask_weight}", f"dice_weight={self.dice_weight}"]
        if self.classification == "softmax":
            parts.append(f"no_object_weight={self.no_object_weight}")
        parts.append(f"classification={self.classification!r}")
        if self._class_weights is not None:
            parts.append(f"class_weights={[round(weight, 4) for weight in self._class_weights.tolist()]}")
        return ", ".join(parts) + told(self.rules)
