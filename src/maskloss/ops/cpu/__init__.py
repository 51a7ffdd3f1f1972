"""The operations on CPU tensors, as Numba kernels; `maskloss.ops.reference` defines what they compute."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskloss.ops.abi import POINT_COLUMNS, Draw, Instances, is_border, is_nearest

from . import instances as instance_kernels
from . import maps as map_kernels
from .arguments import array_of, describe, dtypes_of, given_rows, groups, numbers_of, room, zeros
from .matched import (
    mask_loss,
    mask_loss_ahead,
    mask_loss_backward,
    mask_loss_keeping,
    mask_loss_settle,
    plane_gradients,
)
from .pairs import match_cost, match_plan, row_costs, sample_features
from .sampling import BLOCK, buffer_size
from .threads import launch

__all__ = [
    "mask_loss",
    "mask_loss_ahead",
    "mask_loss_backward",
    "mask_loss_keeping",
    "mask_loss_settle",
    "match_cost",
    "match_plan",
    "plane_gradients",
    "point_sample",
    "point_sample_backward",
    "row_costs",
    "sample_features",
    "uncertain_points",
]


def point_sample(maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Read maps `[M, h, w]`, chosen by index `[N]`, at points `[N, P, 2]`: `[N, P]`."""
    dtypes = dtypes_of(maps, points)
    result = np.empty(points.shape[:2], dtypes[0])
    given, kept = given_rows(points)
    rows = array_of(index)
    order, starts = groups(rows)
    if result.size:
        args = (describe([maps[:, None]]), rows, order, starts, given, is_nearest(mode), is_border(padding), result)
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
            describe([result[:, None]]),
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
    args = (describe(logits), array_of(index), *drawn, is_border(padding), points)
    launch(instance_kernels.uncertain_points, len(index), dtypes_of(logits[0]), room(logits, numbers), args)
    return torch.from_numpy(points)
