"""Device functions for where points lie: random numbers, the points of a draw, and those of an instance.

They are integers until the window of the image, and so the same ones as everywhere. A point of a plane is x, y; one of
a stack (a volume, or a clip as a whole) has a z, which is 0 where `frames`, the number of a stack's slices, is None.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from maskloss import _abi as abi

from .sampling import IMAGE, LAYER, TARGET, X, Y, Z

# Streams of the random numbers, in the half of the counter that holds them.
CANDIDATES: tl.constexpr = tl.constexpr(abi.CANDIDATES << abi.STREAM_SHIFT)
RANDOM: tl.constexpr = tl.constexpr(abi.RANDOM << abi.STREAM_SHIFT)
MATCHER: tl.constexpr = tl.constexpr(abi.MATCHER << abi.STREAM_SHIFT)
_DEPTH_STREAM: tl.constexpr = tl.constexpr(abi.DEPTH_STREAM << abi.STREAM_SHIFT)
_PARITY: tl.constexpr = tl.constexpr(abi.THREEFRY_PARITY)
_A, _B, _C, _D = map(tl.constexpr, abi.THREEFRY_ROTATIONS[0])
_E, _F, _G, _H = map(tl.constexpr, abi.THREEFRY_ROTATIONS[1])
_CELL_BITS: tl.constexpr = tl.constexpr(abi.CELL_BITS)
_CELL_MASK: tl.constexpr = tl.constexpr((1 << abi.CELL_BITS) - 1)
_POSITION_SHIFT: tl.constexpr = tl.constexpr(abi.POSITION_SHIFT)
_UNIT: tl.constexpr = tl.constexpr(1 << abi.INVERSE_BITS)
# Where the cells of candidates (or of the matcher's points) and those of uniform points begin in `strata`.
FIRST_CELLS: tl.constexpr = tl.constexpr(0)
_RANDOM_CELLS: tl.constexpr = tl.constexpr(6)
_WINDOW_X: tl.constexpr = tl.constexpr(abi.WINDOW_X)
_WINDOW_Y: tl.constexpr = tl.constexpr(abi.WINDOW_Y)
_WINDOW_W: tl.constexpr = tl.constexpr(abi.WINDOW_W)
_WINDOW_H: tl.constexpr = tl.constexpr(abi.WINDOW_H)
_WINDOW_COLUMNS: tl.constexpr = tl.constexpr(abi.WINDOW_COLUMNS)


@triton.jit
def _four_rounds(x0, x1, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Four rounds of Threefry: x0 += x1; x1 = rotate(x1, A) ^ x0; and so on with B, C, D."""
    x0 += x1
    x1 = ((x1 << A) | (x1 >> (32 - A))) ^ x0
    x0 += x1
    x1 = ((x1 << B) | (x1 >> (32 - B))) ^ x0
    x0 += x1
    x1 = ((x1 << C) | (x1 >> (32 - C))) ^ x0
    x0 += x1
    x1 = ((x1 << D) | (x1 >> (32 - D))) ^ x0
    return x0, x1


@triton.jit
def threefry(key0, key1, counter0, counter1):
    """Threefry-2x32 with 20 rounds, on uint32: see `points.threefry2x32`."""
    key2 = key0 ^ key1 ^ _PARITY
    x0, x1 = _four_rounds(counter0 + key0, counter1 + key1, _A, _B, _C, _D)
    x0, x1 = _four_rounds(x0 + key1, x1 + (key2 + 1), _E, _F, _G, _H)
    x0, x1 = _four_rounds(x0 + key2, x1 + (key0 + 2), _A, _B, _C, _D)
    x0, x1 = _four_rounds(x0 + key0, x1 + (key1 + 3), _E, _F, _G, _H)
    x0, x1 = _four_rounds(x0 + key1, x1 + (key2 + 4), _A, _B, _C, _D)
    return x0 + key2, x1 + (key0 + 5)


@triton.jit
def instance_key(seed_value, seed_pointer, image_id, target):
    """Key of an instance: threefry(key = seed, counter = (image number, target)).

    The seed is a number, or is read from the device (pointer not None), where a captured graph can vary it.
    """
    if seed_pointer is None:
        seed = seed_value.to(tl.int64)
    else:
        seed = tl.load(seed_pointer)
    return threefry(seed.to(tl.uint32), (seed >> 32).to(tl.uint32), image_id.to(tl.uint32), target.to(tl.uint32))


@triton.jit
def _draw(key0, key1, i, stream, windows, image, frames):
    """Independent points i, in the window of an image: the top 24 bits of a word for each coordinate."""
    word0, word1 = threefry(key0, key1, i.to(tl.uint32), stream)
    x, y = _into_window(word0 >> 8, word1 >> 8, windows, image)
    z = tl.zeros(x.shape, tl.float32)
    if frames is not None:
        third, _other = threefry(key0, key1, i.to(tl.uint32), stream + _DEPTH_STREAM)
        z = _fraction(third >> 8)
    return x, y, z


@triton.jit
def _draw_in_cells(key0, key1, i, stream, cells, rows, narrow, by_cells, by_narrow, by_wide, windows, image):
    """Points i of a stratified draw, in the window of an image: see `points.Strata`, whose fields are the numbers."""
    word = _word_of(key0, key1, i, stream)
    u, v = (word >> _CELL_BITS).to(tl.int64), (word & _CELL_MASK).to(tl.int64)
    row = ((i + 1) * rows - 1) // cells
    first = row * cells // rows
    wide = (row + 1) * cells // rows - first
    by_row = tl.where(wide == narrow, by_narrow, by_wide)
    across = ((i - first).to(tl.int64) << _CELL_BITS) + u
    down = (first.to(tl.int64) << _CELL_BITS) + v * wide
    return _into_window(across * by_row >> _POSITION_SHIFT, down * by_cells >> _POSITION_SHIFT, windows, image)


@triton.jit
def _draw_in_boxes(key0, key1, i, stream, cells, slabs, thin, rows_of_thin, rows_of_thick, by_cells, windows, image):
    """Points i of a stratified draw in a stack: see `points.Boxes`, whose fields are the numbers."""
    word, third = _word_of(key0, key1, i, stream), _word_of(key0, key1, i, stream + _DEPTH_STREAM)
    u, v, w = (word >> _CELL_BITS).to(tl.int64), (word & _CELL_MASK).to(tl.int64), (third >> _CELL_BITS).to(tl.int64)
    slab = ((i + 1) * slabs - 1) // cells
    behind = slab * cells // slabs
    count = (slab + 1) * cells // slabs - behind
    own = i - behind
    rows = tl.where(count == thin, rows_of_thin, rows_of_thick)
    row = ((own + 1) * rows - 1) // count
    first = row * count // rows
    wide = (row + 1) * count // rows - first
    across = ((own - first).to(tl.int64) << _CELL_BITS) + u
    down = (first.to(tl.int64) << _CELL_BITS) + v * wide
    deep = (behind.to(tl.int64) << _CELL_BITS) + w * count
    x, y = _into_window(
        across * (_UNIT // wide.to(tl.int64)) >> _POSITION_SHIFT,
        down * (_UNIT // count.to(tl.int64)) >> _POSITION_SHIFT,
        windows, image,
    )  # fmt: skip
    return x, y, _fraction(deep * by_cells >> _POSITION_SHIFT)


@triton.jit
def _word_of(key0, key1, i, stream):
    """The word of point i: two points share a counter."""
    word0, word1 = threefry(key0, key1, (i >> 1).to(tl.uint32), stream)
    return tl.where((i & 1) != 0, word1, word0)


@triton.jit
def _draw_in_strata(key0, key1, i, stream, a, b, c, d, e, f, windows, image, frames):
    """Points i of a stratified draw, by the six numbers of its strata."""
    if frames is None:
        x, y = _draw_in_cells(key0, key1, i, stream, a, b, c, d, e, f, windows, image)
        z = tl.zeros(x.shape, tl.float32)
    else:
        x, y, z = _draw_in_boxes(key0, key1, i, stream, a, b, c, d, e, f, windows, image)
    return x, y, z


@triton.jit
def draw_layout(key0, key1, i, stream, strata, START: tl.constexpr, windows, image, frames):
    """Points i of a draw: independent ones without `strata`, which otherwise has the numbers from START on."""
    if strata is None:
        x, y, z = _draw(key0, key1, i, stream, windows, image, frames)
    else:
        x, y, z = _draw_in_strata(
            key0, key1, i, stream, strata[START], strata[START + 1], strata[START + 2], strata[START + 3],
            strata[START + 4], strata[START + 5], windows, image, frames,
        )  # fmt: skip
    return x, y, z


@triton.jit
def _fraction(number):
    """A 24-bit integer as a fraction of 2^24."""
    return number.to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _into_window(across, down, windows, image):
    """24-bit integers into the window of an image: x0 + width * fraction, multiplied and added separately."""
    window = windows + image * _WINDOW_COLUMNS
    x = _fraction(across) * tl.load(window + _WINDOW_W) + tl.load(window + _WINDOW_X)
    y = _fraction(down) * tl.load(window + _WINDOW_H) + tl.load(window + _WINDOW_Y)
    return x, y


@triton.jit
def load_point(point, stride, keep, frames):
    """Load points that were given; coordinates far outside move to where nothing overflows."""
    x = tl.load(point + X * stride, mask=keep, other=0.0)
    y = tl.load(point + Y * stride, mask=keep, other=0.0)
    z = tl.zeros(x.shape, x.dtype)
    if frames is not None:
        z = tl.load(point + Z * stride, mask=keep, other=0.0)
    return _bounded(x), _bounded(y), _bounded(z)


@triton.jit
def _bounded(coordinate):
    far = (tl.abs(coordinate) > 4.0) & (coordinate - coordinate == 0.0)
    return tl.where(far, tl.where(coordinate > 0.0, 4.0, -4.0), coordinate)


@triton.jit
def point_of(
    instance, offsets, keep, index_row, windows, image_ids, seed_value, seed_pointer, strata, frames, points, order,
    stride_n, stride_p, stride_c, num_uncertain,
):  # fmt: skip
    """Points of an instance: those that were given, or drawn again, first the chosen candidates, then uniform ones."""
    if points is None:
        image = tl.load(index_row + IMAGE)
        key0, key1 = instance_key(seed_value, seed_pointer, tl.load(image_ids + image), tl.load(index_row + TARGET))
        layer = tl.load(index_row + LAYER).to(tl.uint32)
        if order is None:
            x, y, z = draw_layout(key0, key1, offsets, layer + RANDOM, strata, _RANDOM_CELLS, windows, image, frames)
        else:
            uncertain = offsets < num_uncertain
            candidate = tl.load(order + instance * num_uncertain + offsets, mask=keep & uncertain, other=0)
            counter = tl.where(uncertain, candidate, offsets - num_uncertain)
            stream = tl.where(uncertain, layer + CANDIDATES, layer + RANDOM)
            if strata is None:
                x, y, z = _draw(key0, key1, counter, stream, windows, image, frames)
            else:
                x, y, z = _draw_in_strata(
                    key0, key1, counter, stream,
                    tl.where(uncertain, strata[0], strata[_RANDOM_CELLS]),
                    tl.where(uncertain, strata[1], strata[_RANDOM_CELLS + 1]),
                    tl.where(uncertain, strata[2], strata[_RANDOM_CELLS + 2]),
                    tl.where(uncertain, strata[3], strata[_RANDOM_CELLS + 3]),
                    tl.where(uncertain, strata[4], strata[_RANDOM_CELLS + 4]),
                    tl.where(uncertain, strata[5], strata[_RANDOM_CELLS + 5]),
                    windows, image, frames,
                )  # fmt: skip
    else:
        point = points + instance * stride_n + offsets.to(tl.int64) * stride_p
        x, y, z = load_point(point, stride_c, keep, frames)
    return x, y, z
