"""Turning masks into what the kernels read: bits cropped to their bounding boxes, COCO run lengths, label maps."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from maskloss.errors import Cause, describe, require
from maskloss.ops.abi import OFFSET, PLACE_COLUMNS, TOP

Bytes = NDArray[np.uint8]
_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
# Integer types without arithmetic in torch, and what holds their values.
_WIDER = {torch.int8: torch.int16, torch.uint16: torch.int32, torch.uint32: torch.int64}
# Label maps with values below this are ranked through a table, others by binary search.
_LARGEST_TABLE = 1 << 22
# Gathers the lowest bits of eight bytes in the highest byte, the first of them lowest.
_GATHER = 0x0102040810204080
# pycocotools works with coordinates times 5 in 32-bit integers.
_FAR = 1 << 20


def on_host(tensor: Tensor) -> bool:
    """Tell whether values may be looked at: elsewhere that stalls a device, or breaks the graph of `torch.compile`."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def pack(masks: Tensor) -> Tensor:
    """Pack masks `[..., H, W]`, non-zero inside, into bits: uint8 `[..., H, ceil(W / 8)]`, lowest bit leftmost."""
    if on_host(masks):
        values = masks if masks.dtype in (torch.bool, torch.uint8) else masks != 0
        return torch.from_numpy(np.packbits(values.contiguous().numpy(), axis=-1, bitorder="little"))
    return pack_elsewhere([masks]).view(*masks.shape[:-1], (masks.shape[-1] + 7) // 8)


def pack_elsewhere(images: Sequence[Tensor]) -> Tensor:
    """Pack masks on any device, images of one size together: uint8 1-D, each row padded to a byte."""
    if len(images) > 1 and len({(masks.dtype, masks.shape[1:]) for masks in images}) == 1:
        images = [torch.cat(list(images))]
    rows = []
    for masks in images:
        inside = masks if masks.dtype == torch.bool else masks != 0
        width = masks.shape[-1]
        rows.append((torch.nn.functional.pad(inside, (0, -width % 8)) if width % 8 else inside).reshape(-1))
    joined = torch.cat(rows) if len(rows) > 1 else rows[0]
    if torch.compiler.is_compiling() or joined.storage_offset() % 8:
        joined = joined.clone()  # words begin at words
    # Eight bytes that are 0 or 1 make a word; the product moves byte i to bit 56 + i, and no two terms meet.
    words = joined.view(torch.int64) * _GATHER
    return words.view(torch.uint8)[7::8].contiguous()


def crop(packed: Tensor, width: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Cut packed masks `[T, H, ceil(W / 8)]` down to their bounding boxes, where that needs no wait for a device.

    Returns:
        The bytes of all crops, uint8 `[n]`, and the place of each, int64 `[T, 6]`.
    """
    count, height, row = packed.shape
    place = np.zeros((count, PLACE_COLUMNS), dtype=np.int64)
    if not on_host(packed):
        place[:] = (0, row, 0, 0, height, width)
        place[:, OFFSET] = np.arange(count) * (height * row)
        return packed.flatten(), place
    crops: list[Bytes] = []
    offset = 0
    for target, mask in enumerate(packed.numpy()):
        piece, top, left = _crop_one(mask)
        box_h, box_row = piece.shape
        place[target] = (offset, box_row, top, 8 * left, box_h, min(8 * box_row, width - 8 * left))
        crops.append(piece.reshape(-1))
        offset += piece.size
    return _join(crops), place


def _crop_one(mask: Bytes) -> tuple[Bytes, int, int]:
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return mask[:0, :0], 0, 0
    top, bottom = rows[0], rows[-1] + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    left, right = columns[0], columns[-1] + 1
    return mask[top:bottom, left:right], int(top), int(left)


def _join(crops: Sequence[Bytes]) -> Tensor:
    return torch.from_numpy(np.concatenate(crops)) if crops else torch.empty(0, dtype=torch.uint8, device="cpu")


def label_boxes(labels: Tensor, ids: Sequence[int]) -> NDArray[np.int64]:
    """Find the bounding box of each id in a CPU label map `[H, W]`: int64 `[T, 4]`, (top, left, height, width).

    An id that is not in the map has height and width 0.
    """
    values = labels.numpy()
    wanted, which = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
    boxes = np.zeros((len(ids), 4), dtype=np.int64)
    if not wanted.size:
        return boxes
    slices = ndimage.find_objects(_ranks(values, wanted), max_label=len(wanted))
    for target, rank in enumerate(which):
        if slices[rank] is not None:
            (top, bottom), (left, right) = ((side.start, side.stop) for side in slices[rank])
            boxes[target] = (top, left, bottom - top, right - left)
    return boxes


def label_places(labels: Tensor, ids: Sequence[int], allow_missing: bool) -> NDArray[np.int64]:
    """Where the masks of a label map are: in the box of each id if the map may be searched, or somewhere in it."""
    height, width = labels.shape
    place = np.zeros((len(ids), PLACE_COLUMNS), dtype=np.int64)
    place[:] = (0, width, 0, 0, height, width)
    if on_host(labels):
        boxes = label_boxes(labels, ids)
        missing = [number for number, box in zip(ids, boxes, strict=True) if not box[2]]
        if missing and not allow_missing:
            raise Cause(
                "every id must occur in its label map",
                f"{len(missing)} of {len(ids)} do not, the first is {missing[0]}",
                "drop those targets, or pass allow_missing=True to count them as empty masks",
            )
        place[:, OFFSET] = boxes[:, 0] * width + boxes[:, 1]
        place[:, TOP:] = boxes
    return place


def _ranks(values: NDArray[Any], wanted: NDArray[np.int64]) -> NDArray[np.int32]:
    """Replace each value by 1 + its position in the sorted `wanted`, and by 0 where it is not there."""
    largest = int(values.max(initial=0))
    if values.min(initial=0) >= 0 and largest < _LARGEST_TABLE:
        table = np.zeros(largest + 1, dtype=np.int32)
        inside = (wanted >= 0) & (wanted <= largest)
        table[wanted[inside]] = np.flatnonzero(inside) + 1
        ranks: NDArray[np.int32] = table[values]
        return ranks
    position = np.searchsorted(wanted, values).clip(max=len(wanted) - 1)
    return np.where(wanted[position] == values, position + 1, 0).astype(np.int32)


def pack_coco(segmentations: Sequence[Any], height: int, width: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Pack COCO segmentations (RLE or polygons), one at a time: bytes of all crops, and the place of each `[T, 6]`."""
    api = require("pycocotools.mask", "coco")
    if not isinstance(segmentations, Sequence) or isinstance(segmentations, (str, bytes)):
        raise Cause(
            "segmentations must be a list with one per target",
            f"got {describe(segmentations)}",
            "wrap a single segmentation in a list",
        )
    if height < 1 or width < 1:
        raise Cause("an image must have pixels", f"height={height!r}, width={width!r}", "take them from the image")
    place = np.zeros((len(segmentations), PLACE_COLUMNS), dtype=np.int64)
    crops: list[Bytes] = []
    offset = 0
    for target, segmentation in enumerate(segmentations):
        run = _run_length(api, segmentation, target, height, width)
        packed = np.packbits(api.decode(run), axis=-1, bitorder="little")
        piece, top, left = _crop_one(packed)
        box_h, box_row = piece.shape
        place[target] = (offset, box_row, top, 8 * left, box_h, min(8 * box_row, width - 8 * left))
        crops.append(piece.reshape(-1))
        offset += piece.size
    return _join(crops), place


def _run_length(api: Any, segmentation: Any, target: int, height: int, width: int) -> Any:
    """Bring one segmentation into compressed run lengths, and check that they fill the image."""
    if isinstance(segmentation, Mapping):
        return _checked_rle(api, segmentation, target, height, width)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, (str, bytes)) or not segmentation:
        raise Cause(
            "a segmentation must be an RLE dict or a non-empty list of polygons",
            f"segmentation {target} is {type(segmentation).__name__}",
            'use {"size": [height, width], "counts": ...} or [[x0, y0, x1, y1, x2, y2, ...], ...]',
        )
    for polygon in segmentation:
        if not isinstance(polygon, Sequence) or isinstance(polygon, (str, bytes)):
            raise Cause(
                "a segmentation must be a list of polygons",
                f"segmentation {target} holds a {type(polygon).__name__}",
                "wrap a single polygon in a list: [[x0, y0, x1, y1, x2, y2, ...]]",
            )
        if len(polygon) % 2 or len(polygon) < 6:
            raise Cause(
                "a polygon must have an even number of coordinates, at least 6",
                f"segmentation {target} has a polygon with {len(polygon)} coordinates",
                "list x and y of at least three corners in turn",
            )
        # Farther off, the coordinates overflow inside pycocotools.
        if not all(isinstance(value, Real) and -_FAR < float(value) < _FAR for value in polygon):
            raise Cause(
                f"the coordinates of a polygon must be numbers below {_FAR} in size",
                f"segmentation {target} has {describe(polygon)}",
                "drop the instance, or mend the annotation",
            )
    return api.merge(api.frPyObjects([[float(c) for c in p] for p in segmentation], height, width))


def _checked_rle(api: Any, rle: Mapping[str, Any], target: int, height: int, width: int) -> Any:
    if "size" not in rle or "counts" not in rle:
        raise Cause(
            'an RLE must have the keys "size" and "counts"',
            f"segmentation {target} has {sorted(map(str, rle))}",
            'use {"size": [height, width], "counts": ...}',
        )
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise Cause(
            "the size of an RLE must be that of its image",
            f"segmentation {target} has size {size}, the image is [{height}, {width}]",
            "size is [height, width]",
        )
    if not isinstance(counts, Sequence):
        raise Cause(
            "the counts of an RLE must be a compressed string or a list",
            f"those of segmentation {target} are {describe(counts)}",
            "COCO's annotation files have a list, pycocotools has bytes",
        )
    runs = _runs(counts) if isinstance(counts, (str, bytes)) else [int(run) for run in counts]
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise Cause(
            "the counts of an RLE must fill its size",
            f"segmentation {target} has counts for {sum(runs)} pixels, {height} x {width} = {height * width}",
            "the counts alternate between outside and inside, column by column, and add up to height * width",
        )
    if isinstance(counts, (str, bytes)):
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    return api.frPyObjects({"size": [height, width], "counts": runs}, height, width)


def _runs(counts: str | bytes) -> list[int]:
    """Decode compressed counts: 5 bits a character, lowest first; from the third run on, the change to two runs ago."""
    text = counts.encode() if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    for byte in text:
        digit = byte - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise Cause("compressed counts must be complete", "they end inside a number", "the string was cut off")
    return runs


def check_masks(masks: Tensor) -> None:
    if not isinstance(masks, Tensor) or masks.ndim != 3:
        raise Cause(
            "masks must be a tensor [T, H, W]",
            f"got {describe(masks)}",
            "a single mask is masks[None]; label maps go with their ids; torch.as_tensor converts arrays",
        )
    if masks.dtype not in (torch.bool, torch.uint8) and not masks.is_floating_point():
        raise Cause(
            "masks must be bool, uint8 or float",
            f"got {masks.dtype}",
            "an integer map of instance ids goes to MaskTargets.from_label_map",
        )


def check_devices(images: Sequence[Tensor]) -> None:
    devices = sorted({str(image.device) for image in images})
    if len(devices) > 1:
        raise Cause(
            "the targets of a batch must be on one device", f"got {', '.join(devices)}", "move all of them to one"
        )


def check_label_map(labels: Any) -> Tensor:
    """Bring a label map to a dtype that the kernels read."""
    if isinstance(labels, Tensor) and labels.dtype in _WIDER:
        labels = labels.to(_WIDER[labels.dtype])
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.dtype not in _INTEGERS:
        raise Cause(
            "a label map must be a tensor [H, W] with an integer dtype",
            f"got {describe(labels)}",
            "give one map per image; masks of shape [T, H, W] go to from_masks",
        )
    return labels


def check_ids(ids: Tensor) -> Tensor:
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise Cause("ids must be 64-bit integers, one per target", f"got {describe(ids)}", "give a list [T]")
    return ids


def are_soft(images: Sequence[Tensor], soft: bool | None) -> bool:
    """Decide for a whole batch, which must have one encoding, whether its masks are kept as soft values."""
    floats = [image for image in images if image.is_floating_point()]
    if soft is False or not floats:
        return False
    on_cpu = [image for image in floats if on_host(image)]
    if soft is None and len(on_cpu) == len(floats) and all(bool(((i == 0) | (i == 1)).all()) for i in floats):
        return False
    for image in on_cpu:
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise Cause(
                "soft masks must lie in [0, 1]",
                f"values reach from {float(image.min()):g} to {float(image.max()):g}",
                "divide masks in [0, 255] by 255, or compare with a threshold",
            )
    return True


def listed_ids(ids: Any) -> list[int]:
    if ids is None:
        raise Cause(
            "a label map needs the ids of its targets",
            "no ids were given",
            "list the ids to use, in the order of the labels; the background's is usually left out",
        )
    try:
        listed = [operator.index(number) for number in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    except TypeError:
        listed = [2**63]
    if any(not -(2**63) <= number < 2**63 for number in listed):
        raise Cause("ids must be 64-bit integers, one per target", f"got {describe(ids)}", "give a list [T]")
    return listed
