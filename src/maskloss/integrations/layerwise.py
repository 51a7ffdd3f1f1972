"""The mask terms of criteria that call `loss_masks(outputs, targets, indices, num_boxes)` for each layer, as DETR's do.

Most code bases that descend from DETR have such a method. `LayerMasks` takes its place, and leaves everything else
that the criterion does, its matching included, to the criterion.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from maskloss._abi import IMAGE, TARGET
from maskloss._numbers import check_number
from maskloss.errors import Cause, describe, reported
from maskloss.integrations import _targets
from maskloss.integrations._outputs import find_masks
from maskloss.layers import Layer
from maskloss.loss import MaskLoss
from maskloss.matches import Matches, Pairs
from maskloss.options import MaskKeywords, MaskOptions, TargetRules, mask_options, told
from maskloss.points import PointSampling
from maskloss.step import check_whole, masks_that_count
from maskloss.targets import MaskTargets, joining
from maskloss.targets.collate import joined_flags, read

__all__ = ["LayerMasks"]


class _Packed(NamedTuple):
    """The targets of the last step, by what tells steps apart; none of it keeps dense masks alive."""

    step: object
    sources: tuple[Callable[[], Any], ...]
    targets: MaskTargets
    has_mask: Tensor | None


class LayerMasks:
    """Mask terms of one layer: what takes the place of a criterion's `loss_masks`.

    Called for each layer as `loss_masks(outputs, targets, indices, num_boxes)`; a layer whose outputs have no
    "pred_masks" has no mask terms, `{}`. The masks are packed once for all calls with the same object `num_boxes`,
    which DETR's criteria make anew in every step. A query that shares its target with others, in groups of queries,
    has points of its own.

    Args:
        names: of the cross-entropy and of Dice. Default ("loss_mask", "loss_dice").
        sampling: numbers and layout of points. Default `PointSampling()`.
        when: called with what the criterion passes on top of the four arguments, a number of the layer for instance:
            whether this layer has mask terms. Needed where there is something on top. Default None.
        pixels_per_point: one point for this many pixels of the prediction, but at least as many as it has rows, instead
            of the number in `sampling`; RF-DETR has 16. Default None.
        ignore_value: the value of void pixels in masks (see `MaskTargets.from_masks`). Default None.
        drop_empty: a target whose mask is empty has no mask terms. Default False.
        options: how points are read, the focal loss and the backend, as one `MaskOptions`.
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
        when: Callable[..., bool] | None = None,
        pixels_per_point: float | None = None,
        ignore_value: int | None = None,
        drop_empty: bool = False,
        options: MaskOptions | None = None,
        **kwargs: Unpack[MaskKeywords],
    ) -> None:
        if not isinstance(names, (tuple, list)) or len(names) != 2 or not all(isinstance(each, str) for each in names):
            hint = 'names=("loss_mask", "loss_dice")'
            raise Cause("names must be those of cross-entropy and Dice", f"got {describe(names)}", hint)
        if pixels_per_point is not None:
            check_number("pixels_per_point", pixels_per_point, 1, hint="RF-DETR has 16")
        if when is not None and not callable(when):
            raise Cause("when must be a function", f"got {describe(when)}", "when=lambda layer_id: layer_id < 10")
        self.names, self.when, self.pixels_per_point = tuple(names), when, pixels_per_point
        self.rules = TargetRules(ignore_value, drop_empty=drop_empty)
        self.loss = MaskLoss(sampling=sampling, options=mask_options(options, **kwargs))
        self._last: _Packed | None = None

    @reported("loss_masks", {"num_instances": "num_boxes"})
    def __call__(
        self,
        outputs: Mapping[str, Any],
        targets: Sequence[Mapping[str, Any]],
        indices: Pairs | None,
        num_boxes: float | Tensor,
        *others: Any,
        **more: Any,
    ) -> dict[str, Tensor]:
        """Compute both terms of one layer.

        Args:
            outputs: "pred_masks": `[B, Q, h, w]`, a `MaskFactors`, or the dict that `MaskFactors.from_dict` takes.
            targets: one dict per image with "masks", and "has_mask" where some have none (see `detr.SetCriterion`).
            indices: (queries, targets) of each image; None where nothing was matched: both terms are 0.
            num_boxes: what sums over instances are divided by, at least 1.
            others: what the criterion passes on top, for `when`.
            more: the same by name.

        Returns:
            Both terms by their names, unweighted; nothing for a layer without masks. Gradients flow to the masks.

        Raises:
            MaskLossError: wrong or missing targets, or indices out of range.
        """
        if (others or more) and self.when is None:
            raise Cause(
                "what the criterion passes on top needs when=",
                f"loss_masks was called with {describe([*others, *more])} as well",
                "when=lambda layer_id, extra: layer_id < 10, for instance, says which layers have mask terms",
            )
        if self.when is not None and not self.when(*others, **more):
            return {}
        if isinstance(outputs, Mapping) and outputs.get("pred_masks") is None:
            return {}
        logits = find_masks(outputs)
        if indices is None:
            nothing = torch.empty(0, dtype=torch.int64, device="cpu")
            indices, targets = [(nothing, nothing)] * logits.shape[0], [{"masks": None}] * logits.shape[0]
        packed = self._pack(targets, num_boxes, logits)
        found = layer_loss(self._loss_for(logits), logits, packed.targets, indices, num_boxes, packed.has_mask)
        return dict(zip(self.names, found, strict=True))

    def _loss_for(self, logits: Layer) -> MaskLoss:
        if self.pixels_per_point is None:
            return self.loss
        height, width = logits.shape[2:]
        points = max(height, int(height * width // self.pixels_per_point))
        return MaskLoss(sampling=replace(self.loss.sampling, num_points=points), options=self.loss.options)

    def _pack(self, targets: Sequence[Mapping[str, Any]], num_boxes: object, logits: Layer) -> _Packed:
        """Pack the targets, or return those of the last call if this is one of the same step."""
        found, last = read(targets, None), self._last
        check_whole()
        check_whole(found.annotated)
        # Whole numbers may be one object in all steps.
        if last is not None and last.step is num_boxes and not isinstance(num_boxes, int):
            known = [source() for source in last.sources]
            same = len(known) == len(found.masks) and all(a is b for a, b in zip(known, found.masks, strict=True))
            if same and last.targets.device == logits.device:
                return last
        packed = _targets.pack_entries(found, logits.device, self.rules.ignore_value, clips=logits.ndim == 5)
        has_mask = masks_that_count(packed, joined_flags(found.has_mask, packed), self.rules)
        # Returned as it is: another thread may have put its own in that place by then.
        made = self._last = _Packed(num_boxes, tuple(map(_reference, found.masks)), packed, has_mask)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last step behind in copies and pickles."""
        return vars(self) | {"_last": None}

    def __repr__(self) -> str:
        more = told(self.rules, when=self.when, pixels_per_point=self.pixels_per_point)
        return f"LayerMasks({self.names}, {self.loss.extra_repr()}{more})"


def _reference(value: Any) -> Callable[[], Any]:
    """Refer to masks without keeping them; to lists one cannot, and they are packed anew."""
    return weakref.ref(value) if isinstance(value, (Tensor, np.ndarray, MaskTargets)) else object


def layer_loss(
    loss: MaskLoss,
    logits: Layer,
    targets: MaskTargets,
    indices: Pairs,
    count: float | Tensor,
    has_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and Dice of one layer's pairs, which another matcher found, divided by `count`.

    Targets without a mask, where `has_mask` `[T_all]` is False, have none.
    """
    matches = Matches.from_pairs(indices, num_queries=logits.shape[1], num_targets=targets.num_targets)
    weights = None
    if has_mask is not None:
        # From what the host knows of the targets: `first_rows` would wait for the device.
        first_rows = torch.tensor([0, *accumulate(targets.num_targets)][:-1], device="cpu")
        weights = has_mask[matches.target_rows(first_rows).to(has_mask.device)]
    earlier = _earlier(matches.index[:, IMAGE] * (max(targets.num_targets, default=0) + 1) + matches.index[:, TARGET])
    times = int(earlier.max()) + 1 if len(earlier) else 1
    if times > 1:
        sizes = torch.tensor(targets.num_targets, device="cpu")
        matches.index[:, TARGET] += earlier * sizes[matches.index[:, IMAGE]]
        targets = joining.repeat(targets, times)
        matches = Matches(
            matches.index, matches.layer_sizes, matches.num_queries, targets.num_targets, counts=matches.counts
        )
    found = loss(logits, targets, matches, instance_weights=weights, num_instances=count)
    # Tensors of their own: training loops multiply them by their weights in place.
    return found.ce.clone(), found.dice.clone()


def _earlier(values: Tensor) -> Tensor:
    """Count, for each value, how often it is there before: int64 `[N]`."""
    ordered, order = values.sort(stable=True)
    counted = torch.empty_like(order)
    counted[order] = torch.arange(len(values), device=values.device) - torch.searchsorted(ordered, ordered)
    return counted
