"""The matching cost on CPU tensors: what all queries of an image share, and the costs of dense or factored planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from maskloss._abi import POINT_COLUMNS, Job, Term

from . import cost_kernels as kernels
from . import plane_points
from .arguments import Array, absolute, array_of, check_sizes, dtypes_of, encode, float_of, plane_table, strata_of
from .choose import GROUP
from .planes import BORDER
from .scratch import Dtypes
from .threads import launch

# How many pixels of masks can be looked at while a point is drawn and sorted, or looked at for a target (see `launch`).
_PER_DRAWN, _PER_VISITED = 128, 8


class Plan(NamedTuple):
    """What all queries and layers of an image share."""

    points: Array  # `[B, 2, P]`, sorted into bands of y and within a band by x
    bands: NDArray[np.int64]  # `[B, bands + 1]`, the first point of each band
    weights: Array  # `[B, P]`, 0 or 1
    counts: Array  # `[B]`, their sums, at least 1
    images: Array  # `MaskTargets.images`
    # each target as runs of sorted points. Those of target t are `starts[t]` to `starts[t + 1]`: their first
    # points, lengths and offsets into the values, the values, and the sum of each target's values.
    runs: tuple[Array, ...]
    dtypes: Dtypes  # element types of a kernel's work space
    widest: int  # the largest number of targets


class Places(NamedTuple):
    """Where the points of a plan lie in maps of some sizes (see `plane_points.place_points`).

    The rows of bands and the points' places in a buffer of one, fractions, pixels of points inside, numbers and places
    of points at the edge and how many these are, and the size of the buffer.
    """

    rows: Array
    place: Array
    fx: Array
    fy: Array
    inside: Array
    edges: Array
    num_edges: Array
    size: int


def match_plan(num_targets: Sequence[int], job: Job, maps: Sequence[Tensor]) -> Plan:
    """Draw and sort the points of each image, and read its targets there; `maps` `[B, _, h, w]` are to be sampled."""
    targets, draw, term, _ = job
    check_sizes(maps)
    dtypes, num_points = dtypes_of(maps[0]), draw.num_points
    batch, dtype = len(num_targets), dtypes[0]
    sizes = np.array([each.shape[2:] for each in maps], np.int64)
    num_bands = kernels.bands_for(sizes, np.dtype(dtype).itemsize)
    bands = np.empty((batch, num_bands + 1), np.int64)
    data, table, images = targets.data.contiguous(), absolute(targets.table, targets.images), array_of(targets.images)
    points = np.empty((batch, POINT_COLUMNS, num_points), dtypes[1])
    weights = np.empty((batch, num_points), dtype)
    args: tuple[Any, ...] = (array_of(draw.image_ids), int(draw.seed), array_of(targets.windows), images)
    args += (array_of(targets.ignore), strata_of(draw, num_points), num_points, num_bands, points, weights, bands)
    launch(kernels.draw, batch, dtypes, (0, 0, 5 * num_points), args, _PER_DRAWN * batch * num_points)
    owner = np.repeat(np.arange(batch), num_targets)
    first, length = np.empty((2, len(table), num_bands), np.int64)
    size = int(np.diff(bands).max()) + kernels.VECTOR + GROUP
    args = (points, bands, table, term.border, owner, first, length)
    pixels = _PER_VISITED * len(table) * num_points
    launch(kernels.find_runs, len(table), dtypes, (0, 0, 2 * size), args, pixels)
    offset = np.cumsum(length).reshape(length.shape) - length
    shares, sums = np.empty(int(length.sum()), dtype), np.empty(len(table), dtype)
    args = (points, weights, table, data.data_ptr(), encode(data, targets.encoding), term.border, term.nearest)
    args += (term.dice_kind, bands, owner, first, length, offset, shares, sums)
    launch(kernels.fill_runs, len(table), dtypes, (3 * size, 2 * size, 3 * size), args, pixels)
    real = length > 0
    starts = np.append(0, np.cumsum(real.sum(axis=1)))
    runs = (starts, first[real], length[real], offset[real], shares, sums)
    counts = np.maximum(weights.sum(axis=1), 1)
    return Plan(points, bands, weights, counts, images, runs, dtypes, max(num_targets, default=0))


def join_frames(plan: Plan) -> Plan:
    """Put the points of all images side by side: those of one image, with the targets that each of them has.

    Their places are not kept: logits are sampled with the plan of the images.
    """
    batch, num_points = plan.weights.shape
    starts, first, length, offset, shares, sums = plan.runs
    row = np.repeat(np.arange(len(sums)), np.diff(starts))
    image, target = np.divmod(row, max(plan.widest, 1))
    order = np.argsort(target, kind="stable")
    runs = (first + image * num_points)[order], length[order], offset[order]
    counts = np.bincount(target, minlength=plan.widest)
    sums = sums.reshape(batch, plan.widest).sum(axis=0)
    weights = plan.weights.reshape(1, -1)
    return plan._replace(
        weights=weights,
        counts=np.maximum(weights.sum(axis=1), 1),
        images=plan.images[:1],
        runs=(np.append(0, np.cumsum(counts)), *runs, shares, sums),
    )


def _place(plan: Plan, sizes: NDArray[np.int64], border: bool) -> Places:
    batch, _, num_points = plan.points.shape
    index, inside = np.empty((2, batch, len(sizes), num_points), np.int32)
    edges = np.empty((batch, len(sizes), 3, num_points), np.int32)
    num_edges = np.empty((batch, len(sizes)), np.int64)
    fx, fy = (np.empty((batch, len(sizes), num_points), plan.dtypes[0]) for _ in range(2))
    rows = np.empty((batch, len(sizes), plan.bands.shape[1] - 1, plane_points.ROW_COLUMNS), np.int64)
    args = (plan.points, plan.bands, sizes, border, index, fx, fy, rows, inside, edges, num_edges)
    pixels = _PER_DRAWN * batch * len(sizes) * num_points
    launch(plane_points.place_points, batch * len(sizes), plan.dtypes, (0, 0, 0), args, pixels)
    highest = (rows[..., plane_points.ROWS].max(axis=(0, 2)) + 1) * (sizes[:, 1] + 2 * BORDER)
    return Places(rows, index, fx, fy, inside, edges, num_edges, int(highest.max()))


def _is_small(tensor: Tensor) -> bool:
    """Whether the planes of a tensor `[B, Q, h, w]` are read where they are."""
    height, width = tensor.shape[2:]
    fits = height * width * tensor.element_size() <= plane_points.SMALL_BYTES and min(height, width) > 1
    return fits and tensor.dtype in (torch.float32, torch.float64) and tensor.stride()[2:] == (width, 1)


def _options(term: Term) -> tuple[float, float, int]:
    """Options of the kernels that compute costs."""
    return float(term.alpha), float(term.gamma), term.dice_kind


def match_cost(logits: Sequence[Tensor], num_targets: Sequence[int], job: Job) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost of all pairs of all images and layers, `[L, B, Q, T_max]`."""
    shape = (len(logits), *logits[0].shape[:2], max(num_targets, default=0))
    ce, dice = (np.empty(shape, float_of(logits[0].dtype)) for _ in range(2))
    if ce.size:
        plan = match_plan(num_targets, job, logits)
        _fill_costs(plan, plan, logits, job.term, ce, dice)
    return torch.from_numpy(ce), torch.from_numpy(dice)


def clip_costs(plan: Plan, joined: Plan, logits: Sequence[Tensor], term: Term) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost of one clip, `[L, Q, N]`, from logits `[T, Q, h, w]` of each layer.

    `plan` is that of its frames, and `joined` has their points side by side (see `join_frames`).
    """
    ce, dice = (np.empty((len(logits), 1, logits[0].shape[1], joined.widest), plan.dtypes[0]) for _ in range(2))
    # All frames have the points of the first one.
    _fill_costs(plan._replace(points=plan.points[:1], bands=plan.bands[:1]), joined, logits, term, ce, dice)
    return torch.from_numpy(ce[:, 0]), torch.from_numpy(dice[:, 0])


def _fill_costs(plan: Plan, joined: Plan, logits: Sequence[Tensor], term: Term, ce: Array, dice: Array) -> None:
    """Compute the costs of images, or of a clip, at points that lie as `plan` says, `joined` of all frames."""
    sizes, size_of = np.unique([t.shape[2:] for t in logits], axis=0, return_inverse=True)
    places = _place(plan, sizes.astype(np.int64), term.border)
    small = np.array([_is_small(layer) for layer in logits])
    shared = (joined.weights, joined.counts, joined.images, *joined.runs, *_options(term))
    layers = (plane_table(logits), size_of.reshape(-1).astype(np.int64), small)
    args = (*layers, *places[:-1], plan.bands, *shared, ce, dice)
    size = 2 * (joined.weights.shape[1] + kernels.VECTOR) + places.size
    launch(kernels.match_cost, ce[..., 0].size, plan.dtypes, (size, 0, 0), args)


def sample_features(plan: Plan, features: Tensor, term: Term) -> Tensor:
    """Read features `[B, D, h, w]` at the points of a plan, in its order: `[B, D, P]`, float32 or float64."""
    batch, channels, *size = features.shape
    if features.stride(3) != 1:
        # Channels last: one channel after the other would take a cache line for every pixel of each.
        if features.dtype in (torch.float32, torch.float64):
            grid = torch.from_numpy(plan.points).to(features.dtype).mT[:, None] * 2 - 1
            outside = "border" if term.border else "zeros"
            return grid_sample(features, grid, padding_mode=outside, align_corners=False).squeeze(2)
        features = features.contiguous()
    places = _place(plan, np.array([size], np.int64), term.border)
    sampled = np.empty((batch, channels, plan.points.shape[2]), plan.dtypes[0])
    only = [each.squeeze(1) for each in (places.rows, places.place, places.fx, places.fy)]  # there is one size
    args = (plane_table([features]), *only, plan.bands, sampled)
    launch(kernels.sample_features, batch * channels, plan.dtypes, (places.size, 0, 0), args)
    return torch.from_numpy(sampled)


def row_costs(plan: Plan, logits: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost, `[B, R, T_max]`, from logits `[B, R, P]` at the points of a plan."""
    batch, rows, num_points = logits.shape
    ce, dice = (np.empty((batch, rows, plan.widest), plan.dtypes[0]) for _ in range(2))
    values = array_of(logits if logits.dtype == torch.float64 else logits.float())
    args = (values, plan.weights, plan.counts, plan.images, *plan.runs, *_options(term), ce, dice)
    launch(kernels.row_costs, batch * rows, plan.dtypes, (2 * (num_points + kernels.VECTOR), 0, 0), args)
    return torch.from_numpy(ce), torch.from_numpy(dice)
