"""The operations on CPU tensors, as Numba kernels; `reference.py` defines what they compute.

This file turns tensors into what the kernels take: tables of addresses, sizes and strides, so that one compiled kernel
serves every element type, memory layout and number of layers.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss._frames import BASE, COUNT, OFFSET

from . import _cpu_instances as instances
from . import _cpu_maps as maps_
from . import _cpu_match as matching
from ._cpu_choose import GROUP
from ._cpu_sampling import BF16, BLOCK, BORDER, F16, F32, F64, buffer_size
from ._cpu_targets import BITS, LABEL_I16, LABEL_I32, LABEL_I64, LABEL_U8, VALUES
from ._cpu_threads import Dtypes, launch

Array = NDArray[Any]

_FLOATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.float64: F64}
_LABELS = {torch.uint8: LABEL_U8, torch.int16: LABEL_I16, torch.int32: LABEL_I32, torch.int64: LABEL_I64}
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
    """One row per tensor `[B, Q, h, w]`: address, element type, h, w, strides in elements."""
    rows = [
        (t.data_ptr(), _FLOATS[t.dtype], t.shape[2], t.shape[3], t.stride(0), t.stride(1), t.stride(2), t.stride(3))
        for t in tensors
    ]
    return np.array(rows, np.int64).reshape(len(rows), 8)


def _encode(data: Tensor, encoding: str) -> int:
    if encoding == "bits":
        return BITS
    return _LABELS[data.dtype] if encoding == "labels" else VALUES + _FLOATS[data.dtype]


def _point_rows(points: Tensor | None) -> tuple[tuple[int, bool, int, int, int], Tensor | None]:
    """The caller's points for a kernel (address 0: none), and the tensor that must stay alive while it runs."""
    if points is None:
        return (0, False, 0, 0, 0), None
    if points.dtype not in (torch.float32, torch.float64):
        points = points.float()
    row, point, coordinate = points.stride()
    return (points.data_ptr(), points.dtype == torch.float64, row, point, coordinate), points


def _zeros(shape: Sequence[int], dtype: torch.dtype, sparse: bool = False) -> Tensor:
    """Zeros from the operating system's own zero pages: what is never written costs neither time nor memory.

    NumPy asks for huge pages, 2 MB each. They are right where most of the memory will be written; where only some
    planes will be (`sparse`), each write would clear the planes around it too, so these get ordinary pages.
    """
    if not sparse or not _own_pages(shape, dtype):
        return torch.from_numpy(np.zeros(tuple(shape), _STORAGE[dtype])).view(dtype)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def _own_pages(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a sparse gradient gets pages of its own."""
    return math.prod(shape) * dtype.itemsize >= _HUGE and hasattr(mmap, "MAP_PRIVATE")


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
    given, kept = _point_rows(points)
    rows = _array(index)
    order, starts = _groups(rows)
    if result.size:
        args = (_describe([maps[:, None]]), rows, order, starts, given, mode == "nearest", padding == "border", result)
        sizes = (2 * BLOCK + buffer_size(*maps.shape[1:]), 2 * BLOCK, BLOCK)
        launch(maps_.point_sample, len(starts) - 1, dtypes, sizes, args)
    del kept
    return torch.from_numpy(result)


def point_sample_backward(grad: Tensor, maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Scatter the gradient `[N, P]` of the values to the maps."""
    dtypes = _dtypes(maps, points)
    result = _zeros(maps.shape, maps.dtype)
    given, kept = _point_rows(points)
    rows = _array(index)
    order, starts = _groups(rows)
    if grad.numel() and maps.numel():
        by_value = _array(grad).astype(dtypes[0], copy=False)
        flags = (mode == "nearest", padding == "border")
        table = _describe([result[:, None]])
        args = (table, rows, order, starts, given, *flags, by_value, table)
        sizes = (2 * BLOCK + buffer_size(*maps.shape[1:]), 2 * BLOCK, BLOCK)
        launch(maps_.point_sample_backward, len(starts) - 1, dtypes, sizes, args)
    del kept
    return result


def uncertain_points(
    logits: Sequence[Tensor],
    index: Tensor,
    layer_sizes: Sequence[int],
    windows: Tensor,
    image_ids: Tensor,
    seed: Tensor,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    padding: str,
) -> Tensor:
    """Draw the points of all instances: float32 `[N, P, 2]`, the uncertain ones first."""
    dtypes = _dtypes(logits[0])
    candidates = num_candidates if num_uncertain else 0
    points = np.empty((len(index), num_points, 2), np.float32)
    args = (
        _describe(logits),
        _array(index),
        _array(windows),
        _array(image_ids),
        int(seed),
        (num_points, candidates, num_uncertain),
        padding == "border",
        points,
    )
    launch(instances.uncertain_points, len(index), dtypes, _room(logits, candidates, num_uncertain), args)
    return torch.from_numpy(points)


def _room(logits: Sequence[Tensor], candidates: int, num_uncertain: int) -> tuple[int, int, int]:
    return (
        instances.VALUE_ROWS * BLOCK + candidates + _largest(logits),
        instances.POINT_ROWS * BLOCK,
        instances.INTEGER_ROWS * instances.ROW + 2 * candidates + instances.SPARE + num_uncertain + 8,
    )


def mask_loss(
    logits: Sequence[Tensor],
    index: Tensor,
    layer_sizes: Sequence[int],
    targets: Sequence[Tensor],
    encoding: str,
    image_ids: Tensor,
    seed: Tensor,
    points: Tensor | None,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    padding: str,
    target_mode: str,
    focal_alpha: float,
    focal_gamma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy `[N]`, Dice `[N]`, chosen candidates as bits, and the target pixels at the points."""
    dtypes = _dtypes(logits[0], points)
    dtype = dtypes[0]
    count = len(index)
    uncertain = num_uncertain if points is None else 0
    candidates = num_candidates if uncertain else 0
    ce, dice = np.empty(count, dtype), np.empty(count, dtype)
    chosen = np.empty((count, (candidates + 7) // 8), np.uint8)
    codes, values = _corner_arrays(count, num_points, encoding, dtype)
    given, kept = _point_rows(points)
    data, table, images, windows, ignore = targets
    data = data.contiguous()
    args = (
        _describe(logits),
        _array(index),
        data.data_ptr(),
        _encode(data, encoding),
        _absolute(table, images),
        _array(images),
        _array(windows),
        _array(ignore),
        _array(image_ids),
        int(seed),
        given,
        (num_points, candidates, uncertain),
        padding == "border",
        target_mode == "nearest",
        float(focal_alpha),
        float(focal_gamma),
        ce,
        dice,
        chosen,
        codes,
        values,
    )
    launch(instances.mask_loss, count, dtypes, _room(logits, candidates, uncertain), args)
    del kept
    corners = values if encoding == "values" else codes
    return torch.from_numpy(ce), torch.from_numpy(dice), torch.from_numpy(chosen), torch.from_numpy(corners)


def _corner_arrays(count: int, num_points: int, encoding: str, dtype: type[np.floating[Any]]) -> tuple[Array, Array]:
    """Where the kernels keep targets: codes for bits and labels, values for soft targets; the other one is empty."""
    soft = encoding == "values"
    codes = np.empty((count, 0 if soft else num_points), np.uint8)
    return codes, np.empty((count, num_points if soft else 0), dtype)


def mask_loss_backward(
    grad_ce: Tensor,
    grad_dice: Tensor,
    chosen: Tensor,
    corners: Tensor,
    needs_grad: Sequence[bool],
    logits: Sequence[Tensor],
    index: Tensor,
    layer_sizes: Sequence[int],
    targets: Sequence[Tensor],
    encoding: str,
    image_ids: Tensor,
    seed: Tensor,
    points: Tensor | None,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    padding: str,
    target_mode: str,
    focal_alpha: float,
    focal_gamma: float,
) -> list[Tensor]:
    """Dense gradients of the logits; an empty tensor for each layer that needs none."""
    dtypes = _dtypes(logits[0], points)
    sparse = [2 * count < layer.shape[0] * layer.shape[1] for layer, count in zip(logits, layer_sizes, strict=True)]
    grads = [
        _zeros(layer.shape if need else (0,), layer.dtype, sparse=few)
        for layer, need, few in zip(logits, needs_grad, sparse, strict=True)
    ]
    if not any(needs_grad):
        return grads
    uncertain = num_uncertain if points is None else 0
    codes, values = _corner_arrays(0, num_points, encoding, dtypes[0])
    codes, values = (codes, _array(corners)) if encoding == "values" else (_array(corners), values)
    given, kept = _point_rows(points)
    data, table, images, windows, ignore = targets
    rows = _array(index)
    batch, queries = logits[0].shape[:2]
    order, starts = _groups((rows[:, 0] * batch + rows[:, 1]) * queries + rows[:, 2])
    needed = np.asarray(needs_grad, bool)[rows[order[starts[:-1]], 0]] if len(rows) else np.zeros(0, bool)
    if not needed.all():
        keep = np.repeat(needed, np.diff(starts))
        order, starts = order[keep], np.append(0, np.cumsum(np.diff(starts)[needed]))
    args = (
        _describe(logits),
        rows,
        _encode(data, encoding),
        _array(table),
        _array(images),
        _array(windows),
        _array(ignore),
        _array(image_ids),
        int(seed),
        given,
        (num_points, 0, uncertain),
        padding == "border",
        target_mode == "nearest",
        float(focal_alpha),
        float(focal_gamma),
        _array(grad_ce),
        _array(grad_dice),
        _array(chosen),
        codes,
        values,
        order,
        starts,
        _describe_gradients(grads, logits, needs_grad, sparse),
    )
    sizes = (
        2 * BLOCK + 6 * num_points + 2 * _largest(logits),
        instances.POINT_ROWS * BLOCK,
        instances.INTEGER_ROWS * instances.ROW + num_points + uncertain + 8,
    )
    launch(instances.mask_loss_backward, len(starts) - 1, dtypes, sizes, args)
    del kept
    return grads


def _describe_gradients(
    grads: Sequence[Tensor], logits: Sequence[Tensor], needs_grad: Sequence[bool], sparse: Sequence[bool]
) -> NDArray[np.int64]:
    """As `_describe`, with the column MADVISE: planes in ordinary pages get theirs all at once."""
    table = _describe([grad if need else layer for grad, layer, need in zip(grads, logits, needs_grad, strict=True)])
    fresh = [
        _madvise() if few and need and _own_pages(grad.shape, grad.dtype) else 0
        for grad, need, few in zip(grads, needs_grad, sparse, strict=True)
    ]
    return np.column_stack([table, np.array(fresh, np.int64)])


@cache
def _madvise() -> int:
    """Where the C library's `madvise` is; 0 on systems without the advice that is wanted."""
    if not sys.platform.startswith("linux"):
        return 0
    function = getattr(ctypes.CDLL(None), "madvise", None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


def match_cost(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    encoding: str,
    num_targets: Sequence[int],
    image_ids: Tensor,
    seed: Tensor,
    num_points: int,
    padding: str,
    target_mode: str,
    focal_alpha: float,
    focal_gamma: float,
) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost of all pairs of all images and layers, `[L, B, Q, T_max]`."""
    dtypes = _dtypes(logits[0])
    dtype = dtypes[0]
    batch, queries = logits[0].shape[:2]
    shape = (len(logits), batch, queries, max(num_targets, default=0))
    ce, dice = np.empty(shape, dtype), np.empty(shape, dtype)
    if ce.size == 0:
        return torch.from_numpy(ce), torch.from_numpy(dice)
    sizes, size_of = np.unique([t.shape[2:] for t in logits], axis=0, return_inverse=True)
    num_bands = matching.bands_for(sizes, np.dtype(dtype).itemsize)
    bands = np.empty((batch, num_bands + 1), np.int64)
    points, weights, runs = _match_targets(
        targets, encoding, num_targets, image_ids, seed, num_points, padding == "border", target_mode, dtypes, bands
    )
    index = np.empty((batch, len(sizes), num_points), np.int32)
    fx, fy = (np.empty((batch, len(sizes), num_points), dtype) for _ in range(2))
    rows = np.empty((batch, len(sizes), num_bands, 2), np.int64)
    args = (points, bands, sizes.astype(np.int64), padding == "border", index, fx, fy, rows)
    launch(matching.place_points, batch * len(sizes), dtypes, (0, 0, 0), args)
    planes = (_describe(logits), size_of.reshape(-1).astype(np.int64), rows, index, fx, fy, bands)
    highest = (rows[..., 1].max(axis=(0, 2)) + 1) * (sizes[:, 1] + 2 * BORDER)
    launch(
        matching.match_cost,
        len(logits) * batch * queries,
        dtypes,
        (2 * (num_points + matching.VECTOR) + int(highest.max()), 0, 0),
        (*planes, weights, _array(targets[2]), *runs, float(focal_alpha), float(focal_gamma), ce, dice),
    )
    return torch.from_numpy(ce), torch.from_numpy(dice)


def _match_targets(
    targets: Sequence[Tensor],
    encoding: str,
    num_targets: Sequence[int],
    image_ids: Tensor,
    seed: Tensor,
    num_points: int,
    border: bool,
    target_mode: str,
    dtypes: Dtypes,
    bands: NDArray[np.int64],
) -> tuple[Array, Array, tuple[Array, ...]]:
    """What all planes share: points `[B, 2, P]`, weights `[B, P]`, and each target as runs of sorted points.

    Fills `bands` with the first point of each band. The runs of target t are `starts[t]` to `starts[t + 1]`: their
    first points, lengths and offsets into the values, the values, and the sum of each target's values.
    """
    batch, dtype = len(num_targets), dtypes[0]
    data = targets[0].contiguous()
    table = _absolute(*targets[1:3])
    images, windows, ignore = (_array(t) for t in targets[2:])
    points, weights = np.empty((batch, 2, num_points), dtypes[1]), np.empty((batch, num_points), dtype)
    args: tuple[Any, ...] = (_array(image_ids), int(seed), windows, images, ignore, num_points, bands.shape[1] - 1)
    launch(matching.draw, batch, dtypes, (0, 0, 4 * num_points), (*args, points, weights, bands))
    owner = np.repeat(np.arange(batch), num_targets)
    first, length = np.empty((2, len(table), bands.shape[1] - 1), np.int64)
    room = int(np.diff(bands).max()) + matching.VECTOR + GROUP
    launch(
        matching.find_runs, len(table), dtypes, (0, 0, 2 * room), (points, bands, table, border, owner, first, length)
    )
    offset = np.cumsum(length).reshape(length.shape) - length
    shares, sums = np.empty(int(length.sum()), dtype), np.empty(len(table), dtype)
    args = (points, weights, table, data.data_ptr(), _encode(data, encoding), border, target_mode == "nearest")
    args += (bands, owner, first, length, offset, shares, sums)
    launch(matching.fill_runs, len(table), dtypes, (3 * room, 2 * room, 3 * room), args)
    real = length > 0
    starts = np.append(0, np.cumsum(real.sum(axis=1)))
    return points, weights, (starts, first[real], length[real], offset[real], shares, sums)
