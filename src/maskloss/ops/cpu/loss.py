"""The loss of matched instances on CPU tensors, and its gradient: in the backward pass, or ahead of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss._abi import (
    IMAGE,
    LAYER,
    QUERY,
    Draw,
    Gradients,
    Instances,
    Kept,
    Saved,
    Targets,
    Term,
    num_bytes,
)

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
from .planes import GRADIENT_COLUMNS
from .threads import launch


def mask_loss(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy `[N]`, Dice `[N]`, and `Saved`: chosen candidates as bits, and soft targets at the points."""
    ce, dice, kept = _forward(instances, targets, draw, term, points)
    return ce, dice, kept.chosen, kept.soft


def mask_loss_keeping(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[Tensor, Tensor, Kept]:
    """As `mask_loss`, with the logits at the points among what the backward pass needs."""
    return _forward(instances, targets, draw, term, points, keep=True)


def mask_loss_ahead(
    expected: Gradients,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """As `mask_loss`, with the dense gradients of the logits for the expected gradients of the losses."""
    ahead = _new_gradients(instances, needs_grad)
    ce, dice, kept = _forward(instances, targets, draw, term, points, expected=expected, ahead=ahead)
    return ce, dice, kept.chosen, kept.soft, ahead.tensors


def mask_loss_settle(
    ahead: Sequence[Tensor],
    expected: Gradients,
    grads: Gradients,
    saved: Saved,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    needs_grad: Sequence[bool],
) -> None:
    """Turn gradients for the expected gradients of the losses into those for the real ones, in place."""
    factor = common_factor(expected, grads)
    if factor == 1.0:
        return
    planes = _by_plane(array_of(instances.rows), instances.logits[0], needs_grad)
    written = _needed_table(ahead, needs_grad, [False] * len(ahead))
    if factor is None:
        kept = Kept(*saved, grads.ce.new_empty(len(grads.ce), 0))
        _backward(grads, kept, instances, targets, draw, term, points, planes, written)
    else:
        args = (array_of(instances.rows), *planes, written, factor)
        launch(kernels.scale_planes, len(planes[1]) - 1, dtypes_of(instances.logits[0]), (0, 0, 0), args)


class _NewGradients(NamedTuple):
    """Gradients of all layers, empty for one that needs none, and their table."""

    tensors: list[Tensor]
    table: NDArray[np.int64]


def _new_gradients(instances: Instances, needs_grad: Sequence[bool]) -> _NewGradients:
    check_sizes(instances.logits)
    sizes = instances.layer_sizes
    sparse = [2 * count < layer.shape[0] * layer.shape[1] for layer, count in zip(instances.logits, sizes, strict=True)]
    found = [
        zeros(layer.shape if need else (0,), layer.dtype, sparse=few)
        for layer, need, few in zip(instances.logits, needs_grad, sparse, strict=True)
    ]
    return _NewGradients(found, _needed_table(found, needs_grad, sparse))


def _needed_table(grads: Sequence[Tensor], needs_grad: Sequence[bool], fresh: Sequence[bool]) -> NDArray[np.int64]:
    """As `gradient_table`; the row of a layer that needs no gradient is zeros."""
    table = np.zeros((len(grads), GRADIENT_COLUMNS), np.int64)
    needed = [layer for layer, need in enumerate(needs_grad) if need]
    if needed:
        table[needed] = gradient_table([grads[layer] for layer in needed], [fresh[layer] for layer in needed])
    return table


def _forward(
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    *,
    keep: bool = False,
    expected: Gradients | None = None,
    ahead: _NewGradients | None = None,
) -> tuple[Tensor, Tensor, Kept]:
    count, used = len(instances.rows), draw.for_points(points)
    kind = float_of(instances.logits[0].dtype)
    ce, dice = np.empty(count, kind), np.empty(count, kind)
    chosen = np.empty((count, num_bytes(used.num_candidates)), np.uint8)
    soft = np.empty((count, draw.num_points if targets.encoding == "values" else 0), kind)
    logits = np.empty((count, draw.num_points if keep else 0), kind)
    if expected is None or ahead is None:
        planes, slopes = (np.arange(count), np.arange(count + 1)), (ce[:0], dice[:0])
        written = np.empty((0, GRADIENT_COLUMNS), np.int64)
    else:
        # Those of a plane follow one another also where no gradient is needed.
        planes = _by_plane(array_of(instances.rows), instances.logits[0], [True] * len(instances.logits))
        slopes, written = (array_of(expected.ce), array_of(expected.dice)), ahead.table
    results = (False, ce, dice, chosen, soft, logits, *planes, *slopes, written)
    _run(instances, targets, draw, term, points, results, len(planes[1]) - 1, ahead is not None)
    return torch.from_numpy(ce), torch.from_numpy(dice), Kept(*map(torch.from_numpy, (chosen, soft, logits)))


def _run(
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    results: tuple[Any, ...],
    items: int,
    gradient: bool,
) -> None:
    """Run the kernel of both passes on `items` planes. `results` are what it takes behind its options."""
    shared, numbers, alive = loss_arguments(instances, targets, draw, term, points)
    space = work_space(instances.logits, numbers, loss=True, ahead=gradient)
    launch(kernels.mask_loss, items, dtypes_of(instances.logits[0], points), space, (*shared, *results))
    del alive


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
    found = _new_gradients(instances, needs_grad)
    if any(needs_grad):
        kept = Kept(*saved, grads.ce.new_empty(len(grads.ce), 0))
        planes = _by_plane(array_of(instances.rows), instances.logits[0], needs_grad)
        _backward(grads, kept, instances, targets, draw, term, points, planes, found.table)
    return found.tensors


def plane_gradients(
    grads: Gradients,
    kept: Kept,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
) -> None:
    """Overwrite the planes of instances, one each, with their gradients."""
    count = len(instances.rows)
    planes = np.arange(count), np.arange(count + 1)
    written = gradient_table(instances.logits, [False] * len(instances.logits))
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
    slopes = array_of(grads.ce), array_of(grads.dice)
    # The losses are known: nothing is written there.
    results = (True, slopes[0][:0], slopes[0][:0], *map(array_of, kept), *planes, *slopes, written)
    _run(instances, targets, draw, term, points, results, len(planes[1]) - 1, True)


def _by_plane(rows: Array, layer: Tensor, needs_grad: Sequence[bool]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Instances in the order of their planes, and where each plane starts; without layers that need no gradient."""
    batch, queries = layer.shape[:2]
    order, starts = groups((rows[:, LAYER] * batch + rows[:, IMAGE]) * queries + rows[:, QUERY])
    needed = np.asarray(needs_grad, bool)[rows[order[starts[:-1]], LAYER]] if len(rows) else np.zeros(0, bool)
    if not needed.all():
        keep = np.repeat(needed, np.diff(starts))
        order, starts = order[keep], np.append(0, np.cumsum(np.diff(starts)[needed]))
    return order, starts


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
