"""Convert the target dicts of a batch to what the operations take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskloss._tracing import on_host
from maskloss.errors import Cause, check_layout, describe
from maskloss.targets.mask_targets import MaskTargets

_CONVENTION = 'give [{"masks": [T, H, W], "labels": [T]}, ...]'

# What users give for a batch, one for each image.
Entries = Sequence[Mapping[str, Any]]


def collate(targets: Entries | Mapping[str, Any]) -> tuple[MaskTargets, Tensor]:
    """Turn a list with one dict per image, torchvision's detection convention, into targets and labels.

    Args:
        targets: per image `{"masks": ..., "labels": int64 [T]}`. "masks" is a dense `[T, H, W]` tensor, a
            `MaskTargets` of that image, or an integer label map `[H, W]` along with `"ids"`. Other keys are left
            alone: data sets carry more than a loss needs. Or one dict of a collated batch: "masks" is the `MaskTargets`
            of all images, "labels" a list of `[T]` per image or one `[T_all]`.

    Returns:
        The targets of the batch, and the labels of all images, int64 `[T_all]`.
    """
    if isinstance(targets, Mapping):
        return _collated(targets)
    if not isinstance(targets, Sequence) or not targets:
        raise Cause("targets must be a list with one dict per image", f"got {describe(targets)}", _CONVENTION)
    for image, entry in enumerate(targets):
        if not isinstance(entry, Mapping) or "masks" not in entry or "labels" not in entry:
            got = f"has {sorted(map(str, entry))}" if isinstance(entry, Mapping) else f"is {describe(entry)}"
            raise Cause(
                'each entry of targets must be a dict with "masks" and "labels"', f"entry {image} {got}", _CONVENTION
            )
    packed = _pack([entry["masks"] for entry in targets], [entry.get("ids") for entry in targets])
    labels = [entry["labels"] for entry in targets]
    for image, (found, count) in enumerate(zip(labels, packed.num_targets, strict=True)):
        _check_labels(found, count, f"image {image}", packed.device)
    return packed, torch.cat(labels).long()


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise if labels `[T_all]` are outside the classes, where checking needs no wait for a device."""
    if on_host(labels) and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise Cause(
            f"labels must lie in [0, {num_classes})",
            f"they reach from {int(labels.min())} to {int(labels.max())}",
            f"num_classes={num_classes} counts the classes without 'no object', and labels start at 0",
        )


def joined_weights(weights: Tensor | Sequence[Tensor], targets: MaskTargets) -> Tensor:
    """Join the weights of the targets of each image, `[T]`, to `[T_all]`."""
    if isinstance(weights, Tensor):
        return weights
    counts = targets.num_targets
    fits = isinstance(weights, Sequence) and all(isinstance(part, Tensor) and part.ndim == 1 for part in weights)
    if not fits or tuple(map(len, weights)) != counts:
        raise Cause(
            "instance_weights must hold a bool or float tensor [T] for each image",
            f"got {describe(weights)} for {list(counts)} targets",
            "give one weight for each target; an image without targets has an empty tensor",
        )
    if any(part.dtype != torch.bool and not part.is_floating_point() for part in weights):
        raise Cause("instance_weights must be bool or float", f"got {describe(weights)}", "weights.float() converts")
    parts = [part.float() if part.dtype == torch.bool else part for part in weights]
    return torch.cat(parts)


def _collated(targets: Mapping[str, Any]) -> tuple[MaskTargets, Tensor]:
    masks, labels = targets.get("masks"), targets.get("labels")
    if isinstance(masks, MaskTargets) and isinstance(labels, Tensor):
        _check_labels(labels, masks.num_masks, "the batch", masks.device)
        return masks, labels.long()
    if not isinstance(masks, MaskTargets) or not isinstance(labels, Sequence) or len(labels) != len(masks):
        raise Cause(
            'a dict must hold a collated batch: a MaskTargets in "masks", a list of [T] per image in "labels"',
            f"got {describe(targets)}",
            "give a list with one dict per image, or join the images with MaskTargets.cat",
        )
    for image, (found, count) in enumerate(zip(labels, masks.num_targets, strict=True)):
        _check_labels(found, count, f"image {image}", masks.device)
    return masks, torch.cat(list(labels)).long()


def _pack(masks: Sequence[Any], ids: Sequence[Any]) -> MaskTargets:
    if all(isinstance(each, Tensor) and each.ndim == 3 for each in masks):
        # Together, so that all images of the batch get one encoding.
        return MaskTargets.from_masks(masks)
    if all(isinstance(each, Tensor) and each.ndim == 2 for each in masks):
        return MaskTargets.from_label_map(masks, ids)
    parts = []
    for image, (each, numbers) in enumerate(zip(masks, ids, strict=True)):
        if isinstance(each, MaskTargets):
            if len(each) != 1:
                raise Cause(
                    "a MaskTargets in an entry must hold one image",
                    f"that of entry {image} holds {len(each)}",
                    "give each image its own",
                )
            parts.append(each)
        elif isinstance(each, Tensor):
            parts.append(MaskTargets.from_label_map(each, numbers) if each.ndim == 2 else MaskTargets.from_masks(each))
        else:
            raise Cause(
                '"masks" must be a tensor or a MaskTargets',
                f"that of image {image} is {describe(each)}",
                "use torch.as_tensor, or MaskTargets.from_coco for RLE and polygons",
            )
    return MaskTargets.cat(parts)


def _check_labels(labels: Any, count: int, where: str, device: torch.device) -> None:
    integers = (torch.uint8, torch.int16, torch.int32, torch.int64)
    check_layout("labels", labels)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in integers:
        raise Cause(
            "labels must be an integer tensor [T]",
            f"those of {where} are {describe(labels)}",
            "give one class per mask",
        )
    if labels.device != device:
        raise Cause(
            "labels must be on the device of the masks",
            f"those of {where} are on {labels.device}, the masks on {device}",
            "move both to the device of the logits",
        )
    if len(labels) != count:
        raise Cause(
            "masks and labels must pair up",
            f"{where} has {count} masks but {len(labels)} labels",
            "give one label for each mask",
        )
