"""The loss of matched instances on CPU tensors, and its gradient: in the backward pass, or ahead of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss._abi import FLOAT_CODES, IMAGE, LAYER, QUERY, Gradients, Instances, Job, Saved

from . import loss_kernels as kernels
from .arguments import (
    Array,
    array_of,
    check_sizes,
    dtypes_of,
    float_of,
    gradient_table,
    groups,
    loss_arguments,
    work_space,
    zeros,
)
from .planes import ADDRESS, DTYPE, GRADIENT_COLUMNS, HEIGHT, SOURCE_COLUMNS, STRIDE_B, STRIDE_Q, WIDTH
from .threads import launch


def mask_loss(instances: Instances, job: Job, *, keep: bool = False) -> tuple[Tensor, Tensor, Saved]:
    """Cross-entropy `[N]`, Dice `[N]`, and what the backward pass needs; `keep`: also without the logits."""
    count, nothing = len(instances.rows), np.empty(0, float_of(instances.logits[0].dtype))
    gradient = _Gradient(
        Planes(np.arange(count), np.arange(count + 1)), (nothing, nothing), np.empty((0, GRADIENT_COLUMNS), np.int64)
    )
    return _forward(instances, job, gradient, keep=keep)


def mask_loss_ahead(
    expected: Gradients, instances: Instances, job: Job, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor, Saved, list[Tensor]]:
    """As `mask_loss`, with the dense gradients of the logits for the expected gradients of the losses."""
    ahead, table = _new_gradients(instances, needs_grad)
    # The instances of a plane follow one another also where no gradient is needed.
    planes = by_plane(instances, [True] * len(instances.logits))
    return *_forward(instances, job, _Gradient(planes, _slopes(expected), table)), ahead


def mask_loss_settle(
    ahead: Sequence[Tensor],
    expected: Gradients,
    grads: Gradients,
    saved: Saved,
    instances: Instances,
    job: Job,
    needs_grad: Sequence[bool],
) -> None:
    """Turn gradients for the expected gradients of the losses into those for the real ones, in place."""
    factor = common_factor(expected, grads)
    if factor == 1.0:
        return
    if factor is None:
        written = _needed_table(ahead, needs_grad, [False] * len(ahead))
        _backward(saved, instances, job, _Gradient(by_plane(instances, needs_grad), _slopes(grads), written))
    else:
        scale_gradients(ahead, factor, instances, needs_grad)


def scale_gradients(ahead: Sequence[Tensor], factor: float, instances: Instances, needs_grad: Sequence[bool]) -> None:
    """Multiply the planes or volumes of instances, in gradients that were computed ahead."""
    planes = by_plane(instances, needs_grad)
    written = np.zeros((len(ahead), SOURCE_COLUMNS), np.int64)
    columns = [ADDRESS, DTYPE, HEIGHT, WIDTH, STRIDE_B, STRIDE_Q]
    for layer, grad in enumerate(ahead):
        if needs_grad[layer]:
            # As one row of pixels, so that planes and volumes are alike, and as large as they may be.
            code, size = FLOAT_CODES[grad.dtype], math.prod(grad.shape[2:])
            written[layer, columns] = grad.data_ptr(), code, 1, size, *grad.stride()[:2]
    args = (array_of(instances.rows), *planes, written, factor)
    launch(kernels.scale_planes, len(planes.starts) - 1, dtypes_of(instances.logits[0]), (0, 0, 0), args)


def mask_loss_backward(
    grads: Gradients, saved: Saved, instances: Instances, job: Job, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """Dense gradients of the logits; an empty tensor for each layer that needs none."""
    found, table = _new_gradients(instances, needs_grad)
    if any(needs_grad):
        _backward(saved, instances, job, _Gradient(by_plane(instances, needs_grad), _slopes(grads), table))
    return found


def plane_gradients(grads: Gradients, saved: Saved, instances: Instances, job: Job) -> None:
    """Overwrite the planes of instances, one each, with their gradients."""
    count = len(instances.rows)
    planes = Planes(np.arange(count), np.arange(count + 1))
    written = gradient_table(instances.logits, [False] * len(instances.logits))
    _backward(saved, instances, job, _Gradient(planes, _slopes(grads), written))


class Planes(NamedTuple):
    """The order of instances by their planes, and where each plane starts."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]


class _Gradient(NamedTuple):
    """Planes to work on, gradients of the losses, and the table of the gradients to write, or one without rows."""

    planes: Planes
    slopes: tuple[Array, Array]
    table: NDArray[np.int64]


def _slopes(grads: Gradients) -> tuple[Array, Array]:
    return array_of(grads.ce), array_of(grads.dice)


def _new_gradients(instances: Instances, needs_grad: Sequence[bool]) -> tuple[list[Tensor], NDArray[np.int64]]:
    """Gradients of all layers, empty for one that needs none, and their table."""
    check_sizes(instances.logits)
    sizes = instances.layer_sizes
    sparse = [2 * count < layer.shape[0] * layer.shape[1] for layer, count in zip(instances.logits, sizes, strict=True)]
    found = [
        zeros(layer.shape if need else (0,), layer.dtype, sparse=few)
        for layer, need, few in zip(instances.logits, needs_grad, sparse, strict=True)
    ]
    return found, _needed_table(found, needs_grad, sparse)


def _needed_table(grads: Sequence[Tensor], needs_grad: Sequence[bool], fresh: Sequence[bool]) -> NDArray[np.int64]:
    """As `gradient_table`; the row of a layer that needs no gradient is zeros."""
    table = np.zeros((len(grads), GRADIENT_COLUMNS), np.int64)
    needed = [layer for layer, need in enumerate(needs_grad) if need]
    if needed:
        table[needed] = gradient_table([grads[layer] for layer in needed], [fresh[layer] for layer in needed])
    return table


def _forward(
    instances: Instances, job: Job, gradient: _Gradient, *, keep: bool = False
) -> tuple[Tensor, Tensor, Saved]:
    dtype, device = instances.accumulation_dtype, instances.rows.device
    ce, dice, saved = job.new_losses(len(instances.rows), dtype, device, keep=keep)
    _run(instances, job, gradient, (False, array_of(ce), array_of(dice)), saved)
    return ce, dice, saved


def _backward(saved: Saved, instances: Instances, job: Job, gradient: _Gradient) -> None:
    """Write the gradients of planes. The losses are known: nothing is written there."""
    nothing = gradient.slopes[0][:0]
    _run(instances, job, gradient, (True, nothing, nothing), saved)


def _run(instances: Instances, job: Job, gradient: _Gradient, losses: tuple[Any, ...], saved: Saved) -> None:
    """Run the kernel of both passes. `losses`: whether they are known, and where they are written."""
    shared, numbers, alive = loss_arguments(instances, job)
    planes, slopes, written = gradient
    space = work_space(instances.logits, numbers, loss=True, ahead=len(written) > 0)
    args = (*shared, *losses, *map(array_of, saved), *planes, *slopes, written)
    launch(kernels.mask_loss, len(planes.starts) - 1, dtypes_of(instances.logits[0], job.points), space, args)
    del alive


def by_plane(instances: Instances, needs_grad: Sequence[bool]) -> Planes:
    """Planes of instances, without those of layers that need no gradient."""
    rows = array_of(instances.rows)
    batch, queries = instances.logits[0].shape[:2]
    order, starts = groups((rows[:, LAYER] * batch + rows[:, IMAGE]) * queries + rows[:, QUERY])
    needed = np.asarray(needs_grad, bool)[rows[order[starts[:-1]], LAYER]] if len(rows) else np.zeros(0, bool)
    if not needed.all():
        keep = np.repeat(needed, np.diff(starts))
        order, starts = order[keep], np.append(0, np.cumsum(np.diff(starts)[needed]))
    return Planes(order, starts)


def common_factor(expected: Gradients, grads: Gradients) -> float | None:
    """The number that all expected gradients have been multiplied with, up to rounding; None if there is none."""
    wanted, given = (np.concatenate([array_of(each) for each in pair]).astype(np.float64) for pair in (expected, grads))
    if not wanted.any():
        return None if given.any() else 1.0
    largest_one = np.abs(wanted).argmax()
    factor = float(given[largest_one] / wanted[largest_one])
    error = 4 * float(torch.finfo(expected.ce.dtype).eps)
    # With 0, an instance would be multiplied that must not even be looked at.
    same = factor != 0.0 and np.isfinite(given).all()
    if not same or (np.abs(given - factor * wanted) > error * np.abs(factor * wanted)).any():
        return None
    return 1.0 if abs(factor - 1.0) <= error else factor
