"""Train RF-DETR's own package with maskloss: one call before `train()`, which can be undone.

The criterion stays RF-DETR's: names, boxes, class losses, groups of queries, the encoder's outputs, what is logged and
what sums are divided by. The mask terms and the matching with masks are computed here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maskloss import _inputs
from maskloss._abi import QUERY, TARGET
from maskloss.errors import Cause, describe, reported
from maskloss.functional import focal_class_cost
from maskloss.integrations import _targets
from maskloss.integrations._boxes import box_costs
from maskloss.integrations._outputs import Outputs, find_masks
from maskloss.integrations._undo import Undo
from maskloss.integrations.layerwise import LayerMasks
from maskloss.matcher import HungarianMatcher, check_predictions
from maskloss.matches import Pairs
from maskloss.options import MaskOptions, TargetRules
from maskloss.points import PointSampling
from maskloss.targets.collate import Entries, read

__all__ = ["NAMES", "patch"]

NAMES = ("loss_mask_ce", "loss_mask_dice")


@reported("patch")
def patch(
    criterion: type | None = None,
    *,
    sampling: PointSampling | None = None,
    ignore_value: int | None = None,
    drop_empty: bool = False,
    backend: str | None = None,
) -> Undo:
    """Let maskloss compute the mask terms of RF-DETR's criterion, and the costs and assignments of its matcher.

    All criteria of the class are changed, those that exist and those that are built later. Batches without masks, and
    batches with key points, are left to RF-DETR.

    Args:
        criterion: the class of a criterion that is a copy of RF-DETR's, as libreyolo has one: its `loss_masks` is
            replaced, and its matching stays as it is. Default None: `SetCriterion` and `HungarianMatcher` of rfdetr.
        sampling: numbers and layout of the points, in the matching too. Default None: one point for
            `mask_point_sample_ratio` pixels, as in RF-DETR.
        ignore_value: the value of void pixels in masks: their points weigh nothing, in loss and matching. Default None.
        drop_empty: a target whose mask is empty has no mask terms, in loss and matching. Default False: it is learned,
            as in RF-DETR.
        backend: "reference", "cpu" or "gpu". Default: by device, or MASKLOSS_BACKEND.

    Returns:
        The patch: `undo()` takes it back, and `with patch(): ...` does at the end of the block.

    Raises:
        MaskLossError: a class without `loss_masks`, one that is patched already, or rfdetr is not installed.

    Source:
        RF-DETR's own code: points with border padding, targets by their nearest pixel. A pair with a non-finite cost is
        matched last; the matcher has one set of points for each image and step, not one for each batch and layer.
    """
    handle = Undo()
    options, rules = MaskOptions("border", "nearest", backend=backend), TargetRules(ignore_value, drop_empty=drop_empty)
    if sampling is not None:
        _inputs.check_sampling(sampling)
    if criterion is None:
        try:
            module: Any = importlib.import_module("rfdetr.models.criterion")
        except ModuleNotFoundError as error:
            hint = "pip install 'rfdetr[train]', or give a class"
            raise Cause("rfdetr must be installed", str(error), hint) from None
        criterion, matcher = module.SetCriterion, module.HungarianMatcher
    else:
        matcher = None
    theirs = vars(criterion).get("loss_masks") if isinstance(criterion, type) else None
    if theirs is None or getattr(theirs, "_maskloss", False):
        raise Cause(
            "criterion must be a class with a method loss_masks that is not patched already",
            f"got {describe(criterion)}",
            "give SetCriterion of rfdetr or of a copy; undo() takes a patch back",
        )
    handle.replace(criterion, "loss_masks", _loss_masks(theirs, sampling, options, rules))
    if matcher is not None:
        handle.replace(criterion, "forward", _packed_forward(criterion.forward, rules))  # type: ignore[union-attr]
        match = functools.partial(_match, sampling=sampling, options=options, rules=rules)
        handle.replace(matcher, "forward", _matching(matcher.forward, match, many=False))
        if hasattr(matcher, "_match_many"):
            handle.replace(matcher, "_match_many", _matching(matcher._match_many, match, many=True))
    return handle


def _loss_masks(
    theirs: Callable[..., Any], sampling: PointSampling | None, options: MaskOptions, rules: TargetRules
) -> Any:
    """Make what takes the place of `loss_masks`."""
    by_ratio: dict[int | None, LayerMasks] = {}
    shared: dict[str, Any] = {"ignore_value": rules.ignore_value, "drop_empty": rules.drop_empty, "options": options}

    @functools.wraps(theirs)
    def loss_masks(self: Any, outputs: Outputs, targets: Entries, indices: Any, num_boxes: Any) -> dict[str, Tensor]:
        if targets and "valid" in targets[0]:
            found: dict[str, Tensor] = theirs(self, outputs, targets, indices, num_boxes)
            return found
        ratio = self.mask_point_sample_ratio if sampling is None else None
        if ratio not in by_ratio:
            by_ratio[ratio] = LayerMasks(NAMES, sampling=sampling, pixels_per_point=ratio, **shared)
        return by_ratio[ratio](outputs, targets, indices, num_boxes)

    loss_masks._maskloss = True  # type: ignore[attr-defined]
    return loss_masks


def _packed_forward(theirs: Callable[..., Any], rules: TargetRules) -> Any:
    """Pack the masks of a step before the criterion sees them."""

    @functools.wraps(theirs)
    def forward(self: Any, outputs: Outputs, targets: Entries, *args: Any, **kwargs: Any) -> Any:
        if targets and all("masks" in entry and "valid" not in entry for entry in targets):
            packed = _targets.pack_entries(read(targets, None), outputs["pred_logits"].device, rules.ignore_value)
            targets = [{**entry, "masks": masks} for entry, masks in zip(targets, packed, strict=True)]
        return theirs(self, outputs, targets, *args, **kwargs)

    return forward


def _matching(theirs: Callable[..., Any], match: Callable[..., list[Pairs]], *, many: bool) -> Any:
    """Make what takes the place of the matcher's `forward`, for one layer, and of its `_match_many`, for several."""

    @functools.wraps(theirs)
    def matching(self: Any, given: Any, targets: Entries, group_detr: int = 1, **options: Any) -> Any:
        layers = given if many else [given]
        if any(_is_other(layer, targets) for layer in layers):
            return theirs(self, given, targets, group_detr, **options)
        found = match(self, layers, targets, group_detr)
        return found if many else found[0]

    return matching


def _is_other(outputs: Outputs, targets: Entries) -> bool:
    """Whether a batch has no masks, or more than boxes, classes and masks."""
    plain = all("masks" in entry and "valid" not in entry and "keypoints" not in entry for entry in targets)
    return not targets or not plain or outputs.get("pred_masks") is None


@torch.no_grad()
def _match(
    theirs: Any,
    layers: Sequence[Outputs],
    targets: Entries,
    groups: int,
    *,
    sampling: PointSampling | None,
    options: MaskOptions,
    rules: TargetRules,
) -> list[Pairs]:
    """Match every group of queries of every layer on its own: (queries, targets) of each image, on the CPU."""
    logits, masks = check_predictions(
        [layer["pred_logits"] for layer in layers], [find_masks(layer) for layer in layers], no_object=False
    )
    boxes = _inputs.accumulated(torch.stack([layer["pred_boxes"] for layer in layers]))
    step = _targets.begin_entries(targets, "labels", [*masks, logits], rules, no_object=None)
    counts = step.targets.num_targets
    height, width = masks[0].shape[2:]
    points = sampling or PointSampling(max(height * width // theirs.mask_point_sample_ratio, 1))
    matcher = HungarianMatcher(
        class_weight=0.0,
        mask_weight=theirs.cost_mask_ce,
        dice_weight=theirs.cost_mask_dice,
        groups=groups,
        num_points=points.num_points,
        layout=points.layout,
        classification="focal",
        options=options,
    )
    # Apart, because RF-DETR lets its users choose alpha.
    labels = pad_sequence(step.labels.split(list(counts)), batch_first=True)
    by_class = focal_class_cost(logits, labels, alpha=theirs.focal_alpha)
    given = _targets.boxes_of(targets, counts, boxes)
    extra = box_costs(boxes, given, theirs.cost_bbox, theirs.cost_giou) + theirs.cost_class * by_class
    matches = matcher.match(logits, masks, step, extra)
    rows = matches.index.cpu().split(list(matches.counts or ()))
    pairs = [(each[:, QUERY], each[:, TARGET]) for each in rows]
    return [pairs[first : first + len(targets)] for first in range(0, len(pairs), len(targets))]
