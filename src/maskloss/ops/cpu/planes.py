# mypy: allow-untyped-defs
"""Planes for the CPU kernels: copies with a border of zeros, in the type of sums, and back; number formats."""

from __future__ import annotations

import numpy as np

from maskloss._abi import BF16, F32, F64

from .compile import helper
from .memory import at, call_madvise

# Columns of the table that describes a tensor `[B, Q, h, w]`: address, element type, h, w, and strides in elements.
ADDRESS, DTYPE, HEIGHT, WIDTH, STRIDE_B, STRIDE_Q, STRIDE_Y, STRIDE_X = range(8)
SOURCE_COLUMNS = 8
# A table of gradients has one more: where `madvise` is, if planes lie in fresh ordinary pages.
MADVISE = 8
GRADIENT_COLUMNS = 9
# A buffer holds pixel (y, x) of a plane at row y + 2 and column x + 2; the rest is zero. A point that lies off the map
# reads zeros there, so that the inner loops have no branch.
BORDER = 2

_I32 = np.int32
# Linux: have the pages of a range made at once, instead of one by one at the first write to each.
_POPULATE_WRITE = _I32(23)
_PAGE = 4096


# ------------------------------------------------------------------------------------------------ number formats


@helper(forceinline=True)
def from_bf16(bits):
    """The float32 whose upper half is `bits`."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@helper(forceinline=True)
def from_f16(bits):
    """IEEE half to float32, by integer operations: not every CPU has an instruction, and this one vectorizes."""
    sign = np.uint32(np.uint32(np.uint32(bits) & np.uint32(0x8000)) << np.uint32(16))
    rest = np.uint32(np.uint32(bits) & np.uint32(0x7FFF))
    normal = np.uint32(np.uint32(rest << np.uint32(13)) + np.uint32(0x38000000))
    special = np.uint32(np.uint32(rest << np.uint32(13)) | np.uint32(0x7F800000))
    # A subnormal half is a whole multiple of 2**-24.
    tiny = np.float32(np.float32(_I32(rest)) * np.float32(2.0**-24)).view(np.uint32)
    size = normal if rest < np.uint32(0x7C00) else special
    size = tiny if rest < np.uint32(0x0400) else size
    return np.uint32(size | sign).view(np.float32)


@helper(forceinline=True)
def to_bf16(value):
    """float32 to bfloat16, rounded half to even; NaN stays NaN."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
    return np.uint16(rounded if value == value else np.uint32(0x7FC0))


@helper(forceinline=True)
def to_f16(value):
    """float32 to IEEE half, rounded half to even; too large becomes infinite, NaN stays NaN."""
    bits = np.float32(value).view(np.uint32)
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(np.uint32(size + np.uint32(0xC8000FFF)) + odd) >> np.uint32(13))
    # Adding 0.5 aligns the last bit of a subnormal half with the last bit of the sum.
    shifted = np.float32(np.uint32(size).view(np.float32) + np.float32(0.5)).view(np.uint32)
    half = normal if size >= np.uint32(0x38800000) else np.uint32(shifted - np.uint32(0x3F000000))
    half = half if size < np.uint32(0x477FF000) else np.uint32(0x7C00)
    half = half if value == value else np.uint32(0x7E00)
    return np.uint16(np.uint32(half | sign))


# --------------------------------------------------------------------------------------------------------- planes


@helper()
def read_row(address, dtype, n, step, out):
    """Copy n elements that lie `step` apart."""
    size = (n - 1) * step + 1
    if dtype == F32:
        f32 = at(address, size, np.float32)
        if step == 1:
            for x in range(n):
                out[x] = f32[x]
        else:
            for x in range(n):
                out[x] = f32[x * step]
    elif dtype == F64:
        f64 = at(address, size, np.float64)
        for x in range(n):
            out[x] = f64[x * step]
    elif dtype == BF16:
        u16 = at(address, size, np.uint16)
        if step == 1:
            for x in range(n):
                out[x] = from_bf16(u16[x])
        else:
            for x in range(n):
                out[x] = from_bf16(u16[x * step])
    else:
        u16 = at(address, size, np.uint16)
        for x in range(n):
            out[x] = from_f16(u16[x * step])


@helper()
def read_rows(source, b, q, first, last, buffer):
    """Copy rows `first:last` of plane (b, q) into a buffer whose row 0 is row `first`; rows off the map become zero.

    `source` is a row of the table of tensors. The columns of the border must be zero already.
    """
    width = source[WIDTH]
    pitch = width + 2 * BORDER
    item = item_bytes(source[DTYPE])
    plane = source[ADDRESS] + (b * source[STRIDE_B] + q * source[STRIDE_Q]) * item
    for y in range(first, last):
        start = (y - first) * pitch + BORDER
        row = buffer[start : start + width]
        if 0 <= y < source[HEIGHT]:
            read_row(plane + y * source[STRIDE_Y] * item, source[DTYPE], width, source[STRIDE_X], row)
        else:
            row[:] = 0


@helper(forceinline=True)
def item_bytes(dtype):
    """Size of an element."""
    return 8 if dtype == F64 else (4 if dtype == F32 else 2)


@helper()
def read_plane(source, b, q, buffer):
    """Copy a whole plane and its border; the buffer has `buffer_size(h, w)` elements."""
    pitch = source[WIDTH] + 2 * BORDER
    for y in range(source[HEIGHT] + 2 * BORDER):
        buffer[y * pitch] = 0
        buffer[y * pitch + 1] = 0
        buffer[y * pitch + pitch - 2] = 0
        buffer[y * pitch + pitch - 1] = 0
    read_rows(source, b, q, -BORDER, source[HEIGHT] + BORDER, buffer)


@helper()
def write_plane(buffer, target, b, q):
    """Write the inner part of a buffer to a contiguous plane, rounded to its element type."""
    width = target[WIDTH]
    dtype = target[DTYPE]
    plane = target[ADDRESS] + (b * target[STRIDE_B] + q * target[STRIDE_Q]) * item_bytes(dtype)
    if target.shape[0] > MADVISE and target[MADVISE] != 0:
        # A hint: an older kernel refuses it, and the pages come one by one.
        start = plane // _PAGE * _PAGE
        end = plane + target[HEIGHT] * width * item_bytes(dtype)
        call_madvise(target[MADVISE], start, end - start, _POPULATE_WRITE)
    for y in range(target[HEIGHT]):
        start = (y + BORDER) * (width + 2 * BORDER) + BORDER
        row = buffer[start : start + width]
        if dtype == F32:
            f32 = at(plane + y * width * 4, width, np.float32)
            for x in range(width):
                f32[x] = np.float32(row[x])
        elif dtype == F64:
            f64 = at(plane + y * width * 8, width, np.float64)
            for x in range(width):
                f64[x] = np.float64(row[x])
        elif dtype == BF16:
            u16 = at(plane + y * width * 2, width, np.uint16)
            for x in range(width):
                u16[x] = to_bf16(np.float32(row[x]))
        else:
            u16 = at(plane + y * width * 2, width, np.uint16)
            for x in range(width):
                u16[x] = to_f16(np.float32(row[x]))


def buffer_size(height: int, width: int) -> int:
    """Elements of the buffer for a plane."""
    return (height + 2 * BORDER) * (width + 2 * BORDER)
