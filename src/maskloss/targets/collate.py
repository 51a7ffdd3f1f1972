"""Convert the target dicts of a batch to what the operations take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskloss._numbers import is_float, label_cause
from maskloss._tracing import on_host, plain
from maskloss.errors import Cause, check_layout, describe
from maskloss.targets.frames import Size
from maskloss.targets.mask_targets import MaskTargets

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# What users give for a batch, one for each image.
Entries = Sequence[Mapping[str, Any]]


class Annotated(NamedTuple):
    """What is said of images that are annotated partly, one entry for each image."""

    unlabeled: Sequence[Any] | None = None  # the region that nobody annotated, or None; None: no image has one
    classes: Sequence[Any] | None = None  # the numbers of the annotated classes, or None for all; None: all everywhere
    sizes: Sequence[Size | None] = ()  # of dense masks or a label map; None, or no sizes: its `MaskTargets` knows
    canvas: Size | None = None  # on which dense masks and label maps lie, unless they fill their frames

    def update(self, unlabeled: Any, classes: Any) -> Annotated:
        """Add what a call says."""
        for name, given, said in (
            ("unlabeled", unlabeled, self.unlabeled),
            ("annotated_classes", classes, self.classes),
        ):
            if given is not None and said is not None:
                raise Cause(f"give {name} in the targets or in the call", "it is in both", "leave one out")
        return self._replace(
            unlabeled=self.unlabeled if unlabeled is None else unlabeled,
            classes=self.classes if classes is None else classes,
        )


WHOLE = Annotated()


class Columns(NamedTuple):
    """What the target dicts of a batch hold, one of each for an image."""

    masks: list[Any]  # dense, a label map, a `MaskTargets`, or None
    ids: list[Any]  # of a label map, or None
    labels: list[Any]  # of the targets, if they were asked for
    has_mask: list[Any]  # see `Batch`; None for an image whose targets all have a mask
    annotated: Annotated = WHOLE


class Batch(NamedTuple):
    """The targets of all images."""

    masks: MaskTargets  # of the batch
    labels: Tensor  # int64 `[T_all]`
    # bool `[T_all]`, False for a target that has a class, and perhaps a box, but no mask; None: all have
    has_mask: Tensor | None = None
    annotated: Annotated = WHOLE


def collate(targets: Entries | Mapping[str, Any], ignore_value: int | None = None, like: Any = None) -> Batch:
    """Convert a list with one dict per image, torchvision's detection convention, to targets and labels.

    Args:
        targets: see `read`. Or one dict of a collated batch: "masks" is the `MaskTargets` of all images, "labels" and
            "has_mask" a list of `[T]` per image or one `[T_all]`.
        ignore_value: the value of void pixels (see `pack`).
        like: mask logits, which say whether targets are those of clips.
    """
    if isinstance(targets, Mapping):
        return _collated(targets, ignore_value)
    found = read(targets)
    packed = pack(found.masks, found.ids, ignore_value, clips=like is not None and like.ndim == 5)
    return joined(packed, found.labels, found.has_mask, found.annotated)


def read(targets: Any, label: str | None = "labels") -> Columns:
    """Read the dicts of a batch.

    Args:
        targets: per image `{"masks": ..., "labels": int64 [T]}`. "masks" is a dense `[T, H, W]`, a `MaskTargets` of
            that image, or an integer label map `[H, W]`, with its "ids" or with all that occur but 0. "has_mask", bool
            `[T]`, is False for targets without a mask; with "boxes" and no "masks", or None and False, none has one.
            "unlabeled" and "annotated_classes" say of an image what `MaskCriterion.forward` says of a batch. Other keys
            are left alone: data sets carry more than a loss needs.
        label: the name of the labels; None: there need not be any, but masks.
    """
    names = '"masks"' if label is None else f'"masks" and "{label}"'
    convention = f'give [{{"masks": [T, H, W], "{label or "labels"}": [T]}}, ...]'
    if not isinstance(targets, Sequence) or isinstance(targets, (str, bytes)) or not targets:
        raise Cause("targets must be a list with one dict per image", f"got {describe(targets)}", convention)
    for image, entry in enumerate(targets):
        has = set(entry) if isinstance(entry, Mapping) else set()
        if not ("masks" in has if label is None else label in has and has & {"masks", "boxes"}):
            got = f"has {sorted(map(str, has))}" if isinstance(entry, Mapping) else f"is {describe(entry)}"
            raise Cause(f"each entry of targets must be a dict with {names}", f"entry {image} {got}", convention)
    labels = [] if label is None else [entry[label] for entry in targets]
    masks, has_mask = [entry.get("masks") for entry in targets], [entry.get("has_mask") for entry in targets]
    for image, (given, entry) in enumerate(zip(labels, targets, strict=label is not None)):
        count = len(given) if isinstance(given, (Tensor, np.ndarray, Sequence)) and getattr(given, "ndim", True) else 0
        if masks[image] is None and count and ("boxes" in entry or _any(has_mask[image]) is False):
            if _any(has_mask[image]):
                raise Cause(
                    'targets that have a mask must have "masks"',
                    f'entry {image} has "has_mask" {describe(has_mask[image])} and no "masks"',
                    'give [T, H, W]; a target whose "has_mask" is False may have anything there',
                )
            device = given.device if isinstance(given, Tensor) else "cpu"
            masks[image] = torch.zeros(count, 1, 1, dtype=torch.bool, device=device)
            has_mask[image] = False
    annotated = Annotated(_said(targets, "unlabeled"), _said(targets, "annotated_classes"), list(map(_size, masks)))
    return Columns(masks, [entry.get("ids") for entry in targets], labels, has_mask, annotated)


def _said(targets: Entries, name: str) -> list[Any] | None:
    found = [entry.get(name) for entry in targets]
    return None if all(each is None for each in found) else found


def _size(masks: Any) -> Size | None:
    """Return the size of dense masks or of a label map; None of what has none, or is one pixel for lack of a mask."""
    first = masks[0] if isinstance(masks, (list, tuple)) and masks else masks
    shape = () if isinstance(masks, MaskTargets) else tuple(getattr(first, "shape", ()))[-2:]
    return (shape[0], shape[1]) if len(shape) == 2 and shape != (1, 1) and min(shape) else None


def joined(packed: MaskTargets, labels: Sequence[Any], has_mask: Sequence[Any], annotated: Annotated = WHOLE) -> Batch:
    """Join the labels of each image, after checking that there is one for each mask."""
    sizes, device = packed.num_targets, packed.device
    listed = [_labels(each, n, f"image {i}", device) for i, (each, n) in enumerate(zip(labels, sizes, strict=True))]
    return Batch(packed, torch.cat(listed).long(), joined_flags(has_mask, packed), annotated)


def joined_flags(has_mask: Sequence[Any], packed: MaskTargets) -> Tensor | None:
    """Join what is said of the targets' masks, bool `[T_all]`; None where nothing is said."""
    if all(each is None for each in has_mask):
        return None
    return torch.cat([_flags(each, n, packed.device) for each, n in zip(has_mask, packed.num_targets, strict=True)])


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise if labels `[T_all]` lie outside the classes, where that needs no wait for a device."""
    if on_host(labels) and labels.numel():
        low, high = (int(each) for each in labels.aminmax())
        if not 0 <= low <= high < num_classes:
            raise label_cause(num_classes, f"they reach from {low} to {high}", low if low < 0 else high)


def joined_weights(weights: Tensor | Sequence[Tensor], targets: MaskTargets) -> Tensor:
    """Join the weights of the targets of each image, `[T]`: `[T_all]`."""
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
    if any(part.dtype != torch.bool and not is_float(part) for part in weights):
        raise Cause("instance_weights must be bool or float", f"got {describe(weights)}", "weights.float() converts")
    parts = [part.float() if part.dtype == torch.bool else part for part in weights]
    return torch.cat(parts)


def _collated(targets: Mapping[str, Any], ignore_value: int | None) -> Batch:
    masks, labels, has_mask = targets.get("masks"), targets.get("labels"), targets.get("has_mask")
    if not isinstance(masks, MaskTargets) or not isinstance(labels, (Tensor, Sequence)):
        labels = None
    elif isinstance(labels, Tensor):
        labels = _labels(labels, masks.num_masks, "the batch", masks.device).split(list(masks.num_targets))
    if not isinstance(masks, MaskTargets) or labels is None or len(labels) != len(masks):
        raise Cause(
            'a dict must hold a collated batch: a MaskTargets in "masks", a list of [T] per image in "labels"',
            f"got {describe(targets)}",
            "give a list with one dict per image, or join the images with MaskTargets.cat",
        )
    if isinstance(has_mask, (Tensor, np.ndarray)):
        has_mask = _flags(has_mask, masks.num_masks, masks.device).split(list(masks.num_targets))
    elif has_mask is not None and (not isinstance(has_mask, Sequence) or len(has_mask) != len(masks)):
        raise Cause(
            "has_mask of a collated batch must be a list of bool [T] per image, or one [T_all]",
            f"got {describe(has_mask)} for {len(masks)} images",
            "False for a target that has a class and perhaps a box, but no mask",
        )
    flags = [None] * len(masks) if has_mask is None else has_mask
    annotated = Annotated(targets.get("unlabeled"), targets.get("annotated_classes"))
    return joined(check_packed(masks, ignore_value), labels, flags, annotated)


def pack(
    masks: Sequence[Any],
    ids: Sequence[Any],
    ignore_value: int | None = None,
    canvas: Size | None = None,
    *,
    clips: bool = False,
) -> MaskTargets:
    """Pack what each image has: dense masks, nothing at all, a label map with or without ids, or a `MaskTargets`.

    Args:
        masks: of each image.
        ids: of the targets in a label map, or None.
        ignore_value: the value of void pixels; a `MaskTargets` must have been packed with it, or with an ignore region.
        canvas: what predictions cover. Default: the masks themselves.
        clips: whether integers `[T, H, W]` are the label map of a clip or a volume.
    """
    masks = [each if each is None or isinstance(each, MaskTargets) else plain(each) for each in masks]
    kinds = [_kind(each, image, clips) for image, each in enumerate(masks)]
    options: dict[str, Any] = {"ignore_value": ignore_value, "canvas": canvas}
    # Together if possible, so that all images of the batch get one encoding.
    if set(kinds) == {"dense"}:
        return MaskTargets.from_masks(list(masks), **options)
    if set(kinds) == {"map"}:
        return MaskTargets.from_label_map(list(masks), list(ids), **options)
    parts = []
    for kind, each, listed in zip(kinds, masks, ids, strict=True):
        if kind == "packed":
            parts.append(check_packed(each, ignore_value))
        elif kind == "map":
            parts.append(MaskTargets.from_label_map(each, listed, **options))
        else:
            parts.append(MaskTargets.from_masks([each], **options))
    return MaskTargets.cat(parts)


def check_packed(masks: MaskTargets, ignore_value: int | None) -> MaskTargets:
    """Raise if masks were packed without a word on void pixels, although there are some; return them."""
    if ignore_value is not None and masks.num_masks and not masks.ignore.numel():
        raise Cause(
            "with ignore_value, masks that are packed already must have an ignore region",
            f"got {describe(masks)}",
            "MaskTargets.from_masks and from_label_map take ignore_value themselves",
        )
    return masks


def _kind(masks: Any, image: int, clips: bool) -> str:
    if isinstance(masks, MaskTargets):
        if len(masks) != 1:
            raise Cause(
                "a MaskTargets in an entry must hold one image",
                f"that of entry {image} holds {len(masks)}",
                "give each image its own",
            )
        return "packed"
    if masks is not None and not isinstance(masks, Tensor):
        raise Cause(
            '"masks" must be a tensor, an array or a MaskTargets',
            f"that of image {image} is {describe(masks)}",
            "give one [T, H, W], or MaskTargets.from_coco for RLE and polygons",
        )
    if masks is None or not masks.numel():
        return "map" if masks is not None and masks.ndim == 2 else "dense"
    of_clip = clips and masks.ndim == 3 and masks.dtype in _INTEGERS
    return "map" if masks.ndim == 2 or of_clip else "dense"


def _any(flags: Any) -> bool | None:
    """Whether an entry says that one of its targets has a mask; None: it says nothing, or a look would wait."""
    found = plain(flags)
    seen = isinstance(found, Tensor) and found.dtype == torch.bool and on_host(found)
    return bool(found.any()) if seen else None


def _flags(given: Any, count: int, device: torch.device) -> Tensor:
    """Convert what an entry says of its targets' masks: bool `[T]`."""
    single = given is None or isinstance(given, (bool, np.bool_))
    flags = torch.full((count,), given is None or bool(given), device=device) if single else plain(given)
    if isinstance(flags, Tensor) and not flags.numel() and not count:
        return torch.ones(0, dtype=torch.bool, device=device)
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool or tuple(flags.shape) != (count,):
        raise Cause(
            "has_mask must be bool [T], one for each target",
            f"got {describe(given)} for {count} targets",
            "False for a target that has a class and perhaps a box, but no mask",
        )
    return flags.to(device, non_blocking=on_host(flags))


def _label_hint(labels: Any) -> str:
    """Say how to make labels of what is none."""
    if isinstance(labels, Tensor) and labels.ndim == 2:
        return "labels[:, 0] has no second dimension" if labels.shape[1] == 1 else "labels.argmax(1) if it is one-hot"
    fits = isinstance(labels, Tensor) and labels.ndim == 1
    return "labels.long() converts" if fits else "give one class for each mask"


def _labels(given: Any, count: int, where: str, device: torch.device) -> Tensor:
    check_layout("labels", given)
    labels = plain(given)
    if count == 0 and (labels is None or (isinstance(labels, Tensor) and not labels.numel())):
        # What a mapper leaves of an image without objects: float, of any shape, or nothing.
        return torch.zeros(0, dtype=torch.int64, device=device)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in _INTEGERS:
        raise Cause(
            "labels must be an integer tensor [T]",
            f"those of {where} are {describe(given)}",
            f"{_label_hint(labels)}",
        )
    if labels.device != device and isinstance(given, Tensor):
        raise Cause(
            "labels must be on the device of the masks",
            f"those of {where} are on {labels.device}, the masks on {device}",
            "move both to the device of the logits",
        )
    if len(labels) != count:
        raise Cause(
            "masks and labels must pair up",
            f"{where} has {count} masks but {len(labels)} labels",
            'give one label for each mask; "has_mask" [T] says which of T masks count',
        )
    return labels.to(device, non_blocking=on_host(labels))
