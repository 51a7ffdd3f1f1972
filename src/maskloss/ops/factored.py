"""Mask logits that are a product and never formed whole: the operations on `Factors`, for all backends with kernels.

PyTorch's own matrix products do what is dense, a backend's kernels what is sampled. The matching cost reads the
features at its points and multiplies there. The loss forms the planes of matched queries, a few at a time, and keeps
the logits at their points: the backward pass then needs no plane of logits again, only planes of gradients. In both,
`Factors.scratch_bytes` bounds what exists at a time. Nothing here waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskloss._abi import (
    IMAGE,
    LAYER,
    QUERY,
    Factors,
    Gradients,
    Instances,
    Job,
    Saved,
    accumulation_dtype,
)
from maskloss.ops.clips import clips_of

# ------------------------------------------------------------------------------------------------------------ matching


def match_cost(backend: Any, factors: Factors, num_targets: Sequence[int], job: Job) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost, `[L, B, Q, T_max]` each."""
    if factors.features[0].ndim == 5 and factors.features[0].shape[2] == 1:
        factors = factors._replace(features=[each.squeeze(2) for each in factors.features])
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    for number, features in enumerate(factors.features):
        layers = [layer for layer, which in enumerate(factors.features_of) if which == number]
        rows = torch.stack([factors.embeddings[layer] for layer in layers], 1)
        batch, depth, queries = rows.shape[:3]
        biases = torch.stack([factors.biases[layer] for layer in layers], 1).flatten(1) if factors.biases else None
        shared = _Rows(rows.flatten(1, 2), biases, features, factors.scratch_bytes)
        shape = (batch, depth * queries, max(num_targets, default=0))
        ce = torch.zeros(shape, dtype=accumulation_dtype(features.dtype), device=rows.device)
        dice = torch.zeros_like(ce)
        if ce.numel():
            fill = _fill_costs_of_clips if features.ndim == 5 else _fill_costs
            fill((ce, dice), backend, shared, num_targets, job)
        by_layer = [cost.view(batch, depth, queries, cost.shape[2]).unbind(1) for cost in (ce, dice)]
        parts |= dict(zip(layers, zip(*by_layer, strict=True), strict=True))
    ce, dice = (torch.stack([parts[layer][which] for layer in sorted(parts)]) for which in range(2))
    return ce, dice


class _Rows(NamedTuple):
    """Embeddings of all queries of the layers that share their features."""

    embeddings: Tensor  # `[B, R, D]`
    biases: Tensor | None  # `[B, R]`
    features: Tensor  # `[B, D, h, w]`, or those of clips
    scratch_bytes: int  # bound on the logits at the points, or on the planes, that exist at a time


def _fill_costs(
    costs: tuple[Tensor, Tensor], backend: Any, shared: _Rows, num_targets: Sequence[int], job: Job
) -> None:
    """Fill in the costs `[B, R, T_max]` of some rows."""
    rows, biases, features, scratch_bytes = shared
    batch, count = rows.shape[:2]
    height, width = features.shape[2:]
    # Maps with fewer pixels than there are points are cheaper to form than to sample.
    small = height * width <= job.draw.num_points
    if small:
        base = features.flatten(2)
    else:
        plan = backend.match_plan(num_targets, job, [features])
        base = backend.sample_features(plan, features, job.term).to(features.dtype)
        if biases is not None:
            # A point at the edge reads zeros beside the map, which the bias is not added to.
            ones = features.new_ones(1, 1, height, width).expand(batch, 1, height, width)
            inside = backend.sample_features(plan, ones, job.term).to(features.dtype)
    for part in _chunks(count, scratch_bytes // (batch * base.shape[2] * base.element_size())):
        logits = torch.bmm(rows[:, part], base)
        if biases is not None:
            logits += biases[:, part, None] if small else biases[:, part, None] * inside
        if small:
            maps = logits.view(*logits.shape[:2], height, width)
            found = [cost[0] for cost in backend.match_cost([maps], num_targets, job)]
        else:
            found = backend.row_costs(plan, logits, job.term)
        for cost, values in zip(costs, found, strict=True):
            cost[:, part] = values


def _fill_costs_of_clips(
    costs: tuple[Tensor, Tensor], backend: Any, shared: _Rows, num_targets: Sequence[int], job: Job
) -> None:
    """As `_fill_costs`, of features `[B, D, T, h, w]` and targets as planes."""
    rows, biases, features, scratch_bytes = shared
    for clip in clips_of(backend, num_targets, job, [features]):
        base = clip.sample(features[clip.number]).to(features.dtype)
        if biases is not None:
            ones = features.new_ones(1, 1, *features.shape[3:]).expand(1, *features.shape[2:])
            inside = clip.sample(ones).to(features.dtype)
        for part in _chunks(rows.shape[1], scratch_bytes // (base.shape[1] * base.element_size())):
            logits = rows[clip.number, part] @ base
            if biases is not None:
                logits += biases[clip.number, part, None] * inside
            for cost, values in zip(costs, clip.costs(logits), strict=True):
                cost[clip.number, part, : clip.count] = values


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Cut a range into parts of a size, one at least."""
    size = max(1, size)
    yield from (slice(start, min(start + size, count)) for start in range(0, count, size))


# ------------------------------------------------------------------------------------------------------------ the loss


@dataclass(frozen=True)
class _Part:
    """Some instances of one image whose layers share their features."""

    features: int  # which of the features
    image: int  # number of the image
    first: bool  # whether it is the first part of its features and image
    opens: bool  # whether it is the first part of its features
    own: slice  # where the instances are among all, in the order of the parts
    rows: slice  # where their planes are: one each, or one for each frame of a clip
    embeddings: Tensor  # `[n, D]`
    biases: Tensor | None  # `[n]`, or None
    index: Tensor  # rows of the index, one for each plane; QUERY is its number
    layer_sizes: list[int]  # how many rows of the part each layer has


class Blocks:
    """The instances, sorted by features, image and layer, and cut into parts whose planes fit into the scratch memory.

    Args:
        factors: of all layers.
        index: int64 `[N, INDEX_COLUMNS]`, sorted by layer and image; for features of clips, `[B, D, T, h, w]`, query q
            in frame t is q * T + t, and the frames of an instance follow one another.
        counts: how many rows each layer and image has, `[L * B]`; known on the host, so that nothing waits.
    """

    def __init__(self, factors: Factors, index: Tensor, counts: Sequence[int]) -> None:
        self.frames = math.prod(factors.features[0].shape[2:-2])
        self.factors, self.index, self.counts = factors, index, [int(count) // self.frames for count in counts]
        self.batch = factors.features[0].shape[0]
        self.order = [
            layer * self.batch + image
            for number in range(len(factors.features))
            for image in range(self.batch)
            for layer, which in enumerate(factors.features_of)
            if which == number
        ]

    def sorted(self, values: Tensor) -> Tensor:
        """Reorder values `[N, ...]` from the order of the index to that of the parts."""
        return _reorder(values, [self.frames * count for count in self.counts], self.order)

    def restored(self, values: Tensor) -> Tensor:
        """Invert `sorted`."""
        sizes = [self.frames * self.counts[block] for block in self.order]
        place = {block: position for position, block in enumerate(self.order)}
        return _reorder(values, sizes, [place[block] for block in range(len(self.counts))])

    def gathered(self, layers: Sequence[Tensor]) -> Tensor:
        """Pick the rows `[N, ...]` of the instances from `[B, Q, ...]` of each layer, in the order of the parts."""
        return torch.stack(list(layers))[self.where()]

    def where(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return layer, image and query `[N]` of the instances, in the order of the parts."""
        rows = self.sorted(self.index)[:: self.frames]
        return rows[:, LAYER], rows[:, IMAGE], rows[:, QUERY] // self.frames

    def _sizes(self, number: int, image: int) -> list[int]:
        """How many instances each layer has in an image; none if it has other features."""
        return [
            self.counts[layer * self.batch + image] if which == number else 0
            for layer, which in enumerate(self.factors.features_of)
        ]

    def _planes_at_a_time(self, number: int) -> int:
        features = self.factors.features[number]
        return max(1, self.factors.scratch_bytes // (math.prod(features.shape[2:]) * features.element_size()))

    def space(self, number: int) -> Tensor:
        """Allocate memory for the planes `[n, h * w]` (`[n, T * h * w]`) of the largest part of some features."""
        features = self.factors.features[number]
        most = max(sum(self._sizes(number, image)) for image in range(self.batch))
        return features.new_empty(min(most, self._planes_at_a_time(number)), math.prod(features.shape[2:]))

    def parts(self, job: Job) -> Iterator[tuple[_Part, Job]]:
        """Yield the parts, and for each the job with its points, if these are given."""
        factors, index = self.factors, self.sorted(self.index)
        embeddings = self.gathered(factors.embeddings)
        biases = self.gathered(factors.biases) if factors.biases else None
        points = None if job.points is None else self.sorted(job.points)
        start = 0
        for number in range(len(factors.features)):
            opens = True
            for image in range(self.batch):
                sizes = self._sizes(number, image)
                for part in _chunks(sum(sizes), self._planes_at_a_time(number)):
                    own = slice(start + part.start, start + part.stop)
                    rows = slice(own.start * self.frames, own.stop * self.frames)
                    mine = index[rows].clone()
                    mine[:, QUERY] = torch.arange(len(mine), device=index.device)
                    bias = None if biases is None else biases[own]
                    inside = [self.frames * size for size in _overlaps(sizes, part)]
                    found = _Part(number, image, part.start == 0, opens, own, rows, embeddings[own], bias, mine, inside)
                    yield found, job if points is None else job._replace(points=points[rows])
                    opens = False
                start += sum(sizes)

    def instances(self, part: _Part, planes: Tensor) -> Instances:
        """Describe planes `[n, h, w]` as the logits of all layers and images: each row of the index has its own."""
        logits = planes[None].expand(self.batch, *planes.shape)
        return Instances([logits] * len(part.layer_sizes), part.index, part.layer_sizes)


def _reorder(values: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    pieces = values.split(list(sizes))
    return torch.cat([pieces[block] for block in order]) if order else values


def _overlaps(sizes: Sequence[int], part: slice) -> list[int]:
    """How much of consecutive ranges of some sizes a part covers."""
    stops = list(accumulate(sizes))
    return [
        max(0, min(stop, part.stop) - max(stop - size, part.start)) for size, stop in zip(sizes, stops, strict=True)
    ]


def mask_loss(
    backend: Any, factors: Factors, index: Tensor, counts: Sequence[int], job: Job
) -> tuple[Tensor, Tensor, Saved]:
    """Cross-entropy and Dice `[N]` in the order of the index; what the backward pass needs in that of the parts."""
    blocks = Blocks(factors, index, counts)
    dtype = accumulation_dtype(factors.features[0].dtype)
    ce, dice, saved = job.new_losses(len(index), dtype, index.device, keep=True)
    space = dice
    for part, mine in blocks.parts(job):
        features = factors.features[part.features]
        if part.opens:
            space = blocks.space(part.features)
        planes = space[: len(part.embeddings)]
        matrix = features[part.image].flatten(1)
        torch.mm(part.embeddings, matrix, out=planes)
        if part.biases is not None:
            planes += part.biases[:, None]
        instances = blocks.instances(part, planes.view(-1, *features.shape[-2:]))
        ce[part.rows], dice[part.rows], kept = backend.mask_loss(instances, mine, keep=True)
        for whole, piece in zip(saved, kept, strict=True):
            whole[part.rows] = piece
    return blocks.restored(ce), blocks.restored(dice), saved


def mask_loss_backward(
    backend: Any,
    grads: Gradients,
    saved: Saved,
    factors: Factors,
    index: Tensor,
    counts: Sequence[int],
    job: Job,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """Gradients of all embeddings `[L, B, Q, D]`, of all biases `[L, B, Q]`, and of each of the features.

    `needs_grad` says which of these are wanted; the others are empty.
    """
    blocks = Blocks(factors, index, counts)
    grads = Gradients(*(blocks.sorted(grad) for grad in grads))
    by_row, by_bias, *by_pixel = needs_grad
    like, count = factors.features[0], sum(blocks.counts)
    rows = like.new_empty((count, like.shape[1]) if by_row else 0)
    row_sums = like.new_empty(count if by_bias else 0)
    by_features = [_FeatureGradient(each, need) for each, need in zip(factors.features, by_pixel, strict=True)]
    space = rows
    for part, mine in blocks.parts(job):
        features = factors.features[part.features]
        if part.opens:
            space = blocks.space(part.features)
        planes = space[: len(part.embeddings)]
        instances = blocks.instances(part, planes.view(-1, *features.shape[-2:]))
        slopes = Gradients(*(grad[part.rows] for grad in grads))
        backend.plane_gradients(slopes, Saved(*(each[part.rows] for each in saved)), instances, mine)
        if by_row:
            torch.mm(planes, features[part.image].flatten(1).t(), out=rows[part.own])
        if by_bias:
            row_sums[part.own] = planes.sum(1, dtype=accumulation_dtype(planes.dtype)).to(planes.dtype)
        by_features[part.features].add(part, planes)
    where = blocks.where()
    return [
        _spread(rows, where, factors.embeddings, by_row),
        _spread(row_sums, where, factors.biases, by_bias),
        *(gradient.result() for gradient in by_features),
    ]


class _FeatureGradient:
    """The gradient of features `[B, D, h, w]`: E^T dZ of each part, summed over the parts of an image.

    Half precision is summed up in float32, of one image at a time, where an image has several parts.
    """

    def __init__(self, features: Tensor, needed: bool) -> None:
        self.needed = needed
        self.total = features.new_empty(features.shape if needed else 0)
        self.images = set(range(features.shape[0] if needed else 0))
        self.image = -1
        self.sum: Tensor | None = None

    def add(self, part: _Part, planes: Tensor) -> None:
        """Add the product of a part, whose images come one after the other."""
        if not self.needed:
            return
        mine, embeddings = self.total[part.image].flatten(1), part.embeddings.t()
        self.images.discard(part.image)
        if mine.dtype == accumulation_dtype(mine.dtype):
            # What is there before the first product is not read.
            mine.addmm_(embeddings, planes, beta=0 if part.first else 1)
        elif part.first:
            self._flush()
            torch.mm(embeddings, planes, out=mine)
            self.image = part.image
        else:
            self.sum = mine.float() if self.sum is None else self.sum
            self.sum += embeddings @ planes

    def _flush(self) -> None:
        if self.sum is not None:
            self.total[self.image].flatten(1).copy_(self.sum)
            self.sum = None

    def result(self) -> Tensor:
        """Return the gradient; images without instances get zeros."""
        self._flush()
        for image in self.images:
            self.total[image] = 0
        return self.total


def _spread(rows: Tensor, where: tuple[Tensor, ...], layers: Sequence[Tensor], needed: bool) -> Tensor:
    """Add rows `[N, ...]` up in the gradients of all layers `[L, B, Q, ...]`; a query may have several instances."""
    if not needed:
        return rows.new_empty(0)
    total = rows.new_zeros((len(layers), *layers[0].shape), dtype=accumulation_dtype(rows.dtype))
    total.index_put_(where, rows.to(total.dtype), accumulate=True)
    return total.to(rows.dtype)
