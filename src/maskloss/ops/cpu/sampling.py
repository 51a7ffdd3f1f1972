# mypy: allow-untyped-defs
"""Bilinear gathering from the buffer of a plane for the CPU kernels, and its adjoint."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from .compile import helper
from .lanes import WORD, Code, check_literals
from .memory import prefetch

BLOCK = 512
# Points of a stratified layout that are written one after another lie this many parts of their order apart.
APART = 8


@intrinsic
def _bilinear(
    typingctx: Any, buffer: Any, pitch: Any, index: Any, fx: Any, fy: Any, z: Any, first: Any, lanes: Any
) -> Any:
    """Interpolate at `lanes` points (a literal) from `first` on: `z[i] = top + fy (bottom - top)`, and so on.

    Two neighboring pixels come with one load, and shuffles bring them into vectors over the points; left to itself
    LLVM gathers four times. There are no fused operations: selections agree bit for bit with those of other devices.
    """
    check_literals(lanes=lanes)
    count = lanes.literal_value

    def codegen(*given: Any) -> Any:
        code = Code(*given)
        builder, (_, pitch, *_, first, _) = code.builder, code.args
        data = code.place(0)
        vector = ir.VectorType(data.type.pointee, count)
        indices = [code.place(2, builder.add(first, first.type(k))) for k in range(count)]
        places = [builder.zext(builder.load(index), first.type) for index in indices]
        sides = []
        for start in (data, builder.gep(data, [pitch])):
            pixels = [load_pair(code, builder.gep(start, [place])) for place in places]
            while len(pixels) > 1:
                width = range(2 * pixels[0].type.count)
                pixels = [code.shuffle(*pair, *width) for pair in zip(pixels[::2], pixels[1::2], strict=True)]
            left, right = (code.shuffle(pixels[0], pixels[0], *range(side, 2 * count, 2)) for side in (0, 1))
            sides.append((left, right))
        across, down = (code.load(code.place(which, first), vector) for which in (3, 4))

        def mix(one: Any, other: Any, share: Any) -> Any:
            return builder.fadd(one, builder.fmul(share, builder.fsub(other, one)))

        code.store(mix(mix(*sides[0], across), mix(*sides[1], across), down), code.place(5, first))
        return code.nothing()

    return types.void(buffer, pitch, index, fx, fy, z, types.uintp, lanes), codegen


def load_pair(code: Code, place: Any) -> Any:
    """Two neighboring pixels."""
    return code.load(place, ir.VectorType(place.type.pointee, 2))


@intrinsic
def add_pair(typingctx: Any, buffer: Any, place: Any, first: Any, second: Any) -> Any:
    """Add to two neighboring pixels at once."""

    def codegen(*given: Any) -> Any:
        code = Code(*given)
        where = code.place(0, code.args[1])
        both = ir.Constant(ir.VectorType(where.type.pointee, 2), ir.Undefined)
        for lane, value in enumerate(code.args[2:]):
            both = code.builder.insert_element(both, value, WORD(lane))
        code.store(code.builder.fadd(load_pair(code, where), both), where)
        return code.nothing()

    return types.void(buffer, types.uintp, buffer.dtype, buffer.dtype), codegen


@helper()
def gather(buffer, pitch, index, fx, fy, n, z):
    """Bilinear values: along x in both rows, then along y."""
    below = np.uintp(pitch)
    whole = n - n % 8
    for i in range(0, whole, 8):
        _bilinear(buffer, below, index, fx, fy, z, np.uintp(i), 8)
    for i in range(whole, n):
        _bilinear(buffer, below, index, fx, fy, z, np.uintp(i), 1)


@helper(forceinline=True)
def _scatter_one(buffer, pitch, index, fx, fy, grad, i):
    place = np.uintp(np.uint32(index[i]))
    bottom = fy[i] * grad[i]
    top = grad[i] - bottom
    right = fx[i] * top
    add_pair(buffer, place, top - right, right)
    right = fx[i] * bottom
    add_pair(buffer, place + np.uintp(pitch), bottom - right, right)


@helper()
def gather_ahead(buffer, pitch, index, fx, fy, n, z, address, size):
    """As `gather`; meanwhile `size` bytes from an address on are brought into the cache, a little at a time."""
    below = np.uintp(pitch)
    whole = n - n % 8
    share = (size * 8 // max(whole, 8) + 63) // 64 * 64
    end = address + size
    for i in range(0, whole, 8):
        _bilinear(buffer, below, index, fx, fy, z, np.uintp(i), 8)
        stop = min(address + share, end)
        while address < stop:
            prefetch(address)
            address += 64
    for i in range(whole, n):
        _bilinear(buffer, below, index, fx, fy, z, np.uintp(i), 1)


@helper()
def scatter(buffer, pitch, index, fx, fy, grad, n):
    """The adjoint of `gather`: every point adds its gradient, with the bilinear weights, to four pixels."""
    for i in range(n):
        _scatter_one(buffer, pitch, index, fx, fy, grad, i)


@helper()
def scatter_apart(buffer, pitch, index, fx, fy, grad, n):
    """As `scatter`, for points sorted so that neighbors follow each other: distant parts of the list in turn.

    What was just written to one pair of pixels cannot be read as the pair beside it before it has left the core.
    """
    part = n // APART
    for k in range(part):
        for first in range(APART):
            _scatter_one(buffer, pitch, index, fx, fy, grad, np.uintp(first * part + k))
    for i in range(part * APART, n):
        _scatter_one(buffer, pitch, index, fx, fy, grad, np.uintp(i))


@helper()
def gather_nearest(buffer, index, n, z):
    """The value of one pixel."""
    for i in range(n):
        z[i] = buffer[np.uintp(np.uint32(index[i]))]


@helper()
def scatter_nearest(buffer, index, grad, n):
    """The adjoint of `gather_nearest`."""
    for i in range(n):
        buffer[np.uintp(np.uint32(index[i]))] += grad[i]
