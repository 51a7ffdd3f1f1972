"""Triton kernels that choose points: sample the candidates, keep the most uncertain ones, list them.

The choice needs no sorting. `choose` finds the key of the last candidate to keep, two bits at a time: each pass over
the candidates of an instance counts the keys below three thresholds. That is cheaper than histograms in shared memory
(Triton builds those from ballots, for every bin), needs no atomics, and gives the same answer on every device.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskloss._abi import accumulation_dtype, num_bytes

from .generator import CANDIDATES, FIRST_CELLS, draw_layout, instance_key, load_point, point_of
from .launch import BLOCK, OPTIONS, Sampling, Span, cdiv, empty, geometry, slices
from .sampling import (
    IMAGE,
    INDEX_COLUMNS,
    LAYER,
    POINT_COLUMNS,
    QUERY,
    TARGET,
    X,
    Y,
    layer_pointer,
    locate,
    nearest,
    read_pixel,
    sample_cells,
    sample_logits,
)

# Candidates that one step of a choice takes.
WIDE = 2048


@triton.jit(do_not_specialize=["first_layer"])
def sample_points(
    layers, first_layer, index, points, values, num_points, blocks,
    height, width, stride_b, stride_q, stride_y, stride_x, stride_n, stride_p, stride_c,
    LAYERS: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values[n, i] = map of instance n at points[n, i]. One program: a block of points of an instance."""
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = i < num_points
    row = index + n * INDEX_COLUMNS
    base = layer_pointer(layers, tl.load(row + LAYER) - first_layer, LAYERS)
    base += tl.load(row + IMAGE) * stride_b + tl.load(row + QUERY) * stride_q
    point = points + n * stride_n + i.to(tl.int64) * stride_p
    px, py, _pz = load_point(point, stride_c, keep, None)
    ACC: tl.constexpr = values.dtype.element_ty
    x, fx = locate(px, width, BORDER, ACC)
    y, fy = locate(py, height, BORDER, ACC)
    if NEAREST:
        y, x = nearest(y, fy, height, BORDER), nearest(x, fx, width, BORDER)
        z = read_pixel(base, y, x, height, width, stride_y, stride_x, keep, ACC)
    else:
        z = sample_cells(base, y, x, fy, fx, height, width, stride_y, stride_x, keep, ACC)
    tl.store(values + n * num_points + i, z, mask=keep)


@triton.jit(do_not_specialize=["first_layer", "seed_value"])
def sample_candidates(
    layers, first_layer, index, windows, image_ids, seed_value, seed_pointer, strata, frames, values, num_candidates,
    blocks, height, width, stride_b, stride_q, stride_y, stride_x, depth, stride_z,
    LAYERS: tl.constexpr, BORDER: tl.constexpr, LINEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values[n, i] = logit of instance n at its i-th candidate. One program: a block of candidates of an instance."""
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = i < num_candidates
    row = index + n * INDEX_COLUMNS
    layer, image = tl.load(row + LAYER), tl.load(row + IMAGE)
    base = layer_pointer(layers, layer - first_layer, LAYERS) + image * stride_b + tl.load(row + QUERY) * stride_q
    key0, key1 = instance_key(seed_value, seed_pointer, tl.load(image_ids + image), tl.load(row + TARGET))
    stream = layer.to(tl.uint32) + CANDIDATES
    x, y, z = draw_layout(key0, key1, i, stream, strata, FIRST_CELLS, windows, image, frames)
    ACC: tl.constexpr = values.dtype.element_ty
    logit = sample_logits(base, x, y, z, depth, height, width, stride_z, stride_y, stride_x, keep, BORDER, LINEAR, ACC)
    tl.store(values + n * num_candidates + i, logit, mask=keep)


@triton.jit
def _load_keys(values, i, num_candidates):
    """Logits, and their keys: the bits of |z| as float32, which order as |z| does; 0 for a z that is not finite."""
    z = tl.load(values + i, mask=i < num_candidates, other=0.0)
    bits = z.to(tl.float32).to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    key = tl.where(z - z == 0.0, bits, 0)
    return z, tl.where(i < num_candidates, key, 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _choose(
    values, order, kept, chosen, num_candidates, num_uncertain, num_bytes,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the num_uncertain smallest (key, index) of each instance. One program: an instance.

    The threshold is the largest x with #(key < x) < num_uncertain. Written are the chosen candidates, ascending
    (`order`), their logits (`kept`), and one bit for every candidate (`chosen`).
    """
    n = tl.program_id(0).to(tl.int64)
    values += n * num_candidates
    threshold = tl.full((), 0, tl.uint32)
    below = tl.full((), 0, tl.int32)
    unit = tl.full((), 1 << 30, tl.uint32)
    for _step in range(16):
        first, second, third = threshold + unit, threshold + 2 * unit, threshold + 3 * unit
        count1 = tl.zeros((BLOCK,), tl.int32)
        count2 = tl.zeros((BLOCK,), tl.int32)
        count3 = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, num_candidates, BLOCK):
            _z, key = _load_keys(values, start + tl.arange(0, BLOCK), num_candidates)
            count1 += (key < first).to(tl.int32)
            count2 += (key < second).to(tl.int32)
            count3 += (key < third).to(tl.int32)
        below1, below2, below3 = tl.sum(count1, 0), tl.sum(count2, 0), tl.sum(count3, 0)
        threshold = tl.where(below1 < num_uncertain, first, threshold)
        threshold = tl.where(below2 < num_uncertain, second, threshold)
        threshold = tl.where(below3 < num_uncertain, third, threshold)
        below = tl.where(below1 < num_uncertain, below1, below)
        below = tl.where(below2 < num_uncertain, below2, below)
        below = tl.where(below3 < num_uncertain, below3, below)
        unit = unit >> 2
    ties = num_uncertain - below  # candidates at the threshold that are kept: those with the lowest indices
    seen = tl.full((), 0, tl.int64)  # how many keys were below the threshold (high word) and at it (low word)
    for start in range(0, num_candidates, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z, key = _load_keys(values, i, num_candidates)
        counts = ((key < threshold).to(tl.int64) << 32) + (key == threshold).to(tl.int64)
        before = seen + tl.cumsum(counts, 0) - counts
        ties_before = (before & 0xFFFFFFFF).to(tl.int32)
        take = (key < threshold) | ((key == threshold) & (ties_before < ties))
        place = n * num_uncertain + (before >> 32) + tl.minimum(ties_before, ties)
        tl.store(order + place, i, mask=take)
        tl.store(kept + place, z, mask=take)
        bits = tl.reshape(take.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        tl.store(chosen + n * num_bytes + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte < num_bytes)
        seen += tl.sum(counts, 0)


@triton.jit
def _list_chosen(chosen, order, num_candidates, num_uncertain, num_bytes, BLOCK: tl.constexpr):
    """Invert the bit mask of `choose`: order[n, j] = the j-th candidate whose bit is set. One program: an instance."""
    n = tl.program_id(0).to(tl.int64)
    seen = tl.full((), 0, tl.int32)
    for start in range(0, num_candidates, BLOCK):
        i = start + tl.arange(0, BLOCK)
        byte = tl.load(chosen + n * num_bytes + (i >> 3), mask=i < num_candidates, other=0).to(tl.int32)
        take = (byte >> (i & 7)) & 1
        place = seen + tl.cumsum(take, 0) - take
        tl.store(order + n * num_uncertain + place, i, mask=(take != 0) & (place < num_uncertain))
        seen += tl.sum(take, 0)


@triton.jit(do_not_specialize=["seed_value"])
def write_points(
    index, windows, image_ids, seed_value, seed_pointer, strata, frames, order, points, num_points, num_uncertain,
    blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """points[n, i] = x, y of the points of the loss. One program: a block of points of an instance."""
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = i < num_points
    row = index + n * INDEX_COLUMNS
    x, y, _z = point_of(
        n, i, keep, row, windows, image_ids, seed_value, seed_pointer, strata, frames, None, order,
        0, 0, 0, num_uncertain,
    )  # fmt: skip
    place = points + POINT_COLUMNS * (n * num_points + i)
    tl.store(place + X, x, mask=keep)
    tl.store(place + Y, y, mask=keep)


# -------------------------------------------------------------------------------------------------------- launches


class Choice(NamedTuple):
    """Chosen candidates of the instances of a span, int32 `[n, num_uncertain]` ascending, and their logits."""

    order: Tensor | None
    kept: Tensor | None


def chosen_bits(index: Tensor, sampling: Sampling) -> Tensor:
    """Allocate the choice of instances, a bit for each candidate."""
    return empty((len(index), num_bytes(sampling.num_candidates)), torch.uint8, index.device)


def row_bytes(sampling: Sampling, dtype: torch.dtype) -> int:
    """Scratch memory of an instance in the forward pass."""
    size = accumulation_dtype(dtype).itemsize
    return sampling.num_candidates * size + sampling.num_uncertain * (4 + size)


def choose(span: Span, index: Tensor, sampling: Sampling, chosen: Tensor) -> Choice:
    """Sample the candidates of a span and choose; the choice is also written to `chosen`, as bits."""
    if sampling.num_uncertain == 0:
        return Choice(None, None)
    first, device = span.layers[0], span.layers[0].device
    dtype = accumulation_dtype(first.dtype)
    candidates, uncertain = sampling.num_candidates, sampling.num_uncertain
    values = empty((span.count, candidates), dtype, device)
    order = empty((span.count, uncertain), torch.int32, device)
    kept = empty((span.count, uncertain), dtype, device)
    blocks = cdiv(candidates, BLOCK)
    sample_candidates[(span.count * blocks,)](
        span.layers, span.first, index[span.rows], *sampling.source, values, candidates, blocks, *geometry(first),
        *slices(first), LAYERS=len(span.layers), BORDER=sampling.border, LINEAR=sampling.linear, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    _choose[(span.count,)](
        values, order, kept, chosen[span.rows], candidates, uncertain, chosen.shape[1],
        BLOCK=WIDE, **{**OPTIONS, "num_warps": 8},
    )  # fmt: skip
    return Choice(order, kept)


def list_chosen(span: Span, sampling: Sampling, chosen: Tensor) -> Tensor | None:
    """Turn the bits of the choice back into a list, int32 `[n, num_uncertain]`."""
    if sampling.num_uncertain == 0:
        return None
    order = empty((span.count, sampling.num_uncertain), torch.int32, chosen.device)
    _list_chosen[(span.count,)](
        chosen[span.rows], order, sampling.num_candidates, sampling.num_uncertain, chosen.shape[1],
        BLOCK=WIDE, **OPTIONS,
    )  # fmt: skip
    return order
