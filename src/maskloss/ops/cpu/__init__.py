"""The operations on CPU tensors, as Numba kernels; `maskloss.ops.reference` defines what they compute.

This file turns tensors into what the kernels take: tables of addresses, sizes and strides, so that one compiled kernel
serves every element type, memory layout and number of layers.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss.ops.abi import (
    BASE,
    COUNT,
    ENCODINGS,
    FLOAT_CODES,
    IMAGE,
    INTEGER_CODES,
    LAYER,
    OFFSET,
    POINT_COLUMNS,
    QUERY,
    Draw,
    Gradients,
    Instances,
    Saved,
    Targets,
    Term,
    is_border,
    is_nearest,
    num_bytes,
)

from . import instances as instance_kernels
from . import maps as map_kernels
from . import match as match_kernels
from .choose import GROUP
from .instances import INTEGER_ROWS, POINT_ROWS, ROW, SPARE, VALUE_ROWS, Numbers
from .sampling import BLOCK, BORDER, SOURCE_COLUMNS, Given, buffer_size
from .threads import Dtypes, launch

Array = NDArray[Any]

# From this size on, NumPy asks for huge pages.
_HUGE = 1 << 22
_STORAGE = {torch.float32: np.float32, torch.float16: np.int16, torch.bfloat16: np.int16, torch.float64: np.float64}


# ----------------------------------------------------------------------------------------- tensors to arguments


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().contiguous().numpy()
    return array


def _absolute(table: Tensor, images: Tensor) -> Array:
    """The table of targets, with offsets from where the data of all images begins."""
    rows, described = table.detach().numpy().copy(), _array(images)
    rows[:, OFFSET] += np.repeat(described[:, BASE], described[:, COUNT])
    return rows


def _float(dtype: torch.dtype) -> type[np.floating[Any]]:
    return np.float64 if dtype == torch.float64 else np.float32


def _dtypes(logits: Tensor, points: Tensor | None = None) -> Dtypes:
    """Element types of a kernel's work space: of its sums, and of the coordinates of points."""
    return _float(logits.dtype), np.float32 if points is None else _float(points.dtype)


def _describe(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    """One row per tensor `[B, Q, h, w]`, in the order of `sampling.ADDRESS` to `STRIDE_X`; strides in elements."""
    rows = [(t.data_ptr(), FLOAT_CODES[t.dtype], *t.shape[2:], *t.stride()) for t in tensors]
    return np.array(rows, np.int64).reshape(len(rows), SOURCE_COLUMNS)


def _encode(data: Tensor, encoding: str) -> int:
    """The code of an encoding and an element type: they add up."""
    codes = FLOAT_CODES if data.is_floating_point() else INTEGER_CODES
    return ENCODINGS[encoding] + codes[data.dtype]


def _given(points: Tensor | None) -> tuple[Given, Tensor | None]:
    """The caller's points for a kernel, and the tensor that must stay alive while it runs."""
    if points is None:
        return Given(0, False, 0, 0, 0), None
    if points.dtype not in (torch.float32, torch.float64):
        points = points.float()
    return Given(points.data_ptr(), points.dtype == torch.float64, *points.stride()), points


def _zeros(shape: Sequence[int], dtype: torch.dtype, sparse: bool = False) -> Tensor:
    """Zeros from the operating system's own zero pages: what is never written costs neither time nor memory.

    NumPy asks for huge pages, 2 MB each. They are right where most of the memory will be written; where only some
    planes will be (`sparse`), each write would clear the planes around it too, so these get ordinary pages.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not sparse or nbytes < _HUGE or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.from_numpy(np.zeros(tuple(shape), _STORAGE[dtype])).view(dtype)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def _groups(keys: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows in the order of their keys, and where each run of equal keys starts (and the last one ends)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(keys)), bool), ordered[1:] != ordered[:-1]]))
    return order.astype(np.int64), np.append(starts, len(keys)).astype(np.int64)


def _largest(tensors: Sequence[Tensor]) -> int:
    return max(buffer_size(t.shape[2], t.shape[3]) for t in tensors)


# --------------------------------------------------------------------------------------------------- operations


def point_sample(maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Read maps `[M, h, w]`, chosen by index `[N]`, at points `[N, P, 2]`: `[N, P]`."""
    dtypes = _dtypes(maps, points)
    result = np.empty(points.shape[:2], dtypes[0])
    given, kept = _given(points)
    rows = _array(index)
    order, starts = _groups(rows)
    if result.size:
        args = (_describe([maps[:, None]]), rows, order, starts, given, is_nearest(mode), is_border(padding), result)
        sizes = (2 * BLOCK + buffer_size(*maps.shape[1:]), 2 * BLOCK, BLOCK)
        launch(map_kernels.point_sample, len(starts) - 1, dtypes, sizes, args)
    del kept
    return torch.from_numpy(result)


def point_sample_backward(grad: Tensor, maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Scatter the gradient `[N, P]` of the values to the maps."""
    dtypes = _dtypes(maps, points)
    result = _zeros(maps.shape, maps.dtype)
    given, kept = _given(points)
    rows = _array(index)
    order, starts = _groups(rows)
    if grad.numel() and maps.numel():
        by_value = _array(grad).astype(dtypes[0], copy=False)
        args = (
            rows,
            order,
            starts,
            given,
            is_nearest(mode),
            is_border(padding),
            by_value,
            _describe([result[:, None]]),
        )
        sizes = (2 * BLOCK + buffer_size(*maps.shape[1:]), 2 * BLOCK, BLOCK)
        launch(map_kernels.point_sample_backward, len(starts) - 1, dtypes, sizes, args)
    del kept
    return result


def _room(logits: Sequence[Tensor], numbers: Numbers) -> tuple[int, int, int]:
    return (
        VALUE_ROWS * BLOCK + numbers.candidates + _largest(logits),
        POINT_ROWS * BLOCK,
        INTEGER_ROWS * ROW + 2 * numbers.candidates + SPARE + numbers.uncertain + 8,
    )


def _numbers(draw: Draw, points: Tensor | None = None) -> Numbers:
    used = draw.for_points(points)
    return Numbers(used.num_points, used.num_candidates, used.num_uncertain)


def uncertain_points(instances: Instances, draw: Draw, windows: Tensor, padding: str) -> Tensor:
    """Draw the points of all instances: float32 `[N, P, 2]`, the uncertain ones first."""
    logits, index, _ = instances
    numbers = _numbers(draw)
    points = np.empty((len(index), draw.num_points, POINT_COLUMNS), np.float32)
    drawn = (_array(windows), _array(draw.image_ids), int(draw.seed), numbers)
    args = (_describe(logits), _array(index), *drawn, is_border(padding), points)
    launch(instance_kernels.uncertain_points, len(index), _dtypes(logits[0]), _room(logits, numbers), args)
    return torch.from_numpy(points)


class _Corners(NamedTuple):
    """Where the kernels keep targets: codes for bits and labels, values for soft targets; the other one is empty."""

    codes: Array
    values: Array


def _corners(shape: tuple[int, int], encoding: str, dtype: type[np.floating[Any]]) -> _Corners:
    nothing = (shape[0], 0)
    soft = encoding == "values"
    return _Corners(np.empty(nothing if soft else shape, np.uint8), np.empty(shape if soft else nothing, dtype))


def _loss_arguments(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[tuple[Any, ...], Numbers, Tensor | None]:
    """What both kernels of the loss take between the logits and their own; and what must stay alive meanwhile."""
    given, kept = _given(points)
    numbers = _numbers(draw, points)
    args = (_array(instances.rows), _encode(targets.data, targets.encoding), _array(targets.images))
    drawn = (_array(targets.windows), _array(draw.image_ids), int(draw.seed), given, numbers)
    return (*args, *drawn, term.border, term.nearest, float(term.alpha), float(term.gamma)), numbers, kept


def mask_loss(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy `[N]`, Dice `[N]`, chosen candidates as bits, and the target pixels at the points."""
    dtypes = _dtypes(instances.logits[0], points)
    shared, numbers, kept = _loss_arguments(instances, targets, draw, term, points)
    count, data = len(instances.rows), targets.data.contiguous()
    ce, dice = np.empty(count, dtypes[0]), np.empty(count, dtypes[0])
    chosen = np.empty((count, num_bytes(numbers.candidates)), np.uint8)
    corners = _corners((count, numbers.points), targets.encoding, dtypes[0])
    args = (_describe(instances.logits), data.data_ptr(), _absolute(targets.table, targets.images))
    args += (_array(targets.ignore), *shared, ce, dice, chosen, *corners)
    launch(instance_kernels.mask_loss, count, dtypes, _room(instances.logits, numbers), args)
    del kept
    saved = corners.values if targets.encoding == "values" else corners.codes
    return torch.from_numpy(ce), torch.from_numpy(dice), torch.from_numpy(chosen), torch.from_numpy(saved)


def mask_loss_backward(
    grads: Gradients,
    saved: Saved,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """Dense gradients of the logits; an empty tensor for each layer that needs none."""
    logits = instances.logits
    dtypes = _dtypes(logits[0], points)
    found = [
        _zeros(layer.shape if need else (0,), layer.dtype, sparse=2 * count < layer.shape[0] * layer.shape[1])
        for layer, need, count in zip(logits, needs_grad, instances.layer_sizes, strict=True)
    ]
    if not any(needs_grad):
        return found
    shared, numbers, kept = _loss_arguments(instances, targets, draw, term, points)
    corners = _corners((0, numbers.points), targets.encoding, dtypes[0])
    kind = "values" if targets.encoding == "values" else "codes"
    corners = corners._replace(**{kind: _array(saved.corners)})
    order, starts = _by_plane(_array(instances.rows), logits[0], needs_grad)
    written = _describe([g if need else layer for g, layer, need in zip(found, logits, needs_grad, strict=True)])
    args = (_describe(logits), _array(targets.table), *shared)
    args += (_array(grads.ce), _array(grads.dice), _array(saved.chosen), *corners, order, starts, written)
    sizes = (
        2 * BLOCK + 6 * numbers.points + 2 * _largest(logits),
        POINT_ROWS * BLOCK,
        INTEGER_ROWS * ROW + numbers.points + numbers.uncertain + 8,
    )
    launch(instance_kernels.mask_loss_backward, len(starts) - 1, dtypes, sizes, args)
    del kept
    return found


def _by_plane(rows: Array, layer: Tensor, needs_grad: Sequence[bool]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Instances in the order of their planes, and where each plane starts; without layers that need no gradient."""
    batch, queries = layer.shape[:2]
    order, starts = _groups((rows[:, LAYER] * batch + rows[:, IMAGE]) * queries + rows[:, QUERY])
    needed = np.asarray(needs_grad, bool)[rows[order[starts[:-1]], LAYER]] if len(rows) else np.zeros(0, bool)
    if not needed.all():
        keep = np.repeat(needed, np.diff(starts))
        order, starts = order[keep], np.append(0, np.cumsum(np.diff(starts)[needed]))
    return order, starts


def match_cost(
    logits: Sequence[Tensor], num_targets: Sequence[int], targets: Targets, draw: Draw, term: Term
) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost of all pairs of all images and layers, `[L, B, Q, T_max]`."""
    dtypes, num_points = _dtypes(logits[0]), draw.num_points
    dtype = dtypes[0]
    batch, queries = logits[0].shape[:2]
    shape = (len(logits), batch, queries, max(num_targets, default=0))
    ce, dice = np.empty(shape, dtype), np.empty(shape, dtype)
    if ce.size == 0:
        return torch.from_numpy(ce), torch.from_numpy(dice)
    sizes, size_of = np.unique([t.shape[2:] for t in logits], axis=0, return_inverse=True)
    num_bands = match_kernels.bands_for(sizes, np.dtype(dtype).itemsize)
    bands = np.empty((batch, num_bands + 1), np.int64)
    points, weights, runs = _match_targets(num_targets, targets, draw, term, dtypes, bands)
    index = np.empty((batch, len(sizes), num_points), np.int32)
    fx, fy = (np.empty((batch, len(sizes), num_points), dtype) for _ in range(2))
    rows = np.empty((batch, len(sizes), num_bands, match_kernels.ROW_COLUMNS), np.int64)
    args = (points, bands, sizes.astype(np.int64), term.border, index, fx, fy, rows)
    launch(match_kernels.place_points, batch * len(sizes), dtypes, (0, 0, 0), args)
    planes = (_describe(logits), size_of.reshape(-1).astype(np.int64), rows, index, fx, fy, bands)
    highest = (rows[..., match_kernels.ROWS].max(axis=(0, 2)) + 1) * (sizes[:, 1] + 2 * BORDER)
    launch(
        match_kernels.match_cost,
        len(logits) * batch * queries,
        dtypes,
        (2 * (num_points + match_kernels.VECTOR) + int(highest.max()), 0, 0),
        (*planes, weights, _array(targets.images), *runs, float(term.alpha), float(term.gamma), ce, dice),
    )
    return torch.from_numpy(ce), torch.from_numpy(dice)


def _match_targets(
    num_targets: Sequence[int], targets: Targets, draw: Draw, term: Term, dtypes: Dtypes, bands: NDArray[np.int64]
) -> tuple[Array, Array, tuple[Array, ...]]:
    """What all planes share: points `[B, 2, P]`, weights `[B, P]`, and each target as runs of sorted points.

    Fills `bands` with the first point of each band. The runs of target t are `starts[t]` to `starts[t + 1]`: their
    first points, lengths and offsets into the values, the values, and the sum of each target's values.
    """
    batch, num_bands, num_points, dtype = len(num_targets), bands.shape[1] - 1, draw.num_points, dtypes[0]
    data = targets.data.contiguous()
    table = _absolute(targets.table, targets.images)
    points = np.empty((batch, POINT_COLUMNS, num_points), dtypes[1])
    weights = np.empty((batch, num_points), dtype)
    args: tuple[Any, ...] = (_array(draw.image_ids), int(draw.seed), _array(targets.windows), _array(targets.images))
    args += (_array(targets.ignore), num_points, num_bands, points, weights, bands)
    launch(match_kernels.draw, batch, dtypes, (0, 0, 4 * num_points), args)
    owner = np.repeat(np.arange(batch), num_targets)
    first, length = np.empty((2, len(table), num_bands), np.int64)
    room = int(np.diff(bands).max()) + match_kernels.VECTOR + GROUP
    args = (points, bands, table, term.border, owner, first, length)
    launch(match_kernels.find_runs, len(table), dtypes, (0, 0, 2 * room), args)
    offset = np.cumsum(length).reshape(length.shape) - length
    shares, sums = np.empty(int(length.sum()), dtype), np.empty(len(table), dtype)
    args = (points, weights, table, data.data_ptr(), _encode(data, targets.encoding), term.border, term.nearest)
    args += (bands, owner, first, length, offset, shares, sums)
    launch(match_kernels.fill_runs, len(table), dtypes, (3 * room, 2 * room, 3 * room), args)
    real = length > 0
    starts = np.append(0, np.cumsum(real.sum(axis=1)))
    return points, weights, (starts, first[real], length[real], offset[real], shares, sums)
