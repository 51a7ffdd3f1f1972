# mypy: allow-untyped-defs
"""Reading targets for the CPU kernels: packed bits, label maps and soft values, all cropped."""

from __future__ import annotations

import numpy as np

from maskloss._abi import (
    ALL_CORNERS,
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
    IGNORED,
    IMAGE_H,
    IMAGE_W,
    LABEL,
    LABELS,
    LEFT,
    LOWER_LEFT,
    LOWER_RIGHT,
    OFFSET,
    STRIDE,
    TOP,
    U8,
    UPPER_LEFT,
    UPPER_RIGHT,
    VALUES,
)

from .choose import GROUP, list_marked, mark, pick, put_back
from .compile import helper
from .memory import at
from .planes import BORDER, from_bf16, from_f16
from .positions import locate, round_nearest

_I32 = np.int32
# What each corner adds to a code.
_01, _10, _11 = float(1 << UPPER_RIGHT), float(1 << LOWER_LEFT), float(1 << LOWER_RIGHT)
_C00, _C01, _C10, _C11 = _I32(UPPER_LEFT), _I32(UPPER_RIGHT), _I32(LOWER_LEFT), _I32(LOWER_RIGHT)
_BOTH = np.uint32(1 << UPPER_LEFT | 1 << UPPER_RIGHT)
_BELOW = np.uint32(LOWER_LEFT)


@helper()
def list_inside(x, y, n, row, border, inside, space):
    """List the points that may touch the stored crop of a target; all others read 0 without looking at memory.

    The box is wider than the crop by the reach of the interpolation and a little more; `read_pixel` decides exactly.
    `inside` and `space` are work spaces of at least n + 16 integers.
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
        space[i] = _I32(0) if hit else _I32(1)
        hits += _I32(1) if hit else _I32(0)
    if hits == 0:
        return 0
    space[n : n + GROUP] = 1
    # The marks overwrite flags that have been read already: a byte for each eight integers.
    bits = space.view(np.uint8)[: (n + 7) // 8]
    mark(space, n, _I32(0), _I32(1), bits)
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
    if encoding < VALUES:
        return 1.0 if _read_label(data, encoding, start + x) == row[LABEL] else 0.0
    return _read_value(data, encoding, start + x)


@helper(forceinline=True)
def _bits_around(start, stride, y, x):
    """The code of the four pixels from (y, x) on, x at least 7, inside the crop that begins at address `start`.

    Two bytes hold both pixels of a row. They are the one with the right pixel and the one before it, so that nothing
    behind the last row is read.
    """
    byte = ((x + 1) >> 3) - 1
    shift = np.uint32(x - 8 * byte)
    upper = np.uint32(at(start + y * stride + byte, 1, np.uint16)[0])
    lower = np.uint32(at(start + y * stride + stride + byte, 1, np.uint16)[0])
    return _I32(((upper >> shift) & _BOTH) | (((lower >> shift) & _BOTH) << _BELOW))


@helper()
def read_targets(x, y, n, row, data, encoding, border, nearest, xs, ys, ints, t, fx, fy):
    """Target values at a block of points of one target, and for bits and labels the four pixels around each as a code.

    The pixels are interpolated as `gather` does it. `ints[0]` gets the codes; rows 1 and 2 are work space.
    """
    codes, inside, index = ints[0], ints[1], ints[2]
    for i in range(n):
        codes[i] = 0
        t[i] = 0
    count = list_inside(x, y, n, row, border, inside, index)
    if count == 0:
        return
    pick(x, inside, count, xs)
    pick(y, inside, count, ys)
    height, width = row[FRAME_H], row[FRAME_W]
    pitch = width + 2 * BORDER
    locate(xs, ys, count, height, width, border, index, fx, fy)
    if nearest:
        round_nearest(index, fx, fy, count, height, width, border)
    # In registers: behind every store LLVM would read them again.
    start, stride, top, left = data + row[OFFSET], row[STRIDE], row[TOP] + BORDER, row[LEFT] + BORDER
    bottom, right = row[CROP_H] - 1, row[CROP_W] - 1
    for k in range(count):
        # Exact, as all numbers are below 2**31, and a fifth of the price of an integer division.
        v = np.int64(np.float64(index[k]) / np.float64(pitch))
        u = np.int64(index[k]) - v * pitch - left
        v -= top
        if nearest:
            value = read_pixel(data, encoding, row, v, u)
            fx[k], index[k] = value, _I32(value)
        elif encoding >= VALUES:
            upper = _mix(read_pixel(data, encoding, row, v, u), read_pixel(data, encoding, row, v, u + 1), t, fx[k])
            v += 1
            lower = _mix(read_pixel(data, encoding, row, v, u), read_pixel(data, encoding, row, v, u + 1), t, fx[k])
            fx[k], index[k] = upper + fy[k] * (lower - upper), 0
        elif encoding == BITS and 0 <= v < bottom and 7 <= u < right:
            index[k] = _bits_around(start, stride, v, u)
        else:
            code = read_pixel(data, encoding, row, v, u) + _01 * read_pixel(data, encoding, row, v, u + 1)
            v += 1
            code += _10 * read_pixel(data, encoding, row, v, u) + _11 * read_pixel(data, encoding, row, v, u + 1)
            index[k] = _I32(code)
    if encoding < VALUES and not nearest:
        interpolate_codes(index, count, fx, fy, fx)
    put_back(fx, inside, count, t)
    put_back(index, inside, count, codes)


@helper(forceinline=True)
def _mix(one, other, like, share):
    first = like.dtype.type(one)
    return first + share * (like.dtype.type(other) - first)


@helper()
def interpolate_codes(codes, n, fx, fy, t):
    """Bilinear values between four pixels that are 0 or 1, the bits of a code."""
    for k in range(n):
        code, kind = codes[k], fx.dtype.type
        a, b = kind(_I32(code >> _C00) & _I32(1)), kind(_I32(code >> _C01) & _I32(1))
        c, d = kind(_I32(code >> _C10) & _I32(1)), kind(_I32(code >> _C11) & _I32(1))
        top = a + fx[k] * (b - a)
        bottom = c + fx[k] * (d - c)
        t[k] = top + fy[k] * (bottom - top)


@helper()
def values_of_codes(x, y, n, row, border, nearest, xs, ys, ints, t, fx, fy):
    """Target values from the codes in `ints[0]`: only points between unlike pixels need their position."""
    codes, mixed, index = ints[0], ints[1], ints[2]
    for i in range(n):
        code = codes[i] & ALL_CORNERS
        t[i] = 1 if code == ALL_CORNERS or (nearest and code == 1 << UPPER_LEFT) else 0
        index[i] = _I32(1) if code in (0, ALL_CORNERS) else _I32(0)
    if nearest:
        return
    index[n : n + GROUP] = 1
    bits = index.view(np.uint8)[: (n + 7) // 8]
    mark(index, n, _I32(0), _I32(1), bits)
    count = list_marked(bits, mixed)
    pick(x, mixed, count, xs)
    pick(y, mixed, count, ys)
    locate(xs, ys, count, row[FRAME_H], row[FRAME_W], border, index, fx, fy)
    pick(codes, mixed, count, index)
    interpolate_codes(index, count, fx, fy, fx)
    put_back(fx, mixed, count, t)


@helper()
def mark_ignored(x, y, n, image, ignore, double, codes):
    """Flag the points in pixels that the ignore region covers: pixel `int(x * frame_w)`, in the points' type."""
    if image[IGNORE_SIZE] == 0:
        return
    for i in range(n):
        u, v = x[i] * image[IMAGE_W], y[i] * image[IMAGE_H]
        if not double:
            u = np.float64(np.float32(x[i]) * np.float32(image[IMAGE_W]))
            v = np.float64(np.float32(y[i]) * np.float32(image[IMAGE_H]))
        # A NaN counts as 0.
        column = int(min(u, image[IMAGE_W] - 1.0)) if u > 0 else 0
        row = int(min(v, image[IMAGE_H] - 1.0)) if v > 0 else 0
        if row < image[IGNORE_H] and column < image[IGNORE_W]:
            byte = ignore[image[IGNORE_BASE] + row * image[IGNORE_STRIDE] + (column >> 3)]
            if (byte >> (column & 7)) & 1:
                codes[i] |= IGNORED
