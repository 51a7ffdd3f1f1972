"""Triton kernels that spread gradients at points over the pixels they were read from.

Three destinations. float32 and float64 gradients are zeroed and added to in place. Half precision adds up in float32
planes, one for each plane that is matched, which are then written to the gradient in its dtype. Deterministic mode does
the same with int64 planes in fixed point, because integer additions give the same sum in any order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gpu_choose import list_chosen
from ._gpu_launch import BLOCK, OPTIONS, Sampling, Span, cdiv, empty, geometry
from ._gpu_loss import NUM_SUMS, slope_terms, slopes
from ._gpu_sampling import (
    IMAGE_COLUMNS,
    INDEX_COLUMNS,
    layer_pointer,
    load_corners,
    locate,
    nearest,
    point_of,
    table_row,
)

# In the table of slots: a plane that no instance reads.
UNUSED = 2**31 - 1
_UNUSED: tl.constexpr = tl.constexpr(UNUSED)


@triton.jit
def _two_to(exponent):
    """2^exponent in float64, exactly."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent(bits):
    """Smallest e with |d| < 2^e for all |d| up to the float32 that has these bits."""
    return (bits >> 23) - 126


@triton.jit
def _add(base, y, x, share, height, width, keep, scale):
    """Add shares to pixels; in fixed point if there is a scale."""
    inside = keep & (y >= 0) & (y < height) & (x >= 0) & (x < width) & (share != 0)
    pixel = base + y.to(tl.int64) * width + x
    if scale is None:
        tl.atomic_add(pixel, share, mask=inside, sem="relaxed")
    else:
        tl.atomic_add(pixel, tl.floor(share.to(tl.float64) * scale + 0.5).to(tl.int64), mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["count"])
def claim_slots(index, slots, first_layer, count, batch, queries, BLOCK: tl.constexpr):
    """slots[plane] = the lowest instance that reads the plane: its place in the scratch planes."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = n < count
    row = index + n.to(tl.int64) * INDEX_COLUMNS
    layer = tl.load(row, mask=keep, other=0) - first_layer
    image, query = tl.load(row + 1, mask=keep, other=0), tl.load(row + 2, mask=keep, other=0)
    tl.atomic_min(slots + (layer * batch + image) * queries + query, n, mask=keep, sem="relaxed")


@triton.jit(do_not_specialize=["first_layer", "seed_value", "headroom"])
def scatter(
    planes,
    first_layer,
    slots,
    largest,
    index,
    table,
    images,
    windows,
    image_ids,
    seed_value,
    seed_pointer,
    points,
    order,
    corners,
    values,
    sums,
    grad_ce,
    grad_dice,
    num_points,
    num_uncertain,
    blocks,
    height,
    width,
    batch,
    queries,
    stride_n,
    stride_p,
    stride_c,
    headroom,
    LAYERS: tl.constexpr,
    ENCODING: tl.constexpr,
    NEAREST: tl.constexpr,
    TARGET_NEAREST: tl.constexpr,
    BORDER: tl.constexpr,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Spread d at a block of points of an instance: planes[pixel] += d * weight of the pixel, for four pixels.

    d is `values` itself, or (grad_ce given) the slope of the losses at the logit in `values`. MEASURE: instead, find
    the largest |d| of each scratch plane, from which follows the scale of its fixed point.
    """
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = i < num_points
    ACC: tl.constexpr = values.dtype.element_ty
    row = index + n * INDEX_COLUMNS
    image = tl.load(row + 1)
    layer = tl.load(row) - first_layer
    plane = image * queries + tl.load(row + 2)
    x, y = point_of(
        n, i, keep, row, windows, image_ids, seed_value, seed_pointer, points, order,
        stride_n, stride_p, stride_c, num_uncertain,
    )  # fmt: skip
    d = tl.load(values + n * num_points + i, mask=keep, other=0.0)
    if grad_ce is not None:
        at = table_row(table, images + image * IMAGE_COLUMNS, tl.load(row + 3))
        t, weight = load_corners(corners, n * num_points + i, at, x, y, keep, ENCODING, TARGET_NEAREST, BORDER, ACC)
        mine = sums + n * blocks * NUM_SUMS
        d = slopes(mine, blocks, tl.load(grad_ce + n), tl.load(grad_dice + n), d, t, weight, ALPHA, GAMMA, ACC)
    if slots is None:
        base = layer_pointer(planes, layer, LAYERS) + plane * height * width
    else:
        slot = tl.load(slots + layer * batch * queries + plane).to(tl.int64)
        base = planes + slot * height * width
    if MEASURE:
        bits = tl.abs(d).to(tl.float32).to(tl.int32, bitcast=True)
        tl.atomic_max(largest + slot, tl.max(tl.where(keep, bits, 0), 0), sem="relaxed")
    else:
        scale = None
        if largest is not None:
            scale = _two_to(headroom - _exponent(tl.load(largest + slot)))
        x, fx = locate(x, width, BORDER, ACC)
        y, fy = locate(y, height, BORDER, ACC)
        if NEAREST:
            y, x = nearest(y, fy, height, BORDER), nearest(x, fx, width, BORDER)
            _add(base, y, x, d, height, width, keep, scale)
        else:
            upper, lower = d * (1.0 - fy), d * fy
            _add(base, y, x, upper * (1.0 - fx), height, width, keep, scale)
            _add(base, y, x + 1, upper * fx, height, width, keep, scale)
            _add(base, y + 1, x, lower * (1.0 - fx), height, width, keep, scale)
            _add(base, y + 1, x + 1, lower * fx, height, width, keep, scale)


@triton.jit(do_not_specialize=["headroom"])
def write_planes(
    planes, slots, largest, grads, num_planes, size, blocks, headroom, LAYERS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write every plane of the gradients once: what was added up for it, or 0. One program: a block of a plane.

    In fixed point a plane with a gradient that is not finite becomes NaN as a whole: an integer cannot say which pixel.
    """
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    i = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + plane).to(tl.int64)
    used = slot != _UNUSED
    total = tl.load(planes + slot * size + i, mask=(i < size) & used, other=0)
    if largest is not None:
        bits = tl.load(largest + slot, mask=used, other=0)
        total = total.to(tl.float64) * _two_to(_exponent(bits) - headroom)
        total = tl.where(bits < 0x7F800000, total, float("nan"))
    layer = plane // num_planes
    out = layer_pointer(grads, layer, LAYERS) + (plane - layer * num_planes) * size + i
    if out.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)
    tl.store(out, total.to(out.dtype.element_ty), mask=i < size)


# -------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class LossGradient:
    """What the gradient of the loss at the points depends on, for the instances of a span."""

    chosen: Tensor
    corners: Tensor
    grad_ce: Tensor
    grad_dice: Tensor
    table: Tensor
    images: Tensor
    encoding: int
    target_nearest: bool
    alpha: float
    gamma: float


def plane_bytes(layer: Tensor) -> int:
    """Scratch memory of an instance in the backward pass: a plane, if the gradient is not added up in place."""
    if torch.are_deterministic_algorithms_enabled():
        return layer.shape[2] * layer.shape[3] * 8
    return layer.shape[2] * layer.shape[3] * 4 if layer.dtype.itemsize == 2 else 0


@dataclass(frozen=True)
class Scatter:
    """Spread gradients at points over the layers of a span."""

    index: Tensor
    span: Span
    sampling: Sampling
    values: Tensor
    nearest: bool
    loss: LossGradient | None

    def gradients(self) -> list[Tensor]:
        """Dense gradients of the layers."""
        layers = self.span.layers
        if self.span.count == 0 or self.values.numel() == 0 or layers[0].numel() == 0:
            return [torch.zeros(layer.shape, dtype=layer.dtype, device=layer.device) for layer in layers]
        order, sums = (None, None) if self.loss is None else self._slopes(self.loss)
        fixed = torch.are_deterministic_algorithms_enabled()
        if not fixed and layers[0].dtype == self.values.dtype:
            grads = [torch.zeros(layer.shape, dtype=layer.dtype, device=layer.device) for layer in layers]
            self._launch(tuple(grads), None, None, order, sums, measure=False)
            return grads
        return self._through_planes(order, sums, fixed)

    def _rows(self) -> Tensor:
        return self.index[self.span.rows]

    def _slopes(self, loss: LossGradient) -> tuple[Tensor | None, Tensor]:
        """Read the logits at the points again, into `values`, and add up what the slope of Dice needs."""
        span, sampling = self.span, self.sampling
        order = list_chosen(span, sampling, loss.chosen)
        blocks = cdiv(sampling.num_points, BLOCK)
        sums = empty((span.count, blocks, NUM_SUMS.value), self.values.dtype, self.values.device)
        slope_terms[(span.count * blocks,)](
            span.layers, span.first, self._rows(), loss.table, loss.images, sampling.windows, sampling.image_ids,
            *sampling.seed, sampling.given(span), order, loss.corners[span.rows], self.values, sums,
            sampling.num_points, sampling.num_uncertain, blocks, *geometry(span.layers[0]), *sampling.strides,
            LAYERS=len(span.layers), ENCODING=loss.encoding, NEAREST=loss.target_nearest,
            BORDER=sampling.border, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
        return order, sums

    def _launch(
        self,
        planes: Tensor | tuple[Tensor, ...],
        slots: Tensor | None,
        largest: Tensor | None,
        order: Tensor | None,
        sums: Tensor | None,
        measure: bool,
    ) -> None:
        span, sampling, loss = self.span, self.sampling, self.loss
        blocks = cdiv(sampling.num_points, BLOCK)
        rows = span.rows
        saved: tuple[Tensor | None, ...] = (None, self.values, sums, None, None)
        tables: tuple[Tensor | None, ...] = (None, None)
        encoding, target_nearest, alpha, gamma = 0, False, -1.0, -1.0
        if loss is not None:
            saved = (loss.corners[rows], self.values, sums, loss.grad_ce[rows], loss.grad_dice[rows])
            tables = (loss.table, loss.images)
            encoding, target_nearest, alpha, gamma = loss.encoding, loss.target_nearest, loss.alpha, loss.gamma
        batch, queries, height, width = span.layers[0].shape
        scatter[(span.count * blocks,)](
            planes, span.first, slots, largest, self._rows(), *tables, sampling.windows, sampling.image_ids,
            *sampling.seed, sampling.given(span), order, *saved, sampling.num_points, sampling.num_uncertain, blocks,
            height, width, batch, queries, *sampling.strides, self._headroom(),
            LAYERS=len(span.layers), ENCODING=encoding, NEAREST=self.nearest, TARGET_NEAREST=target_nearest,
            BORDER=sampling.border, ALPHA=alpha, GAMMA=gamma, MEASURE=measure, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip

    def _headroom(self) -> int:
        """Bits of a fixed-point number below the sign that hold one addend, if all points fall on one pixel."""
        return 62 - (self.span.count * self.sampling.num_points).bit_length()

    def _through_planes(self, order: Tensor | None, sums: Tensor | None, fixed: bool) -> list[Tensor]:
        """Add up in scratch planes, one for each plane that an instance reads, and write the gradients from those."""
        span, device = self.span, self.values.device
        batch, queries, height, width = span.layers[0].shape
        num_planes, count = batch * queries, span.count
        everywhere = len(span.layers) * num_planes
        if count < everywhere:
            slots = torch.full((everywhere,), UNUSED, dtype=torch.int32, device=device)
            claim_slots[(cdiv(count, 128),)](
                self._rows(), slots, span.first, count, batch, queries, BLOCK=128, **OPTIONS
            )
        else:
            slots = torch.arange(everywhere, dtype=torch.int32, device=device)
        used = min(count, everywhere)
        planes = torch.zeros(used, height, width, dtype=torch.int64 if fixed else self.values.dtype, device=device)
        largest = None
        if fixed:
            largest = torch.zeros(used, dtype=torch.int32, device=device)
            self._launch(planes, slots, largest, order, sums, measure=True)
        self._launch(planes, slots, largest, order, sums, measure=False)
        grads = [empty(layer.shape, layer.dtype, device) for layer in span.layers]
        size = height * width
        blocks = cdiv(size, 1024)
        write_planes[(everywhere * blocks,)](
            planes, slots, largest, tuple(grads), num_planes, size, blocks, self._headroom(),
            LAYERS=len(span.layers), BLOCK=1024, **OPTIONS,
        )  # fmt: skip
        return grads
