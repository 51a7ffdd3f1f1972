"""Matcher and criterion of MaskDINO's code base: classes by sigmoids, boxes, denoising, two stages.

In MaskDINO's own code base `from maskloss.integrations.maskdino import HungarianMatcher, SetCriterion` replaces the
imports of both; the criterion also takes MaskDINO's own matcher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from maskloss import _inputs
from maskloss._numbers import check_flags
from maskloss.errors import Cause, describe, reported
from maskloss.integrations import _outputs, _targets, detr
from maskloss.integrations._outputs import Outputs
from maskloss.matches import Matches, Pairs
from maskloss.options import MaskOptions, TargetKeywords
from maskloss.points import PointSampling
from maskloss.step import Step
from maskloss.targets import joining
from maskloss.targets.collate import Entries

__all__ = ["HungarianMatcher", "SetCriterion"]

# COCO's panoptic classes: the first 80 are things, and only things have boxes.
NUM_THINGS = 80

# What there is a loss of, by what is denoised: MaskDINO logs zeros under these names where it denoises nothing.
_DENOISED = {
    "standard": ("loss_bbox", "loss_giou", "loss_ce"),
    "seg": ("loss_bbox", "loss_giou", "loss_ce", "loss_mask", "loss_dice"),
}


class HungarianMatcher(detr.HungarianMatcher):
    """MaskDINO's matcher: the class cost of sigmoids, and boxes.

    Its arguments are those of `detr.HungarianMatcher`, in MaskDINO's order, and one more.

    Args:
        panoptic_on: give stuff (labels from 80 on) the mean of the things' box costs. Default False.

    Source:
        MaskDINO (Li et al., 2023), section 3.4.
    """

    @reported("HungarianMatcher")
    def __init__(
        self,
        cost_class: float = 1.0,
        cost_mask: float = 1.0,
        cost_dice: float = 1.0,
        num_points: int = PointSampling.num_points,
        cost_box: float = 0.0,
        cost_giou: float = 0.0,
        panoptic_on: bool = False,
        *,
        layout: str = PointSampling.layout,
        options: MaskOptions | None = None,
        **kwargs: Unpack[TargetKeywords],
    ) -> None:
        check_flags(panoptic_on=panoptic_on)
        given: dict[str, Any] = {"cost_box": cost_box, "cost_giou": cost_giou, "layout": layout, "options": options}
        super().__init__(cost_class, cost_mask, cost_dice, num_points, classification="focal", **given, **kwargs)
        self.panoptic_on = panoptic_on

    def __repr__(self, _repr_indent: int = 4) -> str:
        """Show the weights (see `detr.HungarianMatcher`)."""
        return f"{super().__repr__(_repr_indent)}\n{' ' * _repr_indent}panoptic_on: {self.panoptic_on}"

    def box_costs(self, layers: Sequence[Outputs], targets: Entries, step: Step) -> Tensor:
        """Compute the boxes' part of the cost: `[L, B, Q, T_max]`."""
        costs = super().box_costs(layers, targets, step)
        if self.panoptic_on:
            for image, labels in enumerate(step.labels.split(list(step.targets.num_targets))):
                part = costs[:, image, :, : len(labels)]
                thing = labels < NUM_THINGS
                mean = torch.where(thing, part, 0.0).sum((1, 2), keepdim=True) / (thing.sum() * part.shape[1])
                part.copy_(torch.where(thing, part, mean).nan_to_num())
        return costs


class SetCriterion(detr.SetCriterion):
    """MaskDINO's criterion: `detr.SetCriterion` with sigmoid classes and denoising.

    Its arguments are those of `detr.SetCriterion`, but for `classification`, and four more.

    Args:
        dn: "no" (default), "standard" (classes and boxes) or "seg" (masks as well): what is denoised.
        dn_losses: which losses the denoised queries have. Default: none.
        panoptic_on: the boxes of stuff (labels from 80 on) do not count. Default False.
        semantic_ce_loss: classify by a softmax over C + 1 classes, in which `eos_coef` is the weight of "no object".
            Default False: sigmoids.

    Raises:
        MaskLossError: an unknown kind of denoising, and see `detr.SetCriterion`.

    Source:
        MaskDINO (Li et al., 2023) and its names. The zeros that it logs where there is nothing to denoise are kept.
    """

    # With semantic_ce_loss MaskDINO matches by sigmoids all the same.
    mixes_classifications = True
    own_options = ("dn", "dn_losses", "panoptic_on")

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
        dn: str = "no",
        dn_losses: Sequence[str] = (),
        panoptic_on: bool = False,
        semantic_ce_loss: bool = False,
        *,
        layout: str = PointSampling.layout,
        no_object_label: str = "warn",
        options: MaskOptions | None = None,
        **kwargs: Unpack[TargetKeywords],
    ) -> None:
        detr.check_losses("dn_losses", dn_losses)
        _inputs.check_choice("dn", dn, ("no", *_DENOISED))
        check_flags(panoptic_on=panoptic_on, semantic_ce_loss=semantic_ce_loss)
        points = (num_points, oversample_ratio, importance_sample_ratio)
        classification = "softmax" if semantic_ce_loss else "focal"
        given = (num_classes, matcher, weight_dict, eos_coef, losses, *points)
        named: dict[str, Any] = {"layout": layout, "no_object_label": no_object_label, "options": options}
        super().__init__(*given, classification=classification, **named, **kwargs)
        self.dn, self.dn_losses, self.panoptic_on = dn, list(dn_losses), panoptic_on

    @reported("SetCriterion", _outputs.NAMES)
    def forward(
        self, outputs: Outputs, targets: Entries, mask_dict: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Match all layers and compute their losses, and those of the denoised queries.

        Args:
            outputs: see `detr.SetCriterion`.
            targets: see `detr.SetCriterion`.
            mask_dict: what MaskDINO's decoder returns along with the outputs: "output_known_lbs_bboxes" (the outputs
                of the denoised queries), "scalar" (how often each target was noised) and "pad_size" (their number).

        Returns:
            The losses of `detr.SetCriterion`; with denoising those with "_dn", and "_dn_0" ... of the other layers.

        Raises:
            MaskLossError: wrong or missing outputs or targets.
        """
        # Once: a rank whose targets leave nothing to denoise must not sum over the ranks less often than the others.
        step, count = self.begin(outputs, targets)
        losses = self.matched_losses(outputs, targets, step, count)
        if self.dn == "no":
            return losses
        others = range(0 if "interm_outputs" in outputs else 1, len(outputs.get("aux_outputs") or ()))
        if mask_dict is None:
            zero = outputs["pred_logits"].new_zeros(())
            suffixes = ["_dn", *(f"_dn_{i}" for i in others)]
            return losses | {f"{name}{suffix}": zero.clone() for suffix in suffixes for name in _DENOISED[self.dn]}
        _check_denoised(mask_dict, others)
        known = mask_dict["output_known_lbs_bboxes"]
        layers = {"_dn": known} | {f"_dn_{i}": known["aux_outputs"][i] for i in others}
        return losses | self._denoised(layers, targets, step, count, mask_dict["scalar"], mask_dict["pad_size"])

    def _denoised(
        self, layers: Mapping[str, Outputs], targets: Entries, step: Step, count: float | Tensor, times: int, size: int
    ) -> dict[str, Tensor]:
        """Compute the losses of queries made from targets: query s * size / times + t is target t, noised anew."""
        if size % times:
            raise Cause(
                "pad_size must be a multiple of scalar", f"pad_size={size}, scalar={times}", "see MaskDINO's decoder"
            )
        counts = step.targets.num_targets
        rows = [
            (layer, image, copy * (size // times) + target, copy * count + target)
            for layer in range(len(layers))
            for image, count in enumerate(counts)
            for copy in range(times)
            for target in range(count)
        ]
        index = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 4).to(step.device, non_blocking=True)
        repeated = joining.repeat(step.targets, times)
        again: dict[str, Any] = {
            name: torch.cat([part.repeat(times) for part in values.split(list(counts))])
            for name in ("labels", "unknown", "has_mask")
            if (values := getattr(step, name)) is not None
        }
        # All of these queries have targets, wherever they lie.
        known = step.with_targets(repeated, annotated=step.annotated._replace(unlabeled=None), **again)
        if "boxes" in self.dn_losses:
            boxes = _targets.boxes_of(targets, counts, layers["_dn"]["pred_boxes"])
            targets = [{"boxes": each.repeat(times, 1)} for each in boxes]
        blocks = repeated.num_targets * len(layers)
        matches = Matches(index, (repeated.num_masks,) * len(layers), size, repeated.num_targets, counts=blocks)
        return self.losses_of(self.dn_losses, layers, matches, targets, known, count * times)

    def has_box(self, labels: Tensor) -> Tensor:
        """Return which classes' boxes count in the loss."""
        return labels < NUM_THINGS if self.panoptic_on else super().has_box(labels)


def _check_denoised(mask_dict: Any, others: range) -> None:
    """Raise unless `mask_dict` has what is read of it, and as many layers as there are."""
    hint = "pass on what MaskDINO's decoder returns, or None where nothing was denoised"
    names = ("output_known_lbs_bboxes", "scalar", "pad_size")
    missing = [name for name in names if not isinstance(mask_dict, Mapping) or name not in mask_dict]
    if missing:
        raise Cause("mask_dict must have what was denoised", f"{describe(mask_dict)} lacks {', '.join(missing)}", hint)
    known = mask_dict["output_known_lbs_bboxes"]
    layers = known.get("aux_outputs") if isinstance(known, Mapping) else None
    if not isinstance(known, Mapping) or (others and len(layers or ()) < others.stop):
        got = f"there are {others.stop} auxiliary layers, and of the denoised queries {describe(known)}"
        raise Cause('"output_known_lbs_bboxes" must have every layer of the outputs', got, hint)
