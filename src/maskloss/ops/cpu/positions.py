# mypy: allow-untyped-defs
"""Where points lie in the buffer of a plane, for the CPU kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from maskloss._abi import X, Y

from .compile import helper
from .lanes import LANES, Code, check_literals, constant, words
from .memory import at
from .planes import BORDER

_I32 = np.int32
# Larger maps than this overflow the integers of `locate_bits`.
BITS_LIMIT = 1 << 18


class Given(NamedTuple):
    """Points of the caller: address (0: there are none), whether in float64, strides in elements."""

    address: int
    double: bool
    row: int
    point: int
    coordinate: int


@helper(forceinline=True)
def _limits(size, border):
    return (0.0, size - 1.0) if border else (-np.inf, np.inf)


@helper(forceinline=True)
def _along(coordinate, size, low, high):
    """Where a point lies along an axis: `p = coordinate * size - 0.5`, as the pixel `floor(p)` and `p - floor(p)`.

    In double precision, where the position of a float32 point is exact. Points off the map by more than a pixel, and
    NaN, get pixel -2 or `size`.
    """
    p = coordinate * size - 0.5
    p = max(p, low)
    p = min(p, high)
    first = np.floor(p)
    return _I32(min(size, max(-2.0, first))), p - first


@helper()
def locate_pixels(coordinates, n, size, border, pixels, fractions):
    """Where points lie along one axis of a map."""
    wide = np.float64(size)
    low, high = _limits(wide, border)
    for i in range(n):
        pixels[i], fractions[i] = _along(coordinates[i], wide, low, high)


@helper()
def locate(x, y, n, height, width, border, index, fx, fy):
    """Where points lie in the buffer of a plane, which has a border."""
    w, h = np.float64(width), np.float64(height)
    x_low, x_high = _limits(w, border)
    y_low, y_high = _limits(h, border)
    pitch = _I32(width + 2 * BORDER)
    for i in range(n):
        column, fx[i] = _along(x[i], w, x_low, x_high)
        row, fy[i] = _along(y[i], h, y_low, y_high)
        index[i] = _I32(_I32(_I32(row + _I32(BORDER)) * pitch) + _I32(column + _I32(BORDER)))


@intrinsic
def _locate_lanes(
    typingctx: Any, xs: Any, ys: Any, first: Any, width: Any, height: Any, pitch: Any, index: Any, fx: Any, fy: Any,
    lanes: Any,
) -> Any:  # fmt: skip
    """`locate_bits` for `lanes` points (a literal) from `first` on."""
    check_literals(lanes=lanes)
    vector = words(lanes.literal_value)

    def number(value: int) -> Any:
        return constant(vector, value)

    def codegen(*given: Any) -> Any:
        code = Code(*given)
        builder, (_, _, first, width, height, pitch, *_) = code.builder, code.args

        def axis(bits: int, size: Any, fraction: int) -> Any:
            """`bits * size / 2**24 - 0.5` as whole part and 24 bits of fraction, 12 bits at a time."""
            drawn, size = code.load(code.place(bits, first), vector), code.everywhere(size, vector)
            low = builder.mul(builder.and_(drawn, number(4095)), size)
            high = builder.mul(builder.lshr(drawn, number(12)), size)
            high = builder.sub(builder.add(high, builder.lshr(low, number(12))), number(2048))
            rest = builder.or_(
                builder.shl(builder.and_(high, number(4095)), number(12)), builder.and_(low, number(4095))
            )
            single = ir.VectorType(ir.FloatType(), vector.count)
            share = builder.fmul(builder.sitofp(rest, single), constant(single, 2.0**-24))
            where = code.place(fraction, first)
            kind = ir.VectorType(where.type.pointee, vector.count)
            code.store(share if kind.element == single.element else builder.fpext(share, kind), where)
            return builder.add(builder.ashr(high, number(12)), number(BORDER))

        column, row = axis(0, width, 7), axis(1, height, 8)
        code.store(builder.add(builder.mul(row, code.everywhere(pitch, vector)), column), code.place(6, first))
        return code.nothing()

    return types.void(xs, ys, types.uintp, types.int32, types.int32, types.int32, index, fx, fy, lanes), codegen


@helper()
def locate_bits(bits, n, height, width, index, fx, fy):
    """As `locate`, for points of the whole frame given as 24-bit integers: exact, and twice as fast as with doubles."""
    w, h, pitch = _I32(width), _I32(height), _I32(width + 2 * BORDER)
    xs, ys = bits[X], bits[Y]
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        _locate_lanes(xs, ys, np.uintp(i), w, h, pitch, index, fx, fy, LANES)
    for i in range(whole, n):
        _locate_lanes(xs, ys, np.uintp(i), w, h, pitch, index, fx, fy, 1)


@helper(forceinline=True)
def nearest_pixel(pixel, fraction, size, border):
    """The pixel nearest to a point, half to even; with a border mode the last pixel is the limit."""
    if fraction > 0.5 or (fraction == 0.5 and pixel % 2 == 1):
        pixel += 1
    return min(pixel, size - 1) if border else pixel


@helper()
def round_nearest(index, fx, fy, n, height, width, border):
    """Turn what `locate` found into the nearest pixel."""
    pitch = width + 2 * BORDER
    for i in range(n):
        row = nearest_pixel(index[i] // pitch - BORDER, fy[i], height, border)
        column = nearest_pixel(index[i] % pitch - BORDER, fx[i], width, border)
        index[i] = (row + BORDER) * pitch + column + BORDER


@helper()
def given_points(given, n, first, count, x, y):
    """Points `first:first + count` of row n of a caller's tensor."""
    point, coordinate = given.point, given.coordinate
    start, size = n * given.row + first * point, (count - 1) * point + coordinate + 1
    if given.double:
        f64 = at(given.address + start * 8, size, np.float64)
        for i in range(count):
            x[i] = f64[i * point]
            y[i] = f64[i * point + coordinate]
    else:
        f32 = at(given.address + start * 4, size, np.float32)
        for i in range(count):
            x[i] = f32[i * point]
            y[i] = f32[i * point + coordinate]
