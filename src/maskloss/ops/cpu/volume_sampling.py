# mypy: allow-untyped-defs
"""Volumes for the CPU kernels: reading the eight voxels around points, the adjoint, and reading targets."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from maskloss._abi import (
    BITS,
    CROP_H,
    CROP_W,
    FRAME_H,
    FRAME_W,
    LEFT,
    OFFSET,
    STRIDE,
    TOP,
    VALUES,
    X,
    Y,
    Z,
)

from .compile import helper
from .lanes import Code, check_literals
from .memory import at
from .planes import item_bytes, read_row
from .positions import nearest_pixel
from .sampling import add_pair, gather, load_pair
from .targets import bits_around, interpolate_codes, pixels_around, read_pixel
from .volume_points import Grid

_I32 = np.int32
# Columns of the table that describes a tensor `[B, Q, d, h, w]`: address, element type, sizes, strides in elements, and
# whether kernels read it where it is.
ADDRESS, DTYPE, DEPTH, HEIGHT, WIDTH, STRIDE_B, STRIDE_Q, STRIDE_Z, STRIDE_Y, STRIDE_X, PLAIN = range(11)
SOURCE_COLUMNS = 11


# ------------------------------------------------------------------------------------------------------------ reading


@helper()
def copy_volume(source, b, q, buffer):
    """Copy volume (b, q) to the buffer, in the type of sums, where it cannot be read as it is."""
    if source[PLAIN]:
        return
    depth, height, width, item = source[DEPTH], source[HEIGHT], source[WIDTH], item_bytes(source[DTYPE])
    base = source[ADDRESS] + (b * source[STRIDE_B] + q * source[STRIDE_Q]) * item
    for k in range(depth):
        for v in range(height):
            address, first = base + (k * source[STRIDE_Z] + v * source[STRIDE_Y]) * item, (k * height + v) * width
            read_row(address, source[DTYPE], width, source[STRIDE_X], buffer[first : first + width])


@helper()
def view_volume(source, b, q, linear, buffer):
    """Volume (b, q), or its copy, as an array and its grid.

    An axis of one voxel has the stride 0: what is read beyond it has the weight 0.
    """
    depth, height, width = source[DEPTH], source[HEIGHT], source[WIDTH]
    by_slice, by_row, volume = height * width, width, buffer
    if source[PLAIN]:
        by_slice, by_row = source[STRIDE_Z], source[STRIDE_Y]
        start = source[ADDRESS] + (b * source[STRIDE_B] + q * source[STRIDE_Q]) * item_bytes(source[DTYPE])
        volume = at(start, (depth - 1) * by_slice + (height - 1) * by_row + width, buffer.dtype)
    return volume, Grid(depth, height, width, by_slice if depth > 1 else 0, by_row if height > 1 else 0, linear)


@helper()
def dense_grid(grid):
    """The grid of a volume of the same sizes whose slices and rows follow one another, as those of a gradient do."""
    by_slice, by_row = grid.height * grid.width if grid.depth > 1 else 0, grid.width if grid.height > 1 else 0
    return Grid(grid.depth, grid.height, grid.width, by_slice, by_row, grid.linear)


@intrinsic
def _trilinear(
    typingctx: Any, volume: Any, by_row: Any, by_slice: Any, places: Any, fx: Any, fy: Any, fz: Any, z: Any,
    first: Any, lanes: Any,
) -> Any:  # fmt: skip
    """As `sampling._bilinear`, in two slices, and then between them."""
    check_literals(lanes=lanes)
    count = lanes.literal_value

    def codegen(*given: Any) -> Any:
        code = Code(*given)
        builder, (_, by_row, by_slice, *_, first, _) = code.builder, code.args
        vector = ir.VectorType(code.place(0).type.pointee, count)
        numbers = [code.place(3, builder.add(first, first.type(k))) for k in range(count)]
        places = [builder.zext(builder.load(number), first.type) for number in numbers]
        across, down, through = (code.load(code.place(which, first), vector) for which in (4, 5, 6))

        def mix(one: Any, other: Any, share: Any) -> Any:
            return builder.fadd(one, builder.fmul(share, builder.fsub(other, one)))

        def row(start: Any) -> Any:
            pixels = [load_pair(code, builder.gep(start, [place])) for place in places]
            while len(pixels) > 1:
                width = range(2 * pixels[0].type.count)
                pixels = [code.shuffle(*pair, *width) for pair in zip(pixels[::2], pixels[1::2], strict=True)]
            left, right = (code.shuffle(pixels[0], pixels[0], *range(side, 2 * count, 2)) for side in (0, 1))
            return mix(left, right, across)

        def face(start: Any) -> Any:
            return mix(row(start), row(builder.gep(start, [by_row])), down)

        front = code.place(0)
        code.store(mix(face(front), face(builder.gep(front, [by_slice])), through), code.place(7, first))
        return code.nothing()

    return types.void(volume, by_row, by_slice, places, fx, fy, fz, z, types.uintp, lanes), codegen


@helper(forceinline=True)
def _mix(a, b, c, d, fx, fy):
    top = a + fx * (b - a)
    bottom = c + fx * (d - c)
    return top + fy * (bottom - top)


@helper()
def _voxel(volume, grid, k, v, u):
    if not (0 <= k < grid.depth and 0 <= v < grid.height and 0 <= u < grid.width):
        return volume.dtype.type(0)
    return volume[k * grid.by_slice + v * grid.by_row + u]


@helper()
def _face(volume, grid, k, v, u, fx, fy):
    return _mix(
        _voxel(volume, grid, k, v, u), _voxel(volume, grid, k, v, u + 1),
        _voxel(volume, grid, k, v + 1, u), _voxel(volume, grid, k, v + 1, u + 1), fx, fy,
    )  # fmt: skip


@helper()
def read_volume(volume, grid, cells, places, fx, fy, fz, n, edges, count, z):
    """Logits at points. No operation is fused: choices agree bit for bit with the reference's."""
    if grid.width > 1:
        if grid.linear:
            by_row, by_slice = np.uintp(grid.by_row), np.uintp(grid.by_slice)
            whole = n - n % 8
            for i in range(0, whole, 8):
                _trilinear(volume, by_row, by_slice, places, fx, fy, fz, z, np.uintp(i), 8)
            for i in range(whole, n):
                _trilinear(volume, by_row, by_slice, places, fx, fy, fz, z, np.uintp(i), 1)
        else:
            gather(volume, grid.by_row, places, fx, fy, n, z)
    for e in range(count):
        i = edges[e]
        u, v, k = np.int64(cells[X, i]), np.int64(cells[Y, i]), np.int64(cells[Z, i])
        z[i] = _face(volume, grid, k, v, u, fx[i], fy[i])
        if grid.linear:
            z[i] = z[i] + fz[i] * (_face(volume, grid, k + 1, v, u, fx[i], fy[i]) - z[i])


# ---------------------------------------------------------------------------------------------------------- gradients


@helper(forceinline=True)
def _settle(cell, size, fraction):
    """The fraction between the voxels that exist, and the weight that these have."""
    one = type(fraction)(1)
    if cell < 0:
        return one - one, (fraction if cell == -1 else one - one)
    if cell >= size - 1:
        return (one if size > 1 else one - one), (one - fraction if cell == size - 1 else one - one)
    return fraction, one


@helper()
def settle_edges(cells, grid, edges, count, fx, fy, fz, first, kept, shares, total):
    """Have listed points add to voxels that exist only: their fractions change, and they keep a share of their weight.

    `fx`, `fy` and `fz` are those of a block that begins at point `first`. Returns how many points are listed in `kept`.
    """
    for e in range(count):
        i = edges[e]
        fx[i], across = _settle(cells[X, i], grid.width, fx[i])
        fy[i], down = _settle(cells[Y, i], grid.height, fy[i])
        through = type(across)(1)
        if grid.linear:
            fz[i], through = _settle(cells[Z, i], grid.depth, fz[i])
        kept[total] = first + i
        shares[total] = across * down * through
        total += 1
    return total


@helper(forceinline=True)
def _add_face(buffer, place, by_row, step, fx, fy, grad):
    bottom = fy * grad
    top = grad - bottom
    if step:
        right = fx * top
        add_pair(buffer, place, top - right, right)
        right = fx * bottom
        add_pair(buffer, place + by_row, bottom - right, right)
    else:
        buffer[place] += top
        buffer[place + by_row] += bottom


@helper()
def scatter_volume(buffer, grid, places, fx, fy, fz, grad, n):
    """The adjoint of `read_volume`, once edges are settled: each point adds its gradient to eight voxels."""
    by_row, by_slice, step = np.uintp(grid.by_row), np.uintp(grid.by_slice), grid.width > 1
    for i in range(n):
        place = np.uintp(np.uint32(places[i]))
        if grid.linear:
            back = fz[i] * grad[i]
            _add_face(buffer, place, by_row, step, fx[i], fy[i], grad[i] - back)
            _add_face(buffer, place + by_slice, by_row, step, fx[i], fy[i], back)
        else:
            _add_face(buffer, place, by_row, step, fx[i], fy[i], grad[i])


# ------------------------------------------------------------------------------------------------------------ targets


@helper()
def _target_voxel(data, encoding, row, grid, k, v, u):
    if not (0 <= k < grid.depth and 0 <= v < grid.height):
        return 0.0
    return read_pixel(data, encoding, row, k * grid.height + v - row[TOP], u - row[LEFT])


@helper()
def _target_code(data, encoding, row, grid, k, v, u):
    """Which of the four voxels of a slice are inside, as `interpolate_codes` takes them."""
    code = _I32(0)
    for corner in range(4):
        if _target_voxel(data, encoding, row, grid, k, v + (corner >> 1), u + (corner & 1)) != 0:
            code = _I32(code | _I32(1 << corner))
    return code


@helper()
def _target_face(data, encoding, row, grid, k, v, u, fx, fy):
    kind = type(fx)
    return _mix(
        kind(_target_voxel(data, encoding, row, grid, k, v, u)),
        kind(_target_voxel(data, encoding, row, grid, k, v, u + 1)),
        kind(_target_voxel(data, encoding, row, grid, k, v + 1, u)),
        kind(_target_voxel(data, encoding, row, grid, k, v + 1, u + 1)), fx, fy,
    )  # fmt: skip


@helper(forceinline=True)
def _inner_code(data, encoding, row, y, x):
    """As `_target_code`, of four pixels that are all stored."""
    if encoding == BITS:
        return bits_around(data + row[OFFSET], row[STRIDE], y, x)
    a, b, c, d = pixels_around(data, encoding, row, y, x)
    return _I32(a + 2.0 * b + 4.0 * c + 8.0 * d)


@helper()
def target_grid(row, frames, linear):
    """The grid of a target whose slices lie one below the other."""
    return Grid(frames, row[FRAME_H] // frames, row[FRAME_W], 0, 0, linear)


@helper()
def _list_near(cells, n, row, grid, fronts, backs, near):
    """List the points that may touch the stored crop of a target, and zero the codes of all."""
    left, right = _I32(row[LEFT] - 1), _I32(row[LEFT] + row[CROP_W] - 1)
    upper, lower = row[TOP] // grid.height - grid.linear, (row[TOP] + row[CROP_H] - 1) // grid.height
    first, last = _I32(upper), _I32(lower)
    for i in range(n):
        u, k = cells[X, i], cells[Z, i]
        backs[i] = _I32(1) if (u >= left) & (u <= right) & (k >= first) & (k <= last) else _I32(0)
    count = 0
    for i in range(n):
        if backs[i]:
            near[count] = i
            count += 1
    for i in range(n):
        fronts[i] = _I32(0)
        backs[i] = _I32(0)
    return count


@helper()
def read_target(cells, fx, fy, fz, n, row, grid, data, encoding, border, nearest, codes, t, space):
    """A target at points that lie in its grid as `cells` and fractions say. The last arguments but t are work space."""
    if encoding >= VALUES or nearest:
        for i in range(n):
            u, v, k = np.int64(cells[X, i]), np.int64(cells[Y, i]), np.int64(cells[Z, i])
            if nearest:
                u = nearest_pixel(u, fx[i], grid.width, border)
                v = nearest_pixel(v, fy[i], grid.height, border)
                k = nearest_pixel(k, fz[i], grid.depth, border) if grid.linear else k
                t[i] = _target_voxel(data, encoding, row, grid, k, v, u)
                continue
            t[i] = _target_face(data, encoding, row, grid, k, v, u, fx[i], fy[i])
            if grid.linear:
                t[i] = t[i] + fz[i] * (_target_face(data, encoding, row, grid, k + 1, v, u, fx[i], fy[i]) - t[i])
        return
    fronts, backs, near = codes[0], codes[1], codes[2]
    count = _list_near(cells, n, row, grid, fronts, backs, near)
    if count == 0:
        t[:n] = 0
        return
    top, left, right, bottom = row[TOP], row[LEFT], row[CROP_W] - 1, row[CROP_H] - 1
    height, deeper = grid.height, grid.height if grid.linear else 0
    # Of columns that begin in the first byte of a row, the second one is read as well.
    leftmost = 0 if encoding != BITS or row[STRIDE] > 1 else 7
    for place in range(count):
        i = near[place]
        u, v, k = np.int64(cells[X, i]), np.int64(cells[Y, i]), np.int64(cells[Z, i])
        y, x = k * height + v - top, u - left
        if leftmost <= x < right and 0 <= v < height - 1 and y >= 0 and y + deeper < bottom:
            fronts[i] = _inner_code(data, encoding, row, y, x)
            if deeper:
                backs[i] = _inner_code(data, encoding, row, y + deeper, x)
        else:
            fronts[i] = _target_code(data, encoding, row, grid, k, v, u)
            if deeper:
                backs[i] = _target_code(data, encoding, row, grid, k + 1, v, u)
    interpolate_codes(fronts, n, fx, fy, t)
    if grid.linear:
        interpolate_codes(backs, n, fx, fy, space)
        for i in range(n):
            t[i] = t[i] + fz[i] * (space[i] - t[i])
