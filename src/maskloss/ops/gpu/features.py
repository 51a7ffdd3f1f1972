"""A Triton kernel that samples features at the points of the matching cost, for masks that are products."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from maskloss._abi import Term

from .cost import Plan, cells_of
from .launch import OPTIONS, cdiv, empty, geometry, on_device
from .sampling import sample_cells

# What one program reads.
_CHANNELS, _POINTS = 16, 64


@triton.jit
def sample_channels(
    maps, cells, fractions, sampled, count, num_points, blocks, channels,
    height, width, stride_b, stride_d, stride_y, stride_x,
    CHANNELS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """sampled[b, d, i] = map d of image b at its i-th sorted point. One program: CHANNELS maps, POINTS points.

    Programs that run together go through the points of the same maps, which then stay in the cache.
    """
    program = tl.program_id(0)
    i = program % blocks * POINTS + tl.arange(0, POINTS)
    program = program // blocks
    channel_blocks = tl.cdiv(channels, CHANNELS)
    channel = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    image = (program // channel_blocks).to(tl.int64)
    keep = i < num_points
    ACC: tl.constexpr = fractions.dtype.element_ty
    place = image * num_points + i
    y = tl.load(cells + place, mask=keep, other=0)[None, :]
    x = tl.load(cells + count + place, mask=keep, other=0)[None, :]
    fy = tl.load(fractions + place, mask=keep, other=0.0)[None, :]
    fx = tl.load(fractions + count + place, mask=keep, other=0.0)[None, :]
    base = maps + image * stride_b + channel.to(tl.int64)[:, None] * stride_d
    real = keep[None, :] & (channel < channels)[:, None]
    value = sample_cells(base, y, x, fy, fx, height, width, stride_y, stride_x, real, ACC)
    row = (image * channels + channel)[:, None] * num_points
    tl.store(sampled + row + i[None, :], value.to(sampled.dtype.element_ty), mask=real)


def sample_features(plan: Plan, features: Tensor, term: Term) -> Tensor:  # noqa: ARG001 (the plan knows)
    """Read features `[B, D, h, w]` at the points of a plan, in its order: `[B, D, P]`, in their own dtype."""
    batch, channels = features.shape[:2]
    sampled = empty((batch, channels, plan.num_points), features.dtype, features.device)
    blocks = cdiv(plan.num_points, _POINTS)
    with on_device(features):
        cells, fractions = cells_of(plan, features)
        sample_channels[(batch * cdiv(channels, _CHANNELS) * blocks,)](
            features, cells, fractions, sampled, plan.order.numel(), plan.num_points, blocks, channels,
            *geometry(features), CHANNELS=_CHANNELS, POINTS=_POINTS, **OPTIONS,
        )  # fmt: skip
    return sampled
