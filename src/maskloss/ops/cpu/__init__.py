"""The operations on CPU tensors, as Numba kernels; `maskloss.ops.reference` defines what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss.ops.abi import (
    CROP_H,
    IMAGE,
    LAYER,
    OFFSET,
    PLACE_COLUMNS,
    POINT_COLUMNS,
    QUERY,
    STRIDE,
    Draw,
    Gradients,
    Instances,
    Kept,
    Saved,
    Targets,
    Term,
    is_border,
    is_nearest,
    num_bytes,
)

from . import instances as instance_kernels
from . import maps as map_kernels
from . import packing as packing_kernels
from .arguments import (
    Array,
    absolute,
    array_of,
    corner_arrays,
    describe,
    describe_gradients,
    describe_masks,
    dtypes_of,
    given_rows,
    groups,
    largest,
    loss_arguments,
    numbers_of,
    pixels_of,
    room,
    zeros,
)
from .instances import INTEGER_ROWS, POINT_ROWS, ROW
from .pairs import match_cost, match_plan, row_costs, sample_features
from .sampling import BLOCK, buffer_size
from .threads import Dtypes, Sizes, launch

__all__ = [
    "mask_loss",
    "mask_loss_backward",
    "mask_loss_keeping",
    "match_cost",
    "match_plan",
    "pack_masks",
    "plane_gradients",
    "point_sample",
    "point_sample_backward",
    "row_costs",
    "sample_features",
    "uncertain_points",
]

# So many are packed in a fraction of a millisecond, and waking and awaiting other threads can take longer.
_FEW_PIXELS = 1 << 22
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
    table = describe_masks(arrays, firsts[:-1])
    place = np.zeros((firsts[-1], PLACE_COLUMNS), np.int64)
    few = sum(array.size for array in arrays) <= _FEW_PIXELS
    launch(packing_kernels.find_boxes, len(place), *_NO_SCRATCH, (table, place), alone=few)
    begins = np.append(0, np.cumsum(place[:, STRIDE] * place[:, CROP_H]))
    data = torch.from_numpy(np.empty(begins[-1], np.uint8))
    few = 8 * len(data) <= _FEW_PIXELS
    launch(packing_kernels.pack_boxes, len(place), *_NO_SCRATCH, (table, place, begins, data.data_ptr()), alone=few)
    bounds = begins[firsts]
    place[:, OFFSET] = begins[:-1] - np.repeat(bounds[:-1], counts)
    sizes = np.diff(bounds).tolist()
    return data, [(place[first : first + n], size) for first, n, size in zip(firsts, counts, sizes, strict=False)]


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


def mask_loss(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy `[N]`, Dice `[N]`, chosen candidates as bits, and the target pixels at the points."""
    ce, dice, kept = _forward(instances, targets, draw, term, points, keep=False)
    return ce, dice, kept.chosen, kept.corners


def mask_loss_keeping(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[Tensor, Tensor, Kept]:
    """As `mask_loss`, with the logits at the points among what the backward pass needs."""
    return _forward(instances, targets, draw, term, points, keep=True)


def _forward(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Kept]:
    dtypes = dtypes_of(instances.logits[0], points)
    shared, numbers, alive = loss_arguments(instances, targets, draw, term, points)
    count, data = len(instances.rows), targets.data.contiguous()
    ce, dice = np.empty(count, dtypes[0]), np.empty(count, dtypes[0])
    chosen = np.empty((count, num_bytes(numbers.candidates)), np.uint8)
    corners = corner_arrays((count, numbers.points), targets.encoding, dtypes[0])
    logits = np.empty((count if keep else 0, numbers.points), dtypes[0])
    args = (describe(instances.logits), data.data_ptr(), absolute(targets.table, targets.images))
    args += (array_of(targets.ignore), *shared, ce, dice, chosen, *corners, logits)
    launch(instance_kernels.mask_loss, count, dtypes, room(instances.logits, numbers), args)
    del alive
    saved = corners.values if targets.encoding == "values" else corners.codes
    return torch.from_numpy(ce), torch.from_numpy(dice), Kept(*map(torch.from_numpy, (chosen, saved, logits)))


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
    sizes = instances.layer_sizes
    sparse = [2 * count < layer.shape[0] * layer.shape[1] for layer, count in zip(logits, sizes, strict=True)]
    found = [
        zeros(layer.shape if need else (0,), layer.dtype, sparse=few)
        for layer, need, few in zip(logits, needs_grad, sparse, strict=True)
    ]
    if any(needs_grad):
        kept = Kept(*saved, grads.ce.new_empty(0, draw.num_points))
        written = [g if need else layer for g, layer, need in zip(found, logits, needs_grad, strict=True)]
        planes = _by_plane(array_of(instances.rows), logits[0], needs_grad)
        fresh = [few and need for few, need in zip(sparse, needs_grad, strict=True)]
        _backward(grads, kept, instances, targets, draw, term, points, planes, describe_gradients(written, fresh))
    return found


def plane_gradients(
    grads: Gradients,
    kept: Kept,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
) -> None:
    """Overwrite the planes of instances, each of which has one of its own, with their gradients."""
    count = len(instances.rows)
    planes = np.arange(count), np.arange(count + 1)
    written = describe_gradients(instances.logits, [False] * len(instances.logits))
    _backward(grads, kept, instances, targets, draw, term, points, planes, written)


def _backward(
    grads: Gradients,
    kept: Kept,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    planes: tuple[NDArray[np.int64], NDArray[np.int64]],
    written: NDArray[np.int64],
) -> None:
    """Write the gradients of planes; `planes` are the instances in their order, and where each plane starts."""
    logits = instances.logits
    dtypes = dtypes_of(logits[0], points)
    shared, numbers, alive = loss_arguments(instances, targets, draw, term, points)
    corners = corner_arrays((0, numbers.points), targets.encoding, dtypes[0])
    kind = "values" if targets.encoding == "values" else "codes"
    corners = corners._replace(**{kind: array_of(kept.corners)})
    args = (describe(logits), array_of(targets.table), *shared, array_of(grads.ce), array_of(grads.dice))
    args += (array_of(kept.chosen), *corners, array_of(kept.logits), *planes, written)
    sizes = (
        2 * BLOCK + 6 * numbers.points + 2 * largest(logits),
        POINT_ROWS * BLOCK,
        INTEGER_ROWS * ROW + numbers.points + numbers.uncertain + 8,
    )
    launch(instance_kernels.mask_loss_backward, len(planes[1]) - 1, dtypes, sizes, args)
    del alive


def _by_plane(rows: Array, layer: Tensor, needs_grad: Sequence[bool]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Instances in the order of their planes, and where each plane starts; without layers that need no gradient."""
    batch, queries = layer.shape[:2]
    order, starts = groups((rows[:, LAYER] * batch + rows[:, IMAGE]) * queries + rows[:, QUERY])
    needed = np.asarray(needs_grad, bool)[rows[order[starts[:-1]], LAYER]] if len(rows) else np.zeros(0, bool)
    if not needed.all():
        keep = np.repeat(needed, np.diff(starts))
        order, starts = order[keep], np.append(0, np.cumsum(np.diff(starts)[needed]))
    return order, starts
