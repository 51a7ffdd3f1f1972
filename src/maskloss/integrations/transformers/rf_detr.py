"""The loss of RF-DETR segmentation: quality-weighted classification, boxes, and masks at sampled points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from maskloss import _inputs, ops
from maskloss._quality import quality_sums
from maskloss.errors import Cause, reported
from maskloss.integrations import _targets
from maskloss.integrations._boxes import box_costs, box_terms
from maskloss.layers import Layer
from maskloss.loss import MaskLoss
from maskloss.matcher import HungarianMatcher, check_predictions
from maskloss.matches import Matches
from maskloss.options import MaskOptions, TargetRules
from maskloss.outputs import LayerTerms
from maskloss.points import PointSampling
from maskloss.step import Step
from maskloss.targets import joining

# What Transformers has in its code and not in its configuration.
OVERSAMPLE_RATIO, IMPORTANCE_RATIO = 3.0, 0.75

Layers = list[dict[str, Any]]
_RULES = TargetRules()


@reported("maskloss in Transformers")
def rf_detr_loss(
    logits: Tensor,
    labels: Sequence[Mapping[str, Any]],
    device: torch.device,
    pred_boxes: Tensor,
    pred_masks: Layer,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    outputs_masks: Sequence[Layer] | None = None,
    enc_outputs_class: Tensor | None = None,
    enc_outputs_coord: Tensor | None = None,
    enc_outputs_masks: Layer | None = None,
    *,
    backend: str | None = None,
    sampling: PointSampling | None = None,
    padding_mode: str = "zeros",
    rules: TargetRules = _RULES,
    **_: Any,
) -> tuple[Tensor, dict[str, Tensor], Layers | None]:
    """Compute the loss of `RfDetrForInstanceSegmentation`, with the arguments and results of Transformers' own.

    Logits, boxes and masks are `[B, G * Q, ...]` for G groups of queries (1 outside training), with L in front those of
    all decoder layers, the last of which is left out. Masks may be factors, and those in `labels` take all forms that
    `read` knows. `device` is not used. Options are those of `patch`; RF-DETR's own code has `padding_mode` "border".

    Source:
        LW-DETR (Chen et al., 2024) for groups and classification, Mask2Former for the masks.
    """
    layers: Layers = [{"logits": logits, "pred_boxes": pred_boxes, "pred_masks": pred_masks}]
    suffixes = [""]
    auxiliary = None
    if config.auxiliary_loss and outputs_class is not None and outputs_coord is not None and outputs_masks is not None:
        columns = zip(outputs_class[:-1], outputs_coord[:-1], outputs_masks[:-1], strict=True)
        auxiliary = [{"logits": a, "pred_boxes": b, "pred_masks": c} for a, b, c in columns]
        layers += auxiliary
        suffixes += [f"_{layer}" for layer in range(len(auxiliary))]
    if enc_outputs_class is not None and enc_outputs_coord is not None and enc_outputs_masks is not None:
        proposals = {"logits": enc_outputs_class, "pred_boxes": enc_outputs_coord, "pred_masks": enc_outputs_masks}
        layers.append(proposals)
        suffixes.append("_enc")
    options = MaskOptions(padding_mode, "nearest", backend=backend)
    terms = _layer_terms(layers, labels, config, options, sampling, rules)
    losses = {f"{name}{suffix}": values[i] for i, suffix in enumerate(suffixes) for name, values in terms.items()}
    # Without auxiliary losses the proposals weigh nothing, as in Transformers.
    counted = len(suffixes) if config.auxiliary_loss else 1
    weighted = [weight * terms[name][:counted] for name, weight in _weights(config).items()]
    return torch.stack(weighted).sum(), losses, auxiliary


def _weights(config: Any) -> dict[str, float]:
    """Name the weight of every term."""
    return {
        "loss_ce": config.class_loss_coefficient,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
        "loss_mask_ce": config.mask_class_loss_coefficient,
        "loss_mask_dice": config.mask_dice_loss_coefficient,
    }


def _layer_terms(
    layers: Layers,
    labels: Sequence[Mapping[str, Any]],
    config: Any,
    options: MaskOptions,
    sampling: PointSampling | None,
    rules: TargetRules,
) -> dict[str, Tensor]:
    """Compute every term of every layer, `[L]` each, in the order of `layers`."""
    logits, masks = check_predictions(
        [layer["logits"] for layer in layers], [layer["pred_masks"] for layer in layers], no_object=False
    )
    boxes = _inputs.accumulated(torch.stack([layer["pred_boxes"] for layer in layers]))
    groups = _groups(logits.shape[2], config.num_queries)
    step = _targets.begin_entries(labels, "class_labels", [*masks, logits, boxes], rules, no_object=None)
    box_targets = _targets.boxes_of(labels, step.targets.num_targets, boxes)
    height, width = masks[0].shape[2:]
    area = height * width // config.mask_point_sample_ratio
    # One point for this many pixels, in the matching too; there the model has no lower bound of its own.
    for_matching = sampling or PointSampling(max(area, 1))
    boxes_cost = box_costs(boxes, box_targets, config.bbox_cost, config.giou_cost)
    matches = _matcher(config, groups, for_matching, options).match(logits, masks, step, boxes_cost)
    sampling = sampling or PointSampling(max(height, area), OVERSAMPLE_RATIO, IMPORTANCE_RATIO)
    count = step.divisor(float(step.targets.num_masks), times=groups)
    weights = config.mask_class_loss_coefficient, config.mask_dice_loss_coefficient
    loss = MaskLoss(sampling=sampling, options=options)
    shown = step.mask_weights(matches, None, logits.dtype)
    terms = _mask_terms(step, loss, masks, matches, groups, ops.Reduction(*weights, count, shown))
    layer, image, query, target = matches.index.unbind(1)
    rows = step.targets.first_rows[image] + target
    pairs = box_terms(boxes[layer, image, query], torch.cat(box_targets)[rows])
    place = (layer, image, query, step.labels[rows])

    def per_layer(values: Tensor) -> Tensor:
        return values.reshape(len(layers), values.numel() // len(layers)).sum(1) / count

    by_class = quality_sums(logits, place, pairs.iou, config.focal_alpha)
    if step.unknown is not None:
        hidden = torch.zeros(logits.shape[:3], dtype=torch.bool, device=logits.device)
        by_class = by_class.masked_fill(hidden.index_put((layer, image, query), step.unknown[rows]), 0)
    return {
        "loss_ce": per_layer(by_class),
        "loss_bbox": per_layer(pairs.l1),
        "loss_giou": per_layer(pairs.giou),
        "cardinality_error": _cardinality_error(logits.detach(), step),
        "loss_mask_ce": terms.ce,
        "loss_mask_dice": terms.dice,
    }


def _groups(queries: int, per_group: int) -> int:
    """Count the groups of queries: G in training, 1 in evaluation, where the model runs one group."""
    groups, rest = queries // per_group, queries % per_group
    if rest or not groups:
        raise Cause(
            "the number of queries must be a multiple of config.num_queries",
            f"{queries} queries, num_queries={per_group}",
            "train with the configuration that the model was built with",
        )
    return groups


def _matcher(config: Any, groups: int, sampling: PointSampling, options: MaskOptions) -> HungarianMatcher:
    """Make the matcher of every group of queries."""
    return HungarianMatcher(
        class_weight=config.class_cost,
        mask_weight=config.mask_class_loss_coefficient,
        dice_weight=config.mask_dice_loss_coefficient,
        num_points=sampling.num_points,
        layout=sampling.layout,
        groups=groups,
        classification="focal",
        options=options,
    )


def _mask_terms(
    step: Step, loss: MaskLoss, masks: Sequence[Layer], matches: Matches, groups: int, reduction: ops.Reduction
) -> LayerTerms:
    """Compute the mask terms of each layer; a target has points of their own for its query in each group."""
    repeated = step.with_targets(joining.repeat(step.targets, groups))
    layer, image, query, target = matches.index.unbind(1)
    target = target + query // (matches.num_queries // groups) * step.targets.counts[image]
    index = torch.stack([layer, image, query, target], dim=1)
    apart = replace(matches, index=index, num_targets=repeated.targets.num_targets)
    return loss.layer_terms(masks, apart, repeated, reduction)


@torch.no_grad()
def _cardinality_error(logits: Tensor, step: Step) -> Tensor:
    """Compare the number of confident queries with that of targets, for the log: `[L]`."""
    confident = (logits.amax(-1) > 0).sum(-1).to(logits.dtype)
    wanted = step.targets.counts.to(logits.dtype).expand_as(confident)
    return l1_loss(confident, wanted, reduction="none").mean(1)
