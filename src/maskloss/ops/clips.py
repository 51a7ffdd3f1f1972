"""The matching cost of clips, for all backends: a query has one mask in T frames, and the same points in each.

Both terms are those of an image with T * P points. Logits are sampled frame by frame, and a backend's costs of rows,
which serve masks as products too, take the points of all frames side by side. On a CPU, the kernel of images does both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from maskloss._abi import (
    BASE,
    COUNT,
    FIRST,
    IGNORE_BASE,
    IGNORE_H,
    IGNORE_STRIDE,
    OFFSET,
    Job,
    Targets,
    accumulation_dtype,
)

# Logits at the matcher's points that exist at a time, on the host and on a device, where each part costs launches.
_HOST_BYTES, _DEVICE_BYTES = 1 << 23, 1 << 25

Costs = tuple[Tensor, Tensor]


class Clip:
    """One clip of a batch, and what all its queries share."""

    def __init__(self, backend: Any, number: int, num_targets: Sequence[int], job: Job, maps: Sequence[Tensor]) -> None:
        frames = maps[0].shape[2]
        self.backend, self.number, self.count, self.term = backend, number, num_targets[number], job.term
        own = job._replace(
            targets=_frames_of(job.targets, num_targets, number, frames),
            draw=job.draw._replace(image_ids=job.draw.image_ids[number].repeat(frames)),
        )
        by_frame = [each[number].transpose(0, 1) for each in maps]
        self.by_frame = backend.match_plan([self.count] * frames, own, by_frame)
        self.joined = backend.join_frames(self.by_frame)

    def sample(self, maps: Tensor) -> Tensor:
        """Read maps `[R, T, h, w]` at the points: `[R, T * P]`."""
        sampled: Tensor = self.backend.sample_features(self.by_frame, maps.transpose(0, 1), self.term)
        return sampled.transpose(0, 1).flatten(1)

    def costs(self, rows: Tensor) -> Costs:
        """Both mask terms `[R, N]` of logits `[R, T * P]` at the points."""
        ce, dice = self.backend.row_costs(self.joined, rows[None], self.term)
        return ce[0], dice[0]


def clips_of(backend: Any, num_targets: Sequence[int], job: Job, maps: Sequence[Tensor]) -> Iterator[Clip]:
    """Yield the clips that have targets (see `Clip`)."""
    for number, count in enumerate(num_targets):
        if count:
            yield Clip(backend, number, num_targets, job, maps)


def _frames_of(targets: Targets, num_targets: Sequence[int], clip: int, frames: int) -> Targets:
    """Describe the frames of one clip as images with its N targets each; in `targets` n in frame t is n * T + t."""
    count, first = num_targets[clip], sum(num_targets[:clip]) * frames
    table = targets.table[first : first + count * frames].unflatten(0, (count, frames)).transpose(0, 1).flatten(0, 1)
    table = table.clone()
    table[:, OFFSET] += targets.images[clip, BASE]
    images = targets.images[clip].repeat(frames, 1)
    images[:, BASE] = 0
    frame = torch.arange(frames, device=images.device)
    images[:, IGNORE_BASE] += frame * images[:, IGNORE_H] * images[:, IGNORE_STRIDE]
    images[:, COUNT] = count
    images[:, FIRST] = frame * count
    return targets._replace(table=table, images=images, windows=targets.windows[clip].repeat(frames, 1))


def match_cost(backend: Any, logits: Sequence[Tensor], num_targets: Sequence[int], job: Job) -> Costs:
    """Both mask terms of the matching cost, `[L, B, Q, N_max]`, of logits `[B, Q, T, h, w]` and targets as planes."""
    if logits[0].shape[2] == 1:
        ce, dice = backend.match_cost([layer.squeeze(2) for layer in logits], num_targets, job)
        return ce, dice
    batch, queries, frames = logits[0].shape[:3]
    shape = (len(logits), batch, queries, max(num_targets, default=0))
    ce = torch.zeros(shape, dtype=accumulation_dtype(logits[0].dtype), device=logits[0].device)
    dice = torch.zeros_like(ce)
    scratch = _HOST_BYTES if ce.device.type == "cpu" else _DEVICE_BYTES
    size = max(1, scratch // (frames * job.draw.num_points * ce.element_size()))
    at_once = getattr(backend, "clip_costs", None)
    for clip in clips_of(backend, num_targets, job, logits):
        if at_once is not None:
            layers = [layer[clip.number].transpose(0, 1) for layer in logits]
            found = at_once(clip.by_frame, clip.joined, layers, job.term)
            ce[:, clip.number, :, : clip.count], dice[:, clip.number, :, : clip.count] = found
            continue
        for which, layer in enumerate(logits):
            for start in range(0, queries, size):
                part = slice(start, start + size)
                place = which, clip.number, part, slice(clip.count)
                ce[place], dice[place] = clip.costs(clip.sample(layer[clip.number, part]))
    return ce, dice
