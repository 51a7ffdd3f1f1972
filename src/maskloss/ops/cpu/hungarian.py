# mypy: allow-untyped-defs
"""The CPU kernel of the assignment: shortest augmenting paths, all images and layers side by side.

The algorithm is the one of `scipy.optimize.linear_sum_assignment` (Crouse, 2016), in the same order of operations, so
that the matches are the same ones, also where several are equally good. It is faster, as distances to all columns are
updated by vectors and threads share the problems.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from maskloss._abi import IMAGE, LARGEST_COST, LAYER, QUERY, TARGET, price_of_broken

from .compile import helper, kernel
from .lanes import Code, words
from .memory import bare
from .threads import take

# Columns are taken this many at a time, padded with some that are never the nearest.
WIDE = 16

# Rows of work space that are as long as the longer side: numbers and integers.
_NUMBERS, _INTEGERS = 4, 5


def _filled(columns: int) -> int:
    return -(-columns // WIDE) * WIDE


_filled_up = helper()(_filled)
_price_of_broken = helper()(price_of_broken)


def work_space(queries: int, targets: int) -> tuple[int, int, int]:
    """Sizes of the work space for this many queries and (at most) targets."""
    short, long = min(queries, targets), _filled(max(queries, targets))
    return short * long + short + _NUMBERS * long, 0, short + _INTEGERS * long


@helper()
def _arrange(cost, rows, columns, transposed, table):
    """Copy costs `[Q, T]` to a table with the longer side across; broken pairs get a cost above all assignments."""
    table[:, columns:] = np.inf
    largest = 0.0
    for row in range(rows):
        for column in range(columns):
            value = np.float64(cost[column, row] if transposed else cost[row, column])
            table[row, column] = value
            if abs(value) <= LARGEST_COST:
                largest = max(largest, abs(value))
    last = _price_of_broken(rows, largest)
    for row in range(rows):
        for column in range(columns):
            if not abs(table[row, column]) <= LARGEST_COST:
                table[row, column] = last


@intrinsic
def _relax_lanes(
    typingctx: Any, costs: Any, base: Any, price: Any, prices: Any, row: Any, distance: Any, limit: Any, previous: Any,
    first: Any,
) -> Any:  # fmt: skip
    """`_relax` for WIDE columns from `first` on. Left to itself, LLVM takes the smallest value one by one."""
    double, integers = ir.DoubleType(), words(WIDE)
    vector = ir.VectorType(double, WIDE)

    def codegen(*given: Any) -> Any:
        code = Code(*given)
        builder, (_, base, price, _, row, *_, first) = code.builder, code.args
        costs, prices, distance, limit, previous = (code.place(which, first) for which in (0, 3, 5, 6, 7))
        way = builder.fadd(code.everywhere(base, vector), code.load(costs, vector))
        way = builder.fsub(builder.fsub(way, code.everywhere(price, vector)), code.load(prices, vector))
        bound = code.load(limit, vector)
        shorter = builder.fcmp_ordered("<", way, bound)
        code.store(builder.select(shorter, way, bound), limit)
        found = builder.select(shorter, way, code.load(distance, vector))
        code.store(found, distance)
        code.store(builder.select(shorter, code.everywhere(row, integers), code.load(previous, integers)), previous)
        kind = ir.FunctionType(double, [vector])
        smallest = builder.module.declare_intrinsic(f"llvm.vector.reduce.fmin.v{WIDE}f64", (), kind)
        return builder.call(smallest, [found], fastmath=("nnan",))

    args = (costs, base, price, prices, row, distance, limit, previous, types.uintp)
    return types.float64(*args), codegen


@helper()
def _relax(costs, base, price, prices, row, distance, limit, previous):
    """Shorten the ways to all open columns over one row; the length of the shortest way of all.

    Open columns have their distance as their limit, closed ones a limit that nothing is below, and count no more.
    """
    lowest = np.inf
    for first in range(0, distance.shape[0], WIDE):
        found = _relax_lanes(costs, base, price, prices, row, distance, limit, previous, np.uintp(first))
        lowest = min(lowest, found)
    return lowest


@helper()
def _count_equal(distance, value):
    """How many columns lie at a distance, and the first of them."""
    count, first = np.int32(0), np.int32(distance.shape[0])
    for column in range(distance.shape[0]):
        equal = distance[column] == value
        count = np.int32(count + (np.int32(1) if equal else np.int32(0)))
        first = min(first, np.int32(column) if equal else np.int32(distance.shape[0]))
    return count, first


@helper()
def _nearest(distance, lowest, listed, row_of):
    """The nearest open column; of several a free one, the last in the list."""
    count, nearest = _count_equal(distance, lowest)
    if count > 1:
        nearest = np.int32(-1)
        for column in listed:
            if distance[column] == lowest and (nearest < 0 or row_of[column] < 0):
                nearest = column
    return nearest


@helper()
def _solve(table, columns, prices_of_rows, values, column_of, integers):
    """Give every row of a table a column of its own at the lowest total: `column_of`. Columns are no fewer than rows.

    One row after another gets its column along the shortest way, in costs less prices, from the row to a column that is
    free; the rows on the way move on to the next columns. Prices keep all ways at least 0 long.
    """
    prices, distance, limit, reached = values[0], values[1], values[2], values[3]
    row_of, previous, listed, place, closed = integers[0], integers[1], integers[2], integers[3], integers[4]
    rows = table.shape[0]
    prices_of_rows[:] = 0
    prices[:] = 0
    row_of[:] = -1
    for start in range(rows):
        distance[:] = np.inf
        limit[:] = np.inf
        for column in range(columns):
            listed[columns - 1 - column], place[column] = column, columns - 1 - column
        row, lowest, count, end = start, 0.0, 0, np.int32(-1)
        while end < 0:
            lowest = _relax(table[row], lowest, prices_of_rows[row], prices, np.int32(row), distance, limit, previous)
            column = _nearest(distance, lowest, listed[: columns - count], row_of)
            closed[count], reached[count] = column, lowest
            distance[column], limit[column] = np.inf, -np.inf
            count += 1
            # The list is open columns only; its last one takes the place of the one that leaves.
            moved = listed[columns - count]
            listed[place[column]], place[moved] = moved, place[column]
            if row_of[column] < 0:
                end = column
            else:
                row = row_of[column]
        prices_of_rows[start] += lowest
        for k in range(count - 1):
            prices_of_rows[row_of[closed[k]]] += lowest - reached[k]
            prices[closed[k]] -= lowest - reached[k]
        row = -1
        while row != start:
            row = previous[end]
            row_of[end] = row
            column_of[row], end = end, column_of[row]


@kernel
def assign(counter, items, values, _coordinates, integers, cost, num_targets, firsts, index):
    """Rows (layer, image, query, target) of all matches, sorted by query within an image.

    A work item is an image of a layer. Costs are `[L, B, Q, T_max]`; the rows of an item begin at `firsts`.
    """
    values, integers, cost, index = bare(values), bare(integers), bare(cost), bare(index)
    batch, queries = cost.shape[1], cost.shape[2]
    while True:
        item = take(counter)
        if item >= items:
            break
        layer, image = item // batch, item % batch
        targets = num_targets[image]
        rows, columns, transposed = min(queries, targets), max(queries, targets), targets < queries
        wide = _filled_up(columns)
        size = rows * wide
        table = values[:size].reshape(rows, wide)
        prices = values[size : size + rows]
        numbers = values[size + rows : size + rows + _NUMBERS * wide].reshape(_NUMBERS, wide)
        column_of = integers[:rows]
        lists = integers[rows : rows + _INTEGERS * wide].reshape(_INTEGERS, wide)
        _arrange(cost[layer, image], rows, columns, transposed, table)
        _solve(table, columns, prices, numbers, column_of, lists)
        row_of, place = lists[0], firsts[item]
        for query in range(queries):
            target = row_of[query] if transposed else column_of[query]
            if target >= 0:
                index[place, LAYER], index[place, IMAGE] = layer, image
                index[place, QUERY], index[place, TARGET] = query, target
                place += 1
