"""Volumes: where points lie in them, how they are read there, and their loss and matching cost.

A volume is `[d, h, w]`; its targets are stored slice by slice, one below the other. Along the third axis a point is
read linearly, between two slices, or it takes the slice that it lies in, as the frames of a clip are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from maskloss._abi import (
    ALL_TARGETS,
    CANDIDATES,
    FRAME_H,
    FRAME_W,
    IGNORE_H,
    IGNORE_STRIDE,
    IMAGE,
    IMAGE_H,
    LAYER,
    MATCHER,
    QUERY,
    RANDOM,
    TARGET,
    Draw,
    Gradients,
    Instances,
    Job,
    Saved,
    Stack,
    Targets,
    Term,
    Z,
    accumulation_dtype,
    is_border,
)
from maskloss.points import draw_layout3, instance_keys

from .formulas import instance_losses, interpolate, pairwise_costs, position
from .sampling import Cells, choose, into_window, known_seed, locate, nearest
from .slopes import instance_slopes
from .storage import ignored, pack_bits, pixels_of_targets, rows_of, unpack_bits


def _locate_depth(z: Tensor, depth: int, linear: bool, padding: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the slice before each point, and how far the point lies towards the next one."""
    exact = z.double()
    if not linear:
        # Clamped as floats: integers have no infinity, and no NaN, which is in the first slice.
        return (exact * depth).nan_to_num(0.0).clamp(0, depth - 1).long(), torch.zeros_like(z, dtype=dtype)
    at = position(exact, depth)
    if is_border(padding):
        at = at.clamp(0, depth - 1)
    first = at.floor()
    return first.long(), (at - first).to(dtype)


def sample_volumes(volumes: Tensor, points: Tensor, linear: bool, padding: str = "zeros") -> Tensor:
    """Read volumes `[..., d, h, w]` at points `[..., P, 3]` (leading dimensions broadcast)."""
    depth, height, width = volumes.shape[-3:]
    dtype = accumulation_dtype(volumes.dtype)
    flat = volumes.flatten(-3)

    def read(k: Tensor, y: Tensor, x: Tensor) -> Tensor:
        inside = (k >= 0) & (k < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        voxel = (k.clamp(0, depth - 1) * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
        values = flat.gather(-1, voxel.expand(*flat.shape[:-1], -1)).to(dtype)
        return torch.where(inside, values, values.new_zeros(()))

    return _between(read, points, (depth, height, width), linear, Term(padding), dtype)


def _between(
    read: Callable[[Tensor, Tensor, Tensor], Tensor],
    points: Tensor,
    size: tuple[int, Tensor | int, Tensor | int],
    linear: bool,
    term: Term,
    dtype: torch.dtype,
) -> Tensor:
    """Interpolate what `read(slice, y, x)` finds: along x, then y, and linearly between the slices, if so."""
    depth, height, width = size
    cells = locate(points[..., :Z], height, width, term.padding, dtype)
    k, fz = _locate_depth(points[..., Z], depth, linear, term.padding, dtype)
    y, x = cells.y, cells.x
    if term.nearest:
        k, _ = nearest(Cells(k, x, fz, cells.fx), depth, width, term.padding)
        return read(k, *nearest(cells, height, width, term.padding))

    def slice_at(k: Tensor) -> Tensor:
        corners = read(k, y, x), read(k, y, x + 1), read(k, y + 1, x), read(k, y + 1, x + 1)
        return interpolate(corners, cells.fx, cells.fy)

    front = slice_at(k)
    return front + fz * (slice_at(k + 1) - front) if linear else front


def _scatter(grad: Tensor, points: Tensor, size: torch.Size, linear: bool, padding: str) -> Tensor:
    """Invert `sample_volumes`: spread gradients `[n, P]` over the voxels of volumes `[n, d, h, w]`."""
    depth, height, width = size
    cells = locate(points[..., :Z], height, width, padding, grad.dtype)
    first, fz = _locate_depth(points[..., Z], depth, linear, padding, grad.dtype)
    volumes = grad.new_zeros(len(grad), depth * height * width)
    for dz, gz in ((0, 1 - fz), (1, fz))[: 1 + linear]:
        for dy, gy in ((0, 1 - cells.fy), (1, cells.fy)):
            for dx, gx in ((0, 1 - cells.fx), (1, cells.fx)):
                k, y, x = first + dz, cells.y + dy, cells.x + dx
                inside = (k >= 0) & (k < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                voxel = (k.clamp(0, depth - 1) * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
                volumes.scatter_add_(1, voxel, torch.where(inside, grad * gx * gy * gz, 0.0))
    return volumes.view(len(grad), *size)


def _target_values(points: Tensor, rows: Tensor, job: Job, stack: Stack, dtype: torch.dtype) -> Tensor:
    """Read targets, given by their rows of the table, at points `[n, P, 3]`: t `[n, P]`."""
    targets = job.targets
    height = rows[:, FRAME_H, None] // stack.frames

    def read(k: Tensor, y: Tensor, x: Tensor) -> Tensor:
        inside = (k >= 0) & (k < stack.frames) & (y >= 0) & (y < height)
        return torch.where(inside, pixels_of_targets(k * height + y, x, rows, targets, dtype), 0.0)

    return _between(read, points, (stack.frames, height, rows[:, FRAME_W, None]), stack.linear, job.term, dtype)


def _weights(points: Tensor, image: Tensor, targets: Targets, stack: Stack, dtype: torch.dtype) -> Tensor:
    """Return 0 for points `[n, P, 3]` in a voxel of the ignore region of their image, and 1 for others.

    Whatever is interpolated, a point lies in one voxel, as it lies in one pixel of an image.
    """
    images = targets.images[image]
    for column in (IMAGE_H, IGNORE_H):
        images[:, column] //= stack.frames
    k, _ = _locate_depth(points[..., Z], stack.frames, False, "zeros", dtype)
    offset = k * (images[:, IGNORE_H] * images[:, IGNORE_STRIDE])[:, None]
    return (~ignored(points, images, targets.ignore, offset)).to(dtype)


def _window3(points: Tensor, windows: Tensor) -> Tensor:
    return torch.cat([into_window(points[..., :Z], windows), points[..., Z:]], dim=-1)


def _drawn(rows: Tensor, windows: Tensor, draw: Draw, count: int, stream: int) -> Tensor:
    keys = instance_keys(known_seed(draw.seed, rows.device), draw.image_ids[rows[:, IMAGE]], rows[:, TARGET])
    return _window3(draw_layout3(draw.layout, keys, count, rows[:, LAYER], stream), windows[rows[:, IMAGE]])


def _points(chosen: Tensor, rows: Tensor, given: Tensor | None, windows: Tensor, draw: Draw) -> Tensor:
    """The points of instances `[n, P, 3]`: the caller's, or the chosen candidates, then uniform ones."""
    if given is not None:
        return given
    uniform = _drawn(rows, windows, draw, draw.num_points - draw.num_uncertain, RANDOM)
    if not draw.num_uncertain:
        return uniform
    candidates = _drawn(rows, windows, draw, draw.num_candidates, CANDIDATES)
    return torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 3)), uniform], dim=1)


def _by_layer(instances: Instances, job: Job) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield the logits, the rows and the caller's points of each layer."""
    sizes = list(instances.layer_sizes)
    given = [None] * len(sizes) if job.points is None else job.points.split(sizes)
    yield from zip(instances.logits, instances.rows.split(sizes), given, strict=True)


def _volumes(layer: Tensor, rows: Tensor) -> Tensor:
    return layer[rows[:, IMAGE], rows[:, QUERY]]


def volume_loss(instances: Instances, job: Job, stack: Stack) -> tuple[Tensor, Tensor, Saved]:
    """As `mask_loss`, of logits `[B, Q, d, h, w]`, at points that are drawn in the volumes."""
    targets, draw, term = job.targets, job.drawn, job.term
    dtype, parts = instances.accumulation_dtype, []
    for layer, rows, given in _by_layer(instances, job):
        volumes = _volumes(layer, rows)
        chosen = rows.new_empty(len(rows), 0)
        if draw.num_uncertain:
            candidates = _drawn(rows, targets.windows, draw, draw.num_candidates, CANDIDATES)
            chosen = choose(sample_volumes(volumes, candidates, stack.linear, term.padding), draw.num_uncertain)
        at = _points(chosen, rows, given, targets.windows, draw)
        t = _target_values(at, rows_of(rows[:, IMAGE], rows[:, TARGET], targets), job, stack, dtype)
        z = sample_volumes(volumes, at, stack.linear, term.padding)
        w = _weights(at, rows[:, IMAGE], targets, stack, dtype)
        losses = instance_losses(z, t, w, *term.focal, term.dice)
        soft = torch.where(w > 0, t, -1.0) if targets.encoding == "values" else t[:, :0]
        parts.append((*losses, pack_bits(chosen, draw.num_candidates), soft, z[:, :0]))
    ce, dice, *kept = (torch.cat(part) for part in zip(*parts, strict=True))
    return ce, dice, Saved(*kept)


def volume_loss_backward(
    grads: Gradients, saved: Saved, instances: Instances, job: Job, stack: Stack, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """Scatter the gradient of `volume_loss` to the logits of the layers that need one; others get an empty tensor."""
    targets, draw, term = job.targets, job.drawn, job.term
    parts = zip(*(tensor.split(list(instances.layer_sizes)) for tensor in (*grads, *saved)), strict=True)
    dtype, found = instances.accumulation_dtype, []
    layers = zip(_by_layer(instances, job), needs_grad, parts, strict=True)
    for (layer, rows, given), need, (d_ce, d_dice, bits, _, _) in layers:
        if not need:
            found.append(layer.new_empty(0))
            continue
        at = _points(unpack_bits(bits, draw.num_uncertain), rows, given, targets.windows, draw)
        t = _target_values(at, rows_of(rows[:, IMAGE], rows[:, TARGET], targets), job, stack, dtype)
        z = sample_volumes(_volumes(layer, rows), at, stack.linear, term.padding)
        w = _weights(at, rows[:, IMAGE], targets, stack, dtype)
        slopes = instance_slopes(z, t, w, *term.focal, term.dice)
        d_z = d_ce[:, None] * slopes[0] + d_dice[:, None] * slopes[1]
        # A non-finite logit gives a non-finite gradient, unless its instance weighs nothing.
        live = ((d_ce != 0) | (d_dice != 0))[:, None]
        d_z = torch.where(live, d_z + 0 * z, 0.0)
        d_volumes = _scatter(d_z, at, layer.shape[2:], stack.linear, term.padding)
        grad = torch.zeros(layer.shape, dtype=dtype, device=layer.device)
        found.append(grad.index_put_((rows[:, IMAGE], rows[:, QUERY]), d_volumes, accumulate=True).to(layer.dtype))
    return found


def volume_cost(logits: Sequence[Tensor], num_targets: Sequence[int], job: Job, stack: Stack) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost, `[L, B, Q, T_max]`, at P uniform points of each volume."""
    targets, draw, term, _ = job
    batch, widest, device = len(num_targets), max(num_targets, default=0), targets.table.device
    everyone, column = torch.arange(batch, device=device), torch.arange(widest, device=device)
    ids = draw.image_ids
    keys = instance_keys(known_seed(draw.seed, device), ids, torch.full_like(ids, ALL_TARGETS))
    drawn = draw_layout3(draw.layout, keys, draw.num_points, torch.zeros_like(ids), MATCHER)
    points = _window3(drawn, targets.windows)
    dtype = accumulation_dtype(logits[0].dtype)
    rows = rows_of(everyone.repeat_interleave(widest), column.repeat(batch), targets)
    t = _target_values(points.repeat_interleave(widest, dim=0), rows, job, stack, dtype)
    t, w = t.view(batch, widest, draw.num_points), _weights(points, everyone, targets, stack, dtype)
    real = column < torch.tensor(num_targets, device=device)[:, None]
    ce, overlap = [], []
    for layer in logits:
        z = sample_volumes(layer, points[:, None], stack.linear, term.padding)
        with torch.autocast(layer.device.type, enabled=False):
            costs = pairwise_costs(z, t, w, *term.focal, term.dice)
        ce.append(torch.where(real[:, None], costs[0], 0.0))
        overlap.append(torch.where(real[:, None], costs[1], 0.0))
    return torch.stack(ce), torch.stack(overlap)
