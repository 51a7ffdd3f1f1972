"""The targets of other libraries as a step of this one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskloss import _inputs
from maskloss._tracing import on_host, plain
from maskloss.errors import Cause, describe
from maskloss.layers import Layer
from maskloss.options import TargetRules
from maskloss.step import Step, check_whole
from maskloss.targets import MaskTargets
from maskloss.targets.collate import WHOLE, Annotated, Columns, check_packed, joined, pack, read
from maskloss.targets.frames import Size


def begin(
    packed: MaskTargets,
    labels: Sequence[Any],
    predictions: Sequence[Layer],
    rules: TargetRules,
    *,
    no_object: int | None,
    has_mask: Sequence[Any] | None = None,
    annotated: Annotated = WHOLE,
    classifies: bool = False,
) -> Step:
    """Begin a step with the targets of another library: masks on the device of the predictions, labels on any.

    `no_object` is the label of "no object", if there is one. Where the caller does not compute the classification,
    `classifies`, it is an error to say what was annotated.
    """
    # Before the labels are joined: "one entry per image" is the first thing that goes wrong.
    _inputs.check_targets(packed, predictions[0])
    if no_object is None:
        rules = replace(rules, no_object_label="error")
    elif rules.no_object_label == "warn":
        _warn_of_no_object(labels, no_object)
    if len(labels) != len(packed):
        raise Cause(
            "masks and labels must have the same number of images",
            f"{len(packed)} of masks, {len(labels)} of labels",
            "give an entry for every image; an image without targets has []",
        )
    device = packed.device
    moved = [each.to(device, non_blocking=True) if isinstance(each, Tensor) else each for each in labels]
    step = Step.begin(joined(packed, moved, has_mask or [None] * len(packed), annotated), predictions, rules)
    if not classifies:
        check_whole(step.annotated)
    return step


def begin_entries(
    targets: Sequence[Mapping[str, Any]],
    label: str,
    predictions: Sequence[Layer],
    rules: TargetRules,
    *,
    no_object: int | None,
    classifies: bool = False,
) -> Step:
    """Begin a step with one dict per image, whose labels have the name `label` (see `read`)."""
    found = read(targets, label)
    found.masks[:] = _plain(found.masks)
    logits = predictions[0]
    packed = pack_entries(found, logits.device, rules.ignore_value, clips=logits.ndim == 5)
    annotated = found.annotated._replace(canvas=_canvas(found.masks))
    more: dict[str, Any] = {"has_mask": found.has_mask, "annotated": annotated, "classifies": classifies}
    return begin(packed, found.labels, predictions, rules, no_object=no_object, **more)


def _warn_of_no_object(labels: Sequence[Any], no_object: int) -> None:
    """Warn of targets with the label "no object", as far as labels can be looked at without waiting for a device."""
    seen = [plain(each) for each in labels]
    seen = [each for each in seen if isinstance(each, Tensor) and each.layout is torch.strided and on_host(each)]
    if any(bool((each == no_object).any()) for each in seen):
        warnings.warn(
            f'maskloss: targets have the label {no_object}, which means "no object": their masks are learned, and '
            "their queries learn that there is nothing. If labels count from 1, subtract 1; "
            'no_object_label="allow" accepts them, no_object_label="error" does not',
            UserWarning,
            stacklevel=2,
        )


def pack_entries(
    found: Columns, device: torch.device, ignore_value: int | None = None, *, clips: bool = False
) -> MaskTargets:
    """Pack the masks of a batch, and move them to a device.

    Dense masks and label maps of different sizes lie in the top left corner of one canvas, the largest height and
    width of the batch, because predictions cover the padded batch.
    """
    masks = _plain(found.masks)
    packed = pack(masks, found.ids, ignore_value, _canvas(masks), clips=clips)
    return packed.to(device, non_blocking=True)


def pack_masks(masks: Any, device: torch.device, ignore_value: int | None = None) -> MaskTargets:
    """Pack the masks of a batch without dicts (see `pack_entries`).

    They are the `MaskTargets` of the batch, or one entry per image: a dense `[T, H, W]`, a `MaskTargets`, a label map
    `[H, W]`, or a pair of a label map and its ids. None and `[0]` are an image without targets.
    """
    if isinstance(masks, MaskTargets):
        return check_packed(masks, ignore_value).to(device, non_blocking=True)
    if isinstance(masks, (str, bytes, Mapping)) or not hasattr(masks, "__iter__"):
        raise Cause("masks must have one entry per image", f"got {describe(masks)}", "give a list, or a MaskTargets")
    pairs = [each if isinstance(each, tuple) and len(each) == 2 else (each, None) for each in masks]
    return pack_entries(Columns([each for each, _ in pairs], [ids for _, ids in pairs], [], []), device, ignore_value)


def boxes_of(targets: Sequence[Mapping[str, Any]], counts: Sequence[int], like: Tensor) -> list[Tensor]:
    """List the boxes `[T, 4]` of each image with the dtype and device of the predicted ones."""
    found = []
    for image, (entry, count) in enumerate(zip(targets, counts, strict=True)):
        given = plain(entry.get("boxes"))
        if not count and (given is None or not len(given)):
            # What a mapper leaves of an image without objects.
            given = like.new_zeros(0, 4)
        if not isinstance(given, Tensor) or tuple(given.shape) != (count, 4):
            raise Cause(
                'targets must have "boxes" [T, 4], one for each label',
                f"image {image} has {count} targets and boxes {describe(given)}",
                "give (cx, cy, w, h) as fractions of the image",
            )
        found.append(given.to(like))
    return found


def _plain(masks: Sequence[Any]) -> list[Any]:
    return [each if isinstance(each, MaskTargets) else plain(each) for each in masks]


def _canvas(entries: Sequence[Any]) -> Size | None:
    sizes = [each.shape[-2:] for each in entries if isinstance(each, Tensor) and each.ndim >= 2]
    if not sizes:
        return None
    return max(1, *(int(height) for height, _ in sizes)), max(1, *(int(width) for _, width in sizes))
