# mypy: allow-untyped-defs
"""Choosing the uncertain candidates: a threshold on |z| instead of a sort."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from .threads import helper, splat

_I32 = np.int32
_SMALL = 4096
_SAMPLE = 2048
# Keys are looked at in groups of this size; an array of keys is filled up to whole groups with the largest key.
GROUP = 16
LARGEST_KEY = _I32(0x7FFFFFFF)


def _positions() -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """For each byte the positions of its set bits, and behind them zeros."""
    table = np.zeros((256, 8), np.int32)
    for byte in range(256):
        bits = [bit for bit in range(8) if byte >> bit & 1]
        table[byte, : len(bits)] = bits
    return table


_POSITIONS = _positions()
_COUNTS = np.array([int(byte).bit_count() for byte in range(256)], np.uint8)


@intrinsic
def _within(typingctx: Any, array: Any, first: Any, low: Any, span: Any) -> Any:
    """16 bits: which of `array[first:first + 16]` (int32) lie in [low, low + span). One comparison of a vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        vector = ir.VectorType(ir.IntType(32), GROUP)
        keys = builder.load(builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer()), align=4)
        low, span = (splat(builder, value, vector) for value in args[2:])
        return builder.bitcast(builder.icmp_unsigned("<", builder.sub(keys, low), span), ir.IntType(16))

    return types.uint16(array, types.uintp, types.int32, types.int32), codegen


@intrinsic
def _put(typingctx: Any, out: Any, place: Any, table: Any, row: Any, base: Any) -> Any:
    """`out[place:place + 8] = base + table[row]`, as one vector: LLVM cannot know that the arrays do not overlap."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, table = (context.make_array(signature.args[k])(context, builder, args[k]).data for k in (0, 2))
        vector = ir.VectorType(ir.IntType(32), 8)
        start = builder.gep(table, [builder.mul(args[3], args[3].type(8))])
        positions = builder.load(builder.bitcast(start, vector.as_pointer()), align=4)
        total = builder.add(positions, splat(builder, args[4], vector))
        builder.store(total, builder.bitcast(builder.gep(out, [args[1]]), vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(out, types.uintp, table, types.uintp, types.int32), codegen


@helper()
def make_keys(z, n, keys):
    """The bits of |z| in float32, which order as |z| does; 0 for what is not finite, so that it is always chosen."""
    for i in range(n):
        bits = _I32(np.float32(z[i]).view(np.int32) & LARGEST_KEY)
        keys[i] = bits if bits < _I32(0x7F800000) else _I32(0)


@helper()
def _count_below(keys, n, limit):
    count = _I32(0)
    for i in range(n):
        count = _I32(count + (_I32(1) if keys[i] < limit else _I32(0)))
    return count


@helper()
def _ranked(keys, n, rank, low, high):
    """The `rank`-th smallest key (from 1), known to lie in [low, high]: the answer is built bit by bit, by counting."""
    bit = 30
    while bit >= 0 and (low >> bit) == (high >> bit):
        bit -= 1
    value = (low >> (bit + 1)) << (bit + 1)
    while bit >= 0:
        if _count_below(keys, n, _I32(value | (1 << bit))) < rank:
            value |= 1 << bit
        bit -= 1
    return value


@helper()
def threshold(keys, n, rank, space, bits):
    """The `rank`-th smallest of n keys (from 1), and how many are smaller.

    A sample tells within which two keys the answer lies; one pass collects the keys between them. Should the sample
    have misled, all keys are searched. It is spread over all candidates, since those of a stratified layout come in the
    order of the image. `space` and `bits` are work space.
    """
    if n > _SMALL:
        p = rank / n
        spread = 4.0 * np.sqrt(p * (1.0 - p) * _SAMPLE) + 2.0
        low_rank, high_rank = int(p * _SAMPLE - spread), int(p * _SAMPLE + spread) + 1
        top = 0x7FFFFFFF
        for k in range(_SAMPLE):
            space[k] = keys[k * n // _SAMPLE]
        low = _ranked(space, _SAMPLE, low_rank, 0, top) if low_rank >= 1 else 0
        high = _ranked(space, _SAMPLE, high_rank, low, top) if high_rank <= _SAMPLE else top
        below, between = _collect(keys, n, _I32(low), _I32(high), space, bits)
        if below < rank <= below + between:
            key = _ranked(space, between, rank - below, low, high)
            return key, below + _count_below(space, between, _I32(key))
    key = _ranked(keys, n, rank, 0, 0x7FFFFFFF)
    return key, _count_below(keys, n, _I32(key))


@helper()
def _collect(keys, n, low, high, space, bits):
    """Copy the keys in [low, high] to `space`, which needs room for 8 more than there are; count those below."""
    mark(keys, n, low, _I32(_I32(high - low) + _I32(1)), bits)
    count = list_marked(bits, space)
    for k in range(count):
        space[k] = keys[np.uintp(np.uint32(space[k]))]
    return _count_below(keys, n, low), count


@helper()
def mark(keys, n, low, span, bits):
    """Write a bit mask `[ceil(n / 8)]` of the keys in [low, low + span)."""
    whole = n // GROUP
    words = bits[: 2 * whole].view(np.uint16)
    for k in range(whole):
        words[k] = _within(keys, np.uintp(k * GROUP), low, span)
    if whole * GROUP < n:
        rest = _within(keys, np.uintp(whole * GROUP), low, span)
        bits[2 * whole] = np.uint8(rest & 255)
        if 2 * whole + 1 < bits.shape[0]:
            bits[2 * whole + 1] = np.uint8(rest >> 8)


@helper()
def mark_chosen(keys, n, key, ties, bits):
    """Write the bit mask of the chosen: all keys below `key`, and of those equal to it the first `ties`."""
    equal = _count_below(keys, n, _I32(key + _I32(1))) - _count_below(keys, n, key)
    if equal == ties:
        mark(keys, n, _I32(0), _I32(key + _I32(1)), bits)
        return
    mark(keys, n, _I32(0), key, bits)
    i = 0
    while ties > 0:
        if keys[i] == key:
            bits[i >> 3] |= np.uint8(1 << (i & 7))
            ties -= 1
        i += 1


@helper()
def list_marked(bits, positions):
    """The positions of the set bits, ascending, and their number. `positions` needs room for 8 more than there are."""
    count = np.uintp(0)
    for byte in range(bits.shape[0]):
        value = np.uintp(bits[byte])
        _put(positions, count, _POSITIONS, value, _I32(byte * 8))
        count += np.uintp(_COUNTS[value])
    return np.int64(count)
