"""The operations on CUDA and ROCm tensors, as Triton kernels; `maskloss.ops.reference` defines what they compute.

Nothing here waits for the device. Each family of kernels has a file: `choose`, `losses`, `scatter`, `match`,
`features`; what they share is in `sampling` (on the device) and `launch` (on the host). Layers of one geometry share
their launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskloss._abi import (
    ENCODINGS,
    INDEX_COLUMNS,
    POINT_COLUMNS,
    QUERY,
    Draw,
    Gradients,
    Instances,
    Kept,
    Saved,
    Targets,
    Term,
    accumulation_dtype,
    is_border,
    is_nearest,
    num_bytes,
)

from . import choose as choosing
from . import losses
from . import match as matching
from . import scatter as scattering
from .assignment import assign as assign
from .features import sample
from .launch import (
    BLOCK,
    OPTIONS,
    Sampling,
    Span,
    cdiv,
    empty,
    float_points,
    focal_options,
    geometry,
    make_sampling,
    on_device,
    runs,
    spans,
)


def _map_rows(index: Tensor) -> Tensor:
    """Write an index of maps `[N]` as rows: map m is query m of image 0 in layer 0."""
    return torch.nn.functional.pad(index[:, None], (QUERY, INDEX_COLUMNS - 1 - QUERY))


# ------------------------------------------------------------------------------------------------- point sampling


def point_sample(maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Read maps `[M, h, w]`, chosen by index `[N]`, at points `[N, P, 2]`: `[N, P]`."""
    points = float_points(points)
    count, num_points = points.shape[:2]
    values = empty((count, num_points), accumulation_dtype(maps.dtype), maps.device)
    if values.numel() == 0:
        return values
    blocks = cdiv(num_points, BLOCK)
    with on_device(maps):
        choosing.sample_points[(count * blocks,)](
            (maps[None],), 0, _map_rows(index), points, values, num_points, blocks,
            *geometry(maps[None]), *points.stride(), LAYERS=1,
            NEAREST=is_nearest(mode), BORDER=is_border(padding), BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return values


def point_sample_backward(grad: Tensor, maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Scatter the gradient `[N, P]` of the values to the maps."""
    points = float_points(points)
    values = grad.to(accumulation_dtype(maps.dtype)).contiguous()
    sampling = Sampling(points, points, index, (0, None), points.shape[1], 0, 0, is_border(padding))
    run = Span((maps[None],), 0, 0, len(index), 0, 1)
    with on_device(maps):
        work = scattering.Scatter(_map_rows(index), [len(index)], run, sampling, is_nearest(mode), values)
        return work.gradients()[0].view(maps.shape)


# --------------------------------------------------------------------------------------------------------- points


def _chosen_bits(index: Tensor, sampling: Sampling) -> Tensor:
    return empty((len(index), num_bytes(sampling.num_candidates)), torch.uint8, index.device)


def _row_bytes(sampling: Sampling, dtype: torch.dtype) -> int:
    """Scratch memory of an instance in the forward pass."""
    size = accumulation_dtype(dtype).itemsize
    return sampling.num_candidates * size + sampling.num_uncertain * (4 + size)


def uncertain_points(instances: Instances, draw: Draw, windows: Tensor, padding: str) -> Tensor:
    """Draw the points of all instances: float32 `[N, P, 2]`, the uncertain ones first."""
    logits, index, layer_sizes = instances
    index, num_points = index.contiguous(), draw.num_points
    sampling = make_sampling(draw, windows, padding)
    points = empty((len(index), num_points, POINT_COLUMNS), torch.float32, index.device)
    chosen = _chosen_bits(index, sampling)
    blocks = cdiv(num_points, BLOCK)
    with on_device(index):
        for span in spans(logits, layer_sizes, _row_bytes(sampling, logits[0].dtype)):
            choice = choosing.choose(span, index, sampling, chosen)
            choosing.write_points[(span.count * blocks,)](
                index[span.rows], *sampling.source, choice.order, points[span.rows],
                num_points, sampling.num_uncertain, blocks, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return points


# ------------------------------------------------------------------------------------------------------- the loss


def mask_loss(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy `[N]`, Dice `[N]`, and `Saved`: chosen candidates as bits, and soft targets at the points."""
    sampling = make_sampling(draw, targets.windows, term.padding, points)
    work = spans(instances.logits, instances.layer_sizes, _row_bytes(sampling, instances.accumulation_dtype))
    ce, dice, kept = _forward(work, instances, sampling, targets, term, keep=False)
    return ce, dice, kept.chosen, kept.soft


def mask_loss_keeping(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[Tensor, Tensor, Kept]:
    """As `mask_loss`, of instances with a plane each, and with the logits at the points to go backward without it."""
    sampling = make_sampling(draw, targets.windows, term.padding, points)
    work = _own_planes(instances).parts(_row_bytes(sampling, instances.accumulation_dtype))
    return _forward(work, instances, sampling, targets, term, keep=True)


def _own_planes(instances: Instances) -> Span:
    """One launch for instances with a plane each, numbered by QUERY: all layers and images have the same planes."""
    return Span((instances.logits[0],), 0, 0, len(instances.rows), 0, 1)


def _forward(
    work: Sequence[Span], instances: Instances, sampling: Sampling, targets: Targets, term: Term, *, keep: bool
) -> tuple[Tensor, Tensor, Kept]:
    encoding, data, table, images, _, ignore = targets
    index, device, dtype = instances.rows.contiguous(), instances.rows.device, instances.accumulation_dtype
    num_points = sampling.num_points
    ce, dice = empty((len(index),), dtype, device), empty((len(index),), dtype, device)
    soft = empty((len(index), num_points if encoding == "values" else 0), dtype, device)
    chosen = _chosen_bits(index, sampling)
    logits = empty((len(index), num_points if keep else 0), dtype, device)
    blocks, options = cdiv(num_points, BLOCK), focal_options(term.gamma, bounded=keep and term.gamma >= 0)
    sums = empty((len(index), blocks, losses.NUM_SUMS.value), dtype, device)
    with on_device(index):
        for span in work:
            rows = span.rows
            choice = choosing.choose(span, index, sampling, chosen)
            losses.loss_terms[(span.count * blocks,)](
                span.layers, span.first, index[rows], data, table, images,
                ignore if ignore.numel() else None, *sampling.source, sampling.given(span), *choice,
                soft[rows] if encoding == "values" else None, logits[rows] if keep else None, sums[rows],
                num_points, sampling.num_uncertain, blocks,
                *geometry(span.layers[0]), *sampling.strides,
                LAYERS=len(span.layers), ENCODING=ENCODINGS[encoding], NEAREST=term.nearest, BORDER=sampling.border,
                ALPHA=term.alpha, GAMMA=term.gamma, BLOCK=BLOCK, **options,
            )  # fmt: skip
        if len(index):
            losses.finish_losses[(cdiv(len(index), 32),)](
                sums, ce, dice, len(index), blocks, BLOCK=32, **{**OPTIONS, "num_warps": 1}
            )
    return ce, dice, Kept(chosen, soft, logits)


def mask_loss_backward(
    grads: Gradients,
    saved: Saved,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """Dense gradients of the logits; an empty tensor for each layer that needs none."""
    logits, index, layer_sizes = instances
    sampling = make_sampling(draw, targets.windows, term.padding, points)
    index = index.contiguous()
    found = [empty((0,), layer.dtype, layer.device) for layer in logits]
    loss = scattering.LossGradient(Gradients(*(grad.contiguous() for grad in grads)), saved, targets, term)
    with on_device(index):
        for run in runs(logits, layer_sizes, needs_grad):
            work = scattering.Scatter(index, layer_sizes, run, sampling, False, loss)
            found[run.first : run.first + len(run.layers)] = work.gradients()
    return found


def plane_gradients(
    grads: Gradients,
    kept: Kept,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
) -> None:
    """Overwrite the planes of instances, which have one each, with their gradients; see `mask_loss_keeping`."""
    index, run = instances.rows.contiguous(), _own_planes(instances)
    sampling = make_sampling(draw, targets.windows, term.padding, points)
    loss = scattering.LossGradient(Gradients(*(grad.contiguous() for grad in grads)), kept, targets, term)
    with on_device(index):
        scattering.Scatter(index, [run.count], run, sampling, False, loss).overwrite(run.layers[0][0])


# ------------------------------------------------------------------------------------------------ the matching cost


def match_plan(
    num_targets: Sequence[int], targets: Targets, draw: Draw, term: Term, maps: Sequence[Tensor]
) -> matching.Pairs:
    """Draw and sort the points of each image, and read its targets there; `maps` `[B, _, h, w]` are to be sampled."""
    with on_device(maps[0]):
        return matching.prepare(targets, max(num_targets, default=0), draw, term, accumulation_dtype(maps[0].dtype))


def match_cost(
    logits: Sequence[Tensor], num_targets: Sequence[int], targets: Targets, draw: Draw, term: Term
) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost of all pairs of all images and layers, `[L, B, Q, T_max]`."""
    shape = (len(logits), *logits[0].shape[:2], max(num_targets, default=0))
    if 0 in shape:
        none = empty(shape, accumulation_dtype(logits[0].dtype), logits[0].device)
        return none, torch.empty_like(none)
    plan = match_plan(num_targets, targets, draw, term, logits)
    with on_device(logits[0]):
        return matching.costs(plan, logits, term, sampled=False)


def sample_features(plan: matching.Pairs, features: Tensor, term: Term) -> Tensor:  # noqa: ARG001 (the plan knows)
    """Read features `[B, D, h, w]` at the points of a plan, in its order: `[B, D, P]`, in their dtype."""
    with on_device(features):
        return sample(plan, features)


def row_costs(plan: matching.Pairs, logits: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost, `[B, R, T_max]`, from logits `[B, R, P]` at the points of a plan."""
    with on_device(logits):
        ce, dice = matching.costs(plan, [logits[:, :, None]], term, sampled=True)
    return ce[0], dice[0]
