"""How the work of an operation is cut into launches: layers of one geometry together, scratch memory bounded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from maskloss._abi import Draw, Job, Stack, is_border, is_stratified
from maskloss.points import Boxes, Strata

# Scratch memory of an operation: logits of candidates, or the planes in which half precision adds up its gradients.
SCRATCH_BYTES = 256 * 2**20
# Points or candidates of one program.
BLOCK = 512
# Pointers that one launch takes; a model with more decoder layers takes two launches.
MAX_LAYERS = 16
# The definition rounds after each multiplication and each addition, so no kernel may fuse them. The integers of the
# random numbers wrap, which Triton would report in its debug mode.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "sanitize_overflow": False, "num_warps": 4}


@dataclass(frozen=True)
class Span:
    """One launch: rows of the index that belong to a run of consecutive layers of one geometry.

    Kernels get all layers of the run, however few of them the rows belong to: their number is compiled in.
    """

    layers: tuple[Tensor, ...]  # the logits of the run
    first: int  # number of the first of them
    start: int  # first row
    stop: int  # row after the last one
    low: int  # the first layer of the run that the rows belong to
    high: int  # the layer after the last one

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """The rows, to slice with."""
        return slice(self.start, self.stop)

    def parts(self, row_bytes: int) -> list[Span]:
        """Cut the rows such that `row_bytes` of scratch memory for each stay within SCRATCH_BYTES."""
        rows = max(1, SCRATCH_BYTES // max(row_bytes, 1))
        starts = range(self.start, self.stop, rows)
        return [replace(self, start=start, stop=min(start + rows, self.stop)) for start in starts]


def geometry(layer: Tensor) -> tuple[int, ...]:
    """Height, width, and the four strides of logits `[B, Q, h, w]` or `[B, Q, d, h, w]`, as all kernels take them."""
    return (*layer.shape[-2:], *layer.stride()[:2], *layer.stride()[-2:])


def slices(layer: Tensor) -> tuple[int | None, int | None]:
    """Number and stride of the slices of logits `[B, Q, d, h, w]`; None of planes."""
    return (layer.shape[2], layer.stride(2)) if layer.ndim == 5 else (None, None)


def runs(logits: Sequence[Tensor], layer_sizes: Sequence[int], needed: Sequence[bool]) -> list[Span]:
    """Join consecutive layers of one geometry."""
    found: list[Span] = []
    row = 0
    for number, (layer, size, need) in enumerate(zip(logits, layer_sizes, needed, strict=True)):
        if need:
            last = found[-1] if found else None
            if last is not None and _continues(last, number, layer):
                found[-1] = replace(last, layers=(*last.layers, layer), stop=row + size, high=last.high + 1)
            else:
                found.append(Span((layer,), number, row, row + size, 0, 1))
        row += size
    return found


def _continues(run: Span, number: int, layer: Tensor) -> bool:
    follows = run.first + len(run.layers) == number and len(run.layers) < MAX_LAYERS
    return follows and (run.layers[0].shape, run.layers[0].stride()) == (layer.shape, layer.stride())


def spans(logits: Sequence[Tensor], layer_sizes: Sequence[int], row_bytes: int) -> list[Span]:
    """Cut the rows into launches whose scratch memory, `row_bytes` each, stays within SCRATCH_BYTES."""
    return [part for run in runs(logits, layer_sizes, [True] * len(logits)) for part in run.parts(row_bytes)]


def layer_spans(run: Span, layer_sizes: Sequence[int], row_bytes: int) -> list[Span]:
    """Cut a run into launches in the same way, but at layers only: a layer is not cut, however large it is."""
    found: list[Span] = []
    start = run.start
    for layer in range(run.low, run.high):
        stop = start + layer_sizes[run.first + layer]
        last = found[-1] if found else None
        if last is not None and (stop - last.start) * row_bytes <= SCRATCH_BYTES:
            found[-1] = replace(last, stop=stop, high=layer + 1)
        else:
            found.append(replace(run, start=start, stop=stop, low=layer, high=layer + 1))
        start = stop
    return found


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device current: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def is_simple(gamma: float) -> bool:
    """Whether the focal factor is a product, or there is none; another power takes an exponential and a logarithm."""
    return gamma <= 0 or gamma in (1.0, 2.0)


def focal_options(gamma: float, *, bounded: bool = False) -> dict[str, Any]:
    """Launch options of a kernel that computes losses; `bounded` for a variant that would spill with any gamma.

    NVIDIA's assembler likes to spill a few bytes for more threads at a time; a bound on registers keeps it from that.
    """
    simple = is_simple(gamma) and not bounded
    return OPTIONS if simple or torch.version.hip else {**OPTIONS, "maxnreg": 255}


def cdiv(a: int, b: int) -> int:
    """Divide, rounding up."""
    return -(-a // b)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate what a kernel fills."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def float_points(points: Tensor) -> Tensor:
    """Read points in float32 or float64."""
    return points if points.dtype in (torch.float32, torch.float64) else points.float()


# ----------------------------------------------------------------------------------------------- where points come from


@dataclass(frozen=True)
class Sampling:
    """What the points of instances depend on, apart from the logits."""

    points: Tensor | None
    windows: Tensor
    image_ids: Tensor
    seed: tuple[int, Tensor | None]
    num_points: int
    num_candidates: int
    num_uncertain: int
    border: bool
    strata: tuple[int, ...] | None = None
    stack: Stack | None = None

    @property
    def source(self) -> tuple[Any, ...]:
        """What drawn points follow from, as all kernels take it: windows, image numbers, seed, cells, slices."""
        return (self.windows, self.image_ids, *self.seed, self.strata, self.stack.frames if self.stack else None)

    @property
    def linear(self) -> bool:
        """Whether a point is read between two slices."""
        return self.stack is not None and self.stack.linear

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the points that were given."""
        return (0, 0, 0) if self.points is None else self.points.stride()

    def given(self, span: Span) -> Tensor | None:
        """Points of the instances of a span."""
        return None if self.points is None else self.points[span.rows]


def split_seed(seed: Tensor) -> tuple[int, Tensor | None]:
    """A seed on the host becomes a number; one on the device is read there, where a captured graph can vary it."""
    return (int(seed), None) if seed.device.type == "cpu" else (0, seed)


def make_sampling(
    drawn: Draw, windows: Tensor, padding: str, points: Tensor | None = None, stack: Stack | None = None
) -> Sampling:
    """Gather what points depend on (see `Job.drawn`)."""
    ids, seed, num_points, candidates, uncertain, layout = drawn
    given = None if points is None else float_points(points)
    strata = None if given is not None else strata_of(layout, stack, candidates, num_points - uncertain)
    numbers = (num_points, candidates, uncertain)
    return Sampling(given, windows, ids, split_seed(seed), *numbers, is_border(padding), strata, stack)


def sampling_of(job: Job, stack: Stack | None = None) -> Sampling:
    """Gather what the points of the loss depend on."""
    return make_sampling(job.drawn, job.targets.windows, job.term.padding, job.points, stack)


def strata_of(layout: str, stack: Stack | None, *counts: int) -> tuple[int, ...] | None:
    """Return the numbers of `Strata`, or of `Boxes`, for one draw after another; None: points are independent."""
    if not is_stratified(layout):
        return None
    kind = Strata if stack is None else Boxes
    return tuple(number for count in counts for number in kind.of(count))
