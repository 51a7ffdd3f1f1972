"""Triton kernels for the loss of the instances: terms at their points, sums, and the slopes of the sums."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from maskloss import _abi as abi

from .generator import point_of
from .sampling import (
    BASE,
    IGNORE_OFFSET,
    IMAGE,
    IMAGE_COLUMNS,
    INDEX_COLUMNS,
    LAYER,
    QUERY,
    TARGET,
    is_ignored,
    keep_targets,
    kept_targets,
    layer_pointer,
    read_targets,
    sample_logits,
    table_row,
)

# Sums of an instance: weights, weighted sigmoids, their products with the targets, weighted targets; and the
# cross-entropy, which only the forward pass needs.
WEIGHTS: tl.constexpr = tl.constexpr(0)
PREDICTED: tl.constexpr = tl.constexpr(1)
OVERLAP: tl.constexpr = tl.constexpr(2)
WANTED: tl.constexpr = tl.constexpr(3)
LOSSES: tl.constexpr = tl.constexpr(4)
NUM_SUMS: tl.constexpr = tl.constexpr(5)


# Kinds of Dice.
SOFT: tl.constexpr = tl.constexpr(abi.SOFT)
SEMIMETRIC: tl.constexpr = tl.constexpr(abi.SEMIMETRIC)


@triton.jit
def sigmoids(z):
    """Compute sigmoid(z), sigmoid(-z) and log1p(exp(-|z|)), each without cancellation."""
    e = tl.exp(-tl.abs(z))
    large, small = 1.0 / (1.0 + e), e / (1.0 + e)
    # log(1 + e) loses the low digits of a small e; dividing by what 1 + e kept of e gives them back.
    rounded = 1.0 + e
    exact = rounded == 1.0
    logarithm = tl.where(exact, e, tl.log(rounded) * (e / tl.where(exact, 1.0, rounded - 1.0)))
    return tl.where(z >= 0.0, large, small), tl.where(z >= 0.0, small, large), logarithm


@triton.jit
def power(base, EXPONENT: tl.constexpr):
    """Raise to a power that is known when the kernel is compiled: base^EXPONENT, 0^0 = 1. The base is at least 0."""
    if EXPONENT == 0.0:
        result = base * 0.0 + 1.0
    elif EXPONENT == 1.0:
        result = base
    elif EXPONENT == 2.0:
        result = base * base
    else:
        positive = base > 0.0
        result = tl.exp2(EXPONENT * tl.log2(tl.where(positive, base, 1.0)))
        result = tl.where(positive, result, base * 0.0)  # keeps a NaN
    return result


@triton.jit
def cross_entropy(z, s, c, logarithm, t, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    """BCE max(z, 0) - z t + log1p(exp(-|z|)), or focal a_t (1 - p_t)^gamma BCE; s and c are sigmoid(z), sigmoid(-z)."""
    loss = tl.where(z > 0.0, z, 0.0) - z * t + logarithm
    if GAMMA >= 0.0:
        loss *= power(s * (1.0 - t) + c * t, GAMMA)  # 1 - p_t, without cancellation
        if ALPHA >= 0.0:
            loss *= ALPHA * t + (1.0 - ALPHA) * (1.0 - t)
    return loss


@triton.jit
def cross_entropy_slope(z, s, c, logarithm, t, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    """Derivative of `cross_entropy` by z: s - t, or (1 - p)^g (s - t) - g (1 - p)^(g - 1) BCE s (1 - s) (2 t - 1)."""
    slope = s - t
    if GAMMA >= 0.0:
        miss = s * (1.0 - t) + c * t
        slope *= power(miss, GAMMA)
        if GAMMA > 0.0:
            loss = tl.where(z > 0.0, z, 0.0) - z * t + logarithm
            # miss^(gamma - 1) is infinite at a perfect prediction, where the loss that it multiplies is 0.
            hit = miss <= 0.0
            steep = GAMMA * power(tl.where(hit, 1.0, miss), GAMMA - 1.0) * loss * s * c * (2.0 * t - 1.0)
            slope -= tl.where(hit, 0.0, steep)
        if ALPHA >= 0.0:
            slope *= ALPHA * t + (1.0 - ALPHA) * (1.0 - t)
    return slope


@triton.jit
def _store_sums(block, s, t, weight, keep, DICE: tl.constexpr):
    """Sums of a block of points that both passes need."""
    tl.store(block + WEIGHTS, tl.sum(tl.where(keep, weight, 0.0), 0))
    predicted = weight * s
    if DICE == SOFT:
        predicted *= s
    tl.store(block + PREDICTED, tl.sum(tl.where(keep, predicted, 0.0), 0))
    overlap = weight * s * t
    if DICE == SEMIMETRIC:
        overlap = weight * tl.minimum(s, t)
    tl.store(block + OVERLAP, tl.sum(tl.where(keep, overlap, 0.0), 0))
    wanted = weight * t
    if DICE == SOFT:
        wanted *= t
    tl.store(block + WANTED, tl.sum(tl.where(keep, wanted, 0.0), 0))


@triton.jit(do_not_specialize=["first_layer", "seed_value"])
def loss_terms(
    layers, first_layer, index, data, table, images, ignore, windows, image_ids, seed_value, seed_pointer, strata,
    frames, points, order, kept, soft, logits, sums, num_points, num_uncertain, blocks,
    height, width, stride_b, stride_q, stride_y, stride_x, depth, stride_z, stride_n, stride_p, stride_c,
    LAYERS: tl.constexpr, ENCODING: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr, LINEAR: tl.constexpr,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, DICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward pass at a block of points of an instance: read z and t, write the block's five sums.

    t is also written to `soft`, and z to `logits`, if these are not None: where the backward pass reads them there.
    The logits of chosen candidates were read when the choice was made (`kept`); only the uniform points are read here.
    """
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = i < num_points
    ACC: tl.constexpr = sums.dtype.element_ty
    row = index + n * INDEX_COLUMNS
    layer, image = tl.load(row + LAYER), tl.load(row + IMAGE)
    base = layer_pointer(layers, layer - first_layer, LAYERS) + image * stride_b + tl.load(row + QUERY) * stride_q
    px, py, pz = point_of(
        n, i, keep, row, windows, image_ids, seed_value, seed_pointer, strata, frames, points, order,
        stride_n, stride_p, stride_c, num_uncertain,
    )  # fmt: skip
    fresh = keep
    if order is not None:
        fresh = keep & (i >= num_uncertain)
    z = sample_logits(base, px, py, pz, depth, height, width, stride_z, stride_y, stride_x, fresh, BORDER, LINEAR, ACC)
    if order is not None:
        known = tl.load(kept + n * num_uncertain + i, mask=i < num_uncertain, other=0.0)
        z = tl.where(i < num_uncertain, known, z)
    if logits is not None:
        tl.store(logits + n * num_points + i, z, mask=keep)
    image_row = images + image * IMAGE_COLUMNS
    target_row = table_row(table, image_row, tl.load(row + TARGET))
    data_row = data + tl.load(image_row + BASE)
    t = read_targets(data_row, target_row, px, py, pz, frames, keep, ENCODING, NEAREST, BORDER, LINEAR, ACC)
    skip = is_ignored(ignore, image_row, target_row + IGNORE_OFFSET, px, py, pz, frames, keep)
    if soft is not None:
        keep_targets(soft, n * num_points + i, t, skip, keep)
    weight = 1.0 - skip.to(ACC)
    s, c, logarithm = sigmoids(z)
    loss = cross_entropy(z, s, c, logarithm, t, ALPHA, GAMMA)
    block = sums + program.to(tl.int64) * NUM_SUMS
    _store_sums(block, s, t, weight, keep, DICE)
    tl.store(block + LOSSES, tl.sum(tl.where(keep, weight * loss, 0.0), 0))


@triton.jit
def _add_blocks(sums, which: tl.constexpr, n, keep, blocks, ACC: tl.constexpr):
    """Add up one of the sums over the blocks of instances n, in order."""
    total = tl.zeros(n.shape, ACC)
    for block in range(blocks):
        total += tl.load(sums + (n * blocks + block) * NUM_SUMS + which, mask=keep, other=0.0)
    return total


@triton.jit(do_not_specialize=["count"])
def finish_losses(sums, ce, dice, count, blocks, BLOCK: tl.constexpr):
    """Divide the sums of BLOCK instances.

    ce = sum w l / max(sum w, 1), dice = 1 - (2 sum w s t + 1) / (sum w s + sum w t + 1)
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = n < count
    ACC: tl.constexpr = sums.dtype.element_ty
    weights = _add_blocks(sums, WEIGHTS, n, keep, blocks, ACC)
    predicted = _add_blocks(sums, PREDICTED, n, keep, blocks, ACC)
    overlap = _add_blocks(sums, OVERLAP, n, keep, blocks, ACC)
    wanted = _add_blocks(sums, WANTED, n, keep, blocks, ACC)
    losses = _add_blocks(sums, LOSSES, n, keep, blocks, ACC)
    tl.store(ce + n, losses / tl.where(weights > 1.0, weights, 1.0), mask=keep)
    tl.store(dice + n, 1.0 - (2.0 * overlap + 1.0) / (predicted + wanted + 1.0), mask=keep)


@triton.jit(do_not_specialize=["first_layer", "seed_value"])
def slope_terms(
    layers, first_layer, index, data, table, images, ignore, windows, image_ids, seed_value, seed_pointer, strata,
    frames, points, order, values, wanted, sums, num_points, num_uncertain, blocks,
    height, width, stride_b, stride_q, stride_y, stride_x, depth, stride_z, stride_n, stride_p, stride_c,
    LAYERS: tl.constexpr, ENCODING: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr, LINEAR: tl.constexpr,
    DICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward pass, first half, at a block of points: read z and t again, sum up what the slope of Dice needs.

    They are written to `values` and `wanted`. What the forward pass kept is there already: z if there are no layers, t
    if there are no data.
    """
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = i < num_points
    ACC: tl.constexpr = sums.dtype.element_ty
    row = index + n * INDEX_COLUMNS
    image = tl.load(row + IMAGE)
    px, py, pz = point_of(
        n, i, keep, row, windows, image_ids, seed_value, seed_pointer, strata, frames, points, order,
        stride_n, stride_p, stride_c, num_uncertain,
    )  # fmt: skip
    if layers is None:
        z = tl.load(values + n * num_points + i, mask=keep, other=0.0)
    else:
        base = layer_pointer(layers, tl.load(row + LAYER) - first_layer, LAYERS)
        base += image * stride_b + tl.load(row + QUERY) * stride_q
        z = sample_logits(
            base, px, py, pz, depth, height, width, stride_z, stride_y, stride_x, keep, BORDER, LINEAR, ACC
        )
        tl.store(values + n * num_points + i, z, mask=keep)
    if data is None:
        t, weight = kept_targets(wanted, n * num_points + i, keep, ACC)
    else:
        image_row = images + image * IMAGE_COLUMNS
        target_row = table_row(table, image_row, tl.load(row + TARGET))
        data_row = data + tl.load(image_row + BASE)
        t = read_targets(data_row, target_row, px, py, pz, frames, keep, ENCODING, NEAREST, BORDER, LINEAR, ACC)
        skip = is_ignored(ignore, image_row, target_row + IGNORE_OFFSET, px, py, pz, frames, keep)
        keep_targets(wanted, n * num_points + i, t, skip, keep)
        weight = 1.0 - skip.to(ACC)
    s, _c, _logarithm = sigmoids(z)
    _store_sums(sums + program.to(tl.int64) * NUM_SUMS, s, t, weight, keep, DICE)


@triton.jit
def slopes(
    sums, blocks, grad_ce, grad_dice, z, t, weight, ALPHA: tl.constexpr, GAMMA: tl.constexpr, DICE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the losses of an instance by z at its points.

    g_ce w slope / max(sum w, 1) + g_dice w s (1 - s) (overlap - 2 t area) / area^2 + 0 z, with
    overlap = 2 sum w s t + 1, area = sum w s + sum w t + 1. The last term makes it NaN where z is not finite. Other
    kinds of Dice have other sums, and their own derivatives by s in place of 1 (of the area) and t (of the overlap).
    """
    total = tl.full((), 0.0, ACC)
    predicted = tl.full((), 0.0, ACC)
    overlap = tl.full((), 1.0, ACC)
    wanted = tl.full((), 0.0, ACC)
    for block in range(blocks):
        at = sums + block * NUM_SUMS
        total += tl.load(at + WEIGHTS)
        predicted += tl.load(at + PREDICTED)
        overlap += 2.0 * tl.load(at + OVERLAP)
        wanted += tl.load(at + WANTED)
    area = predicted + wanted + 1.0
    s, c, logarithm = sigmoids(z)
    d_ce = cross_entropy_slope(z, s, c, logarithm, t, ALPHA, GAMMA) / tl.where(total > 1.0, total, 1.0)
    by_overlap = t
    if DICE == SOFT:
        overlap = overlap * 2.0 * s
    if DICE == SEMIMETRIC:
        by_overlap = tl.where(s < t, 1.0, tl.where(s == t, 0.5, 0.0)).to(ACC)
    d_dice = s * c * ((overlap - 2.0 * by_overlap * area) / (area * area))
    slope = weight * (grad_ce * d_ce + grad_dice * d_dice) + 0.0 * z
    # An instance of weight 0 must not bring in the NaN of its logits.
    return tl.where((grad_ce != 0.0) | (grad_dice != 0.0), slope, 0.0)
