"""Triton kernels that spread gradients at points over the pixels they were read from.

Three destinations. float32 and float64 gradients are zeroed and added to in place. Half precision adds up in float32
planes, one for each plane that is matched, which are then written to the gradient in its dtype. Deterministic mode does
the same with int64 planes in fixed point, because integer additions give the same sum in any order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskloss._abi import (
    ENCODINGS,
    Gradients,
    Saved,
    Targets,
    Term,
    accumulation_dtype,
)

from .choose import list_chosen
from .generator import point_of
from .launch import BLOCK, OPTIONS, Sampling, Span, cdiv, empty, focal_options, geometry, layer_spans, slices
from .loss_kernels import NUM_SUMS, slope_terms, slopes
from .sampling import (
    IMAGE,
    INDEX_COLUMNS,
    LAYER,
    QUERY,
    kept_targets,
    layer_pointer,
    locate,
    locate_slice,
    nearest,
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


@triton.jit
def _spread(
    base, px, py, share, height, width, keep, scale, NEAREST: tl.constexpr, BORDER: tl.constexpr, ACC: tl.constexpr
):
    """Add shares to the pixel nearest to each point, or to the four around it."""
    x, fx = locate(px, width, BORDER, ACC)
    y, fy = locate(py, height, BORDER, ACC)
    if NEAREST:
        y, x = nearest(y, fy, height, BORDER), nearest(x, fx, width, BORDER)
        _add(base, y, x, share, height, width, keep, scale)
    else:
        upper, lower = share * (1.0 - fy), share * fy
        _add(base, y, x, upper * (1.0 - fx), height, width, keep, scale)
        _add(base, y, x + 1, upper * fx, height, width, keep, scale)
        _add(base, y + 1, x, lower * (1.0 - fx), height, width, keep, scale)
        _add(base, y + 1, x + 1, lower * fx, height, width, keep, scale)


@triton.jit(do_not_specialize=["count", "first_layer"])
def claim_slots(index, slots, first_layer, count, batch, queries, BLOCK: tl.constexpr):
    """slots[plane] = the lowest instance that reads the plane: its place in the scratch planes."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = n < count
    row = index + n.to(tl.int64) * INDEX_COLUMNS
    layer = tl.load(row + LAYER, mask=keep, other=0) - first_layer
    image, query = tl.load(row + IMAGE, mask=keep, other=0), tl.load(row + QUERY, mask=keep, other=0)
    tl.atomic_min(slots + (layer * batch + image) * queries + query, n, mask=keep, sem="relaxed")


@triton.jit(do_not_specialize=["first_layer", "seed_value", "headroom"])
def scatter(
    planes, first_layer, slots, largest, index, windows, image_ids, seed_value, seed_pointer, strata, frames, points,
    order, values, wanted, sums, grad_ce, grad_dice, num_points, num_uncertain, blocks,
    depth, height, width, batch, queries, stride_n, stride_p, stride_c, headroom,
    LAYERS: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr, LINEAR: tl.constexpr, ALPHA: tl.constexpr,
    GAMMA: tl.constexpr, DICE: tl.constexpr, MEASURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Spread d at a block of points of an instance: planes[pixel] += d * weight of the pixel, for four pixels.

    Of a stack of planes, that has a depth, for those of a slice, or of two if LINEAR.

    d is `values` itself, or (grad_ce given) the slope of the losses at the logits in `values` and the targets in
    `wanted`. MEASURE: instead, find the largest |d| of each scratch plane, from which follows the scale of its fixed
    point.
    """
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = i < num_points
    ACC: tl.constexpr = values.dtype.element_ty
    row = index + n * INDEX_COLUMNS
    image = tl.load(row + IMAGE)
    layer = tl.load(row + LAYER) - first_layer
    plane = image * queries + tl.load(row + QUERY)
    x, y, z = point_of(
        n, i, keep, row, windows, image_ids, seed_value, seed_pointer, strata, frames, points, order,
        stride_n, stride_p, stride_c, num_uncertain,
    )  # fmt: skip
    d = tl.load(values + n * num_points + i, mask=keep, other=0.0)
    if grad_ce is not None:
        t, weight = kept_targets(wanted, n * num_points + i, keep, ACC)
        mine = sums + n * blocks * NUM_SUMS
        d = slopes(mine, blocks, tl.load(grad_ce + n), tl.load(grad_dice + n), d, t, weight, ALPHA, GAMMA, DICE, ACC)
    if slots is None:
        base, first = layer_pointer(planes, layer, LAYERS), plane
    else:
        slot = tl.load(slots + layer * batch * queries + plane).to(tl.int64)
        base, first = planes, slot
    if depth is not None:
        first *= depth
    base += first * height * width
    if MEASURE:
        bits = tl.abs(d).to(tl.float32).to(tl.int32, bitcast=True)
        tl.atomic_max(largest + slot, tl.max(tl.where(keep, bits, 0), 0), sem="relaxed")
    else:
        scale = None
        if largest is not None:
            scale = _two_to(headroom - _exponent(tl.load(largest + slot)))
        if depth is None:
            _spread(base, x, y, d, height, width, keep, scale, NEAREST, BORDER, ACC)
        else:
            k, fz = locate_slice(z, depth, BORDER, LINEAR, ACC)
            front = base + k.to(tl.int64) * (height * width)
            inside = keep & (k >= 0) & (k < depth)
            _spread(front, x, y, d * (1.0 - fz), height, width, inside, scale, NEAREST, BORDER, ACC)
            if LINEAR:
                back, inside = front + height * width, keep & (k >= -1) & (k < depth - 1)
                _spread(back, x, y, d * fz, height, width, inside, scale, NEAREST, BORDER, ACC)


@triton.jit(do_not_specialize=["low", "headroom"])
def write_planes(
    planes, slots, largest, grads, low, num_planes, size, blocks, headroom, LAYERS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write every plane of the layers from `low` on once: what was added up for it, or 0. One program: a block of one.

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
    out = layer_pointer(grads, layer + low, LAYERS) + (plane - layer * num_planes) * size + i
    if out.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)
    tl.store(out, total.to(out.dtype.element_ty), mask=i < size)


# -------------------------------------------------------------------------------------------------------- launches


class LossGradient(NamedTuple):
    """What the gradient of the loss at the points depends on."""

    grads: Gradients
    saved: Saved
    targets: Targets
    term: Term

    @property
    def has_logits(self) -> bool:
        """Whether the logits were kept: instances have planes of their own then, numbered by QUERY."""
        return self.saved.logits.shape[1] > 0


class AtPoints(NamedTuple):
    """What is known of the points of a span: the chosen candidates, gradients or logits, targets, sums of the loss."""

    order: Tensor | None
    values: Tensor
    wanted: Tensor | None
    sums: Tensor | None


class Scratch(NamedTuple):
    """Scratch planes: the place of each plane of the layers, and the largest addend of each if in fixed point."""

    slots: Tensor | None
    largest: Tensor | None


NO_SCRATCH = Scratch(None, None)


@dataclass(frozen=True)
class Scatter:
    """Spread gradients at points over the layers of a run."""

    index: Tensor  # rows of all instances
    layer_sizes: Sequence[int]  # the number of rows of each layer of the model
    run: Span  # the layers, and their rows
    sampling: Sampling  # where the points are
    nearest: bool  # whether maps are read at the nearest pixel
    source: Tensor | LossGradient  # the gradients at the points, `[N, P]`, or the loss that they follow from

    def gradients(self) -> list[Tensor]:
        """Dense gradients of the layers."""
        first = self.run.layers[0]
        if self.run.count == 0 or self.sampling.num_points == 0 or first.numel() == 0:
            return self._zeros()
        if torch.are_deterministic_algorithms_enabled():
            return self._through_planes(torch.int64)
        dtype = accumulation_dtype(first.dtype)
        return self._in_place() if first.dtype == dtype else self._through_planes(dtype)

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros(layer.shape, dtype=layer.dtype, device=layer.device) for layer in self.run.layers]

    def _row_bytes(self) -> int:
        """Scratch memory of an instance, apart from planes."""
        size = accumulation_dtype(self.run.layers[0].dtype).itemsize
        if isinstance(self.source, Tensor):
            return 0
        return 2 * self.sampling.num_points * size + self.sampling.num_uncertain * 4

    def _in_place(self) -> list[Tensor]:
        grads = self._zeros()
        for span in self.run.parts(self._row_bytes()):
            self._launch(span, self._at_points(span), tuple(grads))
        return grads

    def _through_planes(self, dtype: torch.dtype) -> list[Tensor]:
        """Add up in scratch planes, one for each plane that an instance reads, and write the gradients from those."""
        first, device = self.run.layers[0], self.index.device
        batch, queries = first.shape[:2]
        plane_bytes = math.prod(first.shape[2:]) * dtype.itemsize
        grads = tuple(empty(layer.shape, layer.dtype, device) for layer in self.run.layers)
        for span in layer_spans(self.run, self.layer_sizes, plane_bytes + self._row_bytes()):
            slots, used = self._slots(span)
            planes = torch.zeros(used, *first.shape[2:], dtype=dtype, device=device)
            scratch = Scratch(slots, None)
            if span.count:
                points = self._at_points(span)
                if dtype == torch.int64:
                    scratch = Scratch(slots, torch.zeros(used, dtype=torch.int32, device=device))
                    self._launch(span, points, planes, scratch, measure=True)
                self._launch(span, points, planes, scratch)
            self._write(span, planes, slots, scratch.largest, grads, batch * queries)
        return list(grads)

    def _write(
        self,
        span: Span,
        planes: Tensor,
        slots: Tensor,
        largest: Tensor | None,
        grads: tuple[Tensor, ...],
        num_planes: int,
    ) -> None:
        """Write the gradients of the layers, `num_planes` each, from scratch planes."""
        size = math.prod(planes.shape[1:])
        blocks = cdiv(size, 1024)
        write_planes[(len(slots) * blocks,)](
            planes, slots, largest, grads, span.low, num_planes, size, blocks, self._headroom(span),
            LAYERS=len(grads), BLOCK=1024, **OPTIONS,
        )  # fmt: skip

    def overwrite(self, planes: Tensor) -> None:
        """Write the gradients over planes `[n, h, w]`; the n instances have one each, numbered by QUERY."""
        dtype = accumulation_dtype(planes.dtype)
        if torch.are_deterministic_algorithms_enabled():
            dtype = torch.int64
        if planes.dtype == dtype:
            planes.zero_()
            for span in self.run.parts(self._row_bytes()):
                self._launch(span, self._at_points(span), (planes,))
            return
        size, device = planes.shape[1] * planes.shape[2], planes.device
        numbers = torch.arange(len(planes), dtype=torch.int32, device=device)
        for span in self.run.parts(size * dtype.itemsize + self._row_bytes()):
            sums = torch.zeros(span.count, *planes.shape[1:], dtype=dtype, device=device)
            scratch, points = Scratch(numbers - span.start, None), self._at_points(span)
            if dtype == torch.int64:
                scratch = scratch._replace(largest=torch.zeros(span.count, dtype=torch.int32, device=device))
                self._launch(span, points, sums, scratch, measure=True)
            self._launch(span, points, sums, scratch)
            written = (planes[span.rows],)
            self._write(span, sums, numbers[: span.count], scratch.largest, written, span.count)

    def _slots(self, span: Span) -> tuple[Tensor, int]:
        """The place of each plane of the span's layers in the scratch planes, int32, and the number of places."""
        batch, queries = span.layers[0].shape[:2]
        everywhere = (span.high - span.low) * batch * queries
        if span.count >= everywhere:
            return torch.arange(everywhere, dtype=torch.int32, device=self.index.device), everywhere
        slots = torch.full((everywhere,), UNUSED, dtype=torch.int32, device=self.index.device)
        if span.count:
            claim_slots[(cdiv(span.count, 128),)](
                self.index[span.rows], slots, span.first + span.low, span.count, batch, queries, BLOCK=128, **OPTIONS
            )
        return slots, span.count

    def _at_points(self, span: Span) -> AtPoints:
        """Read logits and targets at the points again, if they were not kept; add up what the slope of Dice needs."""
        loss, sampling = self.source, self.sampling
        if isinstance(loss, Tensor):
            return AtPoints(None, loss[span.rows], None, None)
        order = list_chosen(span, sampling, loss.saved.chosen)
        blocks, shape = cdiv(sampling.num_points, BLOCK), (span.count, sampling.num_points)
        dtype, device = accumulation_dtype(span.layers[0].dtype), self.index.device
        encoding, data, table, images, _, ignore = loss.targets
        has_logits, has_targets = loss.has_logits, encoding == "values"
        values = loss.saved.logits[span.rows] if has_logits else empty(shape, dtype, device)
        wanted = loss.saved.soft[span.rows] if has_targets else empty(shape, dtype, device)
        sums = empty((span.count, blocks, NUM_SUMS.value), dtype, device)
        # Reading labels takes more registers than reading bits.
        options = focal_options(-1.0, bounded=encoding == "labels")
        slope_terms[(span.count * blocks,)](
            None if has_logits else span.layers, span.first, self.index[span.rows], None if has_targets else data,
            table, images, ignore if ignore.numel() else None, *sampling.source, sampling.given(span), order,
            values, wanted, sums, sampling.num_points, sampling.num_uncertain, blocks,
            *geometry(span.layers[0]), *slices(span.layers[0]), *sampling.strides,
            LAYERS=len(span.layers), ENCODING=ENCODINGS[encoding], NEAREST=loss.term.nearest,
            BORDER=sampling.border, LINEAR=sampling.linear, DICE=loss.term.dice_kind, BLOCK=BLOCK, **options,
        )  # fmt: skip
        return AtPoints(order, values, wanted, sums)

    def _launch(
        self,
        span: Span,
        points: AtPoints,
        planes: Tensor | tuple[Tensor, ...],
        scratch: Scratch = NO_SCRATCH,
        measure: bool = False,
    ) -> None:
        sampling, loss, rows = self.sampling, self.source, span.rows
        blocks = cdiv(sampling.num_points, BLOCK)
        grads: tuple[Tensor | None, ...] = (None, None)
        term = Term()
        if isinstance(loss, LossGradient):
            grads, term = tuple(grad[rows] for grad in loss.grads), loss.term
        batch, queries = span.layers[0].shape[:2]
        depth, _ = slices(span.layers[0])
        height, width = span.layers[0].shape[-2:]
        if isinstance(loss, LossGradient) and loss.has_logits:
            batch = queries = 0  # QUERY alone numbers the planes
        # Scratch planes are numbered from the first layer of the span, gradients from that of the run.
        first, layers = (span.first, len(span.layers)) if scratch.slots is None else (span.first + span.low, 1)
        scatter[(span.count * blocks,)](
            planes, first, *scratch, self.index[rows], *sampling.source, sampling.given(span), *points, *grads,
            sampling.num_points, sampling.num_uncertain, blocks,
            depth, height, width, batch, queries, *sampling.strides, self._headroom(span), LAYERS=layers,
            NEAREST=self.nearest, BORDER=sampling.border, LINEAR=sampling.linear, ALPHA=term.alpha, GAMMA=term.gamma,
            DICE=term.dice_kind, MEASURE=measure, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip

    def _headroom(self, span: Span) -> int:
        """Bits of a fixed-point number below the sign that hold one addend, if all points fall on one pixel."""
        return 62 - (span.count * self.sampling.num_points).bit_length()
