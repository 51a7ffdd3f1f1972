# mypy: allow-untyped-defs
"""Bilinear gathering from the buffer of a plane for the CPU kernels, and its adjoint."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

from .compile import helper
from .lanes import alignment
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
    if not isinstance(lanes, types.IntegerLiteral):
        raise RequireLiteralValue("lanes")
    count = lanes.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = [context.make_array(signature.args[k])(context, builder, args[k]).data for k in (0, 2, 3, 4, 5)]
        data, index, fx, fy, z = arrays
        first = args[6]
        vector = ir.VectorType(data.type.pointee, count)
        places = [
            builder.zext(builder.load(builder.gep(index, [builder.add(first, first.type(k))])), first.type)
            for k in range(count)
        ]
        sides = []
        for start in (data, builder.gep(data, [args[1]])):
            pixels = _concatenate(builder, [_pair(builder, start, place) for place in places])
            left, right = (_shuffle(builder, pixels, pixels, *range(side, 2 * count, 2)) for side in (0, 1))
            sides.append((left, right))
        across, down = (_vector(builder, array, first, vector) for array in (fx, fy))

        def mix(one: Any, other: Any, share: Any) -> Any:
            return builder.fadd(one, builder.fmul(share, builder.fsub(other, one)))

        value = mix(mix(*sides[0], across), mix(*sides[1], across), down)
        pointer = builder.bitcast(builder.gep(z, [first]), vector.as_pointer())
        builder.store(value, pointer, align=alignment(vector))
        return context.get_dummy_value()

    return types.void(buffer, pitch, index, fx, fy, z, types.uintp, lanes), codegen


def _concatenate(builder: Any, vectors: list[Any]) -> Any:
    while len(vectors) > 1:
        width = range(2 * vectors[0].type.count)
        vectors = [
            _shuffle(builder, one, other, *width) for one, other in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _vector(builder: Any, data: Any, first: Any, vector: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(data, [first]), vector.as_pointer()), align=alignment(vector))


@intrinsic
def _add_pair(typingctx: Any, buffer: Any, place: Any, first: Any, second: Any) -> Any:
    """Add to two neighboring pixels at once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        total = builder.fadd(_pair(builder, array.data, args[1]), _both(builder, args[2], args[3]))
        pointer = builder.bitcast(builder.gep(array.data, [args[1]]), total.type.as_pointer())
        builder.store(total, pointer, align=alignment(total.type))
        return context.get_dummy_value()

    return types.void(buffer, types.uintp, buffer.dtype, buffer.dtype), codegen


def _pair(builder: Any, data: Any, place: Any) -> Any:
    return _vector(builder, data, place, ir.VectorType(data.type.pointee, 2))


def _both(builder: Any, first: Any, second: Any) -> Any:
    vector = ir.Constant(ir.VectorType(first.type, 2), ir.Undefined)
    for lane, value in enumerate((first, second)):
        vector = builder.insert_element(vector, value, ir.IntType(32)(lane))
    return vector


def _shuffle(builder: Any, one: Any, other: Any, *lanes: int) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(one, other, mask)


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
    _add_pair(buffer, place, top - right, right)
    right = fx[i] * bottom
    _add_pair(buffer, place + np.uintp(pitch), bottom - right, right)


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
