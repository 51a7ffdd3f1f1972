"""Volumes on CPU tensors: what their kernels take, and their launches; see `maskloss.ops.reference.volumes`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss._abi import FLOAT_CODES, Draw, Gradients, Instances, Job, Saved, Stack, is_stratified
from maskloss.errors import Cause
from maskloss.points import Boxes

from . import volume_kernels as kernels
from .arguments import HUGE_PAGE, absolute, array_of, encode, float_of, given_rows, zeros
from .blocks import SPARE
from .cost_kernels import VECTOR
from .loss import Planes, by_plane, common_factor, scale_gradients
from .sampling import BLOCK
from .scratch import Dtypes
from .threads import launch
from .volume_sampling import DEPTH, HEIGHT, PLAIN, SOURCE_COLUMNS, WIDTH

_MOST_VOXELS = 2**31 - 1
# Logits at the matcher's points that a thread holds at a time: they should fit into the second-level cache.
_TOGETHER_BYTES = 1 << 19
# Slabs of slices into which the matcher's points are sorted.
_SLABS = 64


def _table(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    """One row per tensor `[B, Q, d, h, w]`, in the order of `volume_sampling.ADDRESS` to `PLAIN`."""
    rows = []
    for each in tensors:
        if math.prod(each.shape[2:]) > _MOST_VOXELS:
            raise Cause(
                "volumes of the CPU kernels must have fewer than 2**31 voxels",
                f"{' x '.join(map(str, each.shape[2:]))}",
                'backend="reference" has no such limit, but copies every volume that it reads',
            )
        reach = sum((size - 1) * step for size, step in zip(each.shape[2:], each.stride()[2:], strict=True))
        plain = each.dtype in (torch.float32, torch.float64) and each.stride(4) == 1 and reach <= _MOST_VOXELS
        rows.append((each.data_ptr(), FLOAT_CODES[each.dtype], *each.shape[2:], *each.stride(), plain))
    return np.array(rows, np.int64).reshape(len(rows), SOURCE_COLUMNS)


def _dtypes(logits: Sequence[Tensor]) -> Dtypes:
    """Element types of work spaces. Coordinates are doubles, so that given points of either type need one kernel."""
    return float_of(logits[0].dtype), np.float64


def _copied(sources: NDArray[np.int64]) -> int:
    """Voxels of the largest volume that is copied before it is read."""
    return max((int(row[DEPTH] * row[HEIGHT] * row[WIDTH]) for row in sources if not row[PLAIN]), default=0)


def _boxes(draw: Draw, count: int) -> Boxes:
    """The boxes of this many points; no cells where points are independent."""
    return Boxes.of(count) if is_stratified(draw.layout) else Boxes(0, 0, 0, 0, 0, 0)


def _reading(job: Job, stack: Stack) -> kernels.Reading:
    return kernels.Reading(stack.frames, stack.linear, job.term.border, job.term.nearest)


def _run(
    instances: Instances, job: Job, stack: Stack, losses: tuple[Any, ...], saved: Saved, planes: Planes,
    slopes: tuple[Any, Any], written: NDArray[np.int64],
) -> None:  # fmt: skip
    """Run the kernel of both passes. `losses`: whether they are known, and where they are written."""
    targets, draw, term = job.targets, job.drawn, job.term
    sources, data = _table(instances.logits), targets.data.contiguous()
    given, alive = given_rows(job.points)
    points, candidates, uncertain = draw.num_points, draw.num_candidates, draw.num_uncertain
    numbers = kernels.Numbers(points, candidates, uncertain, _boxes(draw, candidates), _boxes(draw, points - uncertain))
    args: tuple[Any, ...] = (sources, data.data_ptr(), absolute(targets.table, targets.images))
    args += (
        array_of(targets.ignore),
        array_of(instances.rows),
        encode(data, targets.encoding),
        array_of(targets.images),
    )
    args += (array_of(targets.windows), array_of(draw.image_ids), int(draw.seed), given, numbers, _reading(job, stack))
    width = points if len(written) else BLOCK
    sizes = (
        kernels.VALUE_ROWS * BLOCK + kernels.GRADIENT_ROWS * width + candidates + _copied(sources),
        kernels.POINT_ROWS * BLOCK,
        kernels.INTEGER_ROWS * BLOCK + kernels.PLACE_ROWS * width + 2 * candidates + SPARE + uncertain + 8,
    )
    args += (float(term.alpha), float(term.gamma), term.dice_kind, *losses, array_of(saved.chosen))
    args += (array_of(saved.soft), *planes, *slopes, written)
    launch(kernels.volume_loss, len(planes.starts) - 1, _dtypes(instances.logits), sizes, args)
    del alive


def _forward(
    instances: Instances, job: Job, stack: Stack, planes: Planes, slopes: tuple[Any, Any], written: NDArray[np.int64]
) -> tuple[Tensor, Tensor, Saved]:
    dtype, device = instances.accumulation_dtype, instances.rows.device
    ce, dice, saved = job.new_losses(len(instances.rows), dtype, device, keep=False)
    _run(instances, job, stack, (False, array_of(ce), array_of(dice)), saved, planes, slopes, written)
    return ce, dice, saved


def volume_loss(instances: Instances, job: Job, stack: Stack) -> tuple[Tensor, Tensor, Saved]:
    """Cross-entropy `[N]`, Dice `[N]`, and what the backward pass needs."""
    count, nothing = len(instances.rows), np.empty(0, float_of(instances.logits[0].dtype))
    planes = Planes(np.arange(count), np.arange(count + 1))
    return _forward(instances, job, stack, planes, (nothing, nothing), np.empty((0, SOURCE_COLUMNS), np.int64))


def volume_loss_ahead(
    expected: Gradients, instances: Instances, job: Job, stack: Stack, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor, Saved, list[Tensor]]:
    """As `volume_loss`, with the dense gradients of the logits for the expected gradients of the losses."""
    ahead, written = _new_gradients(instances, needs_grad)
    planes = by_plane(instances, [True] * len(instances.logits))
    slopes = array_of(expected.ce), array_of(expected.dice)
    return *_forward(instances, job, stack, planes, slopes, written), ahead


def volume_loss_settle(
    ahead: list[Tensor],
    expected: Gradients,
    grads: Gradients,
    saved: Saved,
    instances: Instances,
    job: Job,
    stack: Stack,
    needs_grad: Sequence[bool],
) -> None:
    """Turn gradients for the expected gradients of the losses into those for the real ones."""
    factor = common_factor(expected, grads)
    if factor is None:
        ahead.clear()  # so that there is room for the new ones
        ahead += volume_loss_backward(grads, saved, instances, job, stack, needs_grad)
    elif factor != 1.0:
        scale_gradients(ahead, factor, instances, needs_grad)


def volume_loss_backward(
    grads: Gradients, saved: Saved, instances: Instances, job: Job, stack: Stack, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """Dense gradients of the logits; an empty tensor for each layer that needs none."""
    found, written = _new_gradients(instances, needs_grad)
    if any(needs_grad):
        slopes = array_of(grads.ce), array_of(grads.dice)
        # The losses are known: nothing is written there.
        losses = True, slopes[0][:0], slopes[0][:0]
        _run(instances, job, stack, losses, saved, by_plane(instances, needs_grad), slopes, written)
    return [grad.to(layer.dtype) for grad, layer in zip(found, instances.logits, strict=True)]


def _new_gradients(instances: Instances, needs_grad: Sequence[bool]) -> tuple[list[Tensor], NDArray[np.int64]]:
    """Zeros for all layers, in the type of sums, empty for a layer that needs no gradient; and their table."""
    dtype, found = instances.accumulation_dtype, []
    for layer, count, need in zip(instances.logits, instances.layer_sizes, needs_grad, strict=True):
        # A volume of many pages wastes few of the huge ones, however few of its neighbors are written.
        few = 2 * count < layer.shape[0] * layer.shape[1] and math.prod(layer.shape[2:]) * dtype.itemsize < HUGE_PAGE
        found.append(zeros(layer.shape if need else (0,), dtype, sparse=few))
    written = np.zeros((len(found), SOURCE_COLUMNS), np.int64)
    for number, need in enumerate(needs_grad):
        if need:
            written[number] = _table([found[number]])[0]
    return found, written


def volume_cost(logits: Sequence[Tensor], num_targets: Sequence[int], job: Job, stack: Stack) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost, `[L, B, Q, T_max]`, at P uniform points of each volume."""
    targets, draw, term = job.targets, job.draw, job.term
    batch, queries = logits[0].shape[:2]
    kind, widest = float_of(logits[0].dtype), max(num_targets, default=0)
    ce, dice = (np.empty((len(logits), batch, queries, widest), kind) for _ in range(2))
    if ce.size:
        num_points, dtypes = draw.num_points, _dtypes(logits)
        points = np.empty((batch, 3, num_points), np.int32)
        weights, windows, images = (
            np.empty((batch, num_points), kind),
            array_of(targets.windows),
            array_of(targets.images),
        )
        args: tuple[Any, ...] = (array_of(draw.image_ids), int(draw.seed), _boxes(draw, num_points), num_points, _SLABS)
        args += (windows, images, stack.frames, array_of(targets.ignore), points, weights)
        launch(kernels.matching_points, batch, dtypes, (0, 3 * num_points, 7 * num_points), args)
        counts = np.maximum(weights.sum(axis=1), 1)
        runs = _runs(points, windows, weights, num_targets, job, stack)
        sources = _table(logits)
        copied, padded = _copied(sources), num_points + VECTOR
        together = 1 if copied else max(1, min(8, _TOGETHER_BYTES // (padded * ce.itemsize)))
        sizes = (
            kernels.VALUE_ROWS * BLOCK + (together + 1) * padded + copied,
            kernels.POINT_ROWS * BLOCK,
            kernels.INTEGER_ROWS * BLOCK,
        )
        args = (points, sources, windows, _reading(job, stack), together, weights, counts, images)
        args += (*runs, float(term.alpha), float(term.gamma), term.dice_kind, ce, dice)
        launch(kernels.match_volumes, len(logits) * batch * -(-queries // together), dtypes, sizes, args)
    return torch.from_numpy(ce), torch.from_numpy(dice)


def _runs(
    points: NDArray[Any], windows: NDArray[Any], weights: NDArray[Any], num_targets: Sequence[int], job: Job,
    stack: Stack,
) -> tuple[NDArray[Any], ...]:  # fmt: skip
    """Read the targets at the points, and list where they are not 0 (see `cost.Plan.runs`): runs of whole vectors."""
    targets, (batch, _, num_points) = job.targets, points.shape
    rows, vectors = sum(num_targets), -(-num_points // VECTOR)
    shares, sums = np.zeros((rows, vectors * VECTOR), weights.dtype), np.empty(rows, weights.dtype)
    active = np.zeros((rows, vectors + 2), bool)
    data = targets.data.contiguous()
    args: tuple[Any, ...] = (points, windows, np.repeat(np.arange(batch), num_targets))
    args += (absolute(targets.table, targets.images), data.data_ptr(), encode(data, targets.encoding))
    args += (_reading(job, stack), weights, job.term.dice_kind, shares, sums, active[:, 1:])
    sizes = (kernels.VALUE_ROWS * BLOCK, kernels.POINT_ROWS * BLOCK, kernels.INTEGER_ROWS * BLOCK)
    launch(kernels.matching_targets, rows, (weights.dtype.type, np.float64), sizes, args)
    row, vector = np.nonzero(active[:, 1:] != active[:, :-1])
    first, length = vector[::2] * VECTOR, (vector[1::2] - vector[::2]) * VECTOR
    starts = np.append(0, np.cumsum(np.bincount(row[::2], minlength=rows)))
    return starts, first, length, row[::2] * shares.shape[1] + first, shares.reshape(-1), sums
