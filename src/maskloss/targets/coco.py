"""COCO segmentations, run lengths and polygons, as packed bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from maskloss._abi import PLACE_COLUMNS
from maskloss._numbers import check_integer
from maskloss._tracing import listed
from maskloss.errors import Cause, describe, require
from maskloss.targets.bits import crop_one, join_crops

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from maskloss.targets.bits import Bytes


# pycocotools works with coordinates times 5 in 32-bit integers.
_FAR = 1 << 20


def pack_coco(segmentations: Sequence[Any], height: int, width: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Pack COCO segmentations (RLE or polygons), one at a time: bytes of all crops, and the place of each `[T, 6]`."""
    api = require("pycocotools.mask", "coco")
    segmentations = listed(segmentations)
    if not isinstance(segmentations, Sequence) or isinstance(segmentations, (str, bytes)):
        raise Cause(
            "segmentations must be a list with one per target",
            f"got {describe(segmentations)}",
            "wrap a single segmentation in a list",
        )
    height = check_integer("height", height, 1, hint="take it from the image")
    width = check_integer("width", width, 1, hint="take it from the image")
    place = np.zeros((len(segmentations), PLACE_COLUMNS), dtype=np.int64)
    crops: list[Bytes] = []
    offset = 0
    for target, segmentation in enumerate(segmentations):
        run = _run_length(api, segmentation, target, height, width)
        packed = np.packbits(api.decode(run), axis=-1, bitorder="little")
        piece, top, left = crop_one(packed)
        box_h, box_row = piece.shape
        place[target] = (offset, box_row, top, 8 * left, box_h, min(8 * box_row, width - 8 * left))
        crops.append(piece.reshape(-1))
        offset += piece.size
    return join_crops(crops), place


def _run_length(api: Any, segmentation: Any, target: int, height: int, width: int) -> Any:
    """Convert one segmentation to compressed run lengths, and check that they fill the image."""
    if isinstance(segmentation, Mapping) and "segmentation" in segmentation:
        segmentation = segmentation["segmentation"]
    if isinstance(segmentation, Mapping):
        return _checked_rle(api, segmentation, target, height, width)
    segmentation = listed(segmentation)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, (str, bytes)) or not segmentation:
        raise Cause(
            "a segmentation must be an RLE dict or a non-empty list of polygons",
            f"segmentation {target} is {type(segmentation).__name__}",
            'use {"size": [height, width], "counts": ...} or [[x0, y0, x1, y1, x2, y2, ...], ...]',
        )
    segmentation = [listed(p.reshape(-1) if getattr(p, "shape", ())[1:] == (2,) else p) for p in segmentation]
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
        if not all(_is_coordinate(value) for value in polygon):
            raise Cause(
                f"the coordinates of a polygon must be numbers below {_FAR} in size",
                f"segmentation {target} has {describe(polygon)}",
                "drop the instance, or mend the annotation",
            )
    return api.merge(api.frPyObjects([[float(c) for c in p] for p in segmentation], height, width))


def _is_coordinate(value: Any) -> bool:
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and bool(abs(value) < _FAR)


def _checked_rle(api: Any, rle: Mapping[str, Any], target: int, height: int, width: int) -> Any:
    if "size" not in rle or "counts" not in rle:
        raise Cause(
            'an RLE must have the keys "size" and "counts"',
            f"segmentation {target} has {sorted(map(str, rle))}",
            'use {"size": [height, width], "counts": ...}',
        )
    size, counts = listed(rle["size"]), listed(rle["counts"])
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise Cause(
            "the size of an RLE must be that of its image",
            f"segmentation {target} has size {describe(size)}, the image is [{height}, {width}]",
            "size is [height, width]",
        )
    if not isinstance(counts, Sequence):
        raise Cause(
            "the counts of an RLE must be a compressed string or a list",
            f"those of segmentation {target} are {describe(counts)}",
            "COCO's annotation files have a list, pycocotools has bytes",
        )
    runs = _runs(counts, height * width) if isinstance(counts, (str, bytes)) else _whole(counts, target)
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise Cause(
            "the counts of an RLE must fill its size",
            f"segmentation {target} has counts for {sum(runs)} pixels, {height} x {width} = {height * width}",
            "the counts alternate between outside and inside, column by column, and add up to height * width",
        )
    if isinstance(counts, (str, bytes)):
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    return api.frPyObjects({"size": [height, width], "counts": runs}, height, width)


def _whole(counts: Sequence[Any], target: int) -> list[int]:
    """Check that counts are whole numbers; those of a file are plain integers, which is quick to see."""
    if all(type(run) is int for run in counts):
        return list(counts)
    name, hint = f"a count of segmentation {target}", "each is the length of a run, in pixels"
    return [check_integer(name, run, 0, hint=hint) for run in counts]


def _runs(counts: str | bytes, most: int) -> list[int]:
    """Decode compressed counts: 5 bits a character, lowest first; from the third run on, the change to two runs ago."""
    text = counts.encode() if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    # A number of more bits than the pixels need is damage, and many characters of it would take a long time to add up.
    longest = most.bit_length() + 10
    for byte in text:
        digit = byte - 48
        if not 0 <= digit < 64 or shift > longest:
            raise Cause(
                "compressed counts must be what COCO writes", f"they hold {describe(text)}", "the string is damaged"
            )
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
