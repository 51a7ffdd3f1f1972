# mypy: allow-untyped-defs
"""Random points for the CPU kernels: Threefry-2x32 with 20 rounds, many points at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from maskloss._abi import (
    CELL_BITS,
    POSITION_SHIFT,
    STREAM_SHIFT,
    THREEFRY_PARITY,
    THREEFRY_ROTATIONS,
    WINDOW_H,
    WINDOW_W,
    WINDOW_X,
    WINDOW_Y,
    X,
    Y,
)

from .compile import helper
from .lanes import LANES, Code, check_literals, constant, words

U32 = np.uint32
_U64 = np.uint64
_UNIT = np.float32(2.0**-24)


def _encrypt(builder: Any, key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Threefry-2x32 of Salmon et al. (Random123), 20 rounds, of integers of 32 bits or vectors of them."""
    kind = key[0].type

    def number(value: int) -> Any:
        return constant(kind, value) if isinstance(kind, ir.VectorType) else kind(value)

    keys = (*key, builder.xor(builder.xor(*key), number(THREEFRY_PARITY)))
    x0, x1 = (builder.add(word, part) for word, part in zip(counter, key, strict=True))
    for turn in range(5):
        for left in THREEFRY_ROTATIONS[turn % 2]:
            x0 = builder.add(x0, x1)
            x1 = builder.xor(builder.or_(builder.shl(x1, number(left)), builder.lshr(x1, number(32 - left))), x0)
        x0 = builder.add(x0, keys[(turn + 1) % 3])
        x1 = builder.add(x1, builder.add(keys[(turn + 2) % 3], number(turn + 1)))
    return x0, x1


@intrinsic
def threefry(typingctx: Any, key: Any, one: Any, other: Any) -> Any:
    """64 random bits, as two words, for a key and a counter of two words each."""
    word = types.uint32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts = builder.extract_value(args[0], 0), builder.extract_value(args[0], 1)
        return context.make_tuple(builder, signature.return_type, _encrypt(builder, parts, (args[1], args[2])))

    pair = types.UniTuple(word, 2)
    return pair(pair, word, word), codegen


@intrinsic
def _threefry_lanes(
    typingctx: Any, key: Any, stream: Any, counters: Any, first: Any, drop: Any, ones: Any, others: Any, lanes: Any
) -> Any:
    """`threefry` of `lanes` counters from `first` on: both words, without their lowest `drop` bits (literals).

    Left to itself, LLVM takes vectors of 256 bits also where there are larger ones.
    """
    check_literals(drop=drop, lanes=lanes)
    vector, dropped = words(lanes.literal_value), constant(words(lanes.literal_value), drop.literal_value)

    def codegen(*given: Any) -> Any:
        code = Code(*given)
        builder, (key, stream, _, first, *_) = code.builder, code.args
        low, high = (code.everywhere(builder.extract_value(key, which), vector) for which in (0, 1))
        counter = code.load(code.place(2, first), vector), code.everywhere(stream, vector)
        for which, word in zip((5, 6), _encrypt(builder, (low, high), counter), strict=True):
            code.store(builder.lshr(word, dropped), code.place(which, first))
        return code.nothing()

    return types.void(key, stream, counters, types.uintp, drop, ones, others, lanes), codegen


@helper(forceinline=True)
def _threefry_block(key, stream, counters, n, drop, ones, others):
    """Both words of n counters, without their lowest bits; `ones` or `others` may be the counters."""
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        _threefry_lanes(key, stream, counters, np.uintp(i), drop, ones, others, LANES)
    for i in range(whole, n):
        _threefry_lanes(key, stream, counters, np.uintp(i), drop, ones, others, 1)


@helper()
def instance_key(seed, image_id, target):
    """The key of one (image, target) pair: `threefry(seed, (image_id, target))`."""
    bits = np.uint64(seed)
    key = U32(bits), U32(bits >> np.uint64(32))
    return threefry(key, U32(np.uint64(image_id)), U32(np.uint64(target)))


@helper()
def counter_of(layer, stream):
    """The word of a counter that holds the decoder layer and the stream."""
    return U32(layer | (stream << STREAM_SHIFT))


@helper()
def draw_bits(key, stream, counters, n, strata, bits):
    """Points `counters[:n]` (ascending) of a stream as integers: 24 bits for x in `bits[X]`, for y in `bits[Y]`.

    `strata` are the cells of a stratified layout (`points.Strata`); without rows the points are independent.
    """
    xs, ys = bits[X], bits[Y]
    if strata.rows > 0:
        draw_words(key, stream, counters, n, xs, ys)
        _rows_of_cells(counters, n, _follow(counters, n), strata, ys)
        _into_cells(counters, n, strata, xs, ys)
        return
    _threefry_block(key, stream, counters, n, 8, xs, ys)


@helper()
def _follow(counters, n):
    return counters[n - 1] - counters[0] == n - 1


@helper()
def draw_words(key, stream, counters, n, found, space):
    """A word for each counter (ascending): each of the two of a pair of counters is for one."""
    if _follow(counters, n) and counters[0] & 1 == 0:
        _words_of_pairs(key, stream, counters[0] >> 1, n, found, space)
    else:
        _words(key, stream, counters, n, found)


@helper()
def _words_of_pairs(key, stream, first, n, found, space):
    """Two words of each counter from `first` on. Three simple loops beat one that stores at every other place."""
    half = n // 2
    even, odd = space[:half], space[half:]
    for m in range(half):
        even[m] = first + m
    _threefry_block(key, stream, even, half, 0, even, odd)
    for m in range(half):
        found[2 * m] = even[m]
        found[2 * m + 1] = odd[m]
    if n & 1:
        found[n - 1] = np.int32(threefry(key, U32(first + half), stream)[0])


@helper()
def _words(key, stream, counters, n, found):
    for i in range(n):
        number = U32(counters[i])
        r0, r1 = threefry(key, U32(number >> U32(1)), stream)
        odd = U32(U32(0) - U32(number & U32(1)))  # all bits or none: a branch would go the wrong way every other time
        found[i] = np.int32(r0 ^ U32(U32(r0 ^ r1) & odd))


@helper()
def _rows_of_cells(counters, n, follows, strata, found):
    """For each point twice the first cell of its row, and 1 if the row is a wide one."""
    cells, rows = strata.cells, strata.rows
    row = ((counters[0] + 1) * rows - 1) // cells
    first, beyond = row * cells // rows, (row + 1) * cells // rows
    code = np.int32(2 * first + (beyond - first != strata.narrow))
    i = 0
    while i < n:
        # One row after another, as a division takes as long as several points.
        while counters[i] >= beyond:
            row += 1
            first, beyond = beyond, (row + 1) * cells // rows
            code = np.int32(2 * first + (beyond - first != strata.narrow))
        if follows:
            stop = min(n, i + beyond - counters[i])
            found[i:stop] = code
            i = stop
        else:
            found[i] = code
            i += 1


@helper()
def _into_cells(counters, n, strata, xs, ys):
    """Points from their words (in `xs`) and rows of cells (in `ys`)."""
    narrow, by_cells = U32(strata.narrow), _U64(strata.by_cells)
    by_narrow, by_wide = _U64(strata.by_narrow), _U64(strata.by_wide)
    for i in range(n):
        word, row = U32(xs[i]), U32(ys[i])
        u, v = U32(word >> U32(CELL_BITS)), U32(word & U32((1 << CELL_BITS) - 1))
        first, wide = U32(row >> U32(1)), U32(row & U32(1))
        across = U32(U32(U32(U32(counters[i]) - first) << U32(CELL_BITS)) + u)
        down = (_U64(first) << _U64(CELL_BITS)) + _U64(U32(v * U32(narrow + wide)))
        by_row = by_wide if wide else by_narrow
        xs[i] = np.int32((_U64(across) * by_row) >> _U64(POSITION_SHIFT))
        ys[i] = np.int32((down * by_cells) >> _U64(POSITION_SHIFT))


@helper()
def points_of_bits(bits, n, window, x, y):
    """Into the valid window: `x = x0 + bits * 2**-24 * width`, in float32, every operation rounded."""
    x0, y0, width, height = window[WINDOW_X], window[WINDOW_Y], window[WINDOW_W], window[WINDOW_H]
    xs, ys = bits[X], bits[Y]
    for i in range(n):
        x[i] = x0 + np.float32(xs[i]) * _UNIT * width
        y[i] = y0 + np.float32(ys[i]) * _UNIT * height
