"""Choosing the uncertain candidates: a threshold on |z| instead of a sort."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._cpu_threads import helper

_I32 = np.int32
_SMALL = 4096
_PREFIX = 2048
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
_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@intrinsic  # type: ignore[untyped-decorator]
def _within(typingctx: Any, array: Any, first: Any, low: Any, span: Any) -> Any:
    """16 bits: which of `array[first:first + 16]` (int32) lie in [low, low + span). One comparison of a vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        vector = ir.VectorType(ir.IntType(32), GROUP)
        keys = builder.load(builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer()), align=4)
        low, span = (_splat(builder, value, vector) for value in args[2:])
        return builder.bitcast(builder.icmp_unsigned("<", builder.sub(keys, low), span), ir.IntType(16))

    return types.uint16(array, types.uintp, types.int32, types.int32), codegen


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), GROUP), [0] * GROUP)
    return builder.shuffle_vector(single, single, lanes)


@helper()
def make_keys(z, n, keys):  # type: ignore[no-untyped-def]
    """The bits of |z| in float32, which order as |z| does; 0 for what is not finite, so that it is always chosen."""
    for i in range(n):
        bits = _I32(np.float32(z[i]).view(np.int32) & LARGEST_KEY)
        keys[i] = bits if bits < _I32(0x7F800000) else _I32(0)


@helper()
def _count_below(keys, n, limit):  # type: ignore[no-untyped-def]
    count = _I32(0)
    for i in range(n):
        count = _I32(count + (_I32(1) if keys[i] < limit else _I32(0)))
    return count


@helper()
def _ranked(keys, n, rank, low, high):  # type: ignore[no-untyped-def]
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
def threshold(keys, n, rank, space):  # type: ignore[no-untyped-def]
    """The `rank`-th smallest of n keys (from 1), and how many are smaller.

    The candidates are independent, so a prefix tells within which two keys the answer lies; one pass collects the keys
    between them. Should the prefix have misled, all keys are searched.
    """
    if n > _SMALL:
        p = rank / n
        spread = 4.0 * np.sqrt(p * (1.0 - p) * _PREFIX) + 2.0
        low_rank, high_rank = int(p * _PREFIX - spread), int(p * _PREFIX + spread) + 1
        top = 0x7FFFFFFF
        low = _ranked(keys, _PREFIX, low_rank, 0, top) if low_rank >= 1 else 0
        high = _ranked(keys, _PREFIX, high_rank, low, top) if high_rank <= _PREFIX else top
        below, between = _collect(keys, n, _I32(low), _I32(high), space)
        if below < rank <= below + between:
            key = _ranked(space, between, rank - below, low, high)
            return key, below + _count_below(space, between, _I32(key))
    key = _ranked(keys, n, rank, 0, 0x7FFFFFFF)
    return key, _count_below(keys, n, _I32(key))


@helper()
def _collect(keys, n, low, high, space):  # type: ignore[no-untyped-def]
    """Copy the keys in [low, high] to `space`, which needs room for 8 more than there are; count those below."""
    below = _count_below(keys, n, low)
    span = _I32(_I32(high - low) + _I32(1))
    count = np.uintp(0)
    for first in range(0, n, GROUP):
        hits = np.uintp(_within(keys, np.uintp(first), low, span))
        for half in range(2):
            byte = (hits >> np.uintp(8 * half)) & np.uintp(255)
            for j in range(8):
                space[count + np.uintp(j)] = keys[np.uintp(first + 8 * half) + np.uintp(_POSITIONS[byte, j])]
            count += np.uintp(_COUNTS[byte])
    return below, np.int64(count)


@helper()
def mark(keys, n, limit, bits):  # type: ignore[no-untyped-def]
    """Write a bit mask `[ceil(n / 8)]` of the keys below `limit`."""
    for first in range(0, n, GROUP):
        hits = _within(keys, np.uintp(first), _I32(0), limit)
        byte = first // 8
        bits[byte] = np.uint8(hits & 255)
        if byte + 1 < bits.shape[0]:
            bits[byte + 1] = np.uint8(hits >> 8)


@helper()
def mark_chosen(keys, n, key, ties, bits):  # type: ignore[no-untyped-def]
    """Write the bit mask of the chosen: all keys below `key`, and of those equal to it the first `ties`."""
    mark(keys, n, key, bits)
    i = 0
    while ties > 0:
        if keys[i] == key:
            bits[i >> 3] |= np.uint8(1 << (i & 7))
            ties -= 1
        i += 1


@helper()
def list_marked(bits, positions):  # type: ignore[no-untyped-def]
    """The positions of the set bits, ascending, and their number. `positions` needs room for 8 more than there are."""
    count = np.uintp(0)
    for byte in range(bits.shape[0]):
        value = np.uintp(bits[byte])
        if value != 0:
            for j in range(8):
                positions[count + np.uintp(j)] = _I32(_I32(byte * 8) + _POSITIONS[value, j])
            count += np.uintp(_COUNTS[value])
    return np.int64(count)
