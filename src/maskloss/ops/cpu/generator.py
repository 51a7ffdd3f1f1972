# mypy: allow-untyped-defs
"""Random points for the CPU kernels: Threefry-2x32 with 20 rounds, many points at a time."""

from __future__ import annotations

import numpy as np

from maskloss.ops.abi import STREAM_SHIFT, WINDOW_H, WINDOW_W, WINDOW_X, WINDOW_Y, X, Y

from .threads import helper

U32 = np.uint32
_PARITY = U32(0x1BD11BDA)
_UNIT = np.float32(2.0**-24)


@helper(forceinline=True)
def _mix(x0, x1, left):
    # Numba widens unsigned arithmetic to 64 bits: without a cast after every operation the result would be wrong.
    x0 = U32(x0 + x1)
    return x0, U32(U32(U32(x1 << U32(left)) | U32(x1 >> U32(32 - left))) ^ x0)


@helper(forceinline=True)
def threefry(k0, k1, c0, c1):
    """Threefry-2x32 of Salmon et al. (Random123), 20 rounds: 64 random bits for a key and a counter."""
    k2 = U32(U32(k0 ^ k1) ^ _PARITY)
    x0, x1 = U32(c0 + k0), U32(c1 + k1)
    x0, x1 = _mix(x0, x1, 13)
    x0, x1 = _mix(x0, x1, 15)
    x0, x1 = _mix(x0, x1, 26)
    x0, x1 = _mix(x0, x1, 6)
    x0, x1 = U32(x0 + k1), U32(x1 + U32(k2 + U32(1)))
    x0, x1 = _mix(x0, x1, 17)
    x0, x1 = _mix(x0, x1, 29)
    x0, x1 = _mix(x0, x1, 16)
    x0, x1 = _mix(x0, x1, 24)
    x0, x1 = U32(x0 + k2), U32(x1 + U32(k0 + U32(2)))
    x0, x1 = _mix(x0, x1, 13)
    x0, x1 = _mix(x0, x1, 15)
    x0, x1 = _mix(x0, x1, 26)
    x0, x1 = _mix(x0, x1, 6)
    x0, x1 = U32(x0 + k0), U32(x1 + U32(k1 + U32(3)))
    x0, x1 = _mix(x0, x1, 17)
    x0, x1 = _mix(x0, x1, 29)
    x0, x1 = _mix(x0, x1, 16)
    x0, x1 = _mix(x0, x1, 24)
    x0, x1 = U32(x0 + k1), U32(x1 + U32(k2 + U32(4)))
    x0, x1 = _mix(x0, x1, 13)
    x0, x1 = _mix(x0, x1, 15)
    x0, x1 = _mix(x0, x1, 26)
    x0, x1 = _mix(x0, x1, 6)
    return U32(x0 + k2), U32(x1 + U32(k0 + U32(5)))


@helper()
def instance_key(seed, image_id, target):
    """The key of one (image, target) pair: `threefry(seed, (image_id, target))`."""
    bits = np.uint64(seed)
    return threefry(U32(bits), U32(bits >> np.uint64(32)), U32(np.uint64(image_id)), U32(np.uint64(target)))


@helper()
def counter_of(layer, stream):
    """The word of a counter that holds the decoder layer and the stream."""
    return U32(layer | (stream << STREAM_SHIFT))


@helper()
def draw_bits(key, stream, counters, n, bits):
    """Points `counters[:n]` of a stream as integers: 24 bits for x in `bits[X]`, for y in `bits[Y]`."""
    k0, k1 = key
    xs, ys = bits[X], bits[Y]
    for i in range(n):
        r0, r1 = threefry(k0, k1, U32(counters[i]), stream)
        xs[i] = np.int32(r0 >> U32(8))
        ys[i] = np.int32(r1 >> U32(8))


@helper()
def points_of_bits(bits, n, window, x, y):
    """Into the valid window: `x = x0 + bits * 2**-24 * width`, in float32, every operation rounded."""
    x0, y0, width, height = window[WINDOW_X], window[WINDOW_Y], window[WINDOW_W], window[WINDOW_H]
    xs, ys = bits[X], bits[Y]
    for i in range(n):
        x[i] = x0 + np.float32(xs[i]) * _UNIT * width
        y[i] = y0 + np.float32(ys[i]) * _UNIT * height
