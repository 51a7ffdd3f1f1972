"""The step of RF-DETR: its whole criterion in this library, in Transformers, and in the package rfdetr itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskloss import MaskTargets, PointSampling, step
from maskloss.errors import require
from maskloss.factors import MaskFactors
from maskloss.integrations import _targets
from maskloss.integrations.transformers import rf_detr as ours
from maskloss.lab.bench.cases import PEERS, STRATIFIED, Case
from maskloss.lab.bench.inputs import Inputs
from maskloss.lab.bench.measure import Timed, spied, wrap
from maskloss.layers import Layer
from maskloss.loss import MaskLoss
from maskloss.matcher import HungarianMatcher
from maskloss.matches import Matches

# What RF-DETR trains with, in its package and in Transformers.
_COSTS = {"class_cost": 2.0, "bbox_cost": 5.0, "giou_cost": 2.0}
_WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_mask_ce": 5.0, "loss_mask_dice": 5.0}
_ALPHA, _PIXELS_PER_POINT = 0.25, 16

Terms = dict[str, Tensor]


class Computed(NamedTuple):
    """A step: the weighted total, its terms by name, and who is matched; copy g of target t is number g * T + t."""

    total: Tensor
    terms: Terms
    matches: Matches

    def as_dict(self) -> Terms:
        """Return the terms that are weighed."""
        return self.terms


class MasklossArm:
    """RF-DETR's criterion as this library has it: all layers and groups of queries in one call.

    `name` and `backend` are those of `arms.MasklossArm`; `padding_mode` is how masks are read beyond their edge:
    "zeros" as in Transformers, or "border" as in rfdetr.
    """

    takes_masks = True

    def __init__(self, case: Case, name: str, backend: str | None = None, *, padding_mode: str = "zeros") -> None:
        self.name, self.config, self.padding_mode = name, _config(case), padding_mode
        self.factors = name == "factors"
        self.backend = "reference" if name == "reference" else backend
        self.sampling = None
        if name in STRATIFIED:
            self.sampling = PointSampling(num_points=case.points // STRATIFIED[name], layout="stratified")

    def prepare(self, masks: Sequence[Tensor]) -> list[MaskTargets]:
        """Pack the masks of each image."""
        return [MaskTargets.from_masks(each) for each in masks]

    def compute(self, inputs: Inputs, targets: Sequence[MaskTargets | Tensor], seed: int) -> Computed:
        """Compute the step, with its matches; bool masks are packed on the way."""
        with spied(MaskLoss, "layer_terms", lambda given, _: given[2]) as matches:
            total, terms = self._loss(inputs, targets, seed)
        return Computed(total, _weighed(terms), matches[0])

    def forward(self, inputs: Inputs, targets: Sequence[MaskTargets | Tensor], seed: int) -> Tensor:
        """Compute the weighted total."""
        return self._loss(inputs, targets, seed)[0]

    def _loss(self, inputs: Inputs, targets: Sequence[MaskTargets | Tensor], seed: int) -> tuple[Tensor, Terms]:
        masks = inputs.mask_logits if self.factors else inputs.dense()
        arguments = _arguments(inputs, masks, targets, self.config)
        options: dict[str, Any] = {"backend": self.backend, "sampling": self.sampling}
        with step(seed=seed):
            return ours.rf_detr_loss(*arguments, **options, padding_mode=self.padding_mode)[:2]

    def split(self, timed: Timed) -> None:
        """Time packing, the matching costs, the assignment, the mask loss and the classification."""
        wrap(timed, _targets, "begin_entries", "packing")
        wrap(timed, HungarianMatcher, "costs", "matching cost")
        wrap(timed, ours, "box_costs", "matching cost")
        wrap(timed, HungarianMatcher, "match", "assignment")
        wrap(timed, ours, "_mask_terms", "mask loss")
        wrap(timed, ours, "quality_sums", "classification")


class Peer:
    """An arm that is the work of others; it is given bool masks."""

    name: str
    takes_masks = False
    matcher: type  # whose `forward` matches a layer, the final one first

    def prepare(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Leave the masks as they are."""
        return list(masks)

    def compute(self, inputs: Inputs, targets: Sequence[Tensor]) -> tuple[Tensor, Terms]:
        """Compute the weighted total, and the terms that it weighs."""
        raise NotImplementedError

    def forward(self, inputs: Inputs, targets: Sequence[Tensor], seed: int) -> Tensor:
        """Compute the weighted total; the points come from torch's default generator, which is seeded."""
        torch.manual_seed(seed)
        return self.compute(inputs, targets)[0]

    def split(self, timed: Timed) -> None:
        """Time the matching costs, the assignment, the mask loss and the classification."""
        raise NotImplementedError


class TransformersArm(Peer):
    """The loss of `RfDetrForInstanceSegmentation` of Hugging Face Transformers."""

    name = "transformers"

    def __init__(self, case: Case) -> None:
        require("transformers", "transformers")
        self.module = require("transformers.loss.loss_rf_detr", "transformers")
        self.matcher = self.module.RfDetrHungarianMatcher
        self.config = _config(case)

    def compute(self, inputs: Inputs, targets: Sequence[Tensor]) -> tuple[Tensor, Terms]:
        """Compute the weighted total, and the terms that it weighs."""
        arguments = _arguments(inputs, inputs.dense(), targets, self.config)
        total, terms, _ = self.module.RfDetrForSegmentationLoss(*arguments)
        return total, _weighed(terms)

    def split(self, timed: Timed) -> None:
        """Time the matching costs, the assignment, the mask loss and the classification."""
        wrap(timed, self.matcher, "forward", "matching cost")
        wrap(timed, self.module, "linear_sum_assignment", "assignment")
        wrap(timed, self.module.RfDetrImageLoss, "loss_masks", "mask loss")
        wrap(timed, self.module.RfDetrImageLoss, "loss_labels", "classification")


class PackageArm(Peer):
    """The criterion of the package rfdetr; masks of a head are given as the factors that it trains with."""

    name = "rfdetr"

    def __init__(self, case: Case, device: torch.device) -> None:
        self.module = require("rfdetr.models.criterion", "rfdetr")
        self.matcher = self.module.HungarianMatcher
        matcher = self.matcher(
            cost_class=_COSTS["class_cost"],
            cost_bbox=_COSTS["bbox_cost"],
            cost_giou=_COSTS["giou_cost"],
            focal_alpha=_ALPHA,
            mask_point_sample_ratio=_PIXELS_PER_POINT,
            cost_mask_ce=_WEIGHTS["loss_mask_ce"],
            cost_mask_dice=_WEIGHTS["loss_mask_dice"],
        )
        self.criterion = self.module.SetCriterion(
            case.classes,
            matcher=matcher,
            weight_dict=_WEIGHTS,
            focal_alpha=_ALPHA,
            losses=["labels", "boxes", "cardinality", "masks"],
            group_detr=case.groups,
            ia_bce_loss=True,
            mask_point_sample_ratio=_PIXELS_PER_POINT,
        ).to(device)

    def compute(self, inputs: Inputs, targets: Sequence[Tensor]) -> tuple[Tensor, Terms]:
        """Compute the weighted total, and the terms that it weighs."""
        columns = zip(inputs.class_logits, inputs.boxes, map(_as_dict, inputs.mask_logits), strict=True)
        proposals, *decoder = (
            {"pred_logits": logits, "pred_boxes": boxes, "pred_masks": masks} for logits, boxes, masks in columns
        )
        outputs = decoder[-1] | {"aux_outputs": decoder[:-1], "enc_outputs": proposals}
        terms = _weighed(self.criterion(outputs, _labels(inputs, targets, "labels")))
        weighted = [value * _WEIGHTS[_stem(name)] for name, value in terms.items()]
        return torch.stack(weighted).sum(), terms

    def split(self, timed: Timed) -> None:
        """Time the matching costs, the assignment, the mask loss and the classification."""
        wrap(timed, self.matcher, "forward", "matching cost")
        wrap(timed, require("rfdetr.models.matcher", "rfdetr"), "linear_sum_assignment", "assignment")
        wrap(timed, self.module.SetCriterion, "loss_masks", "mask loss")
        wrap(timed, self.module.SetCriterion, "loss_labels", "classification")


def make_arm(name: str, case: Case, device: torch.device) -> MasklossArm | Peer:
    """Build an arm of RF-DETR's step by its name."""
    return make_peer(name, case, device) if name in PEERS else MasklossArm(case, name)


def make_peer(name: str, case: Case, device: torch.device) -> Peer:
    """Build an arm that is the work of others."""
    return TransformersArm(case) if name == "transformers" else PackageArm(case, device)


def _config(case: Case) -> Any:
    """Make what both losses read of RF-DETR's configuration."""
    return SimpleNamespace(
        **_COSTS,
        num_labels=case.classes,
        num_queries=case.queries // case.groups,
        group_detr=case.groups,
        decoder_layers=case.layers - 1,
        auxiliary_loss=True,
        focal_alpha=_ALPHA,
        mask_point_sample_ratio=_PIXELS_PER_POINT,
        class_loss_coefficient=_WEIGHTS["loss_ce"],
        bbox_loss_coefficient=_WEIGHTS["loss_bbox"],
        giou_loss_coefficient=_WEIGHTS["loss_giou"],
        mask_class_loss_coefficient=_WEIGHTS["loss_mask_ce"],
        mask_dice_loss_coefficient=_WEIGHTS["loss_mask_dice"],
    )


def _arguments(inputs: Inputs, masks: Sequence[Layer], targets: Sequence[Any], config: Any) -> tuple[Any, ...]:
    """List the arguments of Transformers' loss: the final layer, all decoder layers, and the encoder's proposals."""
    columns: tuple[Any, ...] = (inputs.class_logits, inputs.boxes, masks)
    proposals, decoder, final = ([each[part] for each in columns] for part in (0, slice(1, None), -1))
    labels, device = _labels(inputs, targets, "class_labels"), final[0].device
    return (final[0], labels, device, *final[1:], config, *decoder, *proposals)


def _labels(inputs: Inputs, targets: Sequence[Any], name: str) -> list[dict[str, Any]]:
    columns = zip(inputs.labels, inputs.target_boxes, targets, strict=True)
    return [{name: labels, "boxes": boxes, "masks": masks} for labels, boxes, masks in columns]


def _as_dict(layer: Layer) -> Tensor | dict[str, Tensor]:
    """Write factors as RF-DETR's head returns them."""
    if not isinstance(layer, MaskFactors):
        return layer
    bias = layer.features.new_zeros(1)
    return {"spatial_features": layer.features, "query_features": layer.embeddings, "bias": bias}


def _weighed(terms: Mapping[str, Tensor]) -> Terms:
    return {name: value for name, value in terms.items() if _stem(name) in _WEIGHTS}


def _stem(name: str) -> str:
    """Return the name of a term without its layer."""
    first, _, last = name.rpartition("_")
    return first if last == "enc" or last.isdecimal() else name
