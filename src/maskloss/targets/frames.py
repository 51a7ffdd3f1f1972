"""Where masks are stored and what predictions cover: the tables of a batch, described on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskloss._abi import FRAME_H, LABEL, PLACE_COLUMNS, TABLE_COLUMNS
from maskloss._numbers import check_integer, check_number
from maskloss._tracing import listed, plain
from maskloss.errors import Cause, describe
from maskloss.targets import bits

if TYPE_CHECKING:
    from numpy.typing import NDArray


Size = tuple[int, int]
Box = tuple[int, int, int, int]


class Frame(NamedTuple):
    """Frame options shared by the constructors, and the void pixels of each image, which are ignored too."""

    canvas: Size | None
    ignore: Any
    valid: Box | None
    void: Sequence[Tensor] = ()

    def regions(self, stored: Sequence[Stored], device: torch.device) -> list[Tensor]:
        """Pack the ignore region of each image: uint8 1-D. None at all if there are none."""
        ignore = plain(self.ignore)
        if ignore is not None:
            for image in stored:
                check_ignore(ignore, image.size, device)
            ignore = ignore != 0
            if not self.void:
                return [bits.pack(ignore).flatten()] * len(stored)
        return [bits.pack(each if ignore is None else each | ignore).flatten() for each in self.void]


def frame_size(size: Size, canvas: Size | None) -> Size:
    """Return the height and width of the frame: the canvas, which must hold the masks, or the masks' own."""
    canvas = listed(canvas)
    if canvas is None:
        return max(size[0], 1), max(size[1], 1)
    if not isinstance(canvas, Sequence) or isinstance(canvas, str) or len(canvas) != 2:
        raise Cause("the canvas must be (height, width)", f"got {describe(canvas)}", "leave the channels out")
    height, width = (
        check_integer(f"the {name} of the canvas", side, 1, hint="canvas is the (height, width) of the padded batch")
        for name, side in zip(("height", "width"), canvas, strict=True)
    )
    if height < max(size[0], 1) or width < max(size[1], 1):
        raise Cause(
            "the canvas must be at least as large as the masks",
            f"canvas {height} x {width}, masks {size[0]} x {size[1]}",
            "canvas is the (height, width) of the padded batch",
        )
    return height, width


class Stored(NamedTuple):
    """Where the masks of one image are stored."""

    place: NDArray[np.int64]  # int64 `[T, 6]`, OFFSET to CROP_W of each mask
    elements: int  # how much of `MaskTargets.data` they take
    size: Size  # height and width of the masks
    ids: Sequence[int] | None = None  # of the targets in a label map


def describe_images(stored: Sequence[Stored], frame: Frame, device: torch.device) -> tuple[Tensor, ...]:
    """Describe where the masks of all images are and what predictions cover.

    Returns:
        `table`, `images`, `windows` and `ignore` of `MaskTargets`, on `device`.
    """
    regions = frame.regions(stored, device)
    ignore = bits.joined(regions) if regions else torch.empty(0, dtype=torch.uint8, device=device)
    tables, images, windows = [], [], []
    first = base = ignore_base = 0
    for number, (place, elements, size, ids) in enumerate(stored):
        height, width = frame_size(size, frame.canvas)
        table = np.zeros((len(place), TABLE_COLUMNS), dtype=np.int64)
        table[:, :PLACE_COLUMNS] = place
        table[:, FRAME_H:LABEL] = height, width
        table[:, LABEL] = 0 if ids is None else ids
        ignored = len(regions[number]) if regions else 0
        region = (ignore_base, (size[1] + 7) // 8, *size) if ignored else (0, 0, 0, 0)
        images.append((len(place), elements, ignored, first, base, *region, height, width))
        windows.append(window_row(frame.valid, height, width))
        tables.append(table)
        first += len(place)
        base += elements
        ignore_base += ignored
    rows = np.array(images, dtype=np.int64)
    return *_upload([np.concatenate(tables), rows, np.concatenate(windows)], device), ignore


def _upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Send arrays, int64 or float32 with an even number of elements, to a device in one copy."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return [torch.from_numpy(array).to(device) for array in arrays]
    sizes = [array.nbytes // 8 for array in arrays]
    # Each begins at a multiple of 16 bytes, whatever the number of targets: kernels are compiled for the alignment.
    spaces = [size + size % 2 for size in sizes]
    sent = np.zeros(sum(spaces), dtype=np.int64)
    for array, size, start in zip(arrays, sizes, np.cumsum([0, *spaces]), strict=False):
        sent[start : start + size] = array.reshape(-1).view(np.int64)
    words = torch.from_numpy(sent)
    pinned = device.type == "cuda" and torch.cuda.is_available()
    words = words.pin_memory() if pinned else words
    parts = words.to(device, non_blocking=pinned).split(spaces)
    return [
        (part if array.dtype == np.int64 else part.view(torch.float32))[: array.size].view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]


def check_ignore(ignore: Tensor, size: Sequence[int], device: torch.device) -> None:
    """Raise if an ignore region has another size, type or device than the masks, `(H, W)` or `(T, H, W)`."""
    fits = isinstance(ignore, Tensor) and tuple(ignore.shape) == tuple(size)
    if not fits or ignore.dtype not in (torch.bool, torch.uint8):
        raise Cause(
            f"the ignore region must be bool {'[H, W]' if len(size) == 2 else '[T, H, W]'}, of the size of the masks",
            f"got {describe(ignore)}, masks are {' x '.join(map(str, size))}",
            "mark the pixels to leave out with True",
        )
    if ignore.device != device:
        raise Cause(
            "the ignore region must be on the device of the masks",
            f"it is on {ignore.device}, the masks on {device}",
            "move it there first",
        )


def window_row(valid: Box | None, height: int, width: int) -> NDArray[np.float32]:
    """Write the valid window as fractions of the frame, float32 `[1, 4]`: left, top, width, height."""
    valid = listed(valid)
    if valid is None:
        return np.array([[0, 0, 1, 1]], dtype=np.float32)
    if not isinstance(valid, Sequence) or isinstance(valid, str) or len(valid) != 4:
        raise Cause("the valid window must be (top, left, height, width)", f"got {describe(valid)}", "in pixels")
    top, left, rows, columns = (
        check_number(f"the {name} of the valid window", side, hint="give it in pixels of the frame")
        for name, side in zip(("top", "left", "height", "width"), valid, strict=True)
    )
    if rows <= 0 or columns <= 0 or top < 0 or left < 0 or top + rows > height or left + columns > width:
        raise Cause(
            "the valid window must be a part of the frame",
            f"window (top, left, height, width) = {tuple(valid)}, frame {height} x {width}",
            "give it in pixels of the frame, with a positive height and width",
        )
    return np.array([[left / width, top / height, columns / width, rows / height]], dtype=np.float32)
