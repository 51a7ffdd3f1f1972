# mypy: allow-untyped-defs
"""The boxes' part of the matching cost on CPU tensors, and its kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import array_of, float_of
from .compile import helper, kernel
from .memory import bare
from .threads import launch, take

# Of a target: center and size, the low and the high corner, and the area.
_ROWS = 9
# How many pixels of masks can be looked at while the boxes of a pair are compared (see `launch`).
_PER_PAIR = 4


@helper(forceinline=True)
def _span(low, high):
    zero = type(low)(0)
    return max(high - low, zero)


@kernel
def _box_costs(counter, items, values, _coordinates, _integers, boxes, targets, l1_weight, giou_weight, result):
    """`l1_weight * sum |box - target| - giou_weight * GIoU` of all pairs: `[B, Q, T]` from `[B, Q, 4]` and `[B, T, 4]`.

    A work item is an image of a layer.
    """
    values, boxes, targets, result = bare(values), bare(boxes), bare(targets), bare(result)
    queries, columns = result.shape[1], result.shape[2]
    parts = values[: _ROWS * columns].reshape(_ROWS, columns)
    x, y, w, h, left, top, right, bottom, areas = (
        parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], parts[7], parts[8],
    )  # fmt: skip
    kind = values.dtype.type
    half, tiny = kind(0.5), np.finfo(values.dtype).tiny
    by_l1, by_giou = kind(l1_weight), kind(giou_weight)
    while True:
        item = take(counter)
        if item >= items:
            break
        for t in range(columns):
            target = targets[item % targets.shape[0], t]
            x[t], y[t], w[t], h[t] = target[0], target[1], target[2], target[3]
            left[t], top[t] = x[t] - w[t] * half, y[t] - h[t] * half
            right[t], bottom[t] = x[t] + w[t] * half, y[t] + h[t] * half
            areas[t] = _span(kind(0), w[t]) * _span(kind(0), h[t])
        for q in range(queries):
            cx, cy, width, height = boxes[item, q, 0], boxes[item, q, 1], boxes[item, q, 2], boxes[item, q, 3]
            x0, y0, x1, y1 = cx - width * half, cy - height * half, cx + width * half, cy + height * half
            area = _span(kind(0), width) * _span(kind(0), height)
            costs = result[item, q]
            for t in range(columns):
                l1 = abs(cx - x[t]) + abs(cy - y[t]) + abs(width - w[t]) + abs(height - h[t])
                overlap = _span(max(x0, left[t]), min(x1, right[t])) * _span(max(y0, top[t]), min(y1, bottom[t]))
                union = max(area + areas[t] - overlap, tiny)
                hull = _span(min(x0, left[t]), max(x1, right[t])) * _span(min(y0, top[t]), max(y1, bottom[t]))
                hull = max(hull, tiny)
                costs[t] = by_l1 * l1 + by_giou * ((hull - union) / hull - overlap / union)


def box_costs(boxes: Tensor, targets: Tensor, l1_weight: float, giou_weight: float) -> Tensor:
    """The boxes' part of the matching cost, `[..., B, Q, T]`, from boxes `[..., B, Q, 4]` and targets `[B, T, 4]`."""
    given, dtype = array_of(boxes), float_of(boxes.dtype)
    result = np.empty((*given.shape[:-1], targets.shape[1]), dtype)
    if result.size:
        queries, columns = result.shape[-2:]
        args: tuple[Any, ...] = (given.reshape(-1, queries, 4), array_of(targets), float(l1_weight), float(giou_weight))
        args = (*args, result.reshape(-1, queries, columns))
        sizes = (_ROWS * columns, 0, 0)
        launch(_box_costs, len(args[0]), (dtype, dtype), sizes, args, _PER_PAIR * result.size)
    return torch.from_numpy(result)
