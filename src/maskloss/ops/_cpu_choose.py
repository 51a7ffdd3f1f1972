"""Choosing the uncertain candidates: a threshold on |z| instead of a sort."""

from __future__ import annotations

import numpy as np

from ._cpu_threads import helper

_I32 = np.int32
_SMALL = 4096
_PREFIX = 2048


def _positions() -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """For each byte the positions of its set bits, and behind them zeros."""
    table = np.zeros((256, 8), np.uint8)
    for byte in range(256):
        bits = [bit for bit in range(8) if byte >> bit & 1]
        table[byte, : len(bits)] = bits
    return table


_POSITIONS = _positions()
_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@helper()
def make_keys(z, n, keys):  # type: ignore[no-untyped-def]
    """The bits of |z| in float32, which order as |z| does; 0 for what is not finite, so that it is always chosen."""
    for i in range(n):
        bits = _I32(np.float32(z[i]).view(np.int32) & _I32(0x7FFFFFFF))
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
    below = _count_below(keys, n, low)
    between = 0
    for i in range(n):
        # Stored always, kept if it lies between: no branch to mispredict.
        space[between] = keys[i]
        between += 1 if low <= keys[i] <= high else 0
    return below, between


@helper()
def mark_chosen(keys, n, key, ties, bits):  # type: ignore[no-untyped-def]
    """Write the bit mask of the chosen: all keys below `key`, and of those equal to it the first `ties`."""
    whole = n // 8
    for byte in range(whole):
        value = _I32(0)
        for j in range(8):
            value |= _I32((_I32(1) if keys[byte * 8 + j] < key else _I32(0)) << _I32(j))
        bits[byte] = value
    if whole * 8 < n:
        bits[whole] = 0
        for i in range(whole * 8, n):
            if keys[i] < key:
                bits[whole] |= np.uint8(1 << (i - whole * 8))
    i = 0
    while ties > 0:
        if keys[i] == key:
            bits[i >> 3] |= np.uint8(1 << (i & 7))
            ties -= 1
        i += 1


@helper()
def list_chosen(bits, chosen):  # type: ignore[no-untyped-def]
    """The positions of the set bits, ascending. `chosen` needs room for 8 more than there are."""
    count = np.uintp(0)
    for byte in range(bits.shape[0]):
        value = np.uintp(bits[byte])
        for j in range(8):
            chosen[count + np.uintp(j)] = _I32(_I32(byte * 8) + _I32(_POSITIONS[value, j]))
        count += np.uintp(_COUNTS[value])
    return count
