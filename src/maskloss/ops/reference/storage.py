"""How targets are stored and read, and how a choice of candidates is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskloss._abi import (
    BASE,
    COUNT,
    CROP_H,
    CROP_W,
    FIRST,
    FRAME_H,
    FRAME_W,
    IGNORE_BASE,
    IGNORE_H,
    IGNORE_SIZE,
    IGNORE_STRIDE,
    IGNORE_W,
    IMAGE_H,
    IMAGE_W,
    LABEL,
    LEFT,
    OFFSET,
    STRIDE,
    TOP,
    Targets,
    Term,
    X,
    Y,
    num_bytes,
)

from .formulas import interpolate
from .sampling import Cells, locate, nearest


def ignored(points: Tensor, images: Tensor, ignore: Tensor, offset: Tensor | int = 0) -> Tensor:
    """Which points `[n, P, 2]` lie in a pixel that the ignore region of their image (a row of `images`) covers.

    `offset`, of each instance or point, is where the region of its frame begins in that of a clip, in bytes.
    """
    if ignore.numel() == 0:
        return torch.zeros(points.shape[:-1], dtype=torch.bool, device=points.device)

    def column(which: int) -> Tensor:
        return images[:, which, None]

    # The pixel is found in the points' own precision, from float32 on: in half precision it would be another one.
    points = points if points.dtype == torch.float64 else points.float()
    y = (points[..., Y] * column(IMAGE_H)).nan_to_num().clamp(0, 2**31).long().clamp(max=column(IMAGE_H) - 1)
    x = (points[..., X] * column(IMAGE_W)).nan_to_num().clamp(0, 2**31).long().clamp(max=column(IMAGE_W) - 1)
    inside = (column(IGNORE_SIZE) > 0) & (y < column(IGNORE_H)) & (x < column(IGNORE_W))
    address = torch.where(inside, column(IGNORE_BASE) + offset + y * column(IGNORE_STRIDE) + (x >> 3), 0)
    return inside & ((ignore[address] >> (x & 7)) & 1).bool()


def rows_of(image: Tensor, target: Tensor, targets: Targets) -> Tensor:
    """Look up the rows of targets, offsets counted from where the data begin. A target too many gets the first row."""
    described = targets.images[image]
    real = target < described[:, COUNT]
    rows = targets.table[torch.where(real, described[:, FIRST] + target, 0)]
    rows[:, OFFSET] += torch.where(real, described[:, BASE], 0)
    return rows


def target_cells(points: Tensor, rows: Tensor, padding: str, dtype: torch.dtype) -> Cells:
    """Locate points `[n, P, 2]` in the frames of targets, given by their rows of the table."""
    return locate(points, rows[:, FRAME_H, None], rows[:, FRAME_W, None], padding, dtype)


def read_targets(cells: Cells, rows: Tensor, targets: Targets, term: Term, dtype: torch.dtype) -> list[Tensor]:
    """Read the target pixels around each point: four tensors `[n, P]`, or one for target_mode "nearest"."""

    def read(y: Tensor, x: Tensor) -> Tensor:
        return pixels_of_targets(y, x, rows, targets, dtype)

    if term.nearest:
        return [read(*nearest(cells, rows[:, FRAME_H, None], rows[:, FRAME_W, None], term.padding))]
    y, x = cells.y, cells.x
    return [read(y, x), read(y, x + 1), read(y + 1, x), read(y + 1, x + 1)]


def pixels_of_targets(y: Tensor, x: Tensor, rows: Tensor, targets: Targets, dtype: torch.dtype) -> Tensor:
    """Read one pixel of targets, given by their rows of the table, for each point: `[n, P]`, 0 outside the crop."""
    data, encoding = targets.data, targets.encoding

    def column(which: int) -> Tensor:
        return rows[:, which, None]

    y, x = y - column(TOP), x - column(LEFT)
    inside = (y >= 0) & (y < column(CROP_H)) & (x >= 0) & (x < column(CROP_W))
    address = column(OFFSET) + y * column(STRIDE) + ((x >> 3) if encoding == "bits" else x)
    found = data[torch.where(inside, address, 0)] if data.numel() else torch.zeros_like(address)
    if encoding == "bits":
        found = (found >> (x & 7)) & 1
    elif encoding == "labels":
        found = found == column(LABEL)
    return torch.where(inside, found.to(dtype), 0.0)


def target_values(corners: Sequence[Tensor], cells: Cells) -> Tensor:
    """Turn what `read_targets` read into the target values t in [0, 1]."""
    if len(corners) == 1:
        return corners[0]
    v00, v01, v10, v11 = corners
    return interpolate((v00, v01, v10, v11), cells.fx, cells.fy)


def pack_bits(chosen: Tensor, num_candidates: int) -> Tensor:
    """Turn indices `[n, k]` into a little-endian bit mask uint8 `[n, ceil(K / 8)]`."""
    width = num_bytes(num_candidates)
    mask = torch.zeros(len(chosen), width * 8, dtype=torch.uint8, device=chosen.device)
    mask.scatter_(1, chosen, 1)
    shifts = torch.arange(8, dtype=torch.uint8, device=chosen.device)
    return (mask.view(len(chosen), width, 8) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, num_chosen: int) -> Tensor:
    """Invert `pack_bits`: int64 `[n, num_chosen]`, ascending."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    mask = (bits[..., None] >> shifts) & 1
    return mask.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :num_chosen]
