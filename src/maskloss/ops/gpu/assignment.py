"""The Triton kernel of the assignment: shortest augmenting paths, one program for each problem.

The algorithm is that of `ops.cpu.hungarian`, in the same order of operations and in float64, so that the matches are
the same ones, also where several are equally good. A program keeps everything about rows and columns in registers, one
lane for each; a lookup by number is a sum over all lanes, where only one is not zero.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskloss import _abi as abi
from maskloss._abi import LARGEST_COST, count_matches, widest

from .launch import OPTIONS, empty, on_device
from .sampling import IMAGE, INDEX_COLUMNS, LAYER, QUERY, TARGET

COUNT: tl.constexpr = tl.constexpr(abi.COUNT)
FIRST: tl.constexpr = tl.constexpr(abi.FIRST)
IMAGE_COLUMNS: tl.constexpr = tl.constexpr(abi.IMAGE_COLUMNS)
LARGEST: tl.constexpr = tl.constexpr(LARGEST_COST)


@triton.jit
def at(values, lane, number):
    """values[number], of values that are spread over the lanes."""
    return tl.sum(tl.where(lane == number, values, 0))


@triton.jit
def load_row(base, lane, columns, stride, last):
    """The costs of a row in float64; those of broken pairs are above all assignments of the others."""
    value = tl.load(base + lane * stride, mask=lane < columns, other=0.0).to(tl.float64)
    return tl.where(tl.abs(value) <= LARGEST, value, last)


@triton.jit
def solve(base, rows, columns, stride_r, stride_c, WIDE: tl.constexpr):
    """Give every row one of the columns, no fewer, at the lowest total: the column of each row, the row of each column.

    One row after another gets its column along the shortest way, in costs less prices, from the row to a column that is
    free; the rows on the way move on to the next columns. Prices keep all ways at least 0 long.
    """
    lane = tl.arange(0, WIDE)
    inside = lane < columns
    largest = tl.full((), 0.0, tl.float64)
    for row in range(rows):
        value = load_row(base + row * stride_r, lane, columns, stride_c, 0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(value)))
    last = 1.0 + 2.0 * rows.to(tl.float64) * largest

    row_prices = tl.zeros((WIDE,), tl.float64)
    prices = tl.zeros((WIDE,), tl.float64)
    column_of = tl.full((WIDE,), -1, tl.int32)
    row_of = tl.full((WIDE,), -1, tl.int32)
    for start in range(rows):
        distance = tl.full((WIDE,), float("inf"), tl.float64)
        reached = tl.zeros((WIDE,), tl.float64)
        row_reached = tl.zeros((WIDE,), tl.float64)
        passed = lane < 0
        previous = tl.full((WIDE,), -1, tl.int32)
        # Where open columns stand in a list, whose order decides between columns that are equally near.
        place = columns - 1 - lane
        left = inside
        length = columns
        row = start
        lowest = tl.full((), 0.0, tl.float64)
        end = tl.full((), -1, tl.int32)
        while end < 0:
            costs = load_row(base + row * stride_r, lane, columns, stride_c, last)
            way = lowest + costs - at(row_prices, lane, row) - prices
            shorter = left & (way < distance)
            distance = tl.where(shorter, way, distance)
            previous = tl.where(shorter, row, previous)
            lowest = tl.min(tl.where(left, distance, float("inf")))
            # Of several a free one, the last in the list; where none is free, the first in the list.
            nearest = left & (distance == lowest)
            free = tl.max(tl.where(nearest & (row_of < 0), place, -1))
            spot = tl.where(free >= 0, free, tl.min(tl.where(nearest, place, WIDE)))
            column = tl.sum(tl.where(left & (place == spot), lane, 0))
            reached = tl.where(lane == column, lowest, reached)
            left = left & (lane != column)
            # The last one in the list takes the place of the one that leaves.
            length -= 1
            place = tl.where(place == length, spot, place)
            owner = at(row_of, lane, column)
            row_reached = tl.where(lane == owner, lowest, row_reached)
            passed = passed | (lane == owner)
            end = tl.where(owner < 0, column, -1)
            row = tl.where(owner < 0, row, owner)
        row_prices = tl.where(lane == start, row_prices + lowest, row_prices)
        row_prices = tl.where(passed, row_prices + (lowest - row_reached), row_prices)
        prices = tl.where(inside & (lane != end) & (left == 0), prices - (lowest - reached), prices)
        row = tl.full((), -1, tl.int32)
        while row != start:
            row = at(previous, lane, end)
            before = at(column_of, lane, row)
            row_of = tl.where(lane == end, row, row_of)
            column_of = tl.where(lane == row, end, column_of)
            end = before
    return column_of, row_of


@triton.jit
def assign_problem(
    cost, labels, images, index, wanted, batch, queries, groups, num_classes,
    stride_l, stride_b, stride_q, stride_t, BATCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows (layer, image, query, target) of all matches, and the class of each query. One program: a group of queries.

    `queries` are those of a group; the rows of an image are sorted by query.
    """
    program = tl.program_id(0)
    group = program % groups
    image = program // groups % batch
    layer = program // groups // batch
    targets = tl.load(images + image * IMAGE_COLUMNS + COUNT).to(tl.int32)
    others = tl.arange(0, BATCH)
    counts = tl.load(images + others * IMAGE_COLUMNS + COUNT, mask=others < batch, other=0)
    matched = tl.minimum(counts, queries) * groups
    place = (
        layer * tl.sum(matched) + tl.sum(tl.where(others < image, matched, 0)) + group * tl.minimum(targets, queries)
    )

    base = cost + layer.to(tl.int64) * stride_l + image.to(tl.int64) * stride_b
    base += (group * queries).to(tl.int64) * stride_q
    swapped = targets < queries
    rows, columns = tl.minimum(queries, targets), tl.maximum(queries, targets)
    stride_r, stride_c = tl.where(swapped, stride_t, stride_q), tl.where(swapped, stride_q, stride_t)
    column_of, row_of = solve(base, rows, columns, stride_r, stride_c, WIDE)

    lane = tl.arange(0, WIDE)
    target = tl.where(swapped, row_of, column_of).to(tl.int64)
    found = (lane < queries) & (target >= 0)
    row = index + (place + tl.cumsum(found.to(tl.int32)) - 1) * INDEX_COLUMNS
    query = group * queries + lane
    tl.store(row + LAYER, layer.to(tl.int64), mask=found)
    tl.store(row + IMAGE, image.to(tl.int64), mask=found)
    tl.store(row + QUERY, query.to(tl.int64), mask=found)
    tl.store(row + TARGET, target, mask=found)
    label = tl.full((WIDE,), 0, tl.int64) + num_classes
    if labels is not None:
        first = tl.load(images + image * IMAGE_COLUMNS + FIRST)
        label = tl.load(labels + first + target, mask=found, other=num_classes)
    tl.store(wanted + (layer * batch + image).to(tl.int64) * (groups * queries) + query, label, mask=lane < queries)


def assign(
    cost: Tensor, labels: Tensor, images: Tensor, num_targets: Sequence[int], num_classes: int, groups: int
) -> Tensor:
    """Match queries to targets; nothing waits for the device. See `ops.assign`."""
    cost = cost.contiguous()
    layers, batch, queries = cost.shape[:3]
    each = queries // groups
    rows = abi.INDEX_COLUMNS * layers * groups * count_matches(num_targets, each)
    answer = empty((rows + layers * batch * queries,), torch.int64, cost.device)
    wide = triton.next_power_of_2(max(each, widest(num_targets), 16))
    if answer.numel() == 0:
        return answer
    with on_device(cost):
        assign_problem[(layers * batch * groups,)](
            cost, labels.contiguous() if labels.numel() else None, images, answer, answer[rows:],
            batch, each, groups, num_classes, *cost.stride(),
            BATCH=triton.next_power_of_2(batch), WIDE=wide, **solver_options(wide),
        )  # fmt: skip
    return answer


def solver_options(wide: int) -> dict[str, Any]:
    """Launch options: a warp for every 256 lanes, as most of the time is spent on sums over all lanes."""
    return {**OPTIONS, "num_warps": max(1, wide // 256)}
