"""Label maps: one integer map for all masks of an image, and where each id lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maskloss._abi import OFFSET, PLACE_COLUMNS, TOP
from maskloss._numbers import check_integer
from maskloss._tracing import materialized, on_host, plain
from maskloss.errors import Cause, check_layout, describe

if TYPE_CHECKING:
    from numpy.typing import NDArray


_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
# What kernels do not read, and what holds its values.
_WIDER = {torch.int8: torch.int16}
# Label maps with values below this are ranked through a table, others by binary search.
_LARGEST_TABLE = 1 << 22


def label_boxes(labels: Tensor, ids: Sequence[int]) -> NDArray[np.int64]:
    """Find the bounding box of each id in a CPU label map `[H, W]`: int64 `[T, 4]`, (top, left, height, width).

    An id that is not in the map has height and width 0.
    """
    values = materialized(labels).numpy()
    wanted, which = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
    boxes = np.zeros((len(ids), 4), dtype=np.int64)
    if not wanted.size:
        return boxes
    from scipy.ndimage import find_objects  # a tenth of a second that many runs never need

    slices = find_objects(_ranks(values, wanted), max_label=len(wanted))
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


def present_ids(labels: Tensor, ignore_value: int | None) -> list[int]:
    """List the ids that occur in a label map, but for 0 and the value of void pixels."""
    found = [number for number in labels.unique().tolist() if number not in (0, ignore_value)]
    if found and found[0] < 0:
        raise Cause(
            "a label map without ids must not have negative values",
            f"{found[0]} occurs",
            f"list the ids of the targets, or ignore_value={found[0]} for void pixels",
        )
    return found


def check_label_map(labels: Any) -> Tensor:
    """Convert a label map to a dtype that the kernels read."""
    check_layout("a label map", labels)
    given, labels = labels, plain(labels)
    if isinstance(labels, Tensor) and labels.dtype in _WIDER:
        labels = labels.to(_WIDER[labels.dtype])
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.dtype not in _INTEGERS:
        raise Cause(
            "a label map must be a tensor or an array [H, W] with an integer dtype",
            f"got {describe(given)}",
            "give one map per image; masks [T, H, W] go to from_masks, a single one as masks[None]",
        )
    return labels


def check_ids(ids: Tensor) -> Tensor:
    """Raise if ids are not integers `[T]`; their values stay on the device."""
    check_layout("ids", ids)
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise Cause("ids must be 64-bit integers, one per target", f"got {describe(ids)}", "give a list [T]")
    return ids


def listed_ids(ids: Any) -> list[int]:
    """List ids on the host, and check that each is a 64-bit integer."""
    check_layout("ids", ids)
    if isinstance(ids, Tensor) and ids.device.type == "meta":
        raise Cause("a label map needs the ids of its targets", f"got {describe(ids)}", "list the ids to use")
    try:
        listed = list(ids.tolist() if isinstance(ids, Tensor) else ids)
    except TypeError:
        raise Cause("ids must be 64-bit integers, one per target", f"got {describe(ids)}", "give a list [T]") from None
    return [check_integer("an id", number, -(2**63), 2**63 - 1, hint="ids are the map's integers") for number in listed]
