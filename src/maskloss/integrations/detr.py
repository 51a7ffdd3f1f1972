"""Matcher and criterion with DETR's convention: dicts of outputs, dicts of targets, a dict of losses.

In Mask2Former's own code base `from maskloss.integrations.detr import HungarianMatcher, SetCriterion` replaces the
imports of both; the criterion also takes the code base's own matcher. `maskloss.integrations.maskdino` has the same
names for MaskDINO.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from maskloss import _inputs, ops
from maskloss import matcher as core
from maskloss._classification import KINDS, focal_sums, partial_of, softmax_loss
from maskloss._numbers import check_flags, check_integer
from maskloss.errors import Cause, describe, reported
from maskloss.integrations import _outputs, _targets
from maskloss.integrations._boxes import box_costs, box_terms
from maskloss.integrations._outputs import Outputs
from maskloss.layers import Layer, with_masks
from maskloss.loss import MaskLoss
from maskloss.matches import Matches, Pairs, join_layers
from maskloss.options import MaskOptions, TargetKeywords, all_options, differing, told
from maskloss.points import PointSampling
from maskloss.step import Step
from maskloss.targets.collate import Entries

__all__ = ["HungarianMatcher", "SetCriterion"]

ExtraLoss = Callable[[Outputs, Entries, Pairs, "float | Tensor"], Mapping[str, Tensor]]

LOSSES = ("labels", "masks", "boxes")

# What the code bases' own criteria call for each layer, and this one, which computes all layers together, does not.
NOT_CALLED = (
    "loss_labels",
    "loss_labels_ce",
    "loss_masks",
    "loss_boxes",
    "loss_boxes_panoptic",
    "get_loss",
    "_get_src_permutation_idx",
    "_get_tgt_permutation_idx",
)
_INSTEAD = "override losses_of, or compute other losses next to this criterion"


class HungarianMatcher(nn.Module):
    """DETR's matcher: `matcher(outputs, targets)` is one pair (queries, targets) of index tensors per image.

    Args:
        cost_class: weight of the class term. Default 1, as in Mask2Former's own.
        cost_mask: weight of the masks' cross-entropy. Default 1.
        cost_dice: weight of Dice. Default 1.
        num_points: P, uniform points per image.
        cost_box: weight of the L1 distance of boxes; outputs and targets need boxes unless it is 0. Default 0.
        cost_giou: weight of the boxes' GIoU. Default 0.
        layout: "independent" (default) or "stratified" (see `PointSampling`).
        classification: "softmax" (default) or "focal" (see `maskloss.HungarianMatcher`).
        options: how points are read, the focal cost and the backend, as one `MaskOptions`.
        kwargs: the same options one by one; and `ignore_value`, `ignore_label` and `drop_empty`, as in
            `maskloss.MaskCriterion`, whose own hold where a criterion calls the matcher.

    Raises:
        MaskLossError: an option outside its range.

    Source:
        DETR (Carion et al., 2020); Mask2Former (Cheng et al., 2022); MaskDINO (Li et al., 2023) for the boxes. A
        non-finite cost is a pair that is taken last, where they raise an error.

    Example:
        >>> masks = torch.zeros(2, 16, 16)
        >>> masks[0, :8], masks[1, 8:] = 1, 1
        >>> outputs = {"pred_logits": torch.zeros(1, 2, 2), "pred_masks": masks.flip(0)[None] * 8 - 4}
        >>> HungarianMatcher(num_points=256)(outputs, [{"labels": torch.tensor([0, 0]), "masks": masks}])
        [(tensor([0, 1]), tensor([1, 0]))]
    """

    @reported("HungarianMatcher")
    def __init__(
        self,
        cost_class: float = 1.0,
        cost_mask: float = 1.0,
        cost_dice: float = 1.0,
        num_points: int = PointSampling.num_points,
        *,
        cost_box: float = 0.0,
        cost_giou: float = 0.0,
        layout: str = PointSampling.layout,
        classification: str = "softmax",
        options: MaskOptions | None = None,
        **kwargs: Unpack[TargetKeywords],
    ) -> None:
        super().__init__()
        *_, self.cost_box, self.cost_giou = _inputs.check_weights(
            cost_class=cost_class, cost_mask=cost_mask, cost_dice=cost_dice, cost_box=cost_box, cost_giou=cost_giou
        )
        all_options(options, kwargs)  # Before the core, which has more options than are offered here.
        self.core = core.HungarianMatcher(
            class_weight=cost_class,
            mask_weight=cost_mask,
            dice_weight=cost_dice,
            num_points=num_points,
            layout=layout,
            classification=classification,
            options=options,
            **kwargs,
        )

    @reported("HungarianMatcher")
    def __init_subclass__(cls, **options: Any) -> None:
        """Raise if a subclass overrides what is never called."""
        super().__init_subclass__(**options)
        hint = "override forward, or add to the costs with extra_costs"
        _outputs.reject_overrides(cls, ["memory_efficient_forward"], hint)

    # Read by criteria, and not to be set.
    cost_class = property(lambda self: self.core.class_weight, doc="Weight of the class term.")
    cost_mask = property(lambda self: self.core.mask_weight, doc="Weight of the masks' cross-entropy.")
    cost_dice = property(lambda self: self.core.dice_weight, doc="Weight of Dice.")
    num_points = property(lambda self: self.core.num_points, doc="P, uniform points per image.")

    def __repr__(self, _repr_indent: int = 4) -> str:
        """Show the weights; the code bases' own criteria ask for an indentation when they print their matcher."""
        names = ("cost_class", "cost_mask", "cost_dice", "cost_box", "cost_giou", "num_points")
        shown = {name: getattr(self, name) for name in names}
        shown |= {name: getattr(self.core, name) for name in ("layout", "classification")}
        shown |= differing(self.core.options, self.core.rules)
        lines = [f"{' ' * _repr_indent}{name}: {value}" for name, value in shown.items()]
        return "\n".join([f"{type(self).__name__}:", *lines])

    @reported("HungarianMatcher", _outputs.NAMES)
    def forward(self, outputs: Outputs, targets: Entries) -> Pairs:
        """Match the outputs of one layer.

        Args:
            outputs: "pred_logits" `[B, Q, C + 1]` (`[B, Q, C]` for classification "focal"); "pred_masks"
                `[B, Q, h, w]`, a `MaskFactors`, or the dict that `MaskFactors.from_dict` takes; "pred_boxes"
                `[B, Q, 4]` if boxes have a weight; and, if wanted, "extra_costs": one `[Q, T]` per image, with its
                weight, which is added to the cost.
            targets: one dict per image: "labels" int64 `[T]`, "masks" (see `SetCriterion`), "boxes" `[T, 4]`.

        Returns:
            (queries, targets) of each image, int64, on the device of the logits.

        Raises:
            MaskLossError: wrong or missing outputs or targets.
        """
        softmax = self.core.classification == "softmax"
        logits, _ = _outputs.predictions([outputs], no_object=softmax)
        rules = replace(self.core.rules, no_object_label="allow")
        step = _outputs.begin(outputs, targets, rules, logits.shape[-1] - 1 if softmax else None)
        return self.match([outputs], targets, step).pairs()

    def match(self, layers: Sequence[Outputs], targets: Entries, step: Step) -> Matches:
        """Match several layers with the same numbers of queries and classes; some may have no masks."""
        logits, masks = _outputs.predictions(layers, no_object=self.core.classification == "softmax")
        extra = self.box_costs(layers, targets, step) if self.cost_box or self.cost_giou else None
        if any("extra_costs" in layer for layer in layers):
            given = [layer.get("extra_costs") for layer in layers]
            if any(costs is None for costs in given):
                raise Cause(
                    "all layers must have extra_costs, or none", "some do not", "give aux_outputs theirs as well"
                )
            more = [core.stack_costs(costs, logits[:1], step.targets) for costs in given if costs is not None]
            extra = torch.cat(more) if extra is None else extra + torch.cat(more)
        return self.core.match(logits, masks, step, extra)

    def box_costs(self, layers: Sequence[Outputs], targets: Entries, step: Step) -> Tensor:
        """Compute the boxes' part of the cost: `[L, B, Q, T_max]`."""
        boxes = _outputs.predicted_boxes(layers)
        given = _targets.boxes_of(targets, step.targets.num_targets, boxes)
        return box_costs(boxes, given, self.cost_box, self.cost_giou)


class SetCriterion(nn.Module):
    """DETR's criterion with masks at sampled points: matches, and computes every loss of every layer.

    Args:
        num_classes: C, without "no object".
        matcher: a `HungarianMatcher` of this module, which matches all layers at once, or any callable that takes
            outputs and targets of one layer and returns a pair (queries, targets) per image.
        weight_dict: the weight of each loss by name. Kept for the training loop; the losses are not weighted.
        eos_coef: weight of "no object" in the classification "softmax".
        losses: which of "labels", "masks" and "boxes" to compute.
        num_points: P, points per instance.
        oversample_ratio: see `PointSampling`.
        importance_sample_ratio: see `PointSampling`.
        classification: "softmax" (default): cross-entropy over C + 1 classes; "focal": the focal loss of C sigmoids
            with alpha 0.25 and gamma 2, divided by the number of instances.
        layout: see `PointSampling`.
        video: for clips, as in Mask2Former's own code for video: "pred_masks" `[B, Q, T, h, w]` and "masks"
            `[N, T, H, W]`. All frames count, even where an instance is absent, and the sums are divided by the number
            of instances. Default False: images.
        extra_loss: more losses of the final layer, as DETR's methods compute them: called with (outputs, targets,
            indices, num_boxes), it returns a dict of losses. Default None.
        no_object_label: "warn" (default) of targets with the label C, where labels are on a CPU; "allow" them, or
            "error".
        options: how points are read, the focal loss of the masks and the backend, as one `MaskOptions`.
        kwargs: the same options one by one; and `ignore_value`, `ignore_label` and `drop_empty`, as in
            `maskloss.MaskCriterion`. Targets without a mask count in the divisor, as in the code bases.

    Attributes:
        layers_by_key: the suffix of the losses of each entry of the outputs that is one more layer, besides
            "aux_outputs": {"interm_outputs": "_interm"}. Entries that hold layers and are not listed raise an error.

    Raises:
        MaskLossError: an unknown loss or classification, or an option outside its range.

    Source:
        Mask2Former (Cheng et al., 2022) and its names. As there, instances are counted as targets, over all ranks.
        Masks of different sizes lie in the top left corner of one canvas, for the matching too.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weights = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
        >>> criterion = SetCriterion(3, HungarianMatcher(num_points=64), weights, 0.1, ["labels", "masks"], 64)
        >>> targets = [{"labels": torch.tensor([2]), "masks": torch.ones(1, 32, 32)}]
        >>> outputs = {"pred_logits": torch.zeros(1, 5, 4), "pred_masks": torch.zeros(1, 5, 16, 16)}
        >>> {name: round(value.item(), 3) for name, value in criterion(outputs, targets).items()}
        {'loss_ce': 1.386, 'loss_mask': 0.693, 'loss_dice': 0.333}
    """

    empty_weight: Tensor
    mask_loss: MaskLoss
    mixes_classifications = False
    own_options: tuple[str, ...] = ("video",)

    @reported("SetCriterion")
    def __init__(
        self,
        num_classes: int,
        matcher: Callable[[Outputs, Entries], Pairs],
        weight_dict: Mapping[str, float],
        eos_coef: float,
        losses: Sequence[str],
        num_points: int = PointSampling.num_points,
        oversample_ratio: float = PointSampling.oversample_ratio,
        importance_sample_ratio: float = PointSampling.importance_ratio,
        *,
        classification: str = "softmax",
        layout: str = PointSampling.layout,
        extra_loss: ExtraLoss | None = None,
        video: bool = False,
        no_object_label: str = "warn",
        options: MaskOptions | None = None,
        **kwargs: Unpack[TargetKeywords],
    ) -> None:
        super().__init__()
        _inputs.check_weights(eos_coef=eos_coef)
        check_flags(video=video)
        if extra_loss is not None and not callable(extra_loss):
            raise Cause(
                "extra_loss must be a function",
                f"got {describe(extra_loss)}",
                "(outputs, targets, indices, num_boxes) -> dict",
            )
        _inputs.check_choice("classification", classification, KINDS)
        check_integer("num_classes", num_classes, 1, hint='do not count "no object"')
        check_losses("losses", losses)
        theirs = matcher.core.classification if isinstance(matcher, HungarianMatcher) else classification
        if theirs != classification and not self.mixes_classifications:
            raise Cause(
                "matcher and criterion must use the same classification",
                f"criterion: {classification!r}, matcher: {theirs!r}",
                "give both the same classification",
            )
        self.num_classes, self.matcher, self.weight_dict, self.eos_coef = num_classes, matcher, weight_dict, eos_coef
        if not callable(matcher) or isinstance(matcher, core.HungarianMatcher):
            hint = "HungarianMatcher of this module takes the weights as cost_class, cost_mask, cost_dice"
            raise Cause("matcher must be called with outputs and targets", f"got {type(matcher).__name__}", hint)
        if not isinstance(weight_dict, Mapping):
            raise Cause(
                "weight_dict must be a dict", f"got {describe(weight_dict)}", "{} if losses are weighted elsewhere"
            )
        self.losses, self.classification, self.extra_loss = list(losses), classification, extra_loss
        self.video = video
        self.layers_by_key = {"interm_outputs": "_interm"}
        group, self.rules = all_options(options, kwargs, no_object_label=no_object_label)
        if isinstance(matcher, HungarianMatcher):
            self.rules.check_matcher(matcher.core.rules)
        self._warned = False
        weights = torch.ones(num_classes + 1)
        weights[-1] = float(eos_coef)
        self.register_buffer("empty_weight", weights)
        sampling = PointSampling(num_points, oversample_ratio, importance_sample_ratio, layout)
        self.mask_loss = MaskLoss(sampling=sampling, options=group)

    @reported("SetCriterion")
    def __init_subclass__(cls, **options: Any) -> None:
        """Raise if a subclass overrides what is never called."""
        super().__init_subclass__(**options)
        _outputs.reject_overrides(cls, NOT_CALLED, _INSTEAD)

    @reported("SetCriterion")
    def __setattr__(self, name: str, value: Any) -> None:
        """Raise if a method is put in place that is never called."""
        super().__setattr__(name, value)
        if name in NOT_CALLED:
            _outputs.reject_overrides(self, [name], _INSTEAD)

    # Read by training loops, and not to be set.
    num_points = property(lambda self: self.mask_loss.sampling.num_points, doc="P, points per instance.")
    oversample_ratio = property(lambda self: self.mask_loss.sampling.oversample_ratio, doc="See there.")
    importance_sample_ratio = property(lambda self: self.mask_loss.sampling.importance_ratio, doc="See there.")

    def extra_repr(self) -> str:
        """Show the options in `print(module)`."""
        names = ["num_classes", "eos_coef", "losses", "classification", *self.own_options]
        own = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return own + told(self.rules, extra_loss=self.extra_loss)

    @reported("SetCriterion", _outputs.NAMES)
    def forward(self, outputs: Outputs, targets: Entries) -> dict[str, Tensor]:
        """Match all layers and compute their losses.

        Args:
            outputs: of the final layer, as `HungarianMatcher` takes them, and "aux_outputs": a list of the other
                layers', "interm_outputs": those of the encoder, if there are any. A layer other than the final one
                may come without "pred_masks"; it has no mask terms then.
            targets: one dict per image: "labels" int64 `[T]`, in [0, C] for classification "softmax" (a target of
                class C is matched by its mask, and its query learns "no object"); "masks": dense `[T, H, W]` (bool,
                integers, or floats, which are soft on a GPU), a `MaskTargets`, or a label map `[H, W]` along with
                "ids"; "boxes" `[T, 4]` (cx, cy, w, h) in [0, 1], where boxes are used; "has_mask", bool `[T]`: False
                for a target that is matched by its class and box alone, as are all those of an image with "boxes" and
                no "masks"; "unlabeled" and "annotated_classes", as `MaskCriterion` is told them of a batch. With
                `video`: "masks" of each clip, `[N, T, H, W]`; "ids" are read beside a label map `[T, H, W]` only.

        Returns:
            "loss_ce", "loss_mask", "loss_dice", "loss_bbox", "loss_giou", as far as asked for, of the final layer;
            the same with "_0" ... of the others, and with "_interm". Not weighted. Gradients flow to the outputs.

        Raises:
            MaskLossError: wrong or missing outputs or targets.
        """
        return self.matched_losses(outputs, targets, *self.begin(outputs, targets))

    def begin(self, outputs: Outputs, targets: Entries) -> tuple[Step, float | Tensor]:
        """Pack the targets of a step, check that they fit, and count them over the ranks."""
        no_object = self.num_classes if self.classification == "softmax" else None
        step = _outputs.begin(outputs, targets, self.rules, no_object)
        return step, step.divisor(float(step.targets.num_masks))

    def matched_losses(
        self, outputs: Outputs, targets: Entries, step: Step, count: float | Tensor
    ) -> dict[str, Tensor]:
        """Match the layers of checked inputs and compute their losses, and divide those of instances by `count`."""
        rank = _outputs.find_masks(outputs).ndim
        if rank != 4 + self.video:
            raise Cause(
                f'"pred_masks" must be {"[B, Q, T, h, w]" if self.video else "[B, Q, h, w]"} where video={self.video}',
                f"they have {rank} dimensions",
                f"SetCriterion(video={not self.video}) takes {'images' if self.video else 'clips'}",
            )
        check_losses("losses", self.losses)
        layers = self._layers(outputs)
        matches = self._match(list(layers.values()), targets, step)
        losses = self.losses_of(self.losses, layers, matches, targets, step, count)
        if self.extra_loss is not None:
            more = self.extra_loss(outputs, targets, matches.pairs(0), count)
            if not isinstance(more, Mapping) or losses.keys() & more:
                hint = "return a dict of losses with names of their own"
                raise Cause("extra_loss must return other losses by name", f"got {describe(more)}", hint)
            losses |= more
        self._warn_of_missing_weights(losses)
        return losses

    def _layers(self, outputs: Outputs) -> dict[str, Outputs]:
        """List the layers by the suffixes of their losses: the final one, the auxiliary ones, and all others."""
        auxiliary = outputs.get("aux_outputs")
        auxiliary = () if auxiliary is None else auxiliary
        if not _outputs.is_list(auxiliary):
            raise Cause('"aux_outputs" must be a list', f"got {describe(auxiliary)}", "give the dict of each layer")
        layers = {"": outputs} | {f"_{i}": layer for i, layer in enumerate(auxiliary)}
        for key, value in outputs.items():
            if key in self.layers_by_key and value is not None:
                layers[self.layers_by_key[key]] = value
            elif key != "aux_outputs" and _outputs.holds_layers(value):
                raise Cause(
                    "outputs that hold layers must be supervised, or taken out",
                    f'"{key}" holds one or more, and its losses have no name',
                    f'criterion.layers_by_key["{key}"] = "_enc" names those of a single layer',
                )
        return layers

    def _warn_of_missing_weights(self, losses: Mapping[str, Tensor]) -> None:
        missing = [name for name in losses if name not in self.weight_dict]
        if missing and self.weight_dict and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn(
                f"SetCriterion: weight_dict has no weight for {', '.join(missing)}; training loops that go by "
                "weight_dict leave such losses out",
                stacklevel=4,
            )

    def losses_of(
        self,
        losses: Sequence[str],
        layers: Mapping[str, Outputs],
        matches: Matches,
        targets: Entries,
        step: Step,
        count: float | Tensor,
    ) -> dict[str, Tensor]:
        """Compute losses of layers of one shape, by their suffixes, and divide those of instances by `count`."""
        outputs = list(layers.values())
        classes, masks = _outputs.predictions(outputs, no_object=self.classification == "softmax")
        terms: dict[str, Tensor | dict[int, Tensor]] = {}
        if "labels" in losses:
            terms["loss_ce"] = self._classify(classes, masks, matches, step, count)
        if "masks" in losses:
            ce_weight, dice_weight = (self.weight_dict.get(name, 1.0) for name in ("loss_mask", "loss_dice"))
            present, given = with_masks(masks)
            shown = matches.of_layers(present)
            reduction = ops.Reduction(ce_weight, dice_weight, count, step.mask_weights(shown, None, classes.dtype))
            found = self.mask_loss.layer_terms(given, shown, step, reduction)
            by_layer = [dict(zip(present, term, strict=True)) for term in (found.ce, found.dice)]
            terms |= {"loss_mask": by_layer[0], "loss_dice": by_layer[1]}
        if "boxes" in losses:
            terms |= self._compare_boxes(outputs, matches, targets, step, count)
        # Tensors of their own: training loops multiply them by their weights in place.
        return {
            f"{name}{suffix}": term[i].clone()
            for i, suffix in enumerate(layers)
            for name, term in terms.items()
            if isinstance(term, Tensor) or i in term
        }

    def _match(self, layers: Sequence[Outputs], targets: Entries, step: Step) -> Matches:
        matcher = self.matcher
        # A subclass with a forward of its own is asked layer by layer, like any other matcher.
        if isinstance(matcher, HungarianMatcher) and type(matcher).forward is HungarianMatcher.forward:
            return matcher.match(layers, targets, step)
        queries, counts, parts = layers[0]["pred_logits"].shape[1], step.targets.num_targets, []
        for layer in layers:
            hidden = {"aux_outputs", *self.layers_by_key}
            without = {name: value for name, value in layer.items() if name not in hidden}
            parts.append(Matches.from_pairs(matcher(without, targets), num_queries=queries, num_targets=counts))
        return join_layers(parts).to(layers[0]["pred_logits"].device)

    def _classify(
        self, logits: Tensor, masks: Sequence[Layer | None], matches: Matches, step: Step, count: float | Tensor
    ) -> Tensor:
        """Compute the classification of each layer `[L]` from logits `[L, B, Q, C (+ 1)]`."""
        softmax = self.classification == "softmax"
        if logits.shape[-1] != self.num_classes + softmax:
            raise Cause(
                f"pred_logits must have {self.num_classes + softmax} entries for {self.num_classes} classes",
                f"got {logits.shape[-1]}",
                'with "softmax" the last class is "no object"; with "focal" there is no such class',
            )
        wanted = step.wanted_classes(matches, logits.shape[:3], self.num_classes)
        points = self.matcher.core if isinstance(self.matcher, HungarianMatcher) else self.mask_loss.sampling
        partial = partial_of(step, masks, self.num_classes, points.num_points, points.layout, softmax=softmax)
        if softmax:
            return softmax_loss(logits, wanted, self.empty_weight, step.query_weight(self.empty_weight), partial)
        return focal_sums(logits, wanted, ignores=self.rules.ignore_label is not None, partial=partial) / count

    def _compare_boxes(
        self, outputs: Sequence[Outputs], matches: Matches, targets: Entries, step: Step, count: float | Tensor
    ) -> dict[str, Tensor]:
        """Compute the boxes' losses of each layer, `[L]` each."""
        boxes = _outputs.predicted_boxes(outputs)
        layer, image, query, _ = matches.index.unbind(1)
        rows = matches.target_rows(step.targets.first_rows)
        given = _targets.boxes_of(targets, step.targets.num_targets, boxes)
        terms = box_terms(boxes[layer, image, query], torch.cat(given)[rows])
        counted = self.has_box(step.labels[rows])
        l1, giou = (
            torch.stack([part.sum() for part in torch.where(counted, term, 0.0).split(list(matches.layer_sizes))])
            for term in (terms.l1, terms.giou)
        )
        return {"loss_bbox": l1 / count, "loss_giou": giou / count}

    def has_box(self, labels: Tensor) -> Tensor:
        """Return which classes' boxes count in the loss: all of them."""
        return torch.ones_like(labels, dtype=torch.bool)


def check_losses(name: str, losses: Sequence[str]) -> None:
    """Raise if losses are not computed here."""
    if not _outputs.is_list(losses) or any(each not in LOSSES for each in losses):
        raise Cause(
            f"{name} must be a list of {', '.join(LOSSES)}",
            f"got {describe(losses)}",
            "extra_loss= takes a function that computes others",
        )
