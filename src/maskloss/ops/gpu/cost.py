"""The matching cost on CUDA and ROCm tensors: what all queries of an image share, and the launches of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskloss._abi import ENCODINGS, POINT_COLUMNS, SEMIMETRIC, SOFT, Job, Stack, Term, accumulation_dtype

from .cost_kernels import finish_costs, match_cells, match_points, match_targets, match_terms
from .launch import (
    BLOCK,
    OPTIONS,
    Span,
    cdiv,
    empty,
    focal_options,
    geometry,
    is_simple,
    on_device,
    runs,
    slices,
    split_seed,
    strata_of,
)

# Programs that keep a large GPU busy.
_PROGRAMS = 1024


class Tile(NamedTuple):
    """What one step of one program of `match_terms` holds."""

    queries: int
    targets: int
    points: int
    warps: int

    def splits(self, images: int, queries: int, targets: int, num_points: int) -> int:
        """Number of splits over points, enough to fill a large GPU."""
        programs = images * cdiv(queries, self.queries) * cdiv(targets, self.targets)
        return max(1, min(cdiv(_PROGRAMS, programs), num_points // (8 * self.points)))


def tile_of(targets: int, dtype: torch.dtype, term: Term) -> Tile:
    """Choose a tile by number of targets, such that no option needs more registers than there are."""
    if term.dice_kind == SEMIMETRIC:
        return Tile(16, 16, 16, 4)
    if dtype == torch.float64:
        return Tile(16, 32, 16, 8)
    wide = min(max(16, 1 << (targets - 1).bit_length()), 128)
    if wide == 128:
        return Tile(16, wide, 32, 8)
    if is_simple(term.gamma):
        return Tile(16, wide, 16, 4)
    return Tile(16, wide, 32, 4 if wide <= 32 else 8)


class Plan(NamedTuple):
    """What all queries and layers of an image share."""

    points: Tensor  # `[B, P, 2]`
    order: Tensor  # `[B, P]`, which sorts the points
    weighted: Tensor  # `[B, T_max, P]`, the targets at the sorted points times the weights
    weights: Tensor  # `[B, P]`, 0 or 1
    images: Tensor  # `MaskTargets.images`
    border: bool  # whether maps are continued at their border
    depths: Tensor | None = None  # `[B, P]`, the third coordinate of points in a stack
    linear: bool = False  # whether a point is read between two slices of a stack

    @property
    def widest(self) -> int:
        """The largest number of targets."""
        return self.weighted.shape[1]

    @property
    def num_points(self) -> int:
        """P."""
        return self.weights.shape[1]


def _prepare(job: Job, widest: int, dtype: torch.dtype, stack: Stack | None) -> Plan:
    """Draw and sort the points of each image, and read its targets there."""
    (encoding, data, table, images, windows, ignore), draw, term, _ = job
    num_points = draw.num_points
    batch, device, blocks = len(images), images.device, cdiv(num_points, BLOCK)
    points = empty((batch, num_points, POINT_COLUMNS), torch.float32, device)
    keys = empty((batch, num_points), torch.int32, device)
    depths = empty((batch, num_points), torch.float32, device) if stack else None
    strata, frames = strata_of(draw.layout, stack, num_points), stack.frames if stack else None
    linear = stack is not None and stack.linear
    match_points[(batch * blocks,)](
        windows, draw.image_ids, *split_seed(draw.seed), strata, frames, points, depths, keys, num_points, blocks,
        BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    if strata is None:
        order = keys.sort(dim=1, stable=True).indices
    else:
        # Cells come row by row already.
        order = torch.arange(num_points, device=device).repeat(batch, 1)
    weighted = empty((batch, widest, num_points), dtype, device)
    weights = empty((batch, num_points), dtype, device)
    match_targets[(batch * widest * blocks,)](
        points, depths, order, frames, data, table, images, ignore if ignore.numel() else None, weighted, weights,
        num_points, blocks, widest,
        ENCODING=ENCODINGS[encoding], NEAREST=term.nearest, BORDER=term.border, LINEAR=linear, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    return Plan(points, order, weighted, weights, images, term.border, depths, linear)


def cells_of(shared: Plan, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Find the sorted points in maps: pixels y, x and fractions, `[2, B * P]` each; in stacks a slice, `[3, B * P]`."""
    batch, num_points = shared.weights.shape
    shape = (maps.ndim - 2, batch * num_points)
    cells = empty(shape, torch.int32, shared.points.device)
    fractions = empty(shape, shared.weights.dtype, shared.points.device)
    blocks = cdiv(num_points, BLOCK)
    match_cells[(batch * blocks,)](
        shared.points, shared.depths, shared.order, cells, fractions, batch * num_points, num_points, blocks,
        *maps.shape[-2:], slices(maps)[0], BORDER=shared.border, LINEAR=shared.linear, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    return cells, fractions


def _precision(dtype: torch.dtype) -> str:
    """How to multiply matrices without losing digits: AMD's units as it is, NVIDIA's in three steps of tf32.

    float64 on NVIDIA adds products up: few of its devices have units for that, and older compilers do not know them.
    """
    if torch.version.hip:
        return "ieee"
    return "sum" if dtype == torch.float64 else "tf32x3"


def add_terms(
    span: Span,
    shared: Plan,
    parts: Sequence[Tensor],
    num_rows: int,
    tile: Tile,
    term: Term,
    sampled: bool,
) -> None:
    """Sums of all pairs of the layers of a span; `sampled` layers hold the logits at the points, `[B, Q, 1, P]`."""
    first, widest = span.layers[0], shared.widest
    batch, queries = first.shape[:2]
    cells, fractions = (None, None) if sampled else cells_of(shared, first)
    splits, num_points = parts[0].shape[0], shared.num_points
    per_split = cdiv(cdiv(num_points, splits), tile.points) * tile.points
    programs = len(span.layers) * batch * cdiv(queries, tile.queries) * splits * cdiv(widest, tile.targets)
    bounded = (sampled and tile.targets > 32) or term.dice_kind == SEMIMETRIC
    options = {**focal_options(term.gamma, bounded=bounded), "num_warps": tile.warps}
    match_terms[(programs,)](
        span.layers, span.first, cells, fractions, shared.weighted, shared.weights, *parts, shared.order.numel(),
        num_points, splits, per_split, batch, queries, widest, num_rows, *geometry(first), *slices(first),
        LAYERS=len(span.layers), LINEAR=shared.linear, ALPHA=term.alpha, GAMMA=term.gamma, DICE=term.dice_kind,
        PRECISION=_precision(shared.weights.dtype),
        QUERIES=tile.queries, TARGETS=tile.targets, POINTS=tile.points, **options,
    )  # fmt: skip


def costs(shared: Plan, layers: Sequence[Tensor], term: Term, *, sampled: bool) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost of all pairs, `[L, B, Q, T_max]`; see `add_terms`."""
    batch, queries = layers[0].shape[:2]
    device, dtype, widest = layers[0].device, shared.weights.dtype, shared.widest
    num_rows = len(layers) * batch * queries
    ce, dice = (empty((len(layers), batch, queries, widest), dtype, device) for _ in range(2))
    tile = tile_of(widest, dtype, term)
    splits = tile.splits(len(layers) * batch, queries, widest, shared.num_points)
    parts = [empty((splits, num_rows * size), dtype, device) for size in (widest, widest, 1, 1)]
    for run in runs(layers, [0] * len(layers), [True] * len(layers)):
        add_terms(run, shared, parts, num_rows, tile, term, sampled)
    wanted = shared.weighted.square() if term.dice_kind == SOFT else shared.weighted
    finish_costs[(cdiv(ce.numel(), BLOCK),)](
        *parts, wanted.sum(2), shared.weights.sum(1), shared.images, ce, dice, ce.numel(), splits,
        num_rows, batch, queries, widest, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    return ce, dice


def match_plan(num_targets: Sequence[int], job: Job, maps: Sequence[Tensor], stack: Stack | None = None) -> Plan:
    """Draw and sort the points of each image, and read its targets there; `maps` `[B, _, h, w]` are to be sampled."""
    with on_device(maps[0]):
        return _prepare(job, max(num_targets, default=0), accumulation_dtype(maps[0].dtype), stack)


def join_frames(plan: Plan) -> Plan:
    """Put the points of all images side by side: those of one image, with the targets that each of them has.

    Their places are not kept: logits are sampled with the plan of the images.
    """
    weighted = plan.weighted.transpose(0, 1).reshape(1, plan.widest, -1)
    return plan._replace(weighted=weighted, weights=plan.weights.view(1, -1), images=plan.images[:1])


def match_cost(
    logits: Sequence[Tensor], num_targets: Sequence[int], job: Job, stack: Stack | None = None
) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost of all pairs of all images and layers, `[L, B, Q, T_max]`."""
    shape = (len(logits), *logits[0].shape[:2], max(num_targets, default=0))
    if 0 in shape:
        none = empty(shape, accumulation_dtype(logits[0].dtype), logits[0].device)
        return none, torch.empty_like(none)
    plan = match_plan(num_targets, job, logits, stack)
    with on_device(logits[0]):
        return costs(plan, logits, job.term, sampled=False)


def row_costs(plan: Plan, logits: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost, `[B, R, T_max]`, from logits `[B, R, P]` at the points of a plan."""
    with on_device(logits):
        ce, dice = costs(plan, [logits[:, :, None]], term, sampled=True)
    return ce[0], dice[0]
