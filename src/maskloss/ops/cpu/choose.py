# mypy: allow-untyped-defs
"""Choosing the uncertain candidates: a threshold on |z| instead of a sort."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from .compile import helper
from .lanes import WORD, Code, words

_I32 = np.int32
_SMALL = 4096
_SAMPLE = 2048
# Of the keys that the sample names, this many low bits need not be known: they are half a percent of |z|.
_COARSE = 15
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
def _within_and_below(typingctx: Any, array: Any, first: Any, low: Any, span: Any) -> Any:
    """16 bits: which of `array[first:first + 16]` (int32) lie in [low, low + span). One comparison of a vector.

    The bits above are the number of those that are smaller than `low`, if none is negative.
    """

    def codegen(*given: Any) -> Any:
        code, vector = Code(*given), words(GROUP)
        builder, args = code.builder, code.args
        keys = code.load(code.place(0, args[1]), vector)
        low, span = (code.everywhere(value, vector) for value in args[2:])
        inside, below = builder.icmp_unsigned("<", builder.sub(keys, low), span), builder.icmp_signed("<", keys, low)
        marks, smaller = (builder.zext(builder.bitcast(mask, ir.IntType(GROUP)), WORD) for mask in (inside, below))
        return builder.or_(builder.shl(builder.ctpop(smaller), WORD(GROUP)), marks)

    return types.uint32(array, types.uintp, types.int32, types.int32), codegen


@intrinsic
def _put(typingctx: Any, out: Any, place: Any, table: Any, row: Any, base: Any) -> Any:
    """`out[place:place + 8] = base + table[row]`, as one vector: LLVM cannot know that the arrays do not overlap."""

    def codegen(*given: Any) -> Any:
        code, vector = Code(*given), words(8)
        _, place, _, row, base = code.args
        positions = code.load(code.place(2, code.builder.mul(row, row.type(8))), vector)
        code.store(code.builder.add(positions, code.everywhere(base, vector)), code.place(0, place))
        return code.nothing()

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
def _ranked(keys, n, rank, low, high, last_bit):
    """The `rank`-th smallest key (from 1), known to lie in [low, high], without its bits below `last_bit`.

    It is built bit by bit, by counting.
    """
    bit = 30
    while bit >= last_bit and (low >> bit) == (high >> bit):
        bit -= 1
    value = (low >> (bit + 1)) << (bit + 1)
    while bit >= last_bit:
        if _count_below(keys, n, _I32(value | (1 << bit))) < rank:
            value |= 1 << bit
        bit -= 1
    return value


@helper()
def threshold(keys, n, rank, space, bits):
    """The `rank`-th smallest of n keys (from 1), how many are smaller, and how many are equal.

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
        low = _ranked(space, _SAMPLE, low_rank, 0, top, _COARSE) if low_rank >= 1 else 0
        high = top
        if high_rank <= _SAMPLE:
            high = _ranked(space, _SAMPLE, high_rank, low, top, _COARSE) | ((1 << _COARSE) - 1)
        below, between = _collect(keys, n, _I32(low), _I32(high), space, bits)
        if below < rank <= below + between:
            key = _ranked(space, between, rank - below, low, high, 0)
            smaller = _count_below(space, between, _I32(key))
            return key, below + smaller, _count_below(space, between, _I32(key + 1)) - smaller
    key = _ranked(keys, n, rank, 0, 0x7FFFFFFF, 0)
    smaller = _count_below(keys, n, _I32(key))
    return key, smaller, _count_below(keys, n, _I32(key + 1)) - smaller


@helper()
def _collect(keys, n, low, high, space, bits):
    """Copy the keys in [low, high] to `space`, which needs room for 8 more than there are; count those below."""
    span, below = _I32(_I32(high - low) + _I32(1)), np.int64(0)
    marks = bits[: n // GROUP * 2].view(np.uint16)
    for k in range(n // GROUP):
        found = _within_and_below(keys, np.uintp(k * GROUP), low, span)
        marks[k] = np.uint16(found)
        below += np.int64(found >> np.uint32(GROUP))
    if n % GROUP:
        first = n // GROUP * GROUP
        _mark_rest(keys, first, low, span, bits)
        for i in range(first, n):
            below += np.int64(keys[i] < low)
    count = list_marked(bits, space)
    pick(keys, space, count, space)
    return below, count


@helper()
def mark(keys, n, low, span, bits):
    """Write a bit mask `[ceil(n / 8)]` of the keys in [low, low + span)."""
    found = bits[: n // GROUP * 2].view(np.uint16)
    for k in range(n // GROUP):
        found[k] = np.uint16(_within_and_below(keys, np.uintp(k * GROUP), low, span))
    if n % GROUP:
        _mark_rest(keys, n // GROUP * GROUP, low, span, bits)


@helper()
def _mark_rest(keys, first, low, span, bits):
    rest = np.uint16(_within_and_below(keys, np.uintp(first), low, span))
    bits[first >> 3] = np.uint8(rest & 255)
    if (first >> 3) + 1 < bits.shape[0]:
        bits[(first >> 3) + 1] = np.uint8(rest >> 8)


@helper()
def mark_chosen(keys, n, key, ties, equal, bits):
    """Write the bit mask of the chosen: all keys below `key`, and the first `ties` of those `equal` to it."""
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


@helper()
def pick(values, positions, n, picked):
    """`picked[k] = values[positions[k]]`, also over the positions; none is negative, which Numba cannot know."""
    for k in range(n):
        picked[k] = values[np.uintp(np.uint32(positions[k]))]


@helper()
def put_back(values, positions, n, out):
    """`out[positions[k]] = values[k]`."""
    for k in range(n):
        out[np.uintp(np.uint32(positions[k]))] = values[k]
