"""Tensors as what the CPU kernels take: tables of addresses, sizes and strides, codes, and work space.

One compiled kernel then serves every element type, memory layout and number of layers.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss._abi import (
    BASE,
    COUNT,
    ENCODINGS,
    FLOAT_CODES,
    INTEGER_CODES,
    OFFSET,
    Draw,
    Instances,
    Job,
    is_stratified,
)
from maskloss.errors import Cause
from maskloss.points import Strata

from .blocks import GRADIENT_ROWS, INTEGER_ROWS, POINT_ROWS, ROW, SPARE, VALUE_ROWS, Numbers
from .planes import SOURCE_COLUMNS, buffer_size
from .positions import Given
from .sampling import BLOCK
from .scratch import Dtypes, Sizes

Array = NDArray[Any]


HUGE_PAGE = 1 << 21
# From this size on, gradients get pages of their own.
_LARGE = 1 << 22
# With the border of a buffer.
_MOST_PIXELS = 2**31 - 1
_STORAGE = {torch.float32: np.float32, torch.float16: np.int16, torch.bfloat16: np.int16, torch.float64: np.float64}


def array_of(tensor: Tensor) -> Array:
    """The values of a CPU tensor, in one piece."""
    array: Array = tensor.detach().contiguous().numpy()
    return array


def absolute(table: Tensor, images: Tensor) -> Array:
    """The table of targets, with offsets from where the data of all images begins."""
    rows: Array = table.detach().numpy().copy()
    described = array_of(images)
    rows[:, OFFSET] += np.repeat(described[:, BASE], described[:, COUNT])
    return rows


def float_of(dtype: torch.dtype) -> type[np.floating[Any]]:
    """The type in which a kernel adds up."""
    return np.float64 if dtype == torch.float64 else np.float32


def dtypes_of(logits: Tensor, points: Tensor | None = None) -> Dtypes:
    """Element types of a kernel's work space: of its sums, and of the coordinates of points."""
    return float_of(logits.dtype), np.float32 if points is None else float_of(points.dtype)


def check_sizes(tensors: Sequence[Tensor]) -> None:
    """Raise if a plane does not fit into the 32 bits in which the kernels number its pixels."""
    for height, width in {tuple(tensor.shape[2:]) for tensor in tensors}:
        if buffer_size(height, width) > _MOST_PIXELS:
            raise Cause(
                "planes of the CPU kernels must have fewer than 2**31 pixels",
                f"{height} x {width}, which makes {height * width}",
                'backend="reference" has no such limit, but copies every plane that it reads',
            )


def plane_table(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    """One row per tensor `[B, Q, h, w]`, in the order of `planes.ADDRESS` to `STRIDE_X`; strides in elements."""
    check_sizes(tensors)
    rows = [(t.data_ptr(), FLOAT_CODES[t.dtype], *t.shape[2:], *t.stride()) for t in tensors]
    return np.array(rows, np.int64).reshape(len(rows), SOURCE_COLUMNS)


def pixels_of(masks: Tensor) -> Array:
    """Masks `[T, H, W]`, a byte per pixel, the pixels of a row side by side; a copy only where they are not."""
    array: Array = (masks if masks.stride(2) == 1 else masks.contiguous()).numpy()
    return array


def mask_table(arrays: Sequence[Array], firsts: Array) -> NDArray[np.int64]:
    """One row per image, in the order of `packing.ADDRESS` to `FIRST_MASK`."""
    rows = [(a.ctypes.data, *a.shape[1:], *a.strides[:2], first) for a, first in zip(arrays, firsts, strict=True)]
    return np.array(rows, np.int64)


def encode(data: Tensor, encoding: str) -> int:
    """The code of an encoding and an element type: they add up."""
    codes = FLOAT_CODES if data.is_floating_point() else INTEGER_CODES
    return ENCODINGS[encoding] + codes[data.dtype]


def given_rows(points: Tensor | None) -> tuple[Given, Tensor | None]:
    """The caller's points for a kernel, and the tensor that must stay alive while it runs."""
    if points is None:
        return Given(0, False, 0, 0, 0), None
    if points.dtype not in (torch.float32, torch.float64):
        points = points.float()
    return Given(points.data_ptr(), points.dtype == torch.float64, *points.stride()), points


def zeros(shape: Sequence[int], dtype: torch.dtype, sparse: bool = False) -> Tensor:
    """Zeros from the operating system's own zero pages: what is never written costs neither time nor memory.

    Huge pages, 2 MB each, are right where most of the memory will be written; where only some planes will be
    (`sparse`), each write would clear the planes around it too, so these get ordinary pages.
    """
    count = math.prod(shape)
    if not _own_pages(shape, dtype):
        return torch.from_numpy(np.zeros(tuple(shape), _STORAGE[dtype])).view(dtype)
    # Linux aligns whole numbers of huge pages: a volume that has the size of two is then two, not parts of three.
    size = -(-count * dtype.itemsize // HUGE_PAGE) * HUGE_PAGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not sparse and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(tuple(shape))


def _own_pages(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a gradient gets pages of its own."""
    return math.prod(shape) * dtype.itemsize >= _LARGE and hasattr(mmap, "MAP_PRIVATE")


def gradient_table(tensors: Sequence[Tensor], sparse: Sequence[bool]) -> NDArray[np.int64]:
    """As `plane_table`, with the column MADVISE: planes in ordinary pages of their own get these all at once."""
    fresh = [
        _madvise() if few and _own_pages(grad.shape, grad.dtype) else 0
        for grad, few in zip(tensors, sparse, strict=True)
    ]
    return np.column_stack([plane_table(tensors), np.array(fresh, np.int64)])


@cache
def _madvise() -> int:
    """Where the C library's `madvise` is; 0 on systems without the advice that is wanted."""
    if not sys.platform.startswith("linux"):
        return 0
    function = getattr(ctypes.CDLL(None), "madvise", None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


def groups(keys: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows in the order of their keys, and where each run of equal keys starts (and the last one ends)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(keys)), bool), ordered[1:] != ordered[:-1]]))
    return order.astype(np.int64), np.append(starts, len(keys)).astype(np.int64)


def largest(tensors: Sequence[Tensor]) -> int:
    """Elements of the buffer for the largest plane."""
    return max(buffer_size(t.shape[2], t.shape[3]) for t in tensors)


def work_space(logits: Sequence[Tensor], numbers: Numbers, loss: bool = False, ahead: bool = False) -> Sizes:
    """Sizes of the work space that draws points and reads logits there; for a loss, and with its gradient `ahead`."""
    width = (numbers.points if ahead else BLOCK) if loss else 0
    return (
        VALUE_ROWS * BLOCK + GRADIENT_ROWS * width + numbers.candidates + (1 + ahead) * largest(logits),
        POINT_ROWS * BLOCK,
        INTEGER_ROWS * ROW + width + 2 * numbers.candidates + SPARE + numbers.uncertain + 8,
    )


def numbers_of(drawn: Draw) -> Numbers:
    """How many points and candidates are drawn (see `Job.drawn`)."""
    cells = strata_of(drawn, drawn.num_candidates), strata_of(drawn, drawn.num_points - drawn.num_uncertain)
    return Numbers(drawn.num_points, drawn.num_candidates, drawn.num_uncertain, *cells)


def strata_of(draw: Draw, count: int) -> Strata:
    """The cells of this many points; without rows where points are independent."""
    return Strata.of(count) if is_stratified(draw.layout) else Strata(0, 0, 0, 0, 0, 0)


def loss_arguments(instances: Instances, job: Job) -> tuple[tuple[Any, ...], Numbers, tuple[Tensor | None, ...]]:
    """What the kernel of the loss reads, the numbers of points, and what must stay alive while it runs."""
    targets, draw, term, points = job
    given, kept = given_rows(points)
    numbers, data = numbers_of(job.drawn), targets.data.contiguous()
    args: tuple[Any, ...] = (plane_table(instances.logits), data.data_ptr(), absolute(targets.table, targets.images))
    args += (array_of(targets.ignore), array_of(instances.rows), encode(data, targets.encoding))
    args += (array_of(targets.images), array_of(targets.windows), array_of(draw.image_ids), int(draw.seed), given)
    options = (term.border, term.nearest, float(term.alpha), float(term.gamma), term.dice_kind)
    return (*args, numbers, *options), numbers, (kept, data)
