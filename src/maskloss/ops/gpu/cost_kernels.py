"""Triton kernels for the matching cost: the points of an image, its targets there, and all pairs as matrix products.

All queries and layers of an image share its points, so targets and weights at the points are read once. The points are
sorted by rows of the map: a program that reads 16 maps then walks down through them, and each map crosses the memory
bus once; in random order every read would fetch its cache line anew, because the maps in flight do not fit the cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from maskloss import _abi as abi

from .generator import FIRST_CELLS, MATCHER, draw_layout, instance_key
from .loss_kernels import SEMIMETRIC, SOFT, power, sigmoids
from .sampling import (
    BASE,
    COUNT,
    IMAGE_COLUMNS,
    POINT_COLUMNS,
    X,
    Y,
    is_ignored,
    layer_pointer,
    locate,
    locate_slice,
    read_targets,
    sample_cells,
    sample_slices,
    table_row,
)

_ALL_TARGETS: tl.constexpr = tl.constexpr(abi.ALL_TARGETS)
_GRID: tl.constexpr = tl.constexpr(1024)


@triton.jit(do_not_specialize=["seed_value"])
def match_points(
    windows, image_ids, seed_value, seed_pointer, strata, frames, points, depths, keys, num_points, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Uniform points of an image, and the key that sorts them: the cell of a 1024 x 1024 grid, row by row.

    Of a stack also their z, as `depths`; those of one slice are sorted together.
    """
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = i < num_points
    everything = tl.full((), _ALL_TARGETS, tl.uint32)
    key0, key1 = instance_key(seed_value, seed_pointer, tl.load(image_ids + image), everything)
    stream = tl.full((), MATCHER, tl.uint32)
    x, y, z = draw_layout(key0, key1, i, stream, strata, FIRST_CELLS, windows, image, frames)
    place = image * num_points + i
    tl.store(points + POINT_COLUMNS * place + X, x, mask=keep)
    tl.store(points + POINT_COLUMNS * place + Y, y, mask=keep)
    cell = (y * _GRID).to(tl.int32) * _GRID + (x * _GRID).to(tl.int32)
    if frames is not None:
        tl.store(depths + place, z, mask=keep)
        cell += tl.minimum((z * frames).to(tl.int32), _GRID - 1) * (_GRID * _GRID)
    tl.store(keys + place, cell, mask=keep)


@triton.jit
def _load_point(points, depths, order, image, i, num_points, keep):
    """Sorted points of an image."""
    place = image * num_points + tl.load(order + image * num_points + i, mask=keep, other=0)
    point = points + POINT_COLUMNS * place
    z = tl.zeros(keep.shape, tl.float32)
    if depths is not None:
        z = tl.load(depths + place, mask=keep, other=0.0)
    return tl.load(point + X, mask=keep, other=0.0), tl.load(point + Y, mask=keep, other=0.0), z


@triton.jit(do_not_specialize=["widest"])
def match_targets(
    points, depths, order, frames, data, table, images, ignore, weighted, weights, num_points, blocks, widest,
    ENCODING: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr, LINEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weighted[b, t, i] = w t at the sorted points, 0 beyond an image's targets; weights[b, i] = w."""
    program = tl.program_id(0)
    pair = (program // blocks).to(tl.int64)
    image, target = pair // widest, pair % widest
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = i < num_points
    ACC: tl.constexpr = weights.dtype.element_ty
    x, y, z = _load_point(points, depths, order, image, i, num_points, keep)
    image_row = images + image * IMAGE_COLUMNS
    weight = 1.0 - is_ignored(ignore, image_row, None, x, y, z, frames, keep).to(ACC)
    tl.store(weights + image * num_points + i, weight, mask=keep & (target == 0))
    real = target < tl.load(image_row + COUNT)
    row = tl.where(real, table_row(table, image_row, target), table)
    data_row = data + tl.load(image_row + BASE)
    value = read_targets(data_row, row, x, y, z, frames, keep & real, ENCODING, NEAREST, BORDER, LINEAR, ACC)
    tl.store(weighted + pair * num_points + i, tl.where(real, value * weight, 0.0), mask=keep)


@triton.jit
def match_cells(
    points, depths, order, cells, fractions, count, num_points, blocks, height, width, depth,
    BORDER: tl.constexpr, LINEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the sorted points lie in maps of one size: cells y, x and fractions fy, fx, `[2, B, P]` each.

    In stacks also the slice before them and the fraction there, `[3, B, P]`.
    """
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = i < num_points
    ACC: tl.constexpr = fractions.dtype.element_ty
    px, py, pz = _load_point(points, depths, order, image, i, num_points, keep)
    y, fy = locate(py, height, BORDER, ACC)
    x, fx = locate(px, width, BORDER, ACC)
    place = image * num_points + i
    tl.store(cells + place, y, mask=keep)
    tl.store(cells + count + place, x, mask=keep)
    tl.store(fractions + place, fy, mask=keep)
    tl.store(fractions + count + place, fx, mask=keep)
    if depth is not None:
        k, fz = locate_slice(pz, depth, BORDER, LINEAR, ACC)
        tl.store(cells + 2 * count + place, k, mask=keep)
        tl.store(fractions + 2 * count + place, fz, mask=keep)


@triton.jit
def _pair_terms(z, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    """Sigmoid, cost where t = 0, and how much less it is where t = 1: the cost is linear in t."""
    s, c, logarithm = sigmoids(z)
    negative = tl.where(z > 0.0, z, 0.0) + logarithm
    slope = z
    if GAMMA >= 0.0:
        positive = tl.where(z > 0.0, 0.0, -z) + logarithm
        positive *= power(c, GAMMA)
        negative *= power(s, GAMMA)
        if ALPHA >= 0.0:
            positive *= ALPHA
            negative *= 1.0 - ALPHA
        slope = negative - positive
    return s, negative, slope


# Numbers that change with the targets of a batch would otherwise be compiled for again and again.
@triton.jit(do_not_specialize=["first_layer", "splits", "widest"])
def match_terms(
    layers, first_layer, cells, fractions, weighted, weights, products, overlaps, negatives, areas, count,
    num_points, splits, per_split, batch, queries, widest, num_rows,
    height, width, stride_b, stride_q, stride_y, stride_x, depth, stride_z,
    LAYERS: tl.constexpr, LINEAR: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr, DICE: tl.constexpr,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, TARGETS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Sums over one of `splits` parts of the points, for QUERIES queries of an image and layer and TARGETS targets.

    Without cells the layers hold no maps but the logits at the points themselves, one after the other.
    products[split] = sum slope (w t) and overlaps[split] = sum s (w t), `[L, B, Q, T]`;
    negatives[split] = sum w negative and areas[split] = sum w s, `[L, B, Q]`.
    """
    program = tl.program_id(0)
    target_blocks = tl.cdiv(widest, TARGETS)
    query_blocks = tl.cdiv(queries, QUERIES)
    target = program % target_blocks * TARGETS + tl.arange(0, TARGETS)
    program = program // target_blocks
    split = program % splits
    program = program // splits
    query = program % query_blocks * QUERIES + tl.arange(0, QUERIES)
    program = program // query_blocks
    image, layer = (program % batch).to(tl.int64), program // batch
    ACC: tl.constexpr = products.dtype.element_ty
    base = layer_pointer(layers, layer, LAYERS) + image * stride_b + query.to(tl.int64)[:, None] * stride_q
    row = ((layer + first_layer) * batch + image) * queries + query
    wanted = weighted + (image * widest + target)[None, :] * num_points
    product = tl.zeros((QUERIES, TARGETS), ACC)
    overlap = tl.zeros((QUERIES, TARGETS), ACC)
    negative_sum = tl.zeros((QUERIES, POINTS), ACC)
    area_sum = tl.zeros((QUERIES, POINTS), ACC)
    last = tl.minimum((split + 1) * per_split, num_points)
    for start in range(split * per_split, last, POINTS):
        i = start + tl.arange(0, POINTS)
        keep = i < last
        place = image * num_points + i
        if cells is None:
            weight = tl.load(weights + place, mask=keep, other=0.0)[None, :]
            real = keep[None, :] & (query < queries)[:, None]
            z = tl.load(base + i[None, :] * stride_x, mask=real, other=0.0).to(ACC)
        else:
            y = tl.load(cells + place, mask=keep, other=0)[None, :]
            x = tl.load(cells + count + place, mask=keep, other=0)[None, :]
            fy = tl.load(fractions + place, mask=keep, other=0.0)[None, :]
            fx = tl.load(fractions + count + place, mask=keep, other=0.0)[None, :]
            weight = tl.load(weights + place, mask=keep, other=0.0)[None, :]
            real = keep[None, :] & (query < queries)[:, None]
            if depth is None:
                z = sample_cells(base, y, x, fy, fx, height, width, stride_y, stride_x, real, ACC)
            else:
                k = tl.load(cells + 2 * count + place, mask=keep, other=0)[None, :]
                fz = tl.load(fractions + 2 * count + place, mask=keep, other=0.0)[None, :]
                z = sample_slices(
                    base, k, y, x, fz, fy, fx, depth, height, width, stride_z, stride_y, stride_x, real, LINEAR, ACC
                )
        s, negative, slope = _pair_terms(z, ALPHA, GAMMA)
        t = tl.load(wanted + i[:, None], mask=keep[:, None] & (target < widest)[None, :], other=0.0)
        if PRECISION == "sum":
            product += tl.sum(slope[:, :, None] * t[None, :, :], 1)
        else:
            product = tl.dot(slope, t, product, input_precision=PRECISION, out_dtype=ACC)
        if DICE == SEMIMETRIC:
            # t is w t, and w is 0 or 1.
            overlap += tl.sum(tl.minimum(s[:, :, None], t[None, :, :]), 1)
        elif PRECISION == "sum":
            overlap += tl.sum(s[:, :, None] * t[None, :, :], 1)
        else:
            overlap = tl.dot(s, t, overlap, input_precision=PRECISION, out_dtype=ACC)
        negative_sum += negative * weight
        if DICE == SOFT:
            area_sum += s * s * weight
        else:
            area_sum += s * weight
    real = (query < queries)[:, None] & (target < widest)[None, :]
    place = (split * num_rows + row)[:, None] * widest + target[None, :]
    tl.store(products + place, product, mask=real)
    tl.store(overlaps + place, overlap, mask=real)
    mine = (query < queries) & (tl.min(target, 0) == 0)
    tl.store(negatives + split * num_rows + row, tl.sum(negative_sum, 1), mask=mine)
    tl.store(areas + split * num_rows + row, tl.sum(area_sum, 1), mask=mine)


@triton.jit(do_not_specialize=["size", "splits", "widest"])
def finish_costs(
    products, overlaps, negatives, areas, target_sums, counts, images, ce, dice, size, splits, num_rows, batch,
    queries, widest,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Divide the sums of all parts.

    ce = (sum w negative - sum slope w t) / max(sum w, 1), dice = 1 - (2 sum s w t + 1) / (sum w s + sum w t + 1)
    """
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = element < size
    row, target = element // widest, element % widest
    image = row // queries % batch
    ACC: tl.constexpr = ce.dtype.element_ty
    product = tl.zeros((BLOCK,), ACC)
    overlap = tl.zeros((BLOCK,), ACC)
    negative = tl.zeros((BLOCK,), ACC)
    area = tl.zeros((BLOCK,), ACC)
    for split in range(splits):
        part = row * 0 + split  # 64-bit, as all parts together may be large
        product += tl.load(products + part * size + element, mask=keep, other=0.0)
        overlap += tl.load(overlaps + part * size + element, mask=keep, other=0.0)
        negative += tl.load(negatives + part * num_rows + row, mask=keep, other=0.0)
        area += tl.load(areas + part * num_rows + row, mask=keep, other=0.0)
    count = tl.load(counts + image, mask=keep, other=1.0)
    area += tl.load(target_sums + image * widest + target, mask=keep, other=0.0) + 1.0
    real = target < tl.load(images + image * IMAGE_COLUMNS + COUNT, mask=keep, other=0)
    cost = (negative - product) / tl.where(count > 1.0, count, 1.0)
    tl.store(ce + element, tl.where(real, cost, 0.0), mask=keep)
    tl.store(dice + element, tl.where(real, 1.0 - (2.0 * overlap + 1.0) / area, 0.0), mask=keep)
