"""The operations on CUDA and ROCm tensors, as Triton kernels; `reference.py` defines what they compute.

Nothing here waits for the device. Each family of kernels has a file: `_gpu_choose.py`, `_gpu_loss.py`,
`_gpu_scatter.py`, `_gpu_match.py`; what they share is in `_gpu_sampling.py` (on the device) and `_gpu_launch.py`
(on the host). Layers of one geometry share their launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _gpu_choose as choosing
from . import _gpu_loss as losses
from . import _gpu_match as matching
from . import _gpu_scatter as scattering
from ._gpu_launch import (
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
from ._gpu_sampling import BITS, LABELS, VALUES
from .reference import accumulation_dtype

_ENCODINGS = {"bits": BITS.value, "labels": LABELS.value, "values": VALUES.value}


def _map_rows(index: Tensor) -> Tensor:
    """Write an index of maps `[N]` as rows (layer 0, image 0, map, target 0)."""
    return torch.nn.functional.pad(index[:, None], (2, 1))


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
            NEAREST=mode == "nearest", BORDER=padding == "border", BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return values


def point_sample_backward(grad: Tensor, maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Scatter the gradient `[N, P]` of the values to the maps."""
    points = float_points(points)
    values = grad.to(accumulation_dtype(maps.dtype)).contiguous()
    sampling = Sampling(points, points, index, (0, None), points.shape[1], 0, 0, padding == "border")
    run = Span((maps[None],), 0, 0, len(index), 0, 1)
    with on_device(maps):
        work = scattering.Scatter(_map_rows(index), [len(index)], run, sampling, mode == "nearest", values)
        return work.gradients()[0].view(maps.shape)


# --------------------------------------------------------------------------------------------------------- points


def _chosen_bits(index: Tensor, sampling: Sampling) -> Tensor:
    return empty((len(index), cdiv(sampling.num_candidates, 8)), torch.uint8, index.device)


def _row_bytes(sampling: Sampling, dtype: torch.dtype) -> int:
    """Scratch memory of an instance in the forward pass."""
    size = accumulation_dtype(dtype).itemsize
    return sampling.num_candidates * size + sampling.num_uncertain * (4 + size)


def uncertain_points(
    logits: Sequence[Tensor],
    index: Tensor,
    layer_sizes: Sequence[int],
    windows: Tensor,
    image_ids: Tensor,
    seed: Tensor,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    padding: str,
) -> Tensor:
    """Draw the points of all instances: float32 `[N, P, 2]`, the uncertain ones first."""
    sampling = make_sampling(None, windows, image_ids, seed, (num_points, num_candidates, num_uncertain), padding)
    index = index.contiguous()
    points = empty((len(index), num_points, 2), torch.float32, index.device)
    chosen = _chosen_bits(index, sampling)
    blocks = cdiv(num_points, BLOCK)
    with on_device(index):
        for span in spans(logits, layer_sizes, _row_bytes(sampling, logits[0].dtype)):
            choice = choosing.choose(span, index, sampling, chosen)
            choosing.write_points[(span.count * blocks,)](
                index[span.rows], windows, image_ids, *sampling.seed, choice.order,
                points[span.rows], num_points, num_uncertain, blocks, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return points


# ------------------------------------------------------------------------------------------------------- the loss


def mask_loss(
    logits: Sequence[Tensor],
    index: Tensor,
    layer_sizes: Sequence[int],
    targets: Sequence[Tensor],
    encoding: str,
    image_ids: Tensor,
    seed: Tensor,
    points: Tensor | None,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    padding: str,
    target_mode: str,
    focal_alpha: float,
    focal_gamma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy `[N]`, Dice `[N]`, chosen candidates as bits, and the target pixels at the points."""
    data, table, images, windows, ignore = targets
    sampling = make_sampling(points, windows, image_ids, seed, (num_points, num_candidates, num_uncertain), padding)
    index, device, dtype = index.contiguous(), index.device, accumulation_dtype(logits[0].dtype)
    ce, dice = empty((len(index),), dtype, device), empty((len(index),), dtype, device)
    corners = empty((len(index), num_points), dtype if encoding == "values" else torch.uint8, device)
    chosen = _chosen_bits(index, sampling)
    blocks = cdiv(num_points, BLOCK)
    sums = empty((len(index), blocks, losses.NUM_SUMS.value), dtype, device)
    with on_device(index):
        for span in spans(logits, layer_sizes, _row_bytes(sampling, dtype)):
            rows = span.rows
            choice = choosing.choose(span, index, sampling, chosen)
            losses.loss_terms[(span.count * blocks,)](
                span.layers, span.first, index[rows], data, table, images, windows,
                ignore if ignore.numel() else None, image_ids, *sampling.seed, sampling.given(span), *choice,
                corners[rows], sums[rows], num_points, sampling.num_uncertain, blocks,
                *geometry(span.layers[0]), *sampling.strides,
                LAYERS=len(span.layers), ENCODING=_ENCODINGS[encoding], NEAREST=target_mode == "nearest",
                BORDER=sampling.border, ALPHA=focal_alpha, GAMMA=focal_gamma, BLOCK=BLOCK, **focal_options(focal_gamma),
            )  # fmt: skip
        if len(index):
            losses.finish_losses[(cdiv(len(index), 32),)](
                sums, ce, dice, len(index), blocks, BLOCK=32, **{**OPTIONS, "num_warps": 1}
            )
    return ce, dice, chosen, corners


def mask_loss_backward(
    grad_ce: Tensor,
    grad_dice: Tensor,
    chosen: Tensor,
    corners: Tensor,
    needs_grad: Sequence[bool],
    logits: Sequence[Tensor],
    index: Tensor,
    layer_sizes: Sequence[int],
    targets: Sequence[Tensor],
    encoding: str,
    image_ids: Tensor,
    seed: Tensor,
    points: Tensor | None,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    padding: str,
    target_mode: str,
    focal_alpha: float,
    focal_gamma: float,
) -> list[Tensor]:
    """Dense gradients of the logits; an empty tensor for each layer that needs none."""
    _, table, images, windows, _ = targets
    sampling = make_sampling(points, windows, image_ids, seed, (num_points, num_candidates, num_uncertain), padding)
    index, options = index.contiguous(), (_ENCODINGS[encoding], target_mode == "nearest", focal_alpha, focal_gamma)
    saved = (chosen, corners, grad_ce.contiguous(), grad_dice.contiguous(), table, images)
    grads = [empty((0,), layer.dtype, layer.device) for layer in logits]
    with on_device(index):
        loss = scattering.LossGradient(*saved, *options)
        for run in runs(logits, layer_sizes, needs_grad):
            work = scattering.Scatter(index, layer_sizes, run, sampling, False, loss)
            grads[run.first : run.first + len(run.layers)] = work.gradients()
    return grads


# ------------------------------------------------------------------------------------------------ the matching cost


def match_cost(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    encoding: str,
    num_targets: Sequence[int],
    image_ids: Tensor,
    seed: Tensor,
    num_points: int,
    padding: str,
    target_mode: str,
    focal_alpha: float,
    focal_gamma: float,
) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost of all pairs of all images and layers, `[L, B, Q, T_max]`."""
    batch, queries = logits[0].shape[:2]
    device, dtype = logits[0].device, accumulation_dtype(logits[0].dtype)
    widest, num_rows = max(num_targets, default=0), len(logits) * batch * queries
    ce = empty((len(logits), batch, queries, widest), dtype, device)
    dice = torch.empty_like(ce)
    if ce.numel() == 0:
        return ce, dice
    focal = (focal_alpha, focal_gamma)
    with on_device(ce):
        shared = matching.prepare(
            targets, _ENCODINGS[encoding], widest, image_ids, seed, num_points, padding, target_mode == "nearest", dtype
        )
        tile = matching.tile_of(widest, dtype, focal_gamma)
        splits = tile.splits(len(logits) * batch, queries, widest, num_points)
        parts = [empty((splits, num_rows * size), dtype, device) for size in (widest, widest, 1, 1)]
        for run in runs(logits, [0] * len(logits), [True] * len(logits)):
            matching.add_terms(run, shared, parts, widest, num_rows, tile, focal)
        matching.finish_costs[(cdiv(ce.numel(), BLOCK),)](
            *parts, shared.weighted.sum(2), shared.weights.sum(1), targets[2], ce, dice, ce.numel(), splits, num_rows,
            batch, queries, widest, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return ce, dice
