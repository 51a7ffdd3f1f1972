"""The operations in plain PyTorch, for any float dtype and device: the definition that every kernel is compared with.

Written to be read, not to be fast. `formulas` is the mathematics; `sampling` is where points lie and how they are
drawn; `storage` is how targets are kept. The backends `cpu` and `gpu` have operations of the same names and arguments.
Shapes: N instances, P points each, K candidates each, L decoder layers of logits `[B, Q, h, w]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from maskloss._abi import (
    COUNT,
    IGNORE_OFFSET,
    IMAGE,
    QUERY,
    TARGET,
    Draw,
    Gradients,
    Instances,
    Job,
    Saved,
    Targets,
    Term,
    accumulation_dtype,
)

from .formulas import instance_losses, pairwise_costs
from .sampling import draw_points, match_points, redraw_points, sample_planes, scatter_planes
from .slopes import instance_slopes
from .storage import (
    ignored,
    pack_bits,
    read_targets,
    rows_of,
    target_cells,
    target_values,
    unpack_bits,
)


def point_sample(maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Read maps `[M, h, w]`, chosen by index `[N]`, at points `[N, P, 2]`."""
    return sample_planes(maps[index], points, mode, padding)


def point_sample_backward(grad: Tensor, maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Scatter the gradient `[N, P]` of the values to the maps."""
    height, width = maps.shape[1:]
    planes = scatter_planes(grad, points, (height, width), mode, padding)
    total = torch.zeros(maps.shape, dtype=grad.dtype, device=grad.device)
    return total.index_add_(0, index, planes).to(maps.dtype)


def _by_layer(instances: Instances, points: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield each layer with its rows of the index and its points, if there are any."""
    sizes = list(instances.layer_sizes)
    given = [None] * len(sizes) if points is None else points.split(sizes)
    yield from zip(instances.logits, instances.rows.split(sizes), given, strict=True)


def _planes(layer: Tensor, rows: Tensor) -> Tensor:
    return layer[rows[:, IMAGE], rows[:, QUERY]]


def uncertain_points(instances: Instances, draw: Draw, windows: Tensor, padding: str) -> Tensor:
    """Draw the points of all instances: float32 `[N, P, 2]`, the uncertain ones first."""
    drawn = []
    for layer, rows, _ in _by_layer(instances):
        z_at = partial(sample_planes, _planes(layer, rows), mode="bilinear", padding=padding)
        drawn.append(draw_points(z_at, rows, windows, draw)[0])
    return torch.cat(drawn)


def mask_loss(instances: Instances, job: Job, *, keep: bool = False) -> tuple[Tensor, Tensor, Saved]:
    """Draw points, read logits and targets there, and sum up the losses of each instance.

    Returns:
        Cross-entropy `[N]`, Dice `[N]`, and what the backward pass needs; `keep`: also without the logits.
    """
    targets, draw, term = job.targets, job.drawn, job.term
    dtype = instances.accumulation_dtype
    parts = []
    for layer, rows, at in _by_layer(instances, job.points):
        z_at = partial(sample_planes, _planes(layer, rows), mode="bilinear", padding=term.padding)
        chosen = rows.new_empty(len(rows), 0)
        if at is None:
            at, chosen = draw_points(z_at, rows, targets.windows, draw)
        t, w = _targets_at(at, rows, targets, term, dtype)
        z = z_at(at)
        soft = torch.where(w > 0, t, -1.0) if targets.encoding == "values" else t[:, :0]
        saved = pack_bits(chosen, draw.num_candidates), soft, z if keep else z[:, :0]
        parts.append((*instance_losses(z, t, w, *term.focal, term.dice), *saved))
    ce, dice, *kept = (torch.cat(part) for part in zip(*parts, strict=True))
    return ce, dice, Saved(*kept)


def _targets_at(
    points: Tensor, rows: Tensor, targets: Targets, term: Term, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Read the targets of instances at their points: t in [0, 1], and w, 0 in the ignore region and 1 elsewhere."""
    entries = rows_of(rows[:, IMAGE], rows[:, TARGET], targets)
    cells = target_cells(points, entries, term.padding, dtype)
    t = target_values(read_targets(cells, entries, targets, term, dtype), cells)
    skip = ignored(points, targets.images[rows[:, IMAGE]], targets.ignore, entries[:, IGNORE_OFFSET, None])
    return t, (~skip).to(dtype)


def mask_loss_backward(
    grads: Gradients, saved: Saved, instances: Instances, job: Job, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """Scatter the gradient of `mask_loss` to the logits of the layers that need one; others get an empty tensor."""
    targets, draw, term = job.targets, job.draw, job.term
    parts = zip(*(tensor.split(list(instances.layer_sizes)) for tensor in (*grads, *saved)), strict=True)
    found = []
    for (layer, rows, at), need, (d_ce, d_dice, bits, soft, kept) in zip(
        _by_layer(instances, job.points), needs_grad, parts, strict=True
    ):
        if not need:
            found.append(layer.new_empty(0))
            continue
        if at is None:
            at = redraw_points(unpack_bits(bits, draw.num_uncertain), rows, targets.windows, draw)
        z = kept if kept.shape[1] else sample_planes(_planes(layer, rows), at, "bilinear", term.padding)
        if soft.shape[1]:
            t, w = soft.clamp(min=0), (~(soft < 0)).to(z.dtype)
        else:
            t, w = _targets_at(at, rows, targets, term, z.dtype)
        slopes = instance_slopes(z, t, w, *term.focal, term.dice)
        d_z = d_ce[:, None] * slopes[0] + d_dice[:, None] * slopes[1]
        # A gradient scaler looks at gradients: a non-finite logit must give a non-finite one, unless its instance
        # weighs nothing.
        live = ((d_ce != 0) | (d_dice != 0))[:, None]
        d_z = torch.where(live, d_z + 0 * z, 0.0)
        d_planes = scatter_planes(d_z, at, (layer.shape[2], layer.shape[3]), "bilinear", term.padding)
        grad = torch.zeros(layer.shape, dtype=z.dtype, device=z.device)
        found.append(grad.index_put_((rows[:, IMAGE], rows[:, QUERY]), d_planes, accumulate=True).to(layer.dtype))
    return found


class Plan(NamedTuple):
    """What all queries and layers of an image share."""

    points: Tensor  # the matcher's, `[B, P, 2]`
    t: Tensor  # the targets there, `[B, T_max, P]`
    w: Tensor  # weights of the points, `[B, P]`
    real: Tensor  # which targets an image has, bool `[B, T_max]`


def match_plan(num_targets: Sequence[int], job: Job, maps: Sequence[Tensor]) -> Plan:
    """Draw the points of each image, and read its targets there; `maps` are to be sampled."""
    targets, draw, term, _ = job
    batch, widest = len(num_targets), max(num_targets, default=0)
    column = torch.arange(widest, device=targets.table.device)
    real = column < targets.images[:, COUNT, None]
    everyone = torch.arange(batch, device=targets.table.device)
    rows = rows_of(everyone.repeat_interleave(widest), column.repeat(batch), targets)
    points = match_points(targets.windows, draw)
    dtype = accumulation_dtype(maps[0].dtype)
    cells = target_cells(points.repeat_interleave(widest, dim=0), rows, term.padding, dtype)
    t = target_values(read_targets(cells, rows, targets, term, dtype), cells)
    w = (~ignored(points, targets.images, targets.ignore)).to(dtype)
    return Plan(points, t.view(batch, widest, draw.num_points), w, real)


def join_frames(plan: Plan) -> Plan:
    """Put the points of all images side by side: those of one image, with the targets that each of them has."""
    t = plan.t.transpose(0, 1).flatten(1)
    return Plan(plan.points.flatten(0, 1)[None], t[None], plan.w.flatten()[None], plan.real[:1])


def sample_features(plan: Plan, features: Tensor, term: Term) -> Tensor:
    """Read features `[B, D, h, w]` at the points of a plan: `[B, D, P]`."""
    return sample_planes(features, plan.points[:, None], "bilinear", term.padding)


def row_costs(plan: Plan, logits: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost, `[B, R, T_max]`, from logits `[B, R, P]` at the points of a plan."""
    # Mixed precision around the call must not round the matrix products.
    with torch.autocast(logits.device.type, enabled=False):
        ce, overlap = pairwise_costs(logits, plan.t, plan.w, *term.focal, term.dice)
    real = plan.real[:, None]
    return torch.where(real, ce, 0.0), torch.where(real, overlap, 0.0)


def match_cost(logits: Sequence[Tensor], num_targets: Sequence[int], job: Job) -> tuple[Tensor, Tensor]:
    """Compute both mask terms of the matching cost of all pairs of all images and layers, `[L, B, Q, T_max]`."""
    plan, term = match_plan(num_targets, job, logits), job.term
    costs = [row_costs(plan, sample_features(plan, layer, term), term) for layer in logits]
    ce, overlap = (torch.stack(list(part)) for part in zip(*costs, strict=True))
    return ce, overlap
