"""What predictions cover: the frame of an image, the part of it where points are drawn, and what they ignore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss import _packing
from maskloss.errors import Cause, describe

Size = tuple[int, int]
Box = tuple[int, int, int, int]


class Frame(NamedTuple):
    """What the constructors are told about the frame of an image."""

    canvas: Size | None
    ignore: Tensor | None
    valid: Box | None


def frame_size(size: Size, canvas: Size | None) -> Size:
    if canvas is None:
        return max(size[0], 1), max(size[1], 1)
    if not isinstance(canvas, Sequence) or len(canvas) != 2:
        raise Cause("the canvas must be (height, width)", f"got {describe(canvas)}", "leave the channels out")
    height, width = (int(side) for side in canvas)
    if height < max(size[0], 1) or width < max(size[1], 1):
        raise Cause(
            "the canvas must be at least as large as the masks",
            f"canvas {height} x {width}, masks {size[0]} x {size[1]}",
            "canvas is the (height, width) of the padded batch",
        )
    return height, width


def packed_ignore(ignore: Tensor, size: Size, device: torch.device) -> Tensor:
    fits = isinstance(ignore, Tensor) and tuple(ignore.shape) == tuple(size)
    if not fits or ignore.dtype not in (torch.bool, torch.uint8):
        raise Cause(
            "the ignore region must be a bool tensor [H, W] of the size of the masks",
            f"got {describe(ignore)}, masks are {size[0]} x {size[1]}",
            "mark the pixels to leave out with True",
        )
    if ignore.device != device:
        raise Cause(
            "the ignore region must be on the device of the masks",
            f"it is on {ignore.device}, the masks on {device}",
            "move it there first",
        )
    return _packing.pack(ignore).flatten()


def window_row(valid: Box | None, height: int, width: int) -> NDArray[np.float32]:
    if valid is None:
        return np.array([[0, 0, 1, 1]], dtype=np.float32)
    if not isinstance(valid, Sequence) or len(valid) != 4:
        raise Cause("the valid window must be (top, left, height, width)", f"got {describe(valid)}", "in pixels")
    top, left, rows, columns = valid
    if rows <= 0 or columns <= 0 or top < 0 or left < 0 or top + rows > height or left + columns > width:
        raise Cause(
            "the valid window must be a part of the frame",
            f"window (top, left, height, width) = {tuple(valid)}, frame {height} x {width}",
            "give it in pixels of the frame, with a positive height and width",
        )
    return np.array([[left / width, top / height, columns / width, rows / height]], dtype=np.float32)
