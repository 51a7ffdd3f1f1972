"""The targets of other libraries as `MaskTargets`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskloss import _inputs
from maskloss._abi import COUNT, FIRST
from maskloss.errors import Cause, describe
from maskloss.layers import Layer
from maskloss.step import Step
from maskloss.targets import MaskTargets
from maskloss.targets.collate import collate
from maskloss.targets.frames import Size

_WIDE = (torch.int8, torch.int16, torch.int32, torch.int64)


def begin(masks: Any, labels: Sequence[Tensor], predictions: Sequence[Layer]) -> Step:
    """Begin a step with the targets of another library.

    Args:
        masks: see `pack_masks`.
        labels: int64 `[T]` of each image, on any device.
        predictions: all of them; the first is `[B, Q, h, w]`.
    """
    device = predictions[0].device
    packed = pack_masks(masks, device)
    # Before the labels are joined: "one entry per image" is the first thing that goes wrong.
    _inputs.check_targets(packed, predictions[0])
    moved = [each.to(device, non_blocking=True) if isinstance(each, Tensor) else each for each in labels]
    return Step.begin(*collate({"masks": packed, "labels": moved}), predictions)


def pack_masks(masks: Any, device: torch.device) -> MaskTargets:
    """Pack the masks of a batch, in any of the forms that users have, and move them to a device.

    Dense masks and label maps of different sizes lie in the top left corner of one canvas, the largest height and
    width of the batch, because predictions cover the padded batch. Integer masks are accepted too, since the original
    criteria convert targets to float.

    Args:
        masks: `MaskTargets` of the batch, or one entry per image: a dense `[T, H, W]`, a `MaskTargets`, or a pair of a
            label map `[H, W]` and its ids.
        device: of the predictions.

    Returns:
        The targets of the batch.

    Raises:
        Cause: an entry that is none of these, or an integer mask with other values than 0 and 1.
    """
    if isinstance(masks, MaskTargets):
        return masks.to(device, non_blocking=True)
    if not isinstance(masks, Iterable):
        raise Cause("masks must have one entry per image", f"got {describe(masks)}", "give a list, or a MaskTargets")
    entries = [_from_integers(entry) for entry in masks]
    canvas = _canvas(entries)
    if entries and all(isinstance(entry, Tensor) for entry in entries):
        # Together, so that all images of the batch get one encoding.
        return MaskTargets.from_masks(entries, canvas=canvas).to(device, non_blocking=True)
    return MaskTargets.cat([_pack_one(entry, canvas) for entry in entries]).to(device, non_blocking=True)


def _canvas(entries: Sequence[Any]) -> Size | None:
    maps = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
    sizes = [tuple(each.shape[-2:]) for each in maps if isinstance(each, Tensor) and each.ndim >= 2]
    if not sizes:
        return None
    return max(1, *(height for height, _ in sizes)), max(1, *(width for _, width in sizes))


def _from_integers(entry: Any) -> Any:
    """Turn dense masks of a wide integer type into bool, and leave everything else as it is."""
    if not isinstance(entry, Tensor) or entry.ndim not in (3, 4) or entry.dtype not in _WIDE:
        return entry
    inside = entry == 1
    # One look at the values, as float masks get one when they are packed.
    if bool((inside | (entry == 0)).all()):
        return inside
    raise Cause(
        "integer masks must be 0 or 1",
        f"values reach from {int(entry.min())} to {int(entry.max())}",
        "an integer map of instance ids goes in as a pair (label map, ids)",
    )


def _pack_one(entry: Any, canvas: Size | None) -> MaskTargets:
    if isinstance(entry, MaskTargets) and len(entry) == 1:
        return entry
    if isinstance(entry, Tensor):
        return MaskTargets.from_masks(entry, canvas=canvas)
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], Tensor):
        return MaskTargets.from_label_map(entry[0], entry[1], canvas=canvas)
    raise Cause(
        "the masks of an image must be a dense [T, H, W], a MaskTargets of that image, or a pair (label map, ids)",
        f"got {type(entry).__name__}: {describe(entry)}",
        "MaskTargets.from_masks, from_label_map and from_coco make packed masks",
    )


def repeat_targets(targets: MaskTargets, times: int) -> MaskTargets:
    """List the targets of every image `times` times; the pixels are shared, not copied.

    Where one target supervises several queries of a layer, each of them draws its own points: they are drawn by the
    number of the target, and copy g of target t has the number g * T + t.
    """
    if times == 1:
        return targets
    counts = tuple(count * times for count in targets.num_targets)
    images = targets.images.clone()
    images[:, COUNT] *= times
    images[:, FIRST] *= times
    which = torch.arange(len(targets), device=targets.device)
    image = which.repeat_interleave(images[:, COUNT], output_size=sum(counts))
    copy = torch.arange(sum(counts), device=targets.device) - images[:, FIRST][image]
    rows = targets.first_rows[image] + copy % targets.counts[image]
    present = None if targets.present is None else targets.present[rows]
    return replace(targets, table=targets.table[rows], images=images, num_targets=counts, present=present)
