"""Where points lie, how maps are read there, and which points are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maskloss._abi import (
    ALL_TARGETS,
    CANDIDATES,
    IMAGE,
    LAYER,
    MATCHER,
    RANDOM,
    TARGET,
    WINDOW_W,
    Draw,
    X,
    Y,
    accumulation_dtype,
    is_border,
    is_nearest,
)
from maskloss.points import draw_layout, instance_keys

from .formulas import interpolate, position, uncertainty


class Cells(NamedTuple):
    """The four pixels around each point, and where the point lies between them.

    y, x: int64 `[..., P]`, the upper left pixel, -2 or the size where the point is off the map by more than a pixel.
    fy, fx: how far the point lies towards the lower right pixel, in [0, 1).
    """

    y: Tensor
    x: Tensor
    fy: Tensor
    fx: Tensor


def locate(points: Tensor, height: Tensor | int, width: Tensor | int, padding: str, dtype: torch.dtype) -> Cells:
    """Map points `[..., P, 2]` in [0, 1]^2 to pixels.

    In double precision, where the device has it, the position of a float32 point is exact, and so is its fraction.
    """
    exact = points.float() if points.device.type == "mps" else points.double()
    cells = []
    for coordinate, size in ((exact[..., Y], height), (exact[..., X], width)):
        at = position(coordinate, size)
        if is_border(padding):
            at = at.clamp(min=0).clamp(max=size - 1)
        first = at.floor()
        fraction = (at - first).to(dtype)
        first = first.nan_to_num(nan=-2.0).clamp(min=-2).clamp(max=size)
        cells.append((first.long(), fraction))
    (y, fy), (x, fx) = cells
    return Cells(y, x, fy, fx)


def nearest(cells: Cells, height: Tensor | int, width: Tensor | int, padding: str) -> tuple[Tensor, Tensor]:
    """Round positions half to even, as `grid_sample` does."""
    rounded = []
    for first, fraction, size in ((cells.y, cells.fy, height), (cells.x, cells.fx, width)):
        up = (fraction > 0.5) | ((fraction == 0.5) & (first % 2 == 1))
        pixel = first + up.long()
        rounded.append(pixel.clamp(max=size - 1) if is_border(padding) else pixel)
    return rounded[0], rounded[1]


def sample_planes(planes: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Read planes `[..., h, w]` at points `[..., P, 2]` (leading dimensions broadcast); gradient to the planes."""
    height, width = planes.shape[-2:]
    dtype = accumulation_dtype(planes.dtype)
    cells = locate(points, height, width, padding, dtype)
    flat = planes.flatten(-2)

    def read(y: Tensor, x: Tensor) -> Tensor:
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        values = flat.gather(-1, pixel.expand(*flat.shape[:-1], -1)).to(dtype)
        return torch.where(inside, values, values.new_zeros(()))

    if is_nearest(mode):
        return read(*nearest(cells, height, width, padding))
    y, x = cells.y, cells.x
    # With border padding the pixel beyond the last one has weight 0; it must not bring in a NaN of its own.
    corners = read(y, x), read(y, x + 1), read(y + 1, x), read(y + 1, x + 1)
    return interpolate(corners, cells.fx, cells.fy)


def scatter_planes(grad: Tensor, points: Tensor, size: tuple[int, int], mode: str, padding: str) -> Tensor:
    """Invert `sample_planes`: spread gradients `[N, P]` over the pixels of planes `[N, h, w]`, in the dtype of grad."""
    height, width = size
    cells = locate(points, height, width, padding, grad.dtype)
    plane = grad.new_zeros(len(grad), height * width)

    def add(y: Tensor, x: Tensor, share: Tensor) -> None:
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        plane.scatter_add_(1, pixel, torch.where(inside, share, 0.0))

    if is_nearest(mode):
        add(*nearest(cells, height, width, padding), grad)
    else:
        for dy, fy in ((0, 1 - cells.fy), (1, cells.fy)):
            for dx, fx in ((0, 1 - cells.fx), (1, cells.fx)):
                add(cells.y + dy, cells.x + dx, grad * fy * fx)
    return plane.view(len(grad), height, width)


# ------------------------------------------------------------------------------------------------------ drawing points


def choose(z: Tensor, num_uncertain: int) -> Tensor:
    """Choose the candidates with the highest U(z) of each row `[N, K]`: int64 `[N, num_uncertain]`, ascending.

    Compared in float32; ties go to the lower index. A non-finite logit counts as most uncertain, so that it is chosen
    and shows in the loss.
    """
    key = torch.where(z.isfinite(), -uncertainty(z).float(), 0.0)
    return key.sort(dim=1, stable=True).indices[:, :num_uncertain].sort(dim=1).values


def into_window(points: Tensor, windows: Tensor) -> Tensor:
    """Map points `[N, P, 2]` of [0, 1)^2 into windows `[N, 4]`."""
    return points * windows[:, None, WINDOW_W:] + windows[:, None, :WINDOW_W]


def known_seed(seed: Tensor, device: torch.device) -> int | Tensor:
    """A seed on the host becomes a number: to copy it to a device would wait for the device."""
    return int(seed) if seed.device.type == "cpu" and device.type != "cpu" else seed.to(device)


def draw_points(z_at: Callable[[Tensor], Tensor], index: Tensor, windows: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Draw the points of instances: `[N, P, 2]` and the chosen candidates `[N, num_uncertain]`."""
    layers, images = index[:, LAYER], index[:, IMAGE]
    keys = instance_keys(known_seed(draw.seed, index.device), draw.image_ids[images], index[:, TARGET])
    window = windows[images]
    num_random = draw.num_points - draw.num_uncertain
    uniform = into_window(draw_layout(draw.layout, keys, num_random, layers, RANDOM), window)
    if draw.num_uncertain == 0:
        return uniform, index.new_empty(len(index), 0)
    candidates = into_window(draw_layout(draw.layout, keys, draw.num_candidates, layers, CANDIDATES), window)
    chosen = choose(z_at(candidates), draw.num_uncertain)
    uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, candidates.shape[2]))
    return torch.cat([uncertain, uniform], dim=1), chosen


def redraw_points(chosen: Tensor, index: Tensor, windows: Tensor, draw: Draw) -> Tensor:
    """Draw the points again whose candidates are known."""

    def known(candidates: Tensor) -> Tensor:
        keep = torch.ones(candidates.shape[:-1], device=candidates.device)
        return keep.scatter(1, chosen, 0.0)

    return draw_points(known, index, windows, draw)[0]


def match_points(windows: Tensor, draw: Draw) -> Tensor:
    """Draw the matcher's uniform points, shared by all queries and layers of an image: `[B, P, 2]`."""
    ids = draw.image_ids
    keys = instance_keys(known_seed(draw.seed, ids.device), ids, torch.full_like(ids, ALL_TARGETS))
    return into_window(draw_layout(draw.layout, keys, draw.num_points, torch.zeros_like(ids), MATCHER), windows)
