"""Device functions that all Triton kernels share: positions, reading maps and targets.

Points and float32 values must agree with the reference bit by bit, or another candidate would be chosen here and
there. So every kernel that samples is launched with `enable_fp_fusion=False` (a fused multiply-add rounds once where
the definition rounds twice; `_locate_fused` asks for it where it is wanted), and the order of operations is the
reference's.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from maskloss import _abi as abi

# Encodings of the targets.
_BITS: tl.constexpr = tl.constexpr(abi.BITS)
_LABELS: tl.constexpr = tl.constexpr(abi.LABELS)
# Columns of `index`, of `MaskTargets.table` and `images`, and of points.
LAYER: tl.constexpr = tl.constexpr(abi.LAYER)
IMAGE: tl.constexpr = tl.constexpr(abi.IMAGE)
QUERY: tl.constexpr = tl.constexpr(abi.QUERY)
TARGET: tl.constexpr = tl.constexpr(abi.TARGET)
INDEX_COLUMNS: tl.constexpr = tl.constexpr(abi.INDEX_COLUMNS)
_OFFSET: tl.constexpr = tl.constexpr(abi.OFFSET)
_STRIDE: tl.constexpr = tl.constexpr(abi.STRIDE)
_TOP: tl.constexpr = tl.constexpr(abi.TOP)
_LEFT: tl.constexpr = tl.constexpr(abi.LEFT)
_CROP_H: tl.constexpr = tl.constexpr(abi.CROP_H)
_CROP_W: tl.constexpr = tl.constexpr(abi.CROP_W)
_FRAME_H: tl.constexpr = tl.constexpr(abi.FRAME_H)
_FRAME_W: tl.constexpr = tl.constexpr(abi.FRAME_W)
_LABEL: tl.constexpr = tl.constexpr(abi.LABEL)
IGNORE_OFFSET: tl.constexpr = tl.constexpr(abi.IGNORE_OFFSET)
TABLE_COLUMNS: tl.constexpr = tl.constexpr(abi.TABLE_COLUMNS)
IMAGE_COLUMNS: tl.constexpr = tl.constexpr(abi.IMAGE_COLUMNS)
COUNT: tl.constexpr = tl.constexpr(abi.COUNT)
_FIRST: tl.constexpr = tl.constexpr(abi.FIRST)
BASE: tl.constexpr = tl.constexpr(abi.BASE)
_IGNORE_SIZE: tl.constexpr = tl.constexpr(abi.IGNORE_SIZE)
_IGNORE_BASE: tl.constexpr = tl.constexpr(abi.IGNORE_BASE)
_IGNORE_STRIDE: tl.constexpr = tl.constexpr(abi.IGNORE_STRIDE)
_IGNORE_H: tl.constexpr = tl.constexpr(abi.IGNORE_H)
_IGNORE_W: tl.constexpr = tl.constexpr(abi.IGNORE_W)
_IMAGE_H: tl.constexpr = tl.constexpr(abi.IMAGE_H)
_IMAGE_W: tl.constexpr = tl.constexpr(abi.IMAGE_W)
X: tl.constexpr = tl.constexpr(abi.X)
Y: tl.constexpr = tl.constexpr(abi.Y)
Z: tl.constexpr = tl.constexpr(abi.Z)
POINT_COLUMNS: tl.constexpr = tl.constexpr(abi.POINT_COLUMNS)


# ------------------------------------------------------------------------------------------------------ positions


@triton.jit
def locate(coordinate, size, BORDER: tl.constexpr, ACC: tl.constexpr):
    """Pixel before a point and its fraction: coordinate * size - 0.5, as float64 would have them.

    The pixel is -2 or `size` where the point is off the map by more than a pixel, and -2 where it is NaN.
    """
    first, fraction = _floor(coordinate, size, 0.5, ACC)
    if BORDER:
        outside = (first < 0.0) | (first >= size - 1)
        fraction = tl.where(outside, 0.0, fraction)
        first = tl.where(first < 0.0, 0.0, first)
        first = tl.where(first >= size - 1, size - 1, first)
    first = tl.where(first >= -2.0, first, -2.0)
    first = tl.where(first <= size, first, size)
    return first.to(tl.int32), fraction


@triton.jit
def locate_slice(coordinate, depth, BORDER: tl.constexpr, LINEAR: tl.constexpr, ACC: tl.constexpr):
    """Slice before a point and its fraction, as `locate` has them; or, if not LINEAR, the nearest frame to it and 0."""
    if LINEAR:
        first, fraction = locate(coordinate, depth, BORDER, ACC)
    else:
        inside, _fraction = _floor(coordinate, depth, 0.0, ACC)
        # NaN is in the first frame.
        inside = tl.where(inside >= 0.0, inside, 0.0)
        first = tl.where(inside < depth, inside, depth - 1).to(tl.int32)
        fraction = tl.zeros(coordinate.shape, ACC)
    return first, fraction


@triton.jit
def _floor(coordinate, size, SHIFT: tl.constexpr, ACC: tl.constexpr):
    """Whole number before coordinate * size - SHIFT, as a float, and the distance from it."""
    # One after the other: Triton 3.3 has no `or` of constants.
    if coordinate.dtype != tl.float32:
        first, fraction = _floor_exact(coordinate, size, SHIFT, ACC)
    elif tl.float32 != ACC:
        first, fraction = _floor_exact(coordinate, size, SHIFT, ACC)
    else:
        first, fraction = _floor_fused(coordinate, size, SHIFT)
    return first, fraction


@triton.jit
def _floor_exact(coordinate, size, SHIFT: tl.constexpr, ACC: tl.constexpr):
    position = coordinate.to(tl.float64) * size - SHIFT
    first = tl.floor(position)
    return first, (position - first).to(ACC)


@triton.jit
def _floor_fused(coordinate, size, SHIFT: tl.constexpr):
    """Compute the same in float32, many times faster where a GPU has few units for float64.

    A fused multiply-add rounds the exact product and sum once. That may push a position that lies just below a pixel
    up to it; the exact distance, again rounded once, is then negative, and the pixel is the one before.
    """
    extent = tl.full(coordinate.shape, 0.0, tl.float32) + size
    shift = tl.full(coordinate.shape, -SHIFT, tl.float32)
    first = tl.floor(tl.fma(coordinate, extent, shift))
    fraction = tl.fma(coordinate, extent, shift - first)
    below = fraction < 0.0
    first = tl.where(below, first - 1.0, first)
    return first, tl.where(below, tl.fma(coordinate, extent, shift - first), fraction)


@triton.jit
def nearest(first, fraction, size, BORDER: tl.constexpr):
    """Round a position half to even."""
    up = (fraction > 0.5) | ((fraction == 0.5) & ((first & 1) == 1))
    pixel = first + up.to(tl.int32)
    if BORDER:
        pixel = tl.where(pixel < size, pixel, size - 1).to(tl.int32)
    return pixel


@triton.jit
def interpolate(v00, v01, v10, v11, fx, fy):
    """Interpolate along x, then along y; each operation is rounded on its own."""
    top = v00 + fx * (v01 - v00)
    bottom = v10 + fx * (v11 - v10)
    return top + fy * (bottom - top)


@triton.jit
def read_pixel(base, y, x, height, width, stride_y, stride_x, keep, ACC: tl.constexpr):
    """One pixel of a map for each point, 0 outside; addresses are 64-bit."""
    inside = keep & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    address = base + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return tl.load(address, mask=inside, other=0.0).to(ACC)


@triton.jit
def sample_cells(base, y, x, fy, fx, height, width, stride_y, stride_x, keep, ACC: tl.constexpr):
    """Value of a map between four pixels, 0 for those outside; addresses are 64-bit."""
    upper, lower = keep & (y >= 0) & (y < height), keep & (y >= -1) & (y < height - 1)
    left, right = (x >= 0) & (x < width), (x >= -1) & (x < width - 1)
    first = base + (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)
    v00 = tl.load(first, mask=upper & left, other=0.0).to(ACC)
    v01 = tl.load(first + stride_x, mask=upper & right, other=0.0).to(ACC)
    v10 = tl.load(first + stride_y, mask=lower & left, other=0.0).to(ACC)
    v11 = tl.load(first + stride_y + stride_x, mask=lower & right, other=0.0).to(ACC)
    return interpolate(v00, v01, v10, v11, fx, fy)


@triton.jit
def sample_slices(
    base, k, y, x, fz, fy, fx, depth, height, width, stride_z, stride_y, stride_x, keep,
    LINEAR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Value of a stack of maps in slice k, as `sample_cells` finds it, or between that and the next one if LINEAR."""
    front = base + k.to(tl.int64) * stride_z
    # Beside the stack a point is off the map.
    above = tl.where((k >= 0) & (k < depth), y, -2)
    value = sample_cells(front, above, x, fy, fx, height, width, stride_y, stride_x, keep, ACC)
    if LINEAR:
        above = tl.where((k >= -1) & (k < depth - 1), y, -2)
        back = sample_cells(front + stride_z, above, x, fy, fx, height, width, stride_y, stride_x, keep, ACC)
        value += fz * (back - value)
    return value


@triton.jit
def sample_logits(
    base, px, py, pz, depth, height, width, stride_z, stride_y, stride_x, keep,
    BORDER: tl.constexpr, LINEAR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Value of a map at points; of a stack of maps if there is a depth."""
    x, fx = locate(px, width, BORDER, ACC)
    y, fy = locate(py, height, BORDER, ACC)
    if depth is None:
        value = sample_cells(base, y, x, fy, fx, height, width, stride_y, stride_x, keep, ACC)
    else:
        k, fz = locate_slice(pz, depth, BORDER, LINEAR, ACC)
        value = sample_slices(
            base, k, y, x, fz, fy, fx, depth, height, width, stride_z, stride_y, stride_x, keep, LINEAR, ACC
        )
    return value


# -------------------------------------------------------------------------------------------------------- targets


@triton.jit
def table_row(table, image_row, target):
    """Row of the target of an image."""
    return table + (tl.load(image_row + _FIRST) + target) * TABLE_COLUMNS


@triton.jit
def _read_target(data, start, stride, top, left, height, width, label, y, x, keep, ENCODING: tl.constexpr):
    """One stored pixel of a target for each point: 0 or 1 as int32, or a soft value as it is stored."""
    y, x = y - top, x - left
    inside = keep & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    address = data + start + y.to(tl.int64) * stride
    if ENCODING == _BITS:
        byte = tl.load(address + (x >> 3), mask=inside, other=0).to(tl.int32)
        value = (byte >> (x & 7)) & 1
    elif ENCODING == _LABELS:
        found = tl.load(address + x, mask=inside, other=0).to(tl.int64)
        value = (inside & (found == label)).to(tl.int32)
    else:
        value = tl.load(address + x, mask=inside, other=0.0)
    return value


@triton.jit
def _read_cells(
    data, start, stride, top, left, height, width, label, y, x, fy, fx, keep,
    ENCODING: tl.constexpr, NEAREST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Value of a stored crop at one pixel, or between four."""
    if NEAREST:
        value = _read_target(data, start, stride, top, left, height, width, label, y, x, keep, ENCODING).to(ACC)
    else:
        v00 = _read_target(data, start, stride, top, left, height, width, label, y, x, keep, ENCODING)
        v01 = _read_target(data, start, stride, top, left, height, width, label, y, x + 1, keep, ENCODING)
        v10 = _read_target(data, start, stride, top, left, height, width, label, y + 1, x, keep, ENCODING)
        v11 = _read_target(data, start, stride, top, left, height, width, label, y + 1, x + 1, keep, ENCODING)
        value = interpolate(v00.to(ACC), v01.to(ACC), v10.to(ACC), v11.to(ACC), fx, fy)
    return value


@triton.jit
def _read_slice(
    data, start, stride, top, left, height, width, label, k, y, x, fy, fx, frames, frame_h, keep,
    ENCODING: tl.constexpr, NEAREST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Value in slice k of a tall crop, 0 outside of the stack: what lies in the slice is a crop of its own."""
    above = k * frame_h
    first = tl.maximum(top, above)
    rows = tl.minimum(top + height, above + frame_h) - first
    rows = tl.where((k >= 0) & (k < frames), rows, 0)
    begin = start + (first - top).to(tl.int64) * stride
    return _read_cells(
        data, begin, stride, first - above, left, rows, width, label, y, x, fy, fx, keep, ENCODING, NEAREST, ACC
    )


@triton.jit
def read_targets(
    data, row, px, py, pz, frames, keep, ENCODING: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr,
    LINEAR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Value of a target at points; its slices are stored one below the other if there are `frames` of them."""
    # Pixels are counted in 32 bits, addresses in 64.
    start, stride, label = tl.load(row + _OFFSET), tl.load(row + _STRIDE), tl.load(row + _LABEL)
    top, left = tl.load(row + _TOP).to(tl.int32), tl.load(row + _LEFT).to(tl.int32)
    rows, columns = tl.load(row + _CROP_H).to(tl.int32), tl.load(row + _CROP_W).to(tl.int32)
    frame_h, frame_w = tl.load(row + _FRAME_H).to(tl.int32), tl.load(row + _FRAME_W).to(tl.int32)
    if frames is not None:
        frame_h = frame_h // frames
    y, fy = locate(py, frame_h, BORDER, ACC)
    x, fx = locate(px, frame_w, BORDER, ACC)
    if NEAREST:
        y, x = nearest(y, fy, frame_h, BORDER), nearest(x, fx, frame_w, BORDER)
    if frames is None:
        value = _read_cells(
            data, start, stride, top, left, rows, columns, label, y, x, fy, fx, keep, ENCODING, NEAREST, ACC
        )
    else:
        k, fz = locate_slice(pz, frames, BORDER, LINEAR, ACC)
        if NEAREST:
            k = nearest(k, fz, frames, BORDER)
        value = _read_slice(
            data, start, stride, top, left, rows, columns, label, k, y, x, fy, fx, frames, frame_h, keep,
            ENCODING, NEAREST, ACC,
        )  # fmt: skip
        if LINEAR:  # noqa: SIM102 (Triton 3.3 evaluates no `and`)
            if not NEAREST:
                back = _read_slice(
                    data, start, stride, top, left, rows, columns, label, k + 1, y, x, fy, fx, frames, frame_h, keep,
                    ENCODING, NEAREST, ACC,
                )  # fmt: skip
                value += fz * (back - value)
    return value


@triton.jit
def is_ignored(ignore, image_row, region, px, py, pz, frames, keep):
    """Whether the pixel that a point lies in is left out; the product is rounded in the precision of the points.

    `region` points to where the ignore region of a frame begins in that of its clip; None: at its beginning. In a stack
    of frames, one below the other, it is the frame that the point lies in.
    """
    if ignore is None:
        skip = tl.full(keep.shape, False, tl.int1)
    else:
        height, rows = tl.load(image_row + _IMAGE_H), tl.load(image_row + _IGNORE_H)
        stride = tl.load(image_row + _IGNORE_STRIDE)
        start = ignore + tl.load(image_row + _IGNORE_BASE)
        if region is not None:
            start += tl.load(region)
        if frames is not None:
            height, rows = height // frames, rows // frames
            k, _none = locate_slice(pz, frames, False, False, tl.float32)
            start += k.to(tl.int64) * rows * stride
        y, x = _clipped_pixel(py, height), _clipped_pixel(px, tl.load(image_row + _IMAGE_W))
        inside = keep & (tl.load(image_row + _IGNORE_SIZE) > 0)
        inside = inside & (y < rows) & (x < tl.load(image_row + _IGNORE_W))
        byte = tl.load(start + y * stride + (x >> 3), mask=inside, other=0)
        skip = ((byte.to(tl.int32) >> (x & 7).to(tl.int32)) & 1) != 0
    return skip


@triton.jit
def _clipped_pixel(coordinate, size):
    position = coordinate * size
    position = tl.where(position > 0, position, 0.0)
    return tl.where(position < size, position, size - 1).to(tl.int64)


@triton.jit
def keep_targets(kept, offsets, value, skip, keep):
    """Write target values at points, -1 for an ignored one."""
    tl.store(kept + offsets, tl.where(skip, -1.0, value), mask=keep)


@triton.jit
def kept_targets(kept, offsets, keep, ACC: tl.constexpr):
    """Read what `keep_targets` wrote: target values at points, and their weights, 0 or 1."""
    value = tl.load(kept + offsets, mask=keep, other=0.0)
    return tl.where(value < 0, 0.0, value), 1 - (value < 0).to(ACC)


# ------------------------------------------------------------------------------------------- layers and instances


@triton.jit
def layer_pointer(layers, number, LAYERS: tl.constexpr):
    """Pick the tensor of a layer: layers of one geometry share a launch, and each has its own allocation."""
    pointer = layers[0]
    for other in tl.static_range(1, LAYERS):
        pointer = tl.where(number == other, layers[other], pointer)
    return pointer
