"""The Hungarian matching of predictions and targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from maskloss import _inputs, layers, ops
from maskloss._classification import KINDS
from maskloss._numbers import check_integer, is_float
from maskloss._tracing import on_host
from maskloss.clips import ClipOptions, check_clip_options, stack_of
from maskloss.errors import Cause, check_device, check_layout, describe, reported
from maskloss.functional import class_cost, focal_class_cost
from maskloss.layers import Layer, spread, with_masks
from maskloss.matches import Matches
from maskloss.options import CLASS_WEIGHT, DICE_WEIGHT, MASK_WEIGHT, MaskOptions, TargetKeywords, all_options, told
from maskloss.points import PointSampling
from maskloss.step import Step
from maskloss.targets import MaskTargets
from maskloss.targets.collate import Entries, collate

# On a CPU the class terms of this many pairs are computed at a time: work space then stays small, and in the cache.
_AT_A_TIME = 1 << 16


class HungarianMatcher(nn.Module):
    """Match queries and targets one to one, at the lowest total cost, for every image and decoder layer.

        C[q, t] = class_weight * (-softmax(class)[q, label_t]) + mask_weight * BCE[q, t] + dice_weight * Dice[q, t]

    Both mask terms are taken at `num_points` uniform points, which all queries and all layers of an image share. The
    costs of all layers and images are computed first, then all assignments are solved side by side: on a GPU by one
    kernel, so that the host waits for nothing. If an image has more targets than queries, Q of them are matched. A pair
    with a non-finite cost is used only as a last resort.

    Args:
        class_weight: weight of the class term, at least 0. Default 2.
        mask_weight: weight of the cross-entropy, at least 0. Default 5.
        dice_weight: weight of Dice, at least 0. Default 5.
        groups: G, groups of Q / G consecutive queries, each matched to all targets on its own, in training mode. After
            `eval()` there is one group. Default 1.
        assignment: where assignments are solved: "auto" (default) on a GPU of the backend "gpu" if a group has at most
            1024 queries and an image at most 1024 targets, so that nothing waits for the host; else on the host.
            "host" and "device" decide it.
        num_points: P, uniform points per image. Default 12544.
        layout: how these points lie to each other, "independent" (default) or "stratified" (see `PointSampling`).
        classification: "softmax" (default), or "focal": the class logits have no "no object", and the class term is
            `functional.focal_class_cost`.
        clips: how clips and volumes are matched, by its `unit`. Default `ClipOptions()`.
        options: how points are read, the focal cost and the backend, as one `MaskOptions`.
        kwargs: the same options one by one; and `ignore_value`, `ignore_label` and `drop_empty`, as in
            `MaskCriterion`, whose own hold where it calls the matcher.

    Raises:
        MaskLossError: an option outside its range.

    Source:
        DETR (Carion et al., 2020), section 3.1; Mask2Former (Cheng et al., 2022), section 3.2.2. Mask2Former draws new
        points for each layer; here the layers of a step share theirs, which leaves each layer's distribution as it is.

    Example:
        >>> masks = torch.zeros(2, 16, 16, dtype=torch.bool)
        >>> masks[0, :8], masks[1, 8:] = True, True
        >>> mask_logits = torch.stack([masks[1], masks[0]]).float()[None] * 8 - 4
        >>> targets = [{"masks": masks, "labels": torch.tensor([0, 0])}]
        >>> matches = HungarianMatcher(num_points=256)(torch.zeros(1, 2, 2), mask_logits, targets)
        >>> matches.pairs()
        [(tensor([0, 1]), tensor([1, 0]))]
    """

    @reported("HungarianMatcher")
    def __init__(
        self,
        *,
        class_weight: float = CLASS_WEIGHT,
        mask_weight: float = MASK_WEIGHT,
        dice_weight: float = DICE_WEIGHT,
        groups: int = 1,
        assignment: str = "auto",
        num_points: int = PointSampling.num_points,
        layout: str = PointSampling.layout,
        classification: str = "softmax",
        clips: ClipOptions | None = None,
        options: MaskOptions | None = None,
        **kwargs: Unpack[TargetKeywords],
    ) -> None:
        super().__init__()
        weights = _inputs.check_weights(class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight)
        self.class_weight, self.mask_weight, self.dice_weight = weights
        self.groups = check_integer("groups", groups, 1, hint="RF-DETR has 13 in training")
        _inputs.check_choice("assignment", assignment, ops.ASSIGNMENTS)
        self.assignment = assignment
        # Only uniform points are drawn: the candidates of a default ratio must not count towards a limit.
        sampling = PointSampling(num_points=num_points, importance_ratio=0.0, layout=layout)
        self.num_points, self.layout = sampling.num_points, sampling.layout
        _inputs.check_choice("classification", classification, KINDS)
        self.classification = classification
        self.options, self.rules = all_options(options, kwargs)
        self.clips = check_clip_options(clips)

    @property
    def groups_now(self) -> int:
        """Into how many groups queries are split: after `eval()` there is one."""
        return self.groups if self.training else 1

    @reported("HungarianMatcher")
    def forward(
        self,
        class_logits: Tensor | Sequence[Tensor],
        mask_logits: Layer | Sequence[Layer | None],
        targets: Entries | Mapping[str, Any],
        *,
        extra_costs: Sequence[Tensor] | None = None,
        image_ids: Tensor | Sequence[int] | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Matches:
        """Match the predictions of one layer, or of a sequence of layers.

        Args:
            class_logits: `[B, Q, C + 1]`, or a sequence of them; the last class is "no object". `[B, Q, C]` for
                classification "focal".
            mask_logits: `[B, Q, h, w]`, dense or as `MaskFactors`, or a sequence of them, in which a layer without
                masks has None. Those of clips are `[B, Q, T, h, w]`: whole clips are matched, at the same P points in
                each of T frames.
            targets: one dict per image with "masks" and "labels" (see `MaskCriterion`).
            extra_costs: more terms of the cost, of boxes for instance, with their weights: `[Q, T]` for each image, or
                `[L, Q, T]` for several layers. Default: none.
            image_ids: global numbers of the images, `[B]`, in [0, 2^32). Default: rank * B + b.
            seed: 64-bit seed of the points.
            generator: where to draw a seed from. Default: torch's default generator.

        Returns:
            The matches, on the device of the logits. No gradient.

        Raises:
            MaskLossError: wrong rank, dtype or device, numbers that do not pair up, labels outside the classes, or no
                costs at all, because all weights are 0.
        """
        softmax = self.classification == "softmax"
        stacked, logits = check_layers_of_masks(class_logits, mask_logits, no_object=softmax)
        _, given = with_masks(logits)
        batch = collate(targets, self.rules.ignore_value, given[0])
        step = Step.begin(batch, given, self.rules, image_ids=image_ids, seed=seed, generator=generator)
        extra = None if extra_costs is None else stack_costs(extra_costs, stacked, step.targets)
        return self.match(stacked, logits, step, extra)

    @torch.no_grad()
    def match(
        self,
        class_logits: Tensor,
        mask_logits: Sequence[Layer | None],
        step: Step,
        extra_costs: Tensor | None = None,
    ) -> Matches:
        """Match checked inputs.

        Args:
            class_logits: `[L, B, Q, C + 1]`, or `[L, B, Q, C]` for classification "focal".
            mask_logits: one `[B, Q, h, w]` per layer, None for one without masks.
            step: targets, numbers, seed, and whether labels may be C: "no object".
            extra_costs: `[L, B, Q, T_max]`, or None.
        """
        cost = self.costs(class_logits, mask_logits, step, extra_costs)
        no_object_labels = step.rules.no_object_label != "error"
        counts, (depth, _, queries, outputs) = step.targets.num_targets, class_logits.shape
        num_classes = outputs - (self.classification == "softmax")
        # Unmatched queries have the first number that is no label.
        groups = self.groups_now
        each, rest = queries // groups, queries % groups  # not `divmod`: PyTorch's compiler has none for symbolic sizes
        if rest:
            raise Cause(
                "the number of queries must be a multiple of groups",
                f"{queries} queries in {groups} groups",
                "groups=1 matches all queries together; call eval() where the model runs one group",
            )
        index, wanted = ops.assign(
            cost,
            step.labels,
            step.targets.images,
            counts,
            num_classes + no_object_labels,
            groups=groups,
            where=self.assignment,
            backend=self.options.backend,
        )
        if no_object_labels:
            wanted = wanted.clamp(max=num_classes)
        matched = tuple(groups * count for count in ops.matched_counts(counts, each)) * depth
        sizes = (groups * ops.count_matches(counts, each),) * depth
        return Matches(index, sizes, queries, counts, wanted, num_classes, matched)

    @torch.no_grad()
    def costs(
        self, class_logits: Tensor, mask_logits: Sequence[Layer | None], step: Step, extra_costs: Tensor | None = None
    ) -> Tensor:
        """Compute the costs `[L, B, Q, T_max]` of checked inputs; meaningless beyond an image's targets."""
        check_costs(self, extra_costs)
        targets = step.targets
        by_class = class_cost if self.classification == "softmax" else focal_class_cost
        labels = _by_image(step.labels, targets)
        logits, pairs = class_logits.detach(), math.prod(class_logits.shape[1:-1]) * labels.shape[1]
        size = max(_AT_A_TIME // max(pairs, 1), 1) if on_host(logits) else len(logits)
        if size < len(logits):
            classes = torch.cat([by_class(part, labels) for part in logits.split(size)])
        else:
            classes = by_class(logits, labels)
        if step.unknown is not None:
            classes = classes.masked_fill(_by_image(step.unknown, targets)[:, None], 0)
        cost = torch.add(self._mask_costs(mask_logits, step, classes), classes, alpha=self.class_weight)
        return cost if extra_costs is None else cost + extra_costs

    def _mask_costs(self, mask_logits: Sequence[Layer | None], step: Step, like: Tensor) -> Tensor:
        """Compute the mask terms of the costs, `[L, B, Q, T_max]`; 0 in layers without masks and for such targets."""
        targets = step.targets
        numbers, given = with_masks(mask_logits)
        if not given or not (self.mask_weight or self.dice_weight):
            return torch.zeros_like(like)
        stack = stack_of(self.clips, given, targets)
        stored = targets if stack else step.by_plane()
        job = ops.Job(
            ops.Targets(targets.encoding, *stored.tensors),
            ops.Draw(step.image_ids, step.seed, self.num_points, layout=self.layout),
            self.options.term,
        )
        backend = ops.choose_backend(given[0].device, self.options.backend)
        ce, dice = layers.match_cost(given, targets.num_targets, job, backend, stack)
        cost = ce.mul_(self.mask_weight).add_(dice, alpha=self.dice_weight)
        if step.has_mask is not None:
            cost = cost.masked_fill(~_by_image(step.has_mask, targets)[:, None], 0)
        return spread(cost, numbers, len(mask_logits))

    def extra_repr(self) -> str:
        """Show the options in `print(module)`."""
        weights = f"class_weight={self.class_weight}, mask_weight={self.mask_weight}, dice_weight={self.dice_weight}"
        solved = f"groups={self.groups}, assignment={self.assignment!r}, classification={self.classification!r}"
        points = f"num_points={self.num_points}, layout={self.layout!r}"
        return f"{weights}, {solved}, {points}, {self.options}{told(self.clips, self.rules)}"


def check_costs(matcher: HungarianMatcher, extra_costs: Tensor | None) -> None:
    """Raise if all costs would be 0."""
    if extra_costs is None and not (matcher.class_weight or matcher.mask_weight or matcher.dice_weight):
        raise Cause(
            "at least one weight must be positive, or extra_costs given",
            "all are 0",
            "with all costs 0 the matching would be arbitrary",
        )


def check_matcher(matcher: HungarianMatcher, classification: str, groups: int | None) -> HungarianMatcher:
    """Raise unless a matcher fits a criterion; return it."""
    if not isinstance(matcher, HungarianMatcher):
        raise Cause(
            "matcher must be a maskloss.HungarianMatcher",
            f"got {describe(matcher)}",
            "pairs from a matcher of another kind are given to each call as matches=",
        )
    kind = type(matcher)
    if kind.forward is not HungarianMatcher.forward and kind.match is HungarianMatcher.match:
        raise Cause(
            "a criterion calls match of its matcher, and never forward",
            f"{kind.__name__} overrides forward and not match",
            "override match or costs instead, or give each call what the matcher finds as matches=",
        )
    if matcher.classification != classification:
        raise Cause(
            "matcher and criterion must have the same classification",
            f"the matcher has {matcher.classification!r}, the criterion {classification!r}",
            "give both the same classification",
        )
    if groups is not None and matcher.groups != groups:
        raise Cause(
            "matcher and criterion must have the same groups",
            f"the matcher has {matcher.groups}, the criterion {describe(groups)}",
            "leave groups out: the criterion takes those of its matcher",
        )
    return matcher


def stack_costs(costs: Sequence[Tensor], class_logits: Tensor, targets: MaskTargets) -> Tensor:
    """Stack the per-image costs `[Q, T]` or `[L, Q, T]`: `[L, B, Q, T_max]`, 0 beyond an image's targets."""
    layers, batch, queries = class_logits.shape[:3]
    stacked = class_logits.new_zeros(layers, batch, queries, ops.widest(targets.num_targets))
    given: Any = costs
    if not isinstance(given, (Sequence, Tensor)) or getattr(given, "ndim", 1) == 0 or len(given) != batch:
        raise Cause(
            "extra_costs must have one entry per image",
            f"got {describe(costs)} for {batch} images",
            "an image without targets has costs [Q, 0]",
        )
    for image, (cost, count) in enumerate(zip(costs, targets.num_targets, strict=True)):
        wanted = [(layers, queries, count)] + [(queries, count)] * (layers == 1)
        if not isinstance(cost, Tensor) or tuple(cost.shape) not in wanted:
            raise Cause(
                "extra_costs must be [Q, T] for each image, or [L, Q, T] for several layers",
                f"image {image} has {count} targets, and its costs are {describe(cost)}",
                f"give it {' or '.join(str(list(shape)) for shape in wanted)}",
            )
        stacked[:, image, :, :count] = cost.detach()
    return stacked


def _by_image(labels: Tensor, targets: MaskTargets) -> Tensor:
    """Arrange values of targets `[T_all]` by image, `[B, T_max]`; columns beyond an image's targets are meaningless."""
    widest = ops.widest(targets.num_targets)
    if widest == 0:
        return labels.new_empty(len(targets), 0)
    rows = targets.first_rows[:, None] + torch.arange(widest, device=labels.device)
    return labels[rows.clamp(max=len(labels) - 1)]


def check_predictions(
    class_logits: Tensor | Sequence[Tensor], mask_logits: Layer | Sequence[Layer], *, no_object: bool = True
) -> tuple[Tensor, list[Layer]]:
    """Check the predictions of all decoder layers, all of which must have masks; see `check_layers_of_masks`."""
    stacked, masks = check_layers_of_masks(class_logits, mask_logits, no_object=no_object)
    _, given = with_masks(masks)
    if len(given) < len(masks):
        raise Cause(
            "mask_logits must be given in every decoder layer",
            f"layer {masks.index(None)} of {len(masks)} has none",
            "leave the layer out, of the class logits too",
        )
    return stacked, given


def check_layers_of_masks(
    class_logits: Tensor | Sequence[Tensor], mask_logits: Layer | Sequence[Layer | None], *, no_object: bool = True
) -> tuple[Tensor, list[Layer | None]]:
    """Check the predictions of all decoder layers.

    Args:
        class_logits: `[B, Q, C + 1]`, or a sequence over decoder layers.
        mask_logits: `[B, Q, h, w]`, or a sequence over decoder layers; None for a layer without masks.
        no_object: whether the last class is "no object", so that there must be two classes at least.

    Returns:
        The class logits, stacked, `[L, B, Q, C + 1]` in float32, or float64 if that is what they are, since everything
        is summed in that; and a list with the mask logits of each layer.
    """
    masks = _inputs.check_layers("mask_logits", mask_logits, "[B, Q, h, w]")
    classes = list(class_logits) if isinstance(class_logits, Sequence) else [class_logits]
    if len(classes) != len(masks):
        raise Cause(
            "class_logits and mask_logits must have the same decoder layers",
            f"{len(classes)} layers of classes but {len(masks)} of masks",
            "give both for every layer; list(...) takes stacked ones apart",
        )
    first = next(layer for layer in masks if layer is not None)
    wanted, shape = first.shape[:2], "[B, Q, C + 1]" if no_object else "[B, Q, C]"
    for layer, logits in enumerate(classes):
        check_layout("class_logits", logits)
        if not is_float(logits) or logits.ndim != 3:
            raise Cause(
                f"class_logits must be float {shape}",
                f"those of layer {layer} are {describe(logits)}",
                "list(class_logits) and list(mask_logits) have one tensor for each decoder layer"
                if isinstance(logits, Tensor) and logits.ndim == 4
                else "the last class is 'no object'"
                if no_object
                else "there is no 'no object' among the classes",
            )
        if logits.shape[:2] != wanted or logits.shape[2] != classes[0].shape[2] or logits.shape[2] < 1 + no_object:
            raise Cause(
                f"class_logits must be {shape} with B and Q of the mask logits and one C of at least 1",
                f"those of layer {layer} are {list(logits.shape)}, B and Q are {list(wanted)}",
                "both heads must read the same queries",
            )
        check_device("class_logits", logits.device, first.device)
    return _inputs.accumulated(_inputs.stack(classes)), masks
