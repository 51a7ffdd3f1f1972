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
from .planes import BORDER, from_bf16, from_f16
from .positions import locate, round_nearest

_I32 = np.int32
# The four pixels around a point are the bits of a code, those of the upper row first.
_BOTH, _BELOW = np.uint32(0b11), np.uint32(2)


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
    """Target values at a block of points of one target, interpolated as `gather` does it.

    xs, ys, fx, fy and the first two rows of `ints` are work space.
    """
    inside, index = ints[0], ints[1]
    for i in range(n):
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
            fx[k] = read_pixel(data, encoding, row, v, u)
        elif encoding >= VALUES:
            upper = _mix(read_pixel(data, encoding, row, v, u), read_pixel(data, encoding, row, v, u + 1), t, fx[k])
            v += 1
            lower = _mix(read_pixel(data, encoding, row, v, u), read_pixel(data, encoding, row, v, u + 1), t, fx[k])
            fx[k] = upper + fy[k] * (lower - upper)
        elif encoding == BITS and 0 <= v < bottom and 7 <= u < right:
            index[k] = _bits_around(start, stride, v, u)
        else:
            code = read_pixel(data, encoding, row, v, u) + 2.0 * read_pixel(data, encoding, row, v, u + 1)
            v += 1
            code += 4.0 * read_pixel(data, encoding, row, v, u) + 8.0 * read_pixel(data, encoding, row, v, u + 1)
            index[k] = _I32(code)
    if encoding < VALUES and not nearest:
        interpolate_codes(index, count, fx, fy, fx)
    put_back(fx, inside, count, t)


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


@helper()
def read_weights(x, y, n, image, ignore, double, w):
    """Weights of points: 0 in the ignore region, 1 elsewhere. A point lies in pixel `int(x * image_w)`, in its type."""
    for i in range(n):
        w[i] = 1
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
                w[i] = 0
