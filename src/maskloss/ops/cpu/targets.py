# mypy: allow-untyped-defs
"""Reading targets for the CPU kernels: packed bits, label maps and soft values, all cropped."""

from __future__ import annotations

import numpy as np

from maskloss._abi import (
    BF16,
    BITS,
    CROP_H,
    CROP_W,
    F16,
    F32,
    FRAME_H,
    FRAME_W,
    I16,
    I32,
    IGNORE_BASE,
    IGNORE_H,
    IGNORE_SIZE,
    IGNORE_STRIDE,
    IGNORE_W,
    IMAGE_H,
    IMAGE_W,
    LABEL,
    LABELS,
    LEFT,
    OFFSET,
    STRIDE,
    TOP,
    U8,
    VALUES,
)

from .choose import GROUP, list_marked, mark, pick, put_back
from .compile import helper
from .memory import at
from .planes import from_bf16, from_f16
from .positions import locate_pixels, nearest_pixel

_I32 = np.int32
# The four pixels around a point are the bits of a code, those of the upper row first.
_BOTH, _BELOW = np.uint32(0b11), np.uint32(2)


@helper()
def list_inside(x, y, n, row, border, inside, space):
    """List the points that may touch the stored crop of a target; all others read 0 without looking at memory.

    See `_flag_outside`. `inside` and `space` are work spaces of at least n + 16 integers.
    """
    hits = _flag_outside(x, y, n, row, border, space)
    return _list_flagged(space, n, inside) if hits else 0


@helper()
def _flag_outside(x, y, n, row, border, flags):
    """Flag the points that cannot touch the stored crop of a target, and count the others.

    The box is wider than the crop by the reach of the interpolation and a little more; `read_pixel` decides exactly.
    """
    if row[CROP_H] == 0 or row[CROP_W] == 0:
        return 0
    slack, kind = 1e-6, x.dtype.type
    left = kind((row[LEFT] - 0.5) / row[FRAME_W] - slack)
    right = kind((row[LEFT] + row[CROP_W] + 0.5) / row[FRAME_W] + slack)
    top = kind((row[TOP] - 0.5) / row[FRAME_H] - slack)
    bottom = kind((row[TOP] + row[CROP_H] + 0.5) / row[FRAME_H] + slack)
    if border:
        left = kind(-np.inf) if row[LEFT] == 0 else left
        top = kind(-np.inf) if row[TOP] == 0 else top
        right = kind(np.inf) if row[LEFT] + row[CROP_W] >= row[FRAME_W] else right
        bottom = kind(np.inf) if row[TOP] + row[CROP_H] >= row[FRAME_H] else bottom
    hits = _I32(0)
    for i in range(n):
        hit = (x[i] >= left) & (x[i] <= right) & (y[i] >= top) & (y[i] <= bottom)
        flags[i] = _I32(0) if hit else _I32(1)
        hits += _I32(1) if hit else _I32(0)
    return hits


@helper()
def _list_flagged(flags, n, inside):
    """List the points without a flag, and overwrite the flags."""
    flags[n : n + GROUP] = 1
    # The marks overwrite flags that have been read already: a byte for each eight integers.
    bits = flags.view(np.uint8)[: (n + 7) // 8]
    mark(flags, n, _I32(0), _I32(1), bits)
    return list_marked(bits, inside)


@helper()
def _read_label(data, encoding, element):
    if encoding == LABELS + U8:
        return np.int64(at(data + element, 1, np.uint8)[0])
    if encoding == LABELS + I16:
        return np.int64(at(data + element * 2, 1, np.int16)[0])
    if encoding == LABELS + I32:
        return np.int64(at(data + element * 4, 1, np.int32)[0])
    return at(data + element * 8, 1, np.int64)[0]


@helper()
def _read_value(data, encoding, element):
    dtype = encoding - VALUES
    if dtype == F32:
        return np.float64(at(data + element * 4, 1, np.float32)[0])
    if dtype == F16:
        return np.float64(from_f16(at(data + element * 2, 1, np.uint16)[0]))
    if dtype == BF16:
        return np.float64(from_bf16(at(data + element * 2, 1, np.uint16)[0]))
    return at(data + element * 8, 1, np.float64)[0]


@helper()
def read_pixel(data, encoding, row, y, x):
    """The target at pixel (y, x) of its crop; 0 outside."""
    if y < 0 or x < 0 or y >= row[CROP_H] or x >= row[CROP_W]:
        return 0.0
    start = row[OFFSET] + y * row[STRIDE]
    if encoding == BITS:
        return np.float64((at(data + start + (x >> 3), 1, np.uint8)[0] >> (x & 7)) & 1)
    return _read_element(data, encoding, row[LABEL], start + x)


@helper(forceinline=True)
def _read_element(data, encoding, label, element):
    if encoding < VALUES:
        return 1.0 if _read_label(data, encoding, element) == label else 0.0
    return _read_value(data, encoding, element)


@helper(forceinline=True)
def pixels_around(data, encoding, row, y, x):
    """The four pixels from (y, x) of a crop on, those of the upper row first."""
    if encoding != BITS and 0 <= y < row[CROP_H] - 1 and 0 <= x < row[CROP_W] - 1:
        stride, label = row[STRIDE], row[LABEL]
        first = row[OFFSET] + y * stride + x
        return (
            _read_element(data, encoding, label, first),
            _read_element(data, encoding, label, first + 1),
            _read_element(data, encoding, label, first + stride),
            _read_element(data, encoding, label, first + stride + 1),
        )
    return (
        read_pixel(data, encoding, row, y, x),
        read_pixel(data, encoding, row, y, x + 1),
        read_pixel(data, encoding, row, y + 1, x),
        read_pixel(data, encoding, row, y + 1, x + 1),
    )


@helper(forceinline=True)
def bits_around(start, stride, y, x):
    """The code of the four pixels from (y, x) on, inside the crop that begins at address `start`.

    Two bytes hold both pixels of a row. They are the one with the right pixel and the one before it, so that nothing
    behind the last row is read; where x is below 7 they are the first two, which the row must have.
    """
    byte = max(((x + 1) >> 3) - 1, 0)
    shift = np.uint32(x - 8 * byte)
    upper = np.uint32(at(start + y * stride + byte, 1, np.uint16)[0])
    lower = np.uint32(at(start + y * stride + stride + byte, 1, np.uint16)[0])
    return _I32(((upper >> shift) & _BOTH) | (((lower >> shift) & _BOTH) << _BELOW))


@helper()
def read_targets(x, y, n, row, data, encoding, border, nearest, xs, ys, ints, t, fx, fy):
    """Target values at a block of points of one target, interpolated as `gather` does it.

    xs, ys, fx, fy and the first three rows of `ints` are work space.
    """
    inside, rows, columns = ints[0], ints[1], ints[2]
    count = _flag_outside(x, y, n, row, border, rows)
    if count < n:
        for i in range(n):
            t[i] = 0
        if count == 0:
            return
        count = _list_flagged(rows, n, inside)
        pick(x, inside, count, xs)
        pick(y, inside, count, ys)
        _read_inside(xs, ys, count, row, data, encoding, border, nearest, rows, columns, fx, fy, fx)
        put_back(fx, inside, count, t)
    else:
        _read_inside(x, y, n, row, data, encoding, border, nearest, rows, columns, fx, fy, t)


@helper()
def _read_inside(x, y, n, row, data, encoding, border, nearest, rows, columns, fx, fy, t):
    """Target values at points around its crop; t may be fx. The row and the column of a pixel fit into 32 bits."""
    height, width = row[FRAME_H], row[FRAME_W]
    locate_pixels(x, n, width, border, columns, fx)
    locate_pixels(y, n, height, border, rows, fy)
    # In registers: behind every store LLVM would read them again.
    start, stride, top, left = data + row[OFFSET], row[STRIDE], row[TOP], row[LEFT]
    bottom, right = row[CROP_H] - 1, row[CROP_W] - 1
    for k in range(n):
        v, u = np.int64(rows[k]), np.int64(columns[k])
        if nearest:
            v, u = nearest_pixel(v, fy[k], height, border), nearest_pixel(u, fx[k], width, border)
        v -= top
        u -= left
        if nearest:
            t[k] = read_pixel(data, encoding, row, v, u)
        elif encoding == BITS and 0 <= v < bottom and 7 <= u < right:
            rows[k] = bits_around(start, stride, v, u)
        else:
            a, b, c, d = pixels_around(data, encoding, row, v, u)
            if encoding < VALUES:
                rows[k] = _I32(a + 2.0 * b + 4.0 * c + 8.0 * d)
            else:
                upper, lower = _mix(a, b, t, fx[k]), _mix(c, d, t, fx[k])
                t[k] = upper + fy[k] * (lower - upper)
    if encoding < VALUES and not nearest:
        interpolate_codes(rows, n, fx, fy, t)


@helper(forceinline=True)
def _mix(one, other, like, share):
    first = like.dtype.type(one)
    return first + share * (like.dtype.type(other) - first)


@helper()
def interpolate_codes(codes, n, fx, fy, t):
    """Bilinear values between four pixels that are 0 or 1, the bits of a code."""
    for k in range(n):
        code, kind = codes[k], fx.dtype.type
        a, b = kind(code & _I32(1)), kind(_I32(code >> _I32(1)) & _I32(1))
        c, d = kind(_I32(code >> _I32(2)) & _I32(1)), kind(_I32(code >> _I32(3)) & _I32(1))
        top = a + fx[k] * (b - a)
        bottom = c + fx[k] * (d - c)
        t[k] = top + fy[k] * (bottom - top)


@helper(forceinline=True)
def _pixel_at(coordinate, size, double):
    """The pixel that a point lies in, `int(x * size)` in the type of the point; a NaN counts as 0."""
    position = coordinate * size if double else np.float64(np.float32(coordinate) * np.float32(size))
    return int(min(position, size - 1.0)) if position > 0 else 0


@helper(forceinline=True)
def is_ignored(x, y, image, frames, region, ignore, double):
    """Whether a point lies in an ignore region: that of one of `frames`, which begins at `region` in their image's."""
    row, column = _pixel_at(y, image[IMAGE_H] // frames, double), _pixel_at(x, image[IMAGE_W], double)
    if row >= image[IGNORE_H] // frames or column >= image[IGNORE_W]:
        return False
    byte = ignore[image[IGNORE_BASE] + region + row * image[IGNORE_STRIDE] + (column >> 3)]
    return ((byte >> (column & 7)) & 1) != 0


@helper()
def read_weights(x, y, n, image, region, ignore, double, w):
    """Weights of points: 0 in the ignore region, which begins at `region` in that of its image, 1 elsewhere."""
    for i in range(n):
        w[i] = 1
    if image[IGNORE_SIZE] == 0:
        return
    for i in range(n):
        if is_ignored(x[i], y[i], image, 1, region, ignore, double):
            w[i] = 0
