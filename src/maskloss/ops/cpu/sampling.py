# mypy: allow-untyped-defs
"""Reading and writing maps for the CPU kernels: planes with a border of zeros, bilinear gather, and its adjoint."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

from maskloss.ops.abi import BF16, F32, F64, X, Y

from .threads import LANES, at, call_madvise, helper, prefetch, splat

# Columns of the table that describes a tensor `[B, Q, h, w]`: address, element type, h, w, and strides in elements.
ADDRESS, DTYPE, HEIGHT, WIDTH, STRIDE_B, STRIDE_Q, STRIDE_Y, STRIDE_X = range(8)
SOURCE_COLUMNS = 8
# A table of gradients has one more: where `madvise` is, if planes lie in fresh ordinary pages.
MADVISE = 8
GRADIENT_COLUMNS = 9
# A buffer holds pixel (y, x) of a plane at row y + 2 and column x + 2; the rest is zero. A point that lies off the map
# reads zeros there, so that the inner loops have no branch.
BORDER = 2
BLOCK = 512
# Points of a stratified layout that are written one after another lie this many parts of their order apart.
APART = 8


class Given(NamedTuple):
    """Points of the caller: address (0: there are none), whether in float64, strides in elements."""

    address: int
    double: bool
    row: int
    point: int
    coordinate: int


_I32 = np.int32
# Linux: have the pages of a range made at once, instead of one by one at the first write to each.
_POPULATE_WRITE = _I32(23)
_PAGE = 4096
_UNIT = np.float32(2.0**-24)
# Larger maps than this overflow the integers of `locate_bits`.
BITS_LIMIT = 1 << 18


# ------------------------------------------------------------------------------------------------ number formats


@helper(forceinline=True)
def from_bf16(bits):
    """The float32 whose upper half is `bits`."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@helper(forceinline=True)
def from_f16(bits):
    """IEEE half to float32, by integer operations: not every CPU has an instruction, and this one vectorises."""
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
def _read_row(address, dtype, n, step, out):
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
            _read_row(plane + y * source[STRIDE_Y] * item, source[DTYPE], width, source[STRIDE_X], row)
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


# ---------------------------------------------------------------------------------------------------- positions


@helper()
def locate(x, y, n, height, width, border, index, fx, fy):
    """Where points lie in a buffer: `px = x * width - 0.5`, the pixel `floor(px)`, the fraction `px - floor(px)`.

    In double precision, where the position of a float32 point is exact. Points off the map by more than a pixel, and
    NaN, are sent into the border.
    """
    w, h = np.float64(width), np.float64(height)
    x_low, x_high = (0.0, w - 1.0) if border else (-np.inf, np.inf)
    y_low, y_high = (0.0, h - 1.0) if border else (-np.inf, np.inf)
    pitch = _I32(width + 2 * BORDER)
    for i in range(n):
        px = x[i] * w - 0.5
        px = max(px, x_low)
        px = min(px, x_high)
        x0 = np.floor(px)
        fx[i] = px - x0
        py = y[i] * h - 0.5
        py = max(py, y_low)
        py = min(py, y_high)
        y0 = np.floor(py)
        fy[i] = py - y0
        x0 = max(-2.0, x0)
        y0 = max(-2.0, y0)
        column = _I32(min(w, x0))
        row = _I32(min(h, y0))
        index[i] = _I32(_I32(_I32(row + _I32(BORDER)) * pitch) + _I32(column + _I32(BORDER)))


@intrinsic
def _locate_lanes(
    typingctx: Any, xs: Any, ys: Any, first: Any, width: Any, height: Any, pitch: Any, index: Any, fx: Any, fy: Any,
    lanes: Any,
) -> Any:  # fmt: skip
    """`locate_bits` for `lanes` points (a literal) from `first` on."""
    if not isinstance(lanes, types.IntegerLiteral):
        raise RequireLiteralValue("lanes")
    vector = ir.VectorType(ir.IntType(32), lanes.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def place(which: int) -> Any:
            data = context.make_array(signature.args[which])(context, builder, args[which]).data
            return builder.gep(data, [args[2]])

        def number(value: int) -> Any:
            return ir.Constant(vector, [value] * vector.count)

        def axis(bits: int, size: int, fraction: int) -> Any:
            """`bits * size / 2**24 - 0.5` as whole part and 24 bits of fraction, 12 bits at a time."""
            given = builder.load(builder.bitcast(place(bits), vector.as_pointer()), align=4)
            size = splat(builder, args[size], vector)
            low = builder.mul(builder.and_(given, number(4095)), size)
            high = builder.mul(builder.lshr(given, number(12)), size)
            high = builder.sub(builder.add(high, builder.lshr(low, number(12))), number(2048))
            rest = builder.or_(
                builder.shl(builder.and_(high, number(4095)), number(12)), builder.and_(low, number(4095))
            )
            single = ir.VectorType(ir.FloatType(), vector.count)
            share = builder.fmul(builder.sitofp(rest, single), ir.Constant(single, [2.0**-24] * vector.count))
            where = place(fraction)
            kind = ir.VectorType(where.type.pointee, vector.count)
            share = share if kind.element == single.element else builder.fpext(share, kind)
            builder.store(share, builder.bitcast(where, kind.as_pointer()), align=_align(kind))
            return builder.add(builder.ashr(high, number(12)), number(BORDER))

        column, row = axis(0, 3, 7), axis(1, 4, 8)
        found = builder.add(builder.mul(row, splat(builder, args[5], vector)), column)
        builder.store(found, builder.bitcast(place(6), vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(xs, ys, types.uintp, types.int32, types.int32, types.int32, index, fx, fy, lanes), codegen


@helper()
def locate_bits(bits, n, height, width, index, fx, fy):
    """As `locate`, for points of the whole frame given as 24-bit integers: exact, and twice as fast as with doubles."""
    w, h, pitch = _I32(width), _I32(height), _I32(width + 2 * BORDER)
    xs, ys = bits[X], bits[Y]
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        _locate_lanes(xs, ys, np.uintp(i), w, h, pitch, index, fx, fy, LANES)
    for i in range(whole, n):
        _locate_lanes(xs, ys, np.uintp(i), w, h, pitch, index, fx, fy, 1)


@helper()
def round_nearest(index, fx, fy, n, height, width, border):
    """Turn what `locate` found into the nearest pixel, half to even; with a border mode the last pixel is the limit."""
    pitch = width + 2 * BORDER
    for i in range(n):
        row, column = index[i] // pitch, index[i] % pitch
        # BORDER is even, so a column is as odd as its pixel.
        if fx[i] > 0.5 or (fx[i] == 0.5 and column % 2 == 1):
            column += 1
        if fy[i] > 0.5 or (fy[i] == 0.5 and row % 2 == 1):
            row += 1
        if border:
            column = min(column, width - 1 + BORDER)
            row = min(row, height - 1 + BORDER)
        index[i] = row * pitch + column


# ------------------------------------------------------------------------------------------- gather and scatter


@intrinsic
def _bilinear(
    typingctx: Any, buffer: Any, pitch: Any, index: Any, fx: Any, fy: Any, z: Any, first: Any, lanes: Any
) -> Any:
    """Interpolate at `lanes` points (a literal) from `first` on: `z[i] = top + fy (bottom - top)`, and so on.

    Two neighbouring pixels come with one load, and shuffles bring them into vectors over the points; left to itself
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
        builder.store(value, pointer, align=_align(vector))
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
    return builder.load(builder.bitcast(builder.gep(data, [first]), vector.as_pointer()), align=_align(vector))


@intrinsic
def _add_pair(typingctx: Any, buffer: Any, place: Any, first: Any, second: Any) -> Any:
    """Add to two neighbouring pixels at once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        total = builder.fadd(_pair(builder, array.data, args[1]), _both(builder, args[2], args[3]))
        pointer = builder.bitcast(builder.gep(array.data, [args[1]]), total.type.as_pointer())
        builder.store(total, pointer, align=_align(total.type))
        return context.get_dummy_value()

    return types.void(buffer, types.uintp, buffer.dtype, buffer.dtype), codegen


def _align(vector: Any) -> int:
    return 4 if isinstance(vector.element, ir.FloatType) else 8


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
    """As `scatter`, for points of which one lies beside the next: from several places of their order in turn.

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


@helper()
def given_points(given, n, first, count, x, y):
    """Points `first:first + count` of row n of a caller's tensor."""
    point, coordinate = given.point, given.coordinate
    start, size = n * given.row + first * point, (count - 1) * point + coordinate + 1
    if given.double:
        f64 = at(given.address + start * 8, size, np.float64)
        for i in range(count):
            x[i] = f64[i * point]
            y[i] = f64[i * point + coordinate]
    else:
        f32 = at(given.address + start * 4, size, np.float32)
        for i in range(count):
            x[i] = f32[i * point]
            y[i] = f32[i * point + coordinate]
