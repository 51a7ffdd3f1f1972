"""The targets of other libraries as `MaskTargets`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskloss.errors import Cause, describe
from maskloss.ops.abi import COUNT, FIRST
from maskloss.targets import MaskTargets
from maskloss.targets.frames import Size


def pack_masks(masks: Any, device: torch.device) -> MaskTargets:
    """Pack the masks of a batch, in any of the forms that users have, and bring them to a device.

    Dense masks and label maps of different sizes lie in the top left corner of one canvas, the largest height and
    width of the batch, because predictions cover the padded batch.

    Args:
        masks: `MaskTargets` of the batch, or one entry per image: a dense `[T, H, W]`, a `MaskTargets`, or a pair of a
            label map `[H, W]` and its ids.
        device: of the predictions.

    Returns:
        The targets of the batch.

    Raises:
        Cause: an entry that is none of these.
    """
    if isinstance(masks, MaskTargets):
        return masks.to(device, non_blocking=True)
    if not isinstance(masks, Iterable):
        raise Cause("masks must have one entry per image", f"got {describe(masks)}", "give a list, or a MaskTargets")
    entries = list(masks)
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
    table = targets.table[targets.first_rows[image] + copy % targets.counts[image]]
    return replace(targets, table=table, images=images, num_targets=counts)


class PackedOnce:
    """The packed masks of the last call, for models that call their criterion once per decoder layer.

    Holds no dense mask alive, and looks at the version of each tensor: one that was written to is packed again.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref[Any], int]] = []
        self._packed: MaskTargets | None = None

    def __call__(self, masks: Any, device: torch.device) -> MaskTargets:
        """Pack, or return what was packed last time if the masks are the same tensors."""
        leaves = _leaves(masks)
        if leaves is None:
            return pack_masks(masks, device)
        seen = [(id(leaf), leaf._version) for leaf in leaves]
        alive = [(id(ref()), version) for ref, version in self._seen if ref() is not None]
        if self._packed is None or seen != alive or len(alive) != len(self._seen) or self._packed.device != device:
            self._packed = pack_masks(masks, device)
            self._seen = [(weakref.ref(leaf), leaf._version) for leaf in leaves]
        return self._packed


def _leaves(masks: Any) -> list[Tensor] | None:
    """List the dense masks of a batch; None where remembering them is not worth it, or not possible."""
    if not isinstance(masks, Iterable):
        return None
    leaves = list(masks)
    dense = all(isinstance(leaf, Tensor) and leaf.ndim == 3 and not leaf.is_inference() for leaf in leaves)
    # The rows of one tensor [B, T, H, W] are new objects at every call.
    return leaves if dense and leaves and not isinstance(masks, Tensor) else None
