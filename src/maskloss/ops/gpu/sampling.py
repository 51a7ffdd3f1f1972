"""Device functions that all Triton kernels share: random numbers, positions, reading maps and targets.

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
# Streams of the random numbers, in the half of the counter that holds them.
CANDIDATES: tl.constexpr = tl.constexpr(abi.CANDIDATES << abi.STREAM_SHIFT)
RANDOM: tl.constexpr = tl.constexpr(abi.RANDOM << abi.STREAM_SHIFT)
MATCHER: tl.constexpr = tl.constexpr(abi.MATCHER << abi.STREAM_SHIFT)
_PARITY: tl.constexpr = tl.constexpr(abi.THREEFRY_PARITY)
_A, _B, _C, _D = map(tl.constexpr, abi.THREEFRY_ROTATIONS[0])
_E, _F, _G, _H = map(tl.constexpr, abi.THREEFRY_ROTATIONS[1])
_CELL_BITS: tl.constexpr = tl.constexpr(abi.CELL_BITS)
_CELL_MASK: tl.constexpr = tl.constexpr((1 << abi.CELL_BITS) - 1)
_POSITION_SHIFT: tl.constexpr = tl.constexpr(abi.POSITION_SHIFT)
# Where the cells of candidates (or of the matcher's points) and those of uniform points begin in `strata`.
FIRST_CELLS: tl.constexpr = tl.constexpr(0)
_RANDOM_CELLS: tl.constexpr = tl.constexpr(6)
# Columns of `index`, of `MaskTargets.table`, `images` and `windows`, and of points.
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
_WINDOW_X: tl.constexpr = tl.constexpr(abi.WINDOW_X)
_WINDOW_Y: tl.constexpr = tl.constexpr(abi.WINDOW_Y)
_WINDOW_W: tl.constexpr = tl.constexpr(abi.WINDOW_W)
_WINDOW_H: tl.constexpr = tl.constexpr(abi.WINDOW_H)
_WINDOW_COLUMNS: tl.constexpr = tl.constexpr(abi.WINDOW_COLUMNS)
X: tl.constexpr = tl.constexpr(abi.X)
Y: tl.constexpr = tl.constexpr(abi.Y)
POINT_COLUMNS: tl.constexpr = tl.constexpr(abi.POINT_COLUMNS)


# ------------------------------------------------------------------------------------------------ random numbers


@triton.jit
def _four_rounds(x0, x1, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Four rounds of Threefry: x0 += x1; x1 = rotate(x1, A) ^ x0; and so on with B, C, D."""
    x0 += x1
    x1 = ((x1 << A) | (x1 >> (32 - A))) ^ x0
    x0 += x1
    x1 = ((x1 << B) | (x1 >> (32 - B))) ^ x0
    x0 += x1
    x1 = ((x1 << C) | (x1 >> (32 - C))) ^ x0
    x0 += x1
    x1 = ((x1 << D) | (x1 >> (32 - D))) ^ x0
    return x0, x1


@triton.jit
def threefry(key0, key1, counter0, counter1):
    """Threefry-2x32 with 20 rounds, on uint32: see `points.threefry2x32`."""
    key2 = key0 ^ key1 ^ _PARITY
    x0, x1 = _four_rounds(counter0 + key0, counter1 + key1, _A, _B, _C, _D)
    x0, x1 = _four_rounds(x0 + key1, x1 + (key2 + 1), _E, _F, _G, _H)
    x0, x1 = _four_rounds(x0 + key2, x1 + (key0 + 2), _A, _B, _C, _D)
    x0, x1 = _four_rounds(x0 + key0, x1 + (key1 + 3), _E, _F, _G, _H)
    x0, x1 = _four_rounds(x0 + key1, x1 + (key2 + 4), _A, _B, _C, _D)
    return x0 + key2, x1 + (key0 + 5)


@triton.jit
def instance_key(seed_value, seed_pointer, image_id, target):
    """Key of an instance: threefry(key = seed, counter = (image number, target)).

    The seed is a number, or is read from the device (pointer not None), where a captured graph can vary it.
    """
    if seed_pointer is None:
        seed = seed_value.to(tl.int64)
    else:
        seed = tl.load(seed_pointer)
    return threefry(seed.to(tl.uint32), (seed >> 32).to(tl.uint32), image_id.to(tl.uint32), target.to(tl.uint32))


@triton.jit
def draw(key0, key1, counter0, counter1, windows, image):
    """Points x, y in the window of an image: x0 + width * (word >> 8) / 2^24, multiplied and added separately."""
    word0, word1 = threefry(key0, key1, counter0, counter1)
    return _into_window(word0 >> 8, word1 >> 8, windows, image)


@triton.jit
def draw_in_cells(key0, key1, i, stream, cells, rows, narrow, by_cells, by_narrow, by_wide, windows, image):
    """Points i of a stratified draw, in the window of an image: see `points.Strata`, whose fields are the numbers."""
    word0, word1 = threefry(key0, key1, (i >> 1).to(tl.uint32), stream)
    word = tl.where((i & 1) != 0, word1, word0)
    u, v = (word >> _CELL_BITS).to(tl.int64), (word & _CELL_MASK).to(tl.int64)
    row = ((i + 1) * rows - 1) // cells
    first = row * cells // rows
    wide = (row + 1) * cells // rows - first
    by_row = tl.where(wide == narrow, by_narrow, by_wide)
    across = ((i - first).to(tl.int64) << _CELL_BITS) + u
    down = (first.to(tl.int64) << _CELL_BITS) + v * wide
    return _into_window(across * by_row >> _POSITION_SHIFT, down * by_cells >> _POSITION_SHIFT, windows, image)


@triton.jit
def draw_layout(key0, key1, i, stream, strata, START: tl.constexpr, windows, image):
    """Points i of a draw: independent ones without `strata`, which otherwise has the numbers from START on."""
    if strata is None:
        x, y = draw(key0, key1, i.to(tl.uint32), stream, windows, image)
    else:
        x, y = draw_in_cells(
            key0, key1, i, stream, strata[START], strata[START + 1], strata[START + 2], strata[START + 3],
            strata[START + 4], strata[START + 5], windows, image,
        )  # fmt: skip
    return x, y


@triton.jit
def _into_window(across, down, windows, image):
    """24-bit integers into the window of an image."""
    u = across.to(tl.float32) * 5.9604644775390625e-08
    v = down.to(tl.float32) * 5.9604644775390625e-08
    window = windows + image * _WINDOW_COLUMNS
    x = u * tl.load(window + _WINDOW_W) + tl.load(window + _WINDOW_X)
    y = v * tl.load(window + _WINDOW_H) + tl.load(window + _WINDOW_Y)
    return x, y


# ------------------------------------------------------------------------------------------------------ positions


@triton.jit
def load_point(point, stride, keep):
    """Load x and y of points that were given; far outside, they move to where nothing overflows."""
    x = tl.load(point + X * stride, mask=keep, other=0.0)
    y = tl.load(point + Y * stride, mask=keep, other=0.0)
    return _bounded(x), _bounded(y)


@triton.jit
def _bounded(coordinate):
    far = (tl.abs(coordinate) > 4.0) & (coordinate - coordinate == 0.0)
    return tl.where(far, tl.where(coordinate > 0.0, 4.0, -4.0), coordinate)


@triton.jit
def locate(coordinate, size, BORDER: tl.constexpr, ACC: tl.constexpr):
    """Pixel before a point and its fraction: coordinate * size - 0.5, as float64 would have them.

    The pixel is -2 or `size` where the point is off the map by more than a pixel, and -2 where it is NaN.
    """
    # Two branches and no `and`: Triton 3.3 evaluates neither that nor a constant on the right.
    if coordinate.dtype != tl.float32 or tl.float32 != ACC:
        first, fraction = _locate_exact(coordinate, size, ACC)
    else:
        first, fraction = _locate_fused(coordinate, size)
    if BORDER:
        outside = (first < 0.0) | (first >= size - 1)
        fraction = tl.where(outside, 0.0, fraction)
        first = tl.where(first < 0.0, 0.0, first)
        first = tl.where(first >= size - 1, size - 1, first)
    first = tl.where(first >= -2.0, first, -2.0)
    first = tl.where(first <= size, first, size)
    return first.to(tl.int32), fraction


@triton.jit
def _locate_exact(coordinate, size, ACC: tl.constexpr):
    position = coordinate.to(tl.float64) * size - 0.5
    first = tl.floor(position)
    return first, (position - first).to(ACC)


@triton.jit
def _locate_fused(coordinate, size):
    """Compute the same in float32, many times faster where a GPU has few units for float64.

    A fused multiply-add rounds the exact product and sum once. That may push a position that lies just below a pixel
    up to it; the exact distance, again rounded once, is then negative, and the pixel is the one before.
    """
    extent = tl.full(coordinate.shape, 0.0, tl.float32) + size
    half = tl.full(coordinate.shape, -0.5, tl.float32)
    first = tl.floor(tl.fma(coordinate, extent, half))
    fraction = tl.fma(coordinate, extent, half - first)
    below = fraction < 0.0
    first = tl.where(below, first - 1.0, first)
    return first, tl.where(below, tl.fma(coordinate, extent, half - first), fraction)


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
def sample_map(
    base, px, py,
    height, width, stride_y, stride_x, keep,
    NEAREST: tl.constexpr, BORDER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Value of a map at points."""
    x, fx = locate(px, width, BORDER, ACC)
    y, fy = locate(py, height, BORDER, ACC)
    if NEAREST:
        y, x = nearest(y, fy, height, BORDER), nearest(x, fx, width, BORDER)
        value = read_pixel(base, y, x, height, width, stride_y, stride_x, keep, ACC)
    else:
        value = sample_cells(base, y, x, fy, fx, height, width, stride_y, stride_x, keep, ACC)
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
def read_targets(
    data, row, px, py, keep, ENCODING: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr, ACC: tl.constexpr
):
    """Value of a target at points."""
    # Pixels are counted in 32 bits, addresses in 64.
    start, stride, label = tl.load(row + _OFFSET), tl.load(row + _STRIDE), tl.load(row + _LABEL)
    top, left = tl.load(row + _TOP).to(tl.int32), tl.load(row + _LEFT).to(tl.int32)
    rows, columns = tl.load(row + _CROP_H).to(tl.int32), tl.load(row + _CROP_W).to(tl.int32)
    frame_h, frame_w = tl.load(row + _FRAME_H).to(tl.int32), tl.load(row + _FRAME_W).to(tl.int32)
    y, fy = locate(py, frame_h, BORDER, ACC)
    x, fx = locate(px, frame_w, BORDER, ACC)
    if NEAREST:
        y, x = nearest(y, fy, frame_h, BORDER), nearest(x, fx, frame_w, BORDER)
        value = _read_target(data, start, stride, top, left, rows, columns, label, y, x, keep, ENCODING).to(ACC)
    else:
        v00 = _read_target(data, start, stride, top, left, rows, columns, label, y, x, keep, ENCODING)
        v01 = _read_target(data, start, stride, top, left, rows, columns, label, y, x + 1, keep, ENCODING)
        v10 = _read_target(data, start, stride, top, left, rows, columns, label, y + 1, x, keep, ENCODING)
        v11 = _read_target(data, start, stride, top, left, rows, columns, label, y + 1, x + 1, keep, ENCODING)
        value = interpolate(v00.to(ACC), v01.to(ACC), v10.to(ACC), v11.to(ACC), fx, fy)
    return value


@triton.jit
def is_ignored(ignore, image_row, region, px, py, keep):
    """Whether the pixel that a point lies in is left out; the product is rounded in the precision of the points.

    `region` points to where the ignore region of a frame begins in that of its clip; None: at its beginning.
    """
    if ignore is None:
        skip = tl.full(keep.shape, False, tl.int1)
    else:
        y = _clipped_pixel(py, tl.load(image_row + _IMAGE_H))
        x = _clipped_pixel(px, tl.load(image_row + _IMAGE_W))
        inside = keep & (tl.load(image_row + _IGNORE_SIZE) > 0)
        inside = inside & (y < tl.load(image_row + _IGNORE_H)) & (x < tl.load(image_row + _IGNORE_W))
        start = ignore + tl.load(image_row + _IGNORE_BASE)
        if region is not None:
            start += tl.load(region)
        byte = tl.load(start + y * tl.load(image_row + _IGNORE_STRIDE) + (x >> 3), mask=inside, other=0)
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


@triton.jit
def point_of(
    instance, offsets, keep, index_row, windows, image_ids, seed_value, seed_pointer, strata, points, order, stride_n,
    stride_p, stride_c, num_uncertain,
):  # fmt: skip
    """Points of an instance: those that were given, or drawn again, first the chosen candidates, then uniform ones."""
    if points is None:
        image = tl.load(index_row + IMAGE)
        key0, key1 = instance_key(seed_value, seed_pointer, tl.load(image_ids + image), tl.load(index_row + TARGET))
        layer = tl.load(index_row + LAYER).to(tl.uint32)
        if order is None:
            x, y = draw_layout(key0, key1, offsets, layer + RANDOM, strata, _RANDOM_CELLS, windows, image)
        else:
            uncertain = offsets < num_uncertain
            candidate = tl.load(order + instance * num_uncertain + offsets, mask=keep & uncertain, other=0)
            counter = tl.where(uncertain, candidate, offsets - num_uncertain)
            stream = tl.where(uncertain, layer + CANDIDATES, layer + RANDOM)
            if strata is None:
                x, y = draw(key0, key1, counter.to(tl.uint32), stream, windows, image)
            else:
                x, y = draw_in_cells(
                    key0, key1, counter, stream,
                    tl.where(uncertain, strata[0], strata[_RANDOM_CELLS]),
                    tl.where(uncertain, strata[1], strata[_RANDOM_CELLS + 1]),
                    tl.where(uncertain, strata[2], strata[_RANDOM_CELLS + 2]),
                    tl.where(uncertain, strata[3], strata[_RANDOM_CELLS + 3]),
                    tl.where(uncertain, strata[4], strata[_RANDOM_CELLS + 4]),
                    tl.where(uncertain, strata[5], strata[_RANDOM_CELLS + 5]),
                    windows, image,
                )  # fmt: skip
    else:
        point = points + instance * stride_n + offsets.to(tl.int64) * stride_p
        x, y = load_point(point, stride_c, keep)
    return x, y
