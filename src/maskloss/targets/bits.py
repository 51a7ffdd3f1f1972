"""Masks as packed bits, cropped to their bounding boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from maskloss import ops
from maskloss._abi import OFFSET, PLACE_COLUMNS
from maskloss._tracing import materialized, on_host
from maskloss.errors import Cause

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

# Gathers the lowest bits of eight bytes in the highest byte, the first of them lowest.
_GATHER = 0x0102040810204080
VOID_HINT = "MaskTargets.from_masks(masks, ignore_value=255) leaves void pixels out"


def pack(masks: Tensor) -> Tensor:
    """Pack masks `[..., H, W]`, non-zero inside, into bits: uint8 `[..., H, ceil(W / 8)]`, lowest bit leftmost."""
    if on_host(masks):
        return torch.from_numpy(np.packbits(_bytes(masks).contiguous().numpy(), axis=-1, bitorder="little"))
    return pack_elsewhere([masks]).view(*masks.shape[:-1], (masks.shape[-1] + 7) // 8)


def _bytes(masks: Tensor) -> Tensor:
    """Masks as one byte per pixel, non-zero inside."""
    return materialized(masks) if masks.dtype in (torch.bool, torch.uint8) else masks != 0


def pack_elsewhere(images: Sequence[Tensor]) -> Tensor:
    """Pack masks on any device, images of one size together: uint8 1-D, each row padded to a byte."""
    if len(images) > 1 and len({(masks.dtype, masks.shape[1:]) for masks in images}) == 1:
        images = [torch.cat(list(images))]
    rows = []
    for masks in images:
        inside = masks
        if masks.dtype != torch.bool:
            inside = masks != 0
            check_unseen(masks == (masks.clamp(0, 1) if masks.is_floating_point() else inside))
        width = masks.shape[-1]
        rows.append((torch.nn.functional.pad(inside, (0, -width % 8)) if width % 8 else inside).reshape(-1))
    joined = torch.cat(rows) if len(rows) > 1 else rows[0]
    if torch.compiler.is_compiling() or joined.storage_offset() % 8:
        joined = joined.clone()  # words begin at words
    # Eight bytes that are 0 or 1 make a word; the product moves byte i to bit 56 + i, and no two terms meet.
    words = joined.view(torch.int64) * _GATHER
    return words.view(torch.uint8)[7::8].contiguous()


def check_unseen(fits: Tensor, rule: str = "masks must be 0 or 1", hint: str = VOID_HINT) -> None:
    """Raise unless all values fit, by an assertion of the device where a look would wait for it, or cannot be had."""
    if fits.device.type in ("cpu", "cuda", "meta") or torch.compiler.is_compiling():
        torch._assert_async(fits.all(), f"maskloss: {rule}; {hint}")
    elif not bool(fits.all()):
        raise Cause(rule, "there are others", hint)


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
        piece, top, left = crop_one(mask)
        box_h, box_row = piece.shape
        place[target] = (offset, box_row, top, 8 * left, box_h, min(8 * box_row, width - 8 * left))
        crops.append(piece.reshape(-1))
        offset += piece.size
    return join_crops(crops), place


def pack_and_crop(images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[NDArray[np.int64], int]]]:
    """Pack masks `[T, H, W]` on the host, non-zero inside, and cut them down to their bounding boxes.

    Returns:
        The bytes of all crops, uint8 `[n]`; for each image where its masks lie in its part, int64 `[T, 6]`, and how
        many bytes that part has.
    """
    if ops.has_host_kernels():
        return ops.pack_masks([_bytes(masks) for masks in images])
    crops = [crop(pack(masks), masks.shape[2]) for masks in images]
    return joined([data for data, _ in crops]), [(place, len(data)) for data, place in crops]


def crop_one(mask: Bytes) -> tuple[Bytes, int, int]:
    """Cut one packed mask `[H, ceil(W / 8)]` to its bounding box: its bytes, its first row, its first byte."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return mask[:0, :0], 0, 0
    top, bottom = rows[0], rows[-1] + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    left, right = columns[0], columns[-1] + 1
    return mask[top:bottom, left:right], int(top), int(left)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate, without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def owned(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate into memory that nobody else writes to."""
    return parts[0].clone() if len(parts) == 1 else torch.cat(list(parts))


def join_crops(crops: Sequence[Bytes]) -> Tensor:
    """Join the bytes of all crops, uint8 1-D."""
    return torch.from_numpy(np.concatenate(crops)) if crops else torch.empty(0, dtype=torch.uint8, device="cpu")
