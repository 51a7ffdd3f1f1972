# mypy: allow-untyped-defs
"""The CPU kernels of volumes: points in three dimensions, eight voxels around each, and the loss there."""

from __future__ import annotations

import numpy as np

from maskloss._abi import (
    ALL_TARGETS,
    BF16,
    CANDIDATES,
    CELL_BITS,
    DEPTH_STREAM,
    F32,
    F64,
    FIRST,
    FRAME_H,
    FRAME_W,
    IMAGE,
    INVERSE_BITS,
    LAYER,
    LEFT,
    MATCHER,
    POSITION_SHIFT,
    QUERY,
    RANDOM,
    STANDARD,
    TARGET,
    TOP,
    VALUES,
    X,
    Y,
    Z,
)
from maskloss.points import Strata

from .blocks import SPARE
from .choose import GROUP, LARGEST_KEY, list_marked, make_keys, mark_chosen, pick, threshold
from .compile import helper, kernel
from .formulas import add_focal_gradients, loss_gradients, sum_areas, sum_focal, sum_losses, sum_other_areas
from .generator import U32, counter_of, draw_bits, instance_key, points_of_bits, threefry
from .memory import at, bare
from .planes import from_bf16, from_f16
from .sampling import BLOCK
from .targets import read_pixel
from .threads import take

_I32 = np.int32
_UNIT = np.float32(2.0**-24)
_INDEPENDENT = Strata(0, 0, 0, 0, 0, 0)
# Columns of the table that describes a tensor `[B, Q, d, h, w]`: address, element type, sizes, strides in elements.
ADDRESS, DTYPE, DEPTH, HEIGHT, WIDTH, STRIDE_B, STRIDE_Q, STRIDE_Z, STRIDE_Y, STRIDE_X = range(10)
SOURCE_COLUMNS = 10
# Rows of work spaces that hold a value, or an integer, for each point of a block.
VALUE_ROWS, INTEGER_ROWS = 5, 5


# ------------------------------------------------------------------------------------------------------------- points


@helper()
def _boxes(key, layer, stream, counters, n, cells, slabs, roots, bits):
    """Points `counters[:n]` of `cells` boxes, as 24-bit integers: see `points.stratified_points3`."""
    xs, ys, zs = bits[0], bits[1], bits[2]
    flat, deep = counter_of(layer, stream), counter_of(layer, stream + DEPTH_STREAM)
    mask = (1 << CELL_BITS) - 1
    for k in range(n):
        i = np.int64(counters[k])
        slab = ((i + 1) * slabs - 1) // cells
        behind = slab * cells // slabs
        count = (slab + 1) * cells // slabs - behind
        own = i - behind
        rows = roots[0] if count == cells // slabs else roots[1]
        row = ((own + 1) * rows - 1) // count
        first = row * count // rows
        wide = (row + 1) * count // rows - first
        words, thirds = threefry(key, U32(i >> 1), flat), threefry(key, U32(i >> 1), deep)
        word = np.int64(words[1] if i & 1 else words[0])
        third = np.int64(thirds[1] if i & 1 else thirds[0])
        across = ((own - first) << CELL_BITS) + (word >> CELL_BITS)
        down = (first << CELL_BITS) + (word & mask) * wide
        through = (behind << CELL_BITS) + (third >> CELL_BITS) * count
        xs[k] = _I32(across * ((1 << INVERSE_BITS) // wide) >> POSITION_SHIFT)
        ys[k] = _I32(down * ((1 << INVERSE_BITS) // count) >> POSITION_SHIFT)
        zs[k] = _I32(through * ((1 << INVERSE_BITS) // cells) >> POSITION_SHIFT)


@helper()
def _draw(key, layer, stream, counters, n, boxes, window, bits, x, y, z):
    """Points `counters[:n]` of a stream in the window of an image; `boxes` are cells, slabs and roots, or zeros."""
    if boxes[0] > 0:
        _boxes(key, layer, stream, counters, n, boxes[0], boxes[1], (boxes[2], boxes[3]), bits)
    else:
        draw_bits(key, counter_of(layer, stream + DEPTH_STREAM), counters, n, _INDEPENDENT, bits[2:])
        draw_bits(key, counter_of(layer, stream), counters, n, _INDEPENDENT, bits)
    points_of_bits(bits, n, window, x, y)
    for i in range(n):
        z[i] = np.float32(bits[2, i]) * _UNIT


@helper()
def _count_up(counters, first, n):
    for i in range(n):
        counters[i] = first + i


# ------------------------------------------------------------------------------------------------------------ reading


@helper(forceinline=True)
def _value(address, dtype, element, like):
    """One logit, in the type of sums."""
    kind = like.dtype.type
    if dtype == F32:
        return kind(at(address + element * 4, 1, np.float32)[0])
    if dtype == F64:
        return kind(at(address + element * 8, 1, np.float64)[0])
    bits = at(address + element * 2, 1, np.uint16)[0]
    return kind(from_bf16(bits) if dtype == BF16 else from_f16(bits))


@helper(forceinline=True)
def _cell(coordinate, size):
    """Where a point lies along an axis: the voxel `floor(p)` and `p - floor(p)`, for `p = coordinate * size - 0.5`."""
    p = np.float64(coordinate) * size - 0.5
    first = np.floor(p)
    return np.int64(first), p - first


@helper(forceinline=True)
def _depth_cell(coordinate, size, linear):
    if linear:
        return _cell(coordinate, size)
    return min(np.int64(np.float64(coordinate) * size), np.int64(size - 1)), 0.0


@helper(forceinline=True)
def _mix(a, b, c, d, fx, fy):
    top = a + fx * (b - a)
    bottom = c + fx * (d - c)
    return top + fy * (bottom - top)


@helper()
def _voxel(base, source, k, v, u, like):
    inside = 0 <= k < source[DEPTH] and 0 <= v < source[HEIGHT] and 0 <= u < source[WIDTH]
    if not inside:
        return like.dtype.type(0)
    return _value(base, source[DTYPE], k * source[STRIDE_Z] + v * source[STRIDE_Y] + u * source[STRIDE_X], like)


@helper()
def _slice(base, source, k, v, u, fx, fy, like):
    return _mix(
        _voxel(base, source, k, v, u, like), _voxel(base, source, k, v, u + 1, like),
        _voxel(base, source, k, v + 1, u, like), _voxel(base, source, k, v + 1, u + 1, like), fx, fy,
    )  # fmt: skip


@helper(forceinline=True)
def _item_bytes(dtype):
    return 8 if dtype == F64 else (4 if dtype == F32 else 2)


@helper()
def _near(grid, first, source, fx, fy):
    """Interpolate in a slice, between four voxels that all exist, the first of them at `grid[first]`."""
    below = first + source[STRIDE_Y]
    return _mix(
        grid[first], grid[first + source[STRIDE_X]], grid[below], grid[below + source[STRIDE_X]], fx, fy
    )  # fmt: skip


@helper()
def _read(source, b, q, x, y, z, n, linear, out):
    """Logits at points of volume (b, q). No operation is fused: choices agree bit for bit with the reference's."""
    kind = out.dtype.type
    depth, height, width = source[DEPTH], source[HEIGHT], source[WIDTH]
    base = source[ADDRESS] + (b * source[STRIDE_B] + q * source[STRIDE_Q]) * _item_bytes(source[DTYPE])
    plain = source[DTYPE] == F32
    last = (depth - 1) * source[STRIDE_Z] + (height - 1) * source[STRIDE_Y] + (width - 1) * source[STRIDE_X]
    grid = at(base, last + 1 if plain else 0, np.float32)
    for i in range(n):
        u, fx = _cell(x[i], width)
        v, fy = _cell(y[i], height)
        k, fz = _depth_cell(z[i], depth, linear)
        inside = 0 <= u < width - 1 and 0 <= v < height - 1 and 0 <= k < depth - linear
        if plain and inside:
            first = k * source[STRIDE_Z] + v * source[STRIDE_Y] + u * source[STRIDE_X]
            front = kind(_near(grid, first, source, np.float32(fx), np.float32(fy)))
            if linear:
                back = kind(_near(grid, first + source[STRIDE_Z], source, np.float32(fx), np.float32(fy)))
                front = front + kind(fz) * (back - front)
        else:
            front = _slice(base, source, k, v, u, kind(fx), kind(fy), out)
            if linear:
                back = _slice(base, source, k + 1, v, u, kind(fx), kind(fy), out)
                front = front + kind(fz) * (back - front)
        out[i] = front


@helper()
def _scatter(grad, x, y, z, n, linear, values, buffer):
    """The adjoint of `_read`: add the gradients of points to the buffer of a contiguous volume."""
    kind = values.dtype.type
    depth, height, width = grad[DEPTH], grad[HEIGHT], grad[WIDTH]
    for i in range(n):
        u, fx = _cell(x[i], width)
        v, fy = _cell(y[i], height)
        k, fz = _depth_cell(z[i], depth, linear)
        for c in range(8 if linear else 4):
            kk, vv, uu = k + (c >> 2), v + ((c >> 1) & 1), u + (c & 1)
            if 0 <= kk < depth and 0 <= vv < height and 0 <= uu < width:
                share = kind(fx if c & 1 else 1.0 - fx) * kind(fy if c & 2 else 1.0 - fy)
                share *= kind(fz if c & 4 else 1.0 - fz)
                buffer[(kk * height + vv) * width + uu] += values[i] * share


@helper()
def _target_voxel(data, encoding, row, frames, height, k, v, u):
    if k < 0 or v < 0 or k >= frames or v >= height:
        return 0.0
    return read_pixel(data, encoding, row, k * height + v - row[TOP], u - row[LEFT])


@helper()
def _target_slice(data, encoding, row, frames, height, k, v, u, fx, fy, like):
    kind = like.dtype.type
    return _mix(
        kind(_target_voxel(data, encoding, row, frames, height, k, v, u)),
        kind(_target_voxel(data, encoding, row, frames, height, k, v, u + 1)),
        kind(_target_voxel(data, encoding, row, frames, height, k, v + 1, u)),
        kind(_target_voxel(data, encoding, row, frames, height, k, v + 1, u + 1)), fx, fy,
    )  # fmt: skip


@helper()
def _read_target(x, y, z, n, row, frames, data, encoding, linear, t):
    """A target, a row of the table whose slices lie one below the other, at points."""
    kind = t.dtype.type
    height, width = row[FRAME_H] // frames, row[FRAME_W]
    for i in range(n):
        u, fx = _cell(x[i], width)
        v, fy = _cell(y[i], height)
        k, fz = _depth_cell(z[i], frames, linear)
        front = _target_slice(data, encoding, row, frames, height, k, v, u, kind(fx), kind(fy), t)
        if linear:
            back = _target_slice(data, encoding, row, frames, height, k + 1, v, u, kind(fx), kind(fy), t)
            front = front + kind(fz) * (back - front)
        t[i] = front


# ----------------------------------------------------------------------------------------------------------- the loss


@kernel
def volume_loss(
    counter, items, values, coordinates, integers,
    sources, data, table, index, encoding, images, windows, image_ids, seed, numbers, candidate_boxes, random_boxes,
    frames, linear, alpha, gamma, kind, again, ce, dice, chosen_bits, soft, order, starts, by_ce, by_dice, grads,
):  # fmt: skip
    """Cross-entropy and Dice of instances, and in the backward pass (`again`) their gradient: see `mask_loss`.

    A work item is a volume and its instances. Gradients are added to those of the layers, which `grads` describes and
    which are in the type of sums.
    """
    values, coordinates, integers = bare(values), bare(coordinates), bare(integers)
    num_points, num_candidates, num_uncertain = numbers
    spaces = values[: VALUE_ROWS * num_points].reshape(VALUE_ROWS, num_points)
    z, t, w, s, extra = spaces[0], spaces[1], spaces[2], spaces[3], spaces[4]
    candidates = values[VALUE_ROWS * num_points : VALUE_ROWS * num_points + num_candidates]
    px, py = coordinates[:num_points], coordinates[num_points : 2 * num_points]
    pz = coordinates[2 * num_points : 3 * num_points]
    ints = integers[: INTEGER_ROWS * BLOCK].reshape(INTEGER_ROWS, BLOCK)
    rest = integers[INTEGER_ROWS * BLOCK :]
    keys, space = rest[: num_candidates + GROUP], rest[num_candidates + GROUP :]
    chosen = rest[2 * num_candidates + SPARE :]
    counters, bits = ints[0], ints[1:]
    while True:
        item = take(counter)
        if item >= items:
            break
        for place in range(starts[item], starts[item + 1]):
            instance = order[place]
            layer, image, query = index[instance, LAYER], index[instance, IMAGE], index[instance, QUERY]
            d_ce, d_dice = (by_ce[instance], by_dice[instance]) if again else (0.0, 0.0)
            if again and d_ce == 0 and d_dice == 0:
                continue
            source, window, target = sources[layer], windows[image], index[instance, TARGET]
            row = table[images[image, FIRST] + target]
            key = instance_key(seed, image_ids[image], target)
            marks = chosen_bits[instance]
            if num_uncertain > 0:
                if not again:
                    for first in range(0, num_candidates, BLOCK):
                        n = min(BLOCK, num_candidates - first)
                        _count_up(counters, first, n)
                        # The points themselves come later.
                        x, y, zz = coordinates[:n], coordinates[BLOCK : BLOCK + n], coordinates[2 * BLOCK :]
                        _draw(key, layer, CANDIDATES, counters, n, candidate_boxes, window, bits, x, y, zz)
                        part = candidates[first : first + n]
                        _read(source, image, query, x, y, zz, n, linear, part)
                        make_keys(part, n, keys[first : first + n])
                    keys[num_candidates:] = LARGEST_KEY
                    limit, below, equal = threshold(keys, num_candidates, num_uncertain, space, marks)
                    mark_chosen(keys, num_candidates, _I32(limit), num_uncertain - below, equal, marks)
                list_marked(marks, chosen)
            first = 0
            while first < num_points:
                uncertain = first < num_uncertain
                n = min(BLOCK, (num_uncertain if uncertain else num_points) - first)
                x, y, zz = px[first : first + n], py[first : first + n], pz[first : first + n]
                if uncertain:
                    _draw(key, layer, CANDIDATES, chosen[first : first + n], n, candidate_boxes, window, bits, x, y, zz)
                else:
                    _count_up(counters, first - num_uncertain, n)
                    _draw(key, layer, RANDOM, counters, n, random_boxes, window, bits, x, y, zz)
                first += n
            if again:
                _read(source, image, query, px, py, pz, num_points, linear, z)
            else:
                pick(candidates, chosen, num_uncertain, z)
                _read(
                    source, image, query, px[num_uncertain:], py[num_uncertain:], pz[num_uncertain:],
                    num_points - num_uncertain, linear, z[num_uncertain:],
                )  # fmt: skip
            _read_target(px, py, pz, num_points, row, frames, data, encoding, linear, t)
            w[:] = 1
            if not again:
                entropy, sums = sum_losses(z, t, w, num_points, s)
                areas = sums[1:] if kind == STANDARD else sum_other_areas(t, w, num_points, s, kind)
                if gamma >= 0:
                    entropy = sum_focal(z, t, w, num_points, alpha, gamma)
                ce[instance] = entropy / num_points
                dice[instance] = 1.0 - (2.0 * areas[2] + 1.0) / (areas[0] + areas[1] + 1.0)
                if encoding >= VALUES:
                    soft[instance] = t
                continue
            sums = sum_areas(z, t, w, num_points, s)
            areas = sums[1:] if kind == STANDARD else sum_other_areas(t, w, num_points, s, kind)
            share = d_ce / num_points
            if gamma >= 0:
                extra[:] = 0
                add_focal_gradients(z, t, w, num_points, share, alpha, gamma, extra)
                share = share * 0
            loss_gradients(z, t, w, s, num_points, share, d_dice, areas[0], areas[2], areas[1], kind)
            if gamma >= 0:
                for i in range(num_points):
                    z[i] += extra[i]
            grad = grads[layer]
            size = grad[DEPTH] * grad[HEIGHT] * grad[WIDTH]
            start = grad[ADDRESS] + (image * grad[STRIDE_B] + query * grad[STRIDE_Q]) * _item_bytes(grad[DTYPE])
            if grad[DTYPE] == F32:
                _scatter(grad, px, py, pz, num_points, linear, z, at(start, size, np.float32))
            else:
                _scatter(grad, px, py, pz, num_points, linear, z, at(start, size, np.float64))


# --------------------------------------------------------------------------------------------------- the matching cost


@kernel
def matching_points(
    counter, items, _values, _coordinates, integers, image_ids, seed, windows, boxes, num_points, points
):
    """The matcher's points of each volume: `[B, 3, P]`."""
    ints = integers[: INTEGER_ROWS * BLOCK].reshape(INTEGER_ROWS, BLOCK)
    while True:
        image = take(counter)
        if image >= items:
            break
        key = instance_key(seed, image_ids[image], ALL_TARGETS)
        for first in range(0, num_points, BLOCK):
            n = min(BLOCK, num_points - first)
            _count_up(ints[0], first, n)
            part = points[image, :, first : first + n]
            _draw(key, 0, MATCHER, ints[0], n, boxes, windows[image], ints[1:], part[X], part[Y], part[Z])


@kernel
def matching_targets(
    counter, items, _values, _coordinates, _integers, points, owner, table, frames, data, encoding, linear, t
):
    """The targets at the points of their volumes: the first P columns of `t` `[T_all, _]`."""
    num_points = points.shape[2]
    while True:
        item = take(counter)
        if item >= items:
            break
        at_points = points[owner[item]]
        _read_target(
            at_points[X], at_points[Y], at_points[Z], num_points, table[item], frames, data, encoding, linear,
            t[item, :num_points],
        )  # fmt: skip


@kernel
def sample_volumes(counter, items, _values, _coordinates, _integers, sources, points, first, linear, result):
    """Logits `[B, R, P]` of queries `first` to `first + R` at the points of their volumes."""
    rows = result.shape[1]
    while True:
        item = take(counter)
        if item >= items:
            break
        image, row = item // rows, item % rows
        at_points = points[image]
        _read(
            sources[0], image, first + row, at_points[X], at_points[Y], at_points[Z], points.shape[2], linear,
            result[image, row],
        )  # fmt: skip
