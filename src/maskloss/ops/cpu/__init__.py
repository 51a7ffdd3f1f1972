"""The operations on CPU tensors, as Numba kernels; `maskloss.ops.reference` defines what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss._abi import (
    CROP_H,
    INDEX_COLUMNS,
    OFFSET,
    PLACE_COLUMNS,
    POINT_COLUMNS,
    STRIDE,
    Draw,
    Instances,
    is_border,
    is_nearest,
)

from . import hungarian, loss_kernels
from . import maps as map_kernels
from . import packing as packing_kernels
from .arguments import (
    Array,
    array_of,
    dtypes_of,
    given_rows,
    groups,
    mask_table,
    numbers_of,
    pixels_of,
    plane_table,
    work_space,
    zeros,
)
from .boxes import box_costs
from .cost import clip_costs, join_frames, match_cost, match_plan, row_costs, sample_features
from .loss import mask_loss, mask_loss_ahead, mask_loss_backward, mask_loss_settle, plane_gradients
from .planes import buffer_size
from .quality import quality_sums
from .sampling import BLOCK
from .scratch import Dtypes, Sizes
from .threads import launch

__all__ = [
    "assign", "box_costs", "clip_costs", "join_frames", "mask_loss", "mask_loss_ahead", "mask_loss_backward",
    "mask_loss_settle", "match_cost", "match_plan", "pack_masks", "plane_gradients", "point_sample",
    "point_sample_backward", "quality_sums", "row_costs",
    "sample_features", "uncertain_points",
]  # fmt: skip

# How many pixels of masks can be looked at while a cost is assigned (see `launch`).
_PIXELS_PER_COST = 70
# Of kernels that need no work space.
_NO_SCRATCH: tuple[Dtypes, Sizes] = (np.float32, np.float32), (0, 0, 0)


def pack_masks(images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[NDArray[np.int64], int]]]:
    """Pack the masks `[T, H, W]` of all images, bool or uint8, into bits, each cut to its box.

    Returns:
        The bytes of all boxes, uint8 `[n]`; for each image where its masks lie in its part, int64 `[T, 6]`, and how
        many bytes that part has.
    """
    arrays = [pixels_of(masks) for masks in images]
    counts = [len(array) for array in arrays]
    firsts = np.cumsum([0, *counts])
    table = mask_table(arrays, firsts[:-1])
    place = np.zeros((firsts[-1], PLACE_COLUMNS), np.int64)
    pixels = sum(array.size for array in arrays)
    launch(packing_kernels.find_boxes, len(place), *_NO_SCRATCH, (table, place), pixels)
    begins = np.append(0, np.cumsum(place[:, STRIDE] * place[:, CROP_H]))
    data = torch.from_numpy(np.empty(begins[-1], np.uint8))
    args = (table, place, begins, data.data_ptr())
    launch(packing_kernels.pack_boxes, len(place), *_NO_SCRATCH, args, 8 * len(data))
    bounds = begins[firsts]
    place[:, OFFSET] = begins[:-1] - np.repeat(bounds[:-1], counts)
    sizes = np.diff(bounds).tolist()
    return data, [(place[first : first + n], size) for first, n, size in zip(firsts, counts, sizes, strict=False)]


def assign(cost: Array, num_targets: Sequence[int]) -> NDArray[np.int64]:
    """Solve the assignments of all layers and images, from costs `[L, B, Q, T_max]`: int64 `[N, 4]`."""
    layers, batch, queries, _ = cost.shape
    counts = np.array(num_targets, np.int64)
    matched = np.tile(np.minimum(queries, counts), layers)
    firsts = np.cumsum(matched) - matched
    index = np.empty((int(matched.sum()), INDEX_COLUMNS), np.int64)
    dtypes = np.float64, np.float32 if cost.dtype == np.float32 else np.float64
    sizes = hungarian.work_space(queries, int(counts.max(initial=0)))
    args = (np.ascontiguousarray(cost), counts, firsts, index)
    launch(hungarian.assign, layers * batch, dtypes, sizes, args, _PIXELS_PER_COST * cost.size)
    return index


def point_sample(maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Read maps `[M, h, w]`, chosen by index `[N]`, at points `[N, P, 2]`: `[N, P]`."""
    dtypes = dtypes_of(maps, points)
    result = np.empty(points.shape[:2], dtypes[0])
    given, kept = given_rows(points)
    rows = array_of(index)
    order, starts = groups(rows)
    if result.size:
        args = (plane_table([maps[:, None]]), rows, order, starts, given, is_nearest(mode), is_border(padding), result)
        sizes = (2 * BLOCK + buffer_size(*maps.shape[1:]), 2 * BLOCK, BLOCK)
        launch(map_kernels.point_sample, len(starts) - 1, dtypes, sizes, args)
    del kept
    return torch.from_numpy(result)


def point_sample_backward(grad: Tensor, maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Scatter the gradient `[N, P]` of the values to the maps."""
    dtypes = dtypes_of(maps, points)
    result = zeros(maps.shape, maps.dtype)
    given, kept = given_rows(points)
    rows = array_of(index)
    order, starts = groups(rows)
    if grad.numel() and maps.numel():
        by_value = array_of(grad).astype(dtypes[0], copy=False)
        args = (
            rows,
            order,
            starts,
            given,
            is_nearest(mode),
            is_border(padding),
            by_value,
            plane_table([result[:, None]]),
        )
        sizes = (2 * BLOCK + buffer_size(*maps.shape[1:]), 2 * BLOCK, BLOCK)
        launch(map_kernels.point_sample_backward, len(starts) - 1, dtypes, sizes, args)
    del kept
    return result


def uncertain_points(instances: Instances, draw: Draw, windows: Tensor, padding: str) -> Tensor:
    """Draw the points of all instances: float32 `[N, P, 2]`, the uncertain ones first."""
    logits, index, _ = instances
    numbers = numbers_of(draw)
    points = np.empty((len(index), draw.num_points, POINT_COLUMNS), np.float32)
    drawn = (array_of(windows), array_of(draw.image_ids), int(draw.seed), numbers)
    args = (plane_table(logits), array_of(index), *drawn, is_border(padding), points)
    launch(loss_kernels.uncertain_points, len(index), dtypes_of(logits[0]), work_space(logits, numbers), args)
    return torch.from_numpy(points)
