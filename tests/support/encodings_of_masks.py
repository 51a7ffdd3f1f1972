"""The same masks through every way in: helpers of the tests of targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskloss import MaskTargets

SIZES = [(1, 1), (1, 7), (7, 1), (8, 8), (13, 17), (5, 64), (30, 65)]
LABEL_DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
]  # fmt: skip


def some_masks(height: int, width: int, count: int = 5) -> Tensor:
    """Bool `[count, H, W]`: noise, nothing, everything, the last pixel, a block."""
    masks = torch.rand(5, height, width) > 0.5
    masks[1], masks[2], masks[3], masks[4] = False, True, False, False
    masks[3, -1, -1] = True
    masks[4, height // 3 : height // 2 + 1, width // 3 : width // 2 + 1] = True
    return masks[:count]


def parts_of(height: int, width: int, count: int = 4) -> tuple[Tensor, Tensor]:
    """A label map of `count` instances, ids 1 to count, and their masks `[count, H, W]`."""
    labels = torch.randint(0, count + 1, (height, width))
    labels.view(-1)[:count] = torch.arange(1, count + 1)
    return labels, labels == torch.arange(1, count + 1)[:, None, None]


def packed(masks: Tensor, **frame: Any) -> MaskTargets:
    bits = np.packbits(masks.numpy(), axis=-1, bitorder="little")
    return MaskTargets.from_packed(torch.from_numpy(bits), masks.shape[2], **frame)


def mapped(masks: Tensor, **frame: Any) -> MaskTargets:
    """Through a label map, for masks that do not overlap."""
    ids = torch.arange(1, len(masks) + 1)
    return MaskTargets.from_label_map((masks * ids[:, None, None]).sum(0), ids, allow_missing=True, **frame)


def run_lengths(mask: Tensor) -> dict[str, Any]:
    """Uncompressed RLE, written out: column by column, background first."""
    pixels = [0, *mask.T.flatten().int().tolist()]
    counts = [0]
    for before, now in itertools.pairwise(pixels):
        if now != before:
            counts.append(0)
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def encoded(masks: Tensor, **frame: Any) -> MaskTargets:
    return MaskTargets.from_coco([run_lengths(mask) for mask in masks], *masks.shape[1:], **frame)


# Every way to the same masks, if they are disjoint.
WAYS: dict[str, Callable[..., MaskTargets]] = {
    "masks": MaskTargets.from_masks,
    "soft": lambda masks, **frame: MaskTargets.from_masks(masks.float(), soft=True, **frame),
    "packed": packed,
    "label map": mapped,
    "run lengths": encoded,
}
every_way = pytest.mark.parametrize("make", [pytest.param(make, id=way) for way, make in WAYS.items()])
