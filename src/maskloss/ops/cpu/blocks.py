# mypy: allow-untyped-defs
"""The points of one instance for the CPU kernels, a block at a time: candidates, the choice of them, and the rest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskloss._abi import CANDIDATES, RANDOM, WINDOW_H, WINDOW_W, WINDOW_X, WINDOW_Y
from maskloss.points import Strata

from .choose import GROUP, LARGEST_KEY, make_keys, mark_chosen, threshold
from .compile import helper
from .generator import counter_of, draw_bits, points_of_bits
from .planes import BORDER, HEIGHT, WIDTH
from .positions import BITS_LIMIT, Given, given_points, locate, locate_bits
from .sampling import BLOCK, gather

_I32 = np.int32
NOT_GIVEN = Given(0, False, 0, 0, 0)
# Rows of the work spaces that hold one block.
VALUE_ROWS, POINT_ROWS, INTEGER_ROWS = 2, 4, 4
# Rows that hold the points of an instance: fractions along x and y, logits, targets, weights, sigmoids of the logits,
# and a work space.
GRADIENT_ROWS = 7
ROW = BLOCK + GROUP
# Integers beside the keys and copies of keys that choosing needs, for whole groups.
SPARE = 2 * GROUP


class Numbers(NamedTuple):
    """How many points and candidates an instance has; no candidates where none are uncertain.

    `candidate_cells` and `random_cells` are `points.Strata`, without rows where points are independent.
    """

    points: int
    candidates: int
    uncertain: int
    candidate_cells: Strata
    random_cells: Strata


@helper()
def _count_up(counters, first, n):
    for i in range(n):
        counters[i] = first + i


@helper()
def locate_drawn(bits, x, y, n, source, window, border, index, fx, fy):
    """Places of random points in a plane's buffer; x and y are work space."""
    height, width = source[HEIGHT], source[WIDTH]
    whole = window[WINDOW_X] == 0 and window[WINDOW_Y] == 0 and window[WINDOW_W] == 1 and window[WINDOW_H] == 1
    if whole and not border and max(height, width) < BITS_LIMIT:
        locate_bits(bits, n, height, width, index, fx, fy)
    else:
        points_of_bits(bits, n, window, x, y)
        locate(x, y, n, height, width, border, index, fx, fy)


@helper()
def choose_candidates(buffer, source, key, layer, window, numbers, border, z, blocks, integers, marks):
    """Draw candidates, read the logits there, and mark the chosen ones: z `[K]`, marks `[ceil(K / 8)]`."""
    num_candidates, num_uncertain = numbers.candidates, numbers.uncertain
    points, values, ints = blocks
    x, y, fx, fy = points[0], points[1], values[0], values[1]
    counters, index, bits = ints[0], ints[1], ints[2:4]
    keys, space = integers[: num_candidates + GROUP], integers[num_candidates + GROUP :]
    stream = counter_of(layer, CANDIDATES)
    for first in range(0, num_candidates, BLOCK):
        n = min(BLOCK, num_candidates - first)
        _count_up(counters, first, n)
        draw_bits(key, stream, counters, n, numbers.candidate_cells, bits)
        locate_drawn(bits, x, y, n, source, window, border, index, fx, fy)
        part = z[first : first + n]
        gather(buffer, source[WIDTH] + 2 * BORDER, index, fx, fy, n, part)
        make_keys(part, n, keys[first : first + n])
    keys[num_candidates:] = LARGEST_KEY
    limit, below, equal = threshold(keys, num_candidates, num_uncertain, space, marks)
    mark_chosen(keys, num_candidates, _I32(limit), num_uncertain - below, equal, marks)


@helper()
def points_of_block(first, n, numbers, given, instance, key, layer, window, chosen, x, y, ints):
    """Points `first:first + n` of an instance: the caller's, or chosen candidates and then random ones.

    Random points also stay in `ints[2:4]`, as bits.
    """
    if given.address != 0:
        given_points(given, instance, first, n, x, y)
        return
    counters, stream, cells = chosen[first : first + n], counter_of(layer, CANDIDATES), numbers.candidate_cells
    if first >= numbers.uncertain:
        counters, stream, cells = ints[0], counter_of(layer, RANDOM), numbers.random_cells
        _count_up(counters, first - numbers.uncertain, n)
    draw_bits(key, stream, counters, n, cells, ints[2:4])
    points_of_bits(ints[2:4], n, window, x, y)


@helper()
def locate_block(given, ints, x, y, n, source, window, border, index, fx, fy):
    """Places in a plane's buffer of what `points_of_block` found."""
    if given.address != 0:
        locate(x, y, n, source[HEIGHT], source[WIDTH], border, index, fx, fy)
    else:
        # The caller keeps x and y: the general path writes the same numbers again.
        locate_drawn(ints[2:4], x, y, n, source, window, border, index, fx, fy)


@helper(forceinline=True)
def block_length(first, num_points, num_uncertain):
    """How many points the block from `first` on has; they are of one kind, uncertain or not."""
    return min(BLOCK, (num_uncertain if first < num_uncertain else num_points) - first)
