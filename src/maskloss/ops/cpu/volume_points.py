# mypy: allow-untyped-defs
"""Points in volumes for the CPU kernels: where they are drawn, between which voxels they lie, and what they weigh."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskloss._abi import (
    CELL_BITS,
    DEPTH_STREAM,
    IGNORE_H,
    IGNORE_SIZE,
    IGNORE_STRIDE,
    INVERSE_BITS,
    POSITION_SHIFT,
    WINDOW_H,
    WINDOW_W,
    WINDOW_X,
    WINDOW_Y,
    X,
    Y,
    Z,
)
from maskloss.points import Strata

from .compile import helper
from .generator import U32, counter_of, draw_bits, draw_words, points_of_bits
from .positions import Given, given_points, locate_pixels
from .targets import is_ignored

_I32 = np.int32
_UNIT = np.float32(2.0**-24)
_INDEPENDENT = Strata(0, 0, 0, 0, 0, 0)


class Grid(NamedTuple):
    """The sizes of a volume, how far slices and rows lie apart, and whether z is read between two slices."""

    depth: int
    height: int
    width: int
    by_slice: int
    by_row: int
    linear: bool


@helper()
def _boxes(key, layer, stream, counters, n, boxes, bits):
    """Points `counters[:n]` of a stratified layout (see `points.stratified_points3`)."""
    cells, slabs, mask = boxes.cells, boxes.slabs, (1 << CELL_BITS) - 1
    xs, ys, zs = bits[X], bits[Y], bits[Z]
    draw_words(key, counter_of(layer, stream), counters, n, xs, ys)
    draw_words(key, counter_of(layer, stream + DEPTH_STREAM), counters, n, zs, ys)
    # The cells of a slab and of a row in it. Divisions take as long as several points: they are for the next of these.
    behind, beyond, count, rows, first, end = 0, 0, 1, 1, 0, 0
    by_count, by_row = 0, 0
    for k in range(n):
        i, word, third = np.int64(counters[k]), np.int64(U32(xs[k])), np.int64(U32(zs[k]))
        if i >= beyond:
            slab = ((i + 1) * slabs - 1) // cells
            behind, beyond = slab * cells // slabs, (slab + 1) * cells // slabs
            count, end = beyond - behind, behind
            rows = boxes.rows_of_thin if count == boxes.thin else boxes.rows_of_thick
            by_count = (1 << INVERSE_BITS) // count
        if i >= end:
            row = ((i - behind + 1) * rows - 1) // count
            first, end = behind + row * count // rows, behind + (row + 1) * count // rows
            by_row = (1 << INVERSE_BITS) // (end - first)
        across = ((i - first) << CELL_BITS) + (word >> CELL_BITS)
        down = ((first - behind) << CELL_BITS) + (word & mask) * (end - first)
        through = (behind << CELL_BITS) + (third >> CELL_BITS) * count
        xs[k] = _I32(across * by_row >> POSITION_SHIFT)
        ys[k] = _I32(down * by_count >> POSITION_SHIFT)
        zs[k] = _I32(through * boxes.by_cells >> POSITION_SHIFT)


@helper()
def draw_volume(key, layer, stream, counters, n, boxes, bits):
    """Points `counters[:n]` of a stream, 24 bits a coordinate; `boxes` have no cells where they are independent.

    The fourth row of `bits` is work space.
    """
    if boxes.cells > 0:
        _boxes(key, layer, stream, counters, n, boxes, bits)
    else:
        draw_bits(key, counter_of(layer, stream + DEPTH_STREAM), counters, n, _INDEPENDENT, bits[Z:])
        draw_bits(key, counter_of(layer, stream), counters, n, _INDEPENDENT, bits)


@helper()
def _along(bits, n, size, cells, fractions):
    """Where points lie along an axis: the voxel `floor(p)` and `p - floor(p)`, for `p = bits / 2**24 * size - 0.5`."""
    for i in range(n):
        p = np.int64(bits[i]) * np.int64(size) - (1 << 23)
        cells[i] = _I32(p >> 24)
        fractions[i] = np.float32(_I32(p & 0xFFFFFF)) * _UNIT


@helper()
def find_cells(bits, n, window, grid, border, coordinates, cells, fx, fy, fz):
    """Where drawn points lie between the voxels of a grid; exact, as are `locate` and `locate_bits`."""
    whole = window[WINDOW_X] == 0 and window[WINDOW_Y] == 0 and window[WINDOW_W] == 1 and window[WINDOW_H] == 1
    if whole and not border:
        _along(bits[X], n, grid.width, cells[X], fx)
        _along(bits[Y], n, grid.height, cells[Y], fy)
    else:
        _coordinates_of_bits(bits, n, window, coordinates)
        _cells_of_floats(coordinates, n, grid, border, cells, fx, fy, fz)
        return
    if grid.linear:
        _along(bits[Z], n, grid.depth, cells[Z], fz)
    else:
        for i in range(n):
            cells[Z, i] = _I32(np.int64(bits[Z, i]) * np.int64(grid.depth) >> 24)
            fz[i] = 0


@helper()
def _coordinates_of_bits(bits, n, window, coordinates):
    points_of_bits(bits, n, window, coordinates[X], coordinates[Y])
    for i in range(n):
        coordinates[Z, i] = np.float32(bits[Z, i]) * _UNIT


@helper()
def _given_coordinates(given, instance, first, n, coordinates):
    deep = Given(given.address, given.double, given.row, given.point, 2 * given.coordinate)
    given_points(deep, instance, first, n, coordinates[X], coordinates[Z])
    given_points(given, instance, first, n, coordinates[X], coordinates[Y])


@helper()
def given_cells(given, instance, first, n, grid, border, coordinates, cells, fx, fy, fz):
    """As `find_cells`, of points `first:first + n` that the caller gave to an instance."""
    _given_coordinates(given, instance, first, n, coordinates)
    _cells_of_floats(coordinates, n, grid, border, cells, fx, fy, fz)


@helper()
def _cells_of_floats(coordinates, n, grid, border, cells, fx, fy, fz):
    locate_pixels(coordinates[X], n, grid.width, border, cells[X], fx)
    locate_pixels(coordinates[Y], n, grid.height, border, cells[Y], fy)
    if grid.linear:
        locate_pixels(coordinates[Z], n, grid.depth, border, cells[Z], fz)
        return
    for i in range(n):
        cells[Z, i] = _slice_at(coordinates[Z, i], grid.depth)
        fz[i] = 0


@helper(forceinline=True)
def _slice_at(coordinate, depth):
    """The slice that a point lies in. A NaN is in the first one; along the other axes it is off the volume."""
    z = np.float64(coordinate) * depth
    return _I32(min(z, depth - 1.0)) if z > 0 else _I32(0)


@helper()
def weigh_points(given, instance, first, bits, n, window, image, frames, ignore, coordinates, w):
    """Weights of points, given or drawn: 0 in a voxel of the ignore region, 1 elsewhere (see `read_weights`)."""
    for i in range(n):
        w[i] = 1
    if image[IGNORE_SIZE] == 0:
        return
    if given.address != 0:
        _given_coordinates(given, instance, first, n, coordinates)
    else:
        _coordinates_of_bits(bits, n, window, coordinates)
    region = image[IGNORE_H] // frames * image[IGNORE_STRIDE]
    for i in range(n):
        behind = _slice_at(coordinates[Z, i], frames) * region
        if is_ignored(coordinates[X, i], coordinates[Y, i], image, frames, behind, ignore, given.double):
            w[i] = 0


@helper()
def find_places(cells, n, grid, places, flags, edges):
    """The first of the voxels around each point, moved to where all of them exist; list the points that were moved.

    Returns:
        How many there are. `flags` are work space.
    """
    beyond_u, beyond_v, beyond_k = _I32(grid.width - 1), _I32(grid.height - 1), _I32(grid.depth - grid.linear)
    by_slice, by_row, zero = _I32(grid.by_slice), _I32(grid.by_row), _I32(0)
    for i in range(n):
        u, v, k = cells[X, i], cells[Y, i], cells[Z, i]
        inside = (u >= zero) & (u < beyond_u) & (v >= zero) & (v < beyond_v) & (k >= zero) & (k < beyond_k)
        flags[i] = _I32(0) if inside else _I32(1)
        u = max(min(u, _I32(beyond_u - _I32(1))), zero)
        v = max(min(v, _I32(beyond_v - _I32(1))), zero)
        k = max(min(k, _I32(beyond_k - _I32(1))), zero)
        places[i] = _I32(_I32(_I32(k * by_slice) + _I32(v * by_row)) + u)
    count = 0
    for i in range(n):
        if flags[i]:
            edges[count] = i
            count += 1
    return count
