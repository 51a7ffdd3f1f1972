"""The operations on CUDA and ROCm tensors, as Triton kernels; `maskloss.ops.reference` defines what they compute.

Nothing here waits for the device. As in `cpu`, loss and matching cost have a file of kernels (`loss_kernels`,
`cost_kernels`) and one that launches them (`loss`, `cost`). `choose`, `scatter` and `features` have both. What all of
them share is in `sampling` (on the device) and `launch` (on the host). Layers of one geometry share their launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskloss._abi import (
    INDEX_COLUMNS,
    POINT_COLUMNS,
    QUERY,
    Draw,
    Instances,
    accumulation_dtype,
    is_border,
    is_nearest,
)

from . import choose as choosing
from .assignment import assign as assign
from .cost import join_frames, match_cost, match_plan, row_costs
from .features import sample_features
from .launch import (
    BLOCK,
    OPTIONS,
    Sampling,
    Span,
    cdiv,
    empty,
    float_points,
    geometry,
    make_sampling,
    on_device,
    spans,
)
from .loss import mask_loss, mask_loss_backward, plane_gradients
from .scatter import Scatter

__all__ = [
    "join_frames", "mask_loss", "mask_loss_backward", "match_cost", "match_plan", "plane_gradients", "point_sample",
    "point_sample_backward", "row_costs", "sample_features", "uncertain_points",
]  # fmt: skip


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
        work = Scatter(_map_rows(index), [len(index)], run, sampling, is_nearest(mode), values)
        return work.gradients()[0].view(maps.shape)


# --------------------------------------------------------------------------------------------------------- points


def uncertain_points(instances: Instances, draw: Draw, windows: Tensor, padding: str) -> Tensor:
    """Draw the points of all instances: float32 `[N, P, 2]`, the uncertain ones first."""
    logits, index, layer_sizes = instances
    index, num_points = index.contiguous(), draw.num_points
    sampling = make_sampling(draw, windows, padding)
    points = empty((len(index), num_points, POINT_COLUMNS), torch.float32, index.device)
    chosen = choosing.chosen_bits(index, sampling)
    blocks = cdiv(num_points, BLOCK)
    with on_device(index):
        for span in spans(logits, layer_sizes, choosing.row_bytes(sampling, logits[0].dtype)):
            choice = choosing.choose(span, index, sampling, chosen)
            choosing.write_points[(span.count * blocks,)](
                index[span.rows], *sampling.source, choice.order, points[span.rows],
                num_points, sampling.num_uncertain, blocks, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return points
