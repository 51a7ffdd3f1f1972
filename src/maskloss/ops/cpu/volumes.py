"""Volumes on CPU tensors: what their kernels take, and their launches; see `maskloss.ops.reference.volumes`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss._abi import (
    FLOAT_CODES,
    IMAGE,
    LAYER,
    QUERY,
    SOFT,
    Draw,
    Gradients,
    Instances,
    Job,
    Saved,
    Stack,
    is_stratified,
)
from maskloss.points import slabs_of

from . import volume_kernels as kernels
from .arguments import absolute, array_of, dtypes_of, encode, float_of, groups, zeros
from .blocks import SPARE
from .cost import Plan, row_costs
from .cost_kernels import VECTOR
from .sampling import BLOCK
from .threads import launch

# Logits at the matcher's points that exist at a time.
_SCRATCH_BYTES = 1 << 25


def _table(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    rows = [(each.data_ptr(), FLOAT_CODES[each.dtype], *each.shape[2:], *each.stride()) for each in tensors]
    return np.array(rows, np.int64).reshape(len(rows), kernels.SOURCE_COLUMNS)


def _boxes(draw: Draw, count: int) -> NDArray[np.int64]:
    """The boxes of this many points: cells, slabs, and the rows of a slab's narrow and wide; zeros: independent."""
    if not is_stratified(draw.layout):
        return np.zeros(4, np.int64)
    cells = max(count, 1)
    slabs = slabs_of(cells)
    return np.array([cells, slabs, math.isqrt(cells // slabs), math.isqrt(cells // slabs + 1)], np.int64)


def _run(
    instances: Instances, job: Job, stack: Stack, again: bool, results: tuple[Any, ...], planes: tuple[Any, ...]
) -> None:
    """Run the kernel of both passes on volumes; `planes` are the instances by volume, their slopes and gradients."""
    targets, draw, term = job.targets, job.drawn, job.term
    data = targets.data.contiguous()
    points, candidates, uncertain = draw.num_points, draw.num_candidates, draw.num_uncertain
    args: tuple[Any, ...] = (_table(instances.logits), data.data_ptr(), absolute(targets.table, targets.images))
    args += (array_of(instances.rows), encode(data, targets.encoding), array_of(targets.images))
    args += (array_of(targets.windows), array_of(draw.image_ids), int(draw.seed), (points, candidates, uncertain))
    args += (_boxes(draw, candidates), _boxes(draw, points - uncertain), stack.frames, stack.linear)
    sizes = (
        kernels.VALUE_ROWS * points + candidates,
        3 * max(points, BLOCK),
        kernels.INTEGER_ROWS * BLOCK + 2 * candidates + SPARE + uncertain + 8,
    )
    args += (float(term.alpha), float(term.gamma), term.dice_kind, again, *results, *planes)
    launch(kernels.volume_loss, len(planes[1]) - 1, dtypes_of(instances.logits[0]), sizes, args)


def volume_loss(instances: Instances, job: Job, stack: Stack) -> tuple[Tensor, Tensor, Saved]:
    """Cross-entropy `[N]`, Dice `[N]`, and what the backward pass needs."""
    count, dtype = len(instances.rows), instances.accumulation_dtype
    ce, dice, saved = job.new_losses(count, dtype, instances.rows.device, keep=False)
    nothing = np.empty(0, float_of(dtype))
    planes = (np.arange(count), np.arange(count + 1), nothing, nothing)
    results = tuple(map(array_of, (ce, dice, saved.chosen, saved.soft)))
    _run(instances, job, stack, False, results, (*planes, np.empty((0, kernels.SOURCE_COLUMNS), np.int64)))
    return ce, dice, saved


def volume_loss_backward(
    grads: Gradients, saved: Saved, instances: Instances, job: Job, stack: Stack, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """Dense gradients of the logits; an empty tensor for each layer that needs none."""
    layers = zip(instances.logits, needs_grad, strict=True)
    found = [zeros(layer.shape if need else (0,), instances.accumulation_dtype, sparse=True) for layer, need in layers]
    table = np.zeros((len(found), kernels.SOURCE_COLUMNS), np.int64)
    for number, need in enumerate(needs_grad):
        if need:
            table[number] = _table([found[number]])[0]
    if any(needs_grad):
        rows = array_of(instances.rows)
        batch, queries = instances.logits[0].shape[:2]
        order, starts = groups((rows[:, LAYER] * batch + rows[:, IMAGE]) * queries + rows[:, QUERY])
        needed = np.asarray(needs_grad, bool)[rows[order[starts[:-1]], LAYER]] if len(rows) else np.zeros(0, bool)
        keep = np.repeat(needed, np.diff(starts))
        order, starts = order[keep], np.append(0, np.cumsum(np.diff(starts)[needed]))
        slopes = array_of(grads.ce), array_of(grads.dice)
        # The losses are known: nothing is written there.
        results = (slopes[0][:0], slopes[0][:0], array_of(saved.chosen), array_of(saved.soft))
        _run(instances, job, stack, True, results, (order, starts, *slopes, table))
    return [grad.to(layer.dtype) for grad, layer in zip(found, instances.logits, strict=True)]


def volume_cost(logits: Sequence[Tensor], num_targets: Sequence[int], job: Job, stack: Stack) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost, `[L, B, Q, T_max]`, at P uniform points of each volume."""
    targets, draw = job.targets, job.draw
    batch, queries = logits[0].shape[:2]
    kind, widest = float_of(logits[0].dtype), max(num_targets, default=0)
    ce, dice = (torch.from_numpy(np.zeros((len(logits), batch, queries, widest), kind)) for _ in range(2))
    if ce.numel() == 0:
        return ce, dice
    dtypes, num_points = dtypes_of(logits[0]), draw.num_points
    points = np.empty((batch, 3, num_points), np.float32)
    args: tuple[Any, ...] = (array_of(draw.image_ids), int(draw.seed), array_of(targets.windows))
    args += (_boxes(draw, num_points), num_points, points)
    launch(kernels.matching_points, batch, dtypes, (0, 0, kernels.INTEGER_ROWS * BLOCK), args)
    plan = _plan(points, num_targets, job, stack, kind)
    part = max(1, _SCRATCH_BYTES // (batch * num_points * np.dtype(kind).itemsize))
    for number, layer in enumerate(logits):
        for first in range(0, queries, part):
            count = min(part, queries - first)
            sampled = np.empty((batch, count, num_points), kind)
            args = (_table([layer]), plan.points, first, stack.linear, sampled)
            launch(kernels.sample_volumes, batch * count, dtypes, (0, 0, 0), args)
            costs = row_costs(plan, torch.from_numpy(sampled), job.term)
            rows = slice(first, first + count)
            ce[number, :, rows], dice[number, :, rows] = costs
    return ce, dice


def _plan(points: NDArray[Any], num_targets: Sequence[int], job: Job, stack: Stack, kind: Any) -> Plan:
    """What all queries and layers of a volume share; its points are sorted along z, then y, for the caches' sake."""
    targets = job.targets
    batch, num_points = points.shape[0], points.shape[2]
    order = np.argsort((points[:, 2] * 256).astype(np.int64) * 256 + (points[:, 1] * 256).astype(np.int64), axis=1)
    points = np.ascontiguousarray(np.take_along_axis(points, order[:, None], axis=2))
    data, rows = targets.data.contiguous(), sum(num_targets)
    # Each target is one run of all points, filled up with zeros to whole vectors.
    padded = -(-num_points // VECTOR) * VECTOR
    t = np.zeros((rows, padded), kind)
    owner = np.repeat(np.arange(batch), num_targets)
    args: tuple[Any, ...] = (points, owner, absolute(targets.table, targets.images), stack.frames, data.data_ptr())
    args += (encode(data, targets.encoding), stack.linear, t)
    dtypes = (kind, np.float32)
    launch(kernels.matching_targets, rows, dtypes, (0, 0, 0), args)
    runs = (np.arange(rows + 1), np.zeros(rows, np.int64), np.full(rows, padded), padded * np.arange(rows))
    weights = np.ones((batch, num_points), kind)
    counts = np.full(batch, num_points, kind)
    shares, sums = t.reshape(-1), (t * t if job.term.dice_kind == SOFT else t).sum(axis=1)
    widest = max(num_targets)
    bands = np.zeros((batch, 1), np.int64)
    return Plan(points, bands, weights, counts, array_of(targets.images), (*runs, shares, sums), dtypes, widest)
