"""The mask terms of criteria that call `loss_masks(outputs, targets, indices, num_boxes)` for each layer, as DETR's do.

Most code bases that descend from DETR have such a method. `LayerMasks` takes its place, and leaves everything else
that the criterion does, its matching included, to the criterion.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from maskloss._abi import IMAGE, TARGET
from maskloss._numbers import check_number
from maskloss.errors import Cause, describe, reported
from maskloss.integrations import _targets
from maskloss.integrations.detr import check_targets, find_masks, mask_entries
from maskloss.layers import Layer
from maskloss.loss import MaskLoss
from maskloss.matches import Matches, Pairs
from maskloss.options import MaskKeywords, MaskOptions, mask_options
from maskloss.points import PointSampling
from maskloss.targets import MaskTargets

__all__ = ["LayerMasks"]


class _Packed(NamedTuple):
    """The targets of the last step, by what tells steps apart; none of it keeps dense masks alive."""

    step: object
    sources: tuple[weakref.ref[Any], ...]
    targets: MaskTargets


class LayerMasks:
    """Mask terms of one layer: what takes the place of a criterion's `loss_masks`.

    Called for each layer as `loss_masks(outputs, targets, indices, num_boxes)`; a layer whose outputs have no
    "pred_masks" has no mask terms, `{}`. The masks are packed once for all calls with the same object `num_boxes`,
    which DETR's criteria make anew in every step. A query that shares its target with others, in groups of queries,
    has points of its own.

    Args:
        names: of the cross-entropy and of Dice. Default ("loss_mask", "loss_dice").
        sampling: numbers and layout of points. Default `PointSampling()`.
        pixels_per_point: one point for this many pixels of the prediction, but at least as many as it has rows, instead
            of the number in `sampling`; RF-DETR has 16. Default None.
        options: how points are read, focal loss and backend, as a group; `MaskOptions` says what there is.
        kwargs: the same options one by one.

    Raises:
        MaskLossError: an option outside its range.

    Source:
        DETR (Carion et al., 2020) for the call, Mask2Former (Cheng et al., 2022) for the terms.

    Example:
        >>> loss_masks = LayerMasks(("loss_mask_ce", "loss_mask_dice"), pixels_per_point=16, padding_mode="border")
        >>> outputs = {"pred_masks": torch.zeros(1, 5, 16, 16)}
        >>> targets = [{"masks": torch.ones(2, 32, 32)}]
        >>> found = loss_masks(outputs, targets, [(torch.tensor([0, 3]), torch.tensor([1, 0]))], 2.0)
        >>> {name: round(value.item(), 3) for name, value in found.items()}
        {'loss_mask_ce': 0.693, 'loss_mask_dice': 0.32}
    """

    @reported("LayerMasks")
    def __init__(
        self,
        names: tuple[str, str] = ("loss_mask", "loss_dice"),
        *,
        sampling: PointSampling | None = None,
        pixels_per_point: float | None = None,
        options: MaskOptions | None = None,
        **kwargs: Unpack[MaskKeywords],
    ) -> None:
        if not isinstance(names, (tuple, list)) or len(names) != 2 or not all(isinstance(each, str) for each in names):
            hint = 'names=("loss_mask", "loss_dice")'
            raise Cause("names must be those of cross-entropy and Dice", f"got {describe(names)}", hint)
        if pixels_per_point is not None:
            check_number("pixels_per_point", pixels_per_point, 1, hint="RF-DETR has 16")
        self.names, self.pixels_per_point = tuple(names), pixels_per_point
        self.loss = MaskLoss(sampling=sampling, options=mask_options(options, **kwargs))
        self._last: _Packed | None = None

    @reported("loss_masks")
    def __call__(
        self,
        outputs: Mapping[str, Any],
        targets: Sequence[Mapping[str, Any]],
        indices: Pairs,
        num_boxes: float | Tensor,
    ) -> dict[str, Tensor]:
        """Compute both terms of one layer.

        Args:
            outputs: "pred_masks": `[B, Q, h, w]`, a `MaskFactors`, or the dict that `MaskFactors.from_dict` takes.
            targets: one dict per image with "masks" (see `detr.SetCriterion`).
            indices: (queries, targets) of each image.
            num_boxes: what sums over instances are divided by, at least 1.

        Returns:
            Both terms by their names, unweighted; nothing for a layer without masks. Gradients flow to the masks.

        Raises:
            MaskLossError: wrong or missing targets, or indices out of range.
        """
        if isinstance(outputs, Mapping) and outputs.get("pred_masks") is None:
            return {}
        logits = find_masks(outputs)
        masks = self._pack(targets, num_boxes, logits.device)
        found = layer_loss(self._loss_for(logits), logits, masks, indices, num_boxes)
        return dict(zip(self.names, found, strict=True))

    def _loss_for(self, logits: Layer) -> MaskLoss:
        if self.pixels_per_point is None:
            return self.loss
        height, width = logits.shape[2:]
        given = self.loss.sampling
        points = max(height, int(height * width // self.pixels_per_point))
        sampling = PointSampling(points, given.oversample_ratio, given.importance_ratio, given.layout)
        return MaskLoss(sampling=sampling, options=self.loss.options)

    def _pack(self, targets: Sequence[Mapping[str, Any]], num_boxes: object, device: torch.device) -> MaskTargets:
        """Pack the targets, or return those of the last call if this is one of the same step."""
        check_targets(targets, ("masks",))
        entries = mask_entries(targets)
        sources = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
        last = self._last
        # Whole numbers may be one object in all steps.
        if last is not None and last.step is num_boxes and not isinstance(num_boxes, int):
            known = [source() for source in last.sources]
            same = len(known) == len(sources) and all(a is b for a, b in zip(known, sources, strict=True))
            if same and last.targets.device == device:
                return last.targets
        packed = _targets.pack_masks(entries, device)
        self._last = _Packed(num_boxes, tuple(weakref.ref(source) for source in sources), packed)
        return packed

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last step behind in copies and pickles."""
        return vars(self) | {"_last": None}

    def __repr__(self) -> str:
        return f"LayerMasks({self.names}, pixels_per_point={self.pixels_per_point}, {self.loss.extra_repr()})"


def layer_loss(
    loss: MaskLoss, logits: Layer, targets: MaskTargets, indices: Pairs, count: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and Dice of one layer's pairs, which another matcher found, divided by `count`."""
    matches = Matches.from_pairs(indices, num_queries=logits.shape[1], num_targets=targets.num_targets)
    earlier = _earlier(matches.index[:, IMAGE] * (max(targets.num_targets, default=0) + 1) + matches.index[:, TARGET])
    times = int(earlier.max()) + 1 if len(earlier) else 1
    if times > 1:
        sizes = torch.tensor(targets.num_targets, device="cpu")
        matches.index[:, TARGET] += earlier * sizes[matches.index[:, IMAGE]]
        targets = _targets.repeat_targets(targets, times)
        matches = Matches(
            matches.index, matches.layer_sizes, matches.num_queries, targets.num_targets, counts=matches.counts
        )
    found = loss(logits, targets, matches, num_instances=count)
    # Tensors of their own: training loops multiply them by their weights in place.
    return found.ce.clone(), found.dice.clone()


def _earlier(values: Tensor) -> Tensor:
    """Count, for each value, how often it is there before: int64 `[N]`."""
    ordered, order = values.sort(stable=True)
    counted = torch.empty_like(order)
    counted[order] = torch.arange(len(values), device=values.device) - torch.searchsorted(ordered, ordered)
    return counted
