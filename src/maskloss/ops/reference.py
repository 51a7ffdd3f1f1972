"""The operations in plain PyTorch, for any float dtype and device: the definition that every kernel is compared with.

Written to be read, not to be fast: `cpu.py` and `gpu.py` have functions of the same names and arguments. Shapes:
N instances, P points each, K candidates each, L decoder layers of logits `[B, Q, h, w]`. `index` is int64 `[N, 4]`,
rows (layer, image, query, target within its image), sorted by layer; `layer_sizes` counts its rows by layer.
`targets` is what `MaskTargets.tensors` documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from maskloss.points import ALL_TARGETS, CANDIDATES, MATCHER, RANDOM, instance_keys, uniform_points
from maskloss.targets import frames

_CORNERS = (1, 2, 4, 8)
_IGNORED = 16


class Cells(NamedTuple):
    """The four pixels around each point, and where the point lies between them.

    y, x: int64 `[..., P]`, the upper left pixel, -2 or the size where the point is off the map by more than a pixel.
    fy, fx: how far the point lies towards the lower right pixel, in [0, 1).
    """

    y: Tensor
    x: Tensor
    fy: Tensor
    fx: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Everything is summed in float32, and in float64 where the input is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def locate(points: Tensor, height: Tensor | int, width: Tensor | int, padding: str, dtype: torch.dtype) -> Cells:
    """Map points `[..., P, 2]` in [0, 1]^2 to pixels: x * width - 0.5.

    In double precision, where the device has it, the position of a float32 point is exact, and so is its fraction.
    """
    exact = points if points.device.type == "mps" else points.double()
    cells = []
    for coordinate, size in ((exact[..., 1], height), (exact[..., 0], width)):
        position = coordinate * size - 0.5
        if padding == "border":
            position = position.clamp(min=0).clamp(max=size - 1)
        first = position.floor()
        fraction = (position - first).to(dtype)
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
        rounded.append(pixel.clamp(max=size - 1) if padding == "border" else pixel)
    return rounded[0], rounded[1]


def interpolate(corners: Sequence[Tensor], cells: Cells) -> Tensor:
    """Interpolate linearly along x, then along y. The order of the operations is part of the definition."""
    v00, v01, v10, v11 = corners
    top = v00 + cells.fx * (v01 - v00)
    bottom = v10 + cells.fx * (v11 - v10)
    return top + cells.fy * (bottom - top)


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

    if mode == "nearest":
        return read(*nearest(cells, height, width, padding))
    y, x = cells.y, cells.x
    # With border padding the pixel beyond the last one has weight 0; it must not bring in a NaN of its own.
    return interpolate([read(y, x), read(y, x + 1), read(y + 1, x), read(y + 1, x + 1)], cells)


def point_sample(maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Read maps `[M, h, w]`, chosen by index `[N]`, at points `[N, P, 2]`."""
    return sample_planes(maps[index], points, mode, padding)


def scatter_planes(grad: Tensor, points: Tensor, size: tuple[int, int], mode: str, padding: str) -> Tensor:
    """Invert `sample_planes`: spread gradients `[N, P]` over the pixels of planes `[N, h, w]`, in the dtype of grad."""
    height, width = size
    cells = locate(points, height, width, padding, grad.dtype)
    plane = grad.new_zeros(len(grad), height * width)

    def add(y: Tensor, x: Tensor, share: Tensor) -> None:
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        plane.scatter_add_(1, pixel, torch.where(inside, share, 0.0))

    if mode == "nearest":
        add(*nearest(cells, height, width, padding), grad)
    else:
        for dy, fy in ((0, 1 - cells.fy), (1, cells.fy)):
            for dx, fx in ((0, 1 - cells.fx), (1, cells.fx)):
                add(cells.y + dy, cells.x + dx, grad * fy * fx)
    return plane.view(len(grad), height, width)


def point_sample_backward(grad: Tensor, maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str) -> Tensor:
    """Scatter the gradient `[N, P]` of the values to the maps."""
    height, width = maps.shape[1:]
    planes = scatter_planes(grad, points, (height, width), mode, padding)
    total = torch.zeros(maps.shape, dtype=grad.dtype, device=grad.device)
    return total.index_add_(0, index, planes).to(maps.dtype)


def uncertainty(z: Tensor) -> Tensor:
    """Compute U(z) = -|z|, the highest where the sigmoid is near 1/2."""
    return -z.abs()


def choose(z: Tensor, num_uncertain: int) -> Tensor:
    """Choose the candidates with the smallest |z| of each row `[N, K]`: int64 `[N, num_uncertain]`, ascending.

    Compared in float32; ties go to the lower index. A non-finite logit counts as most uncertain, so that it is chosen
    and shows in the loss.
    """
    key = torch.where(z.isfinite(), z.abs().float(), 0.0)
    return key.sort(dim=1, stable=True).indices[:, :num_uncertain].sort(dim=1).values


def into_window(points: Tensor, windows: Tensor) -> Tensor:
    """Map points `[N, P, 2]` of [0, 1)^2 into windows `[N, 4]`: x0, y0, width, height."""
    return points * windows[:, None, 2:] + windows[:, None, :2]


def _known_seed(seed: Tensor, device: torch.device) -> int | Tensor:
    """A seed on the host becomes a number: to copy it to a device would wait for the device."""
    return int(seed) if seed.device.type == "cpu" and device.type != "cpu" else seed.to(device)


def draw_points(
    z_at: Callable[[Tensor], Tensor],
    index: Tensor,
    windows: Tensor,
    image_ids: Tensor,
    seed: Tensor,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
) -> tuple[Tensor, Tensor]:
    """Draw the points of instances of one layer: `[N, P, 2]` and the chosen candidates `[N, num_uncertain]`."""
    layers, images = index[:, 0], index[:, 1]
    keys = instance_keys(_known_seed(seed, index.device), image_ids[images], index[:, 3])
    window = windows[images]
    uniform = into_window(uniform_points(keys, num_points - num_uncertain, layers, RANDOM), window)
    if num_uncertain == 0:
        return uniform, index.new_empty(len(index), 0)
    candidates = into_window(uniform_points(keys, num_candidates, layers, CANDIDATES), window)
    chosen = choose(z_at(candidates), num_uncertain)
    uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([uncertain, uniform], dim=1), chosen


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
    drawn = [
        draw_points(
            _Sampler(planes, padding),
            rows,
            windows,
            image_ids,
            seed,
            num_points,
            num_candidates,
            num_uncertain,
        )[0]
        for planes, rows in _layers(logits, index, layer_sizes)
    ]
    return torch.cat(drawn)


@dataclass(frozen=True)
class _Sampler:
    planes: Tensor
    padding: str

    def __call__(self, points: Tensor) -> Tensor:
        return sample_planes(self.planes, points, "bilinear", self.padding)


def _layers(logits: Sequence[Tensor], index: Tensor, layer_sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Pair the matched planes `[n, h, w]` of each layer with their rows of the index."""
    return [
        (layer[rows[:, 1], rows[:, 2]], rows)
        for layer, rows in zip(logits, index.split(list(layer_sizes)), strict=True)
    ]


def ignored(points: Tensor, images: Tensor, ignore: Tensor) -> Tensor:
    """Tell which points `[n, P, 2]` lie in a pixel that the ignore region of their image (rows `[n, 11]`) covers."""
    if ignore.numel() == 0:
        return torch.zeros(points.shape[:-1], dtype=torch.bool, device=points.device)
    size = images[:, frames.IGNORE_SIZE, None]
    # From where the region begins to the size of the frame, in this order.
    region = images[:, frames.IGNORE_BASE : frames.IMAGE_W + 1].unbind(1)
    offset, stride, height, width, frame_h, frame_w = (column[:, None] for column in region)
    y = (points[..., 1] * frame_h).nan_to_num().long().clamp(min=0).clamp(max=frame_h - 1)
    x = (points[..., 0] * frame_w).nan_to_num().long().clamp(min=0).clamp(max=frame_w - 1)
    inside = (size > 0) & (y < height) & (x < width)
    address = torch.where(inside, offset + y * stride + (x >> 3), 0)
    return inside & ((ignore[address] >> (x & 7)) & 1).bool()


def _entries(image: Tensor, target: Tensor, table: Tensor, images: Tensor) -> Tensor:
    """Look up the rows of targets, offsets counted from where the data begin. A target too many gets the first row."""
    described = images[image]
    real = target < described[:, frames.COUNT]
    rows = table[torch.where(real, described[:, frames.FIRST] + target, 0)]
    base = torch.where(real, described[:, frames.BASE], 0)
    return torch.cat([rows[:, :1] + base[:, None], rows[:, 1:]], dim=1)


def target_cells(points: Tensor, rows: Tensor, padding: str, dtype: torch.dtype) -> Cells:
    """Locate points `[n, P, 2]` in the frames of targets, given by their rows `[n, 9]` of the table."""
    return locate(points, rows[:, 6, None], rows[:, 7, None], padding, dtype)


def read_targets(
    cells: Cells,
    rows: Tensor,
    data: Tensor,
    encoding: str,
    padding: str,
    target_mode: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Read the target pixels around each point: four tensors `[n, P]`, or one for target_mode "nearest"."""
    offset, stride, top, left, height, width, frame_h, frame_w, ids = (column[:, None] for column in rows.unbind(1))

    def read(y: Tensor, x: Tensor) -> Tensor:
        y, x = y - top, x - left
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        address = offset + y * stride + ((x >> 3) if encoding == "bits" else x)
        found = data[torch.where(inside, address, 0)] if data.numel() else torch.zeros_like(address)
        if encoding == "bits":
            found = (found >> (x & 7)) & 1
        elif encoding == "labels":
            found = found == ids
        return torch.where(inside, found.to(dtype), 0.0)

    if target_mode == "nearest":
        return [read(*nearest(cells, frame_h, frame_w, padding))]
    y, x = cells.y, cells.x
    return [read(y, x), read(y, x + 1), read(y + 1, x), read(y + 1, x + 1)]


def target_values(corners: Sequence[Tensor], cells: Cells) -> Tensor:
    """Turn what `read_targets` read into the target values t in [0, 1]."""
    return corners[0] if len(corners) == 1 else interpolate(corners, cells)


def pack_corners(corners: Sequence[Tensor], cells: Cells, skip: Tensor, encoding: str) -> Tensor:
    """Keep what the backward pass needs of the targets: four pixels and the ignore flag in a byte, or soft values."""
    if encoding == "values":
        return torch.where(skip, -1.0, target_values(corners, cells))
    packed = skip.to(torch.uint8) * _IGNORED
    for corner, bit in zip(corners, _CORNERS, strict=False):
        packed += corner.to(torch.uint8) * bit
    return packed


def unpack_corners(packed: Tensor, cells: Cells, target_mode: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Invert `pack_corners`: target values and ignore flags, both `[n, P]`."""
    if packed.dtype != torch.uint8:
        return packed.clamp(min=0), packed < 0
    count = 1 if target_mode == "nearest" else 4
    corners = [((packed & bit) != 0).to(dtype) for bit in _CORNERS[:count]]
    return target_values(corners, cells), (packed & _IGNORED) != 0


def bce(z: Tensor, t: Tensor) -> Tensor:
    """Compute -[t log s(z) + (1 - t) log(1 - s(z))] in its stable form."""
    return z.clamp(min=0) - z * t + (-z.abs()).exp().log1p()


def focal(z: Tensor, t: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute the focal loss a_t (1 - p_t)^gamma bce(z, t); alpha < 0 leaves a_t out, gamma < 0 is plain BCE."""
    loss = bce(z, t)
    if gamma < 0:
        return loss
    s = z.sigmoid()
    loss = loss * (1 - (s * t + (1 - s) * (1 - t))) ** gamma
    return loss if alpha < 0 else loss * (alpha * t + (1 - alpha) * (1 - t))


def dice(z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """Compute 1 - (2 sum s t + 1) / (sum s + sum t + 1) over the last dimension, with point weights w."""
    s = z.sigmoid() * w
    return 1 - (2 * (s * t).sum(-1) + 1) / (s.sum(-1) + (t * w).sum(-1) + 1)


def instance_losses(z: Tensor, t: Tensor, w: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice of each instance `[n]` from logits, targets and weights at its points `[n, P]`."""
    ce = (focal(z, t, alpha, gamma) * w).sum(-1) / w.sum(-1).clamp(min=1)
    return ce, dice(z, t, w)


def instance_slopes(z: Tensor, t: Tensor, w: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Differentiate `instance_losses` by the logits: d ce / dz and d dice / dz at every point, `[n, P]`."""
    s = z.sigmoid()
    slope = s - t
    if gamma >= 0:
        miss = 1 - (s * t + (1 - s) * (1 - t))
        # miss^(gamma - 1) is infinite at a perfect prediction, where the loss that it multiplies is 0.
        steep = torch.where(miss > 0, gamma * miss ** (gamma - 1) * bce(z, t) * s * (1 - s) * (2 * t - 1), 0.0)
        slope = miss**gamma * slope - steep
        slope = slope if alpha < 0 else slope * (alpha * t + (1 - alpha) * (1 - t))
    d_ce = w * slope / w.sum(-1, keepdim=True).clamp(min=1)
    overlap = 2 * (w * s * t).sum(-1, keepdim=True) + 1
    area = (w * s).sum(-1, keepdim=True) + (w * t).sum(-1, keepdim=True) + 1
    d_dice = w * s * (1 - s) * (overlap - 2 * t * area) / area**2
    return d_ce, d_dice


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
    """Draw points, read logits and targets there, and sum up the losses of each instance.

    Returns:
        Cross-entropy `[N]`, Dice `[N]`, and what the backward pass needs: the chosen candidates as bits
        `[N, ceil(K / 8)]` and the target pixels at the points `[N, P]`.
    """
    data, table, images, windows, ignore = targets
    parts = []
    given = [None] * len(logits) if points is None else points.split(list(layer_sizes))
    for (planes, rows), at in zip(_layers(logits, index, layer_sizes), given, strict=True):
        dtype = accumulation_dtype(planes.dtype)
        z_at = _Sampler(planes, padding)
        chosen = rows.new_empty(len(rows), 0)
        if at is None:
            at, chosen = draw_points(z_at, rows, windows, image_ids, seed, num_points, num_candidates, num_uncertain)
        z = z_at(at)
        entries = _entries(rows[:, 1], rows[:, 3], table, images)
        cells = target_cells(at, entries, padding, dtype)
        corners = read_targets(cells, entries, data, encoding, padding, target_mode, dtype)
        skip = ignored(at, images[rows[:, 1]], ignore)
        losses = instance_losses(z, target_values(corners, cells), (~skip).to(dtype), focal_alpha, focal_gamma)
        bits = _pack_bits(chosen, num_candidates if points is None and num_uncertain else 0)
        parts.append((*losses, bits, pack_corners(corners, cells, skip, encoding)))
    ce, dice_, chosen, packed = (torch.cat(part) for part in zip(*parts, strict=True))
    return ce, dice_, chosen, packed


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
    """Scatter the gradient of `mask_loss` to the logits of the layers that need one; others get an empty tensor."""
    table, images, windows = targets[1:4]
    sizes = list(layer_sizes)
    given = [None] * len(logits) if points is None else points.split(sizes)
    saved = zip(grad_ce.split(sizes), grad_dice.split(sizes), chosen.split(sizes), corners.split(sizes), strict=True)
    grads = []
    for layer, rows, at, need, (d_ce, d_dice, bits, packed) in zip(
        logits, index.split(sizes), given, needs_grad, saved, strict=True
    ):
        if not need:
            grads.append(layer.new_empty(0))
            continue
        if at is None:
            ids = _unpack_bits(bits, num_uncertain)
            at = _redraw(ids, rows, windows, image_ids, seed, num_points, num_candidates, num_uncertain)
        planes = layer[rows[:, 1], rows[:, 2]]
        z = sample_planes(planes, at, "bilinear", padding)
        cells = target_cells(at, _entries(rows[:, 1], rows[:, 3], table, images), padding, z.dtype)
        t, skip = unpack_corners(packed, cells, target_mode, z.dtype)
        slopes = instance_slopes(z, t, (~skip).to(z.dtype), focal_alpha, focal_gamma)
        d_z = d_ce[:, None] * slopes[0] + d_dice[:, None] * slopes[1]
        # A gradient scaler looks at gradients: a non-finite logit must give a non-finite one, unless its instance
        # weighs nothing.
        live = ((d_ce != 0) | (d_dice != 0))[:, None]
        d_z = torch.where(live, d_z + 0 * z, 0.0)
        d_planes = scatter_planes(d_z, at, (layer.shape[2], layer.shape[3]), "bilinear", padding)
        grad = torch.zeros(layer.shape, dtype=z.dtype, device=z.device)
        grads.append(grad.index_put_((rows[:, 1], rows[:, 2]), d_planes, accumulate=True).to(layer.dtype))
    return grads


def _redraw(
    chosen: Tensor,
    index: Tensor,
    windows: Tensor,
    image_ids: Tensor,
    seed: Tensor,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
) -> Tensor:
    """Draw the points again whose candidates are known."""

    def known(candidates: Tensor) -> Tensor:
        keep = torch.ones(candidates.shape[:-1], device=candidates.device)
        return keep.scatter(1, chosen, 0.0)

    return draw_points(known, index, windows, image_ids, seed, num_points, num_candidates, num_uncertain)[0]


def _pack_bits(chosen: Tensor, num_candidates: int) -> Tensor:
    """Turn indices `[n, k]` into a little-endian bit mask uint8 `[n, ceil(K / 8)]`."""
    width = (num_candidates + 7) // 8
    mask = torch.zeros(len(chosen), width * 8, dtype=torch.uint8, device=chosen.device)
    mask.scatter_(1, chosen, 1)
    shifts = torch.arange(8, dtype=torch.uint8, device=chosen.device)
    return (mask.view(len(chosen), width, 8) << shifts).sum(-1, dtype=torch.uint8)


def _unpack_bits(bits: Tensor, num_chosen: int) -> Tensor:
    """Invert `_pack_bits`: int64 `[n, num_chosen]`, ascending."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    mask = (bits[..., None] >> shifts) & 1
    return mask.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :num_chosen]


def match_points(windows: Tensor, image_ids: Tensor, seed: Tensor, num_points: int) -> Tensor:
    """Draw the matcher's uniform points, shared by all queries and layers of an image: `[B, P, 2]`."""
    everything = torch.full_like(image_ids, ALL_TARGETS)
    keys = instance_keys(_known_seed(seed, image_ids.device), image_ids, everything)
    return into_window(uniform_points(keys, num_points, torch.zeros_like(image_ids), MATCHER), windows)


def pairwise_costs(z: Tensor, t: Tensor, w: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy, Dice `[..., Q, T]` of all pairs: logits `[..., Q, P]`, targets `[..., T, P]`, weights `[..., P]`.

    bce(z, t) = softplus(z) - z t is linear in t, so a matrix product does it for all pairs at once. The focal cost
    is a_1 (1 - s)^gamma softplus(-z) t + a_0 s^gamma softplus(z) (1 - t), linear as well.
    """
    s = z.sigmoid()
    w = w.unsqueeze(-2)
    count = w.sum(-1, keepdim=True).clamp(min=1)
    weighted = (t * w).transpose(-1, -2)
    negative = softplus(z)
    if gamma < 0:
        slope = z
    else:
        on, off = (1.0, 1.0) if alpha < 0 else (alpha, 1 - alpha)
        negative, positive = off * s**gamma * negative, on * (1 - s) ** gamma * softplus(-z)
        slope = negative - positive
    ce = ((negative * w).sum(-1, keepdim=True) - slope @ weighted) / count
    area = (s * w).sum(-1, keepdim=True) + weighted.sum(-2, keepdim=True)
    return ce, 1 - (2 * (s @ weighted) + 1) / (area + 1)


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
    """Compute both mask terms of the matching cost of all pairs of all images and layers, `[L, B, Q, T_max]`."""
    data, table, images, windows, ignore = targets
    batch, widest = len(num_targets), max(num_targets, default=0)
    column = torch.arange(widest, device=table.device)
    real = column < images[:, frames.COUNT, None]
    everyone = torch.arange(batch, device=table.device)
    rows = _entries(everyone.repeat_interleave(widest), column.repeat(batch), table, images)
    points = match_points(windows, image_ids, seed, num_points)
    dtype = accumulation_dtype(logits[0].dtype)
    cells = target_cells(points.repeat_interleave(widest, dim=0), rows, padding, dtype)
    t = target_values(read_targets(cells, rows, data, encoding, padding, target_mode, dtype), cells)
    w = (~ignored(points, images, ignore)).to(dtype)
    ce, overlap = [], []
    for layer in logits:
        z = sample_planes(layer, points[:, None], "bilinear", padding)
        # Mixed precision around the call must not round the matrix products.
        with torch.autocast(layer.device.type, enabled=False):
            costs = pairwise_costs(z, t.view(batch, widest, num_points), w, focal_alpha, focal_gamma)
        ce.append(torch.where(real[:, None], costs[0], 0.0))
        overlap.append(torch.where(real[:, None], costs[1], 0.0))
    return torch.stack(ce), torch.stack(overlap)
