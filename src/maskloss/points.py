"""Where the loss looks: numbers and kinds of points, and the counter-based generator that draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from maskloss._abi import (
    CELL_BITS,
    DEPTH_STREAM,
    INVERSE_BITS,
    LAYOUTS,
    POSITION_SHIFT,
    STREAM_SHIFT,
    THREEFRY_PARITY,
    THREEFRY_ROTATIONS,
)
from maskloss._numbers import check_integer, check_number, is_float
from maskloss.errors import Cause, check_device, check_layout, describe, reported_init

# Up to here row numbers follow from 32-bit integers on every backend, and rounding moves no point by 2^-24.
MOST_CELLS = 1 << 20

_MASK = 0xFFFFFFFF


@reported_init
@dataclass(frozen=True)
class PointSampling:
    """How the points of an instance are drawn: the most uncertain of many candidates, and uniform ones.

        num_candidates = int(oversample_ratio * num_points)
        num_uncertain  = floor(importance_ratio * num_points)
        num_random     = num_points - num_uncertain

    `num_candidates` points are drawn uniformly in [0, 1]^2 and the logits are sampled there; the `num_uncertain` with
    the smallest |logit| are kept, and `num_random` fresh uniform points are added.

    In the layout "independent" each uniform point is drawn on its own. "stratified" divides the square into one
    equal-area cell per point and draws one point in each, for candidates and uniform points alike. Expectations are
    unchanged, and a quarter of the points gives about the same variance. See `Strata` for the cells.

    Args:
        num_points: P, points per instance, at least 1. Default 12544 = 112^2.
        oversample_ratio: k, candidates per point, finite and at least 1. Default 3.
        importance_ratio: alpha, the share of uncertain points, in [0, 1]. Default 0.75.
        layout: "independent" (default) or "stratified", which takes at most 2^20 points or candidates.

    Raises:
        MaskLossError: a value outside its range.

    Source:
        PointRend (Kirillov et al., 2020), section 3.1, with the values of Mask2Former (Cheng et al., 2022), section
        3.2.2. Both draw independent points; stratified sampling is as old as survey statistics (Neyman, 1934).

    Example:
        >>> sampling = PointSampling(num_points=100)
        >>> sampling.num_candidates, sampling.num_uncertain, sampling.num_random
        (300, 75, 25)
    """

    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_ratio: float = 0.75
    layout: str = "independent"

    def __post_init__(self) -> None:
        """Check the values, and keep plain numbers."""
        hint = "take at least one point per instance; 12544 is usual"
        object.__setattr__(self, "num_points", check_integer("num_points", self.num_points, 1, hint=hint))
        hint = "there must be enough candidates to choose from; 3.0 is usual"
        object.__setattr__(
            self, "oversample_ratio", check_number("oversample_ratio", self.oversample_ratio, 1, hint=hint)
        )
        hint = "it is the share of uncertain points; 0.75 is usual, 0 draws all points uniformly"
        object.__setattr__(
            self, "importance_ratio", check_number("importance_ratio", self.importance_ratio, 0, 1, hint=hint)
        )
        if not isinstance(self.layout, str) or self.layout not in LAYOUTS:
            raise Cause(
                f"layout must be one of {', '.join(LAYOUTS)}",
                f"layout={describe(self.layout)}",
                f"{LAYOUTS[0]!r} is the default",
            )
        most = self.num_candidates if self.num_uncertain else self.num_points
        if self.layout == "stratified" and most > MOST_CELLS:
            raise Cause(
                f"a stratified layout has at most {MOST_CELLS} cells",
                f"num_points={self.num_points}, oversample_ratio={self.oversample_ratio} ask for {most}",
                'take fewer points, or layout="independent"',
            )

    @property
    def num_uncertain(self) -> int:
        """Points taken from the candidates: floor(importance_ratio * num_points)."""
        return int(self.importance_ratio * self.num_points)

    @property
    def num_random(self) -> int:
        """Fresh uniform points: num_points - num_uncertain."""
        return self.num_points - self.num_uncertain

    @property
    def num_candidates(self) -> int:
        """Candidates that are drawn for the uncertain part: int(oversample_ratio * num_points)."""
        return int(self.oversample_ratio * self.num_points)


def draw_seed(
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the 64-bit seed of a step as an int64 tensor with one element.

    Args:
        seed: the seed itself: an integer in [-2^63, 2^64), or an int64 tensor with one element on any device, which
            is returned as it is, so that a captured CUDA graph can be given a new seed in place.
        generator: where to draw a seed from if none is given. Default: torch's default CPU generator.
        device: where it will be used. Default None: anywhere.

    Returns:
        int64 `[]`; the kernels read its 64 bits as an unsigned number.

    Raises:
        MaskLossError: seed and generator are both given, the seed is not one 64-bit integer, or it is neither on the
            CPU nor on `device`.

    Example:
        >>> draw_seed(7)
        tensor(7)
    """
    if seed is not None and generator is not None:
        raise Cause("give seed or generator, not both", "both were given", "leave one of them out")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise Cause("generator must be a torch.Generator", f"got {describe(generator)}", "seed= takes a number")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise Cause(
                "a seed tensor must hold one int64",
                f"got {describe(seed)}",
                "use torch.randint(2**63 - 1, (), dtype=torch.int64)",
            )
        return _reachable(seed.reshape(()), device)
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise Cause("seed must be a 64-bit integer", f"seed={describe(seed)}", "use a whole number in [0, 2**64)")
        return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")
    source = "cpu" if generator is None else generator.device
    drawn = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator, device=source)
    return _reachable(drawn, device)


def _reachable(seed: Tensor, device: torch.device | None) -> Tensor:
    if device is not None and seed.device.type != "cpu" and seed.device != device:
        raise Cause(
            "a seed or generator must be on the CPU or on the device of the logits",
            f"it is on {seed.device}, the logits on {device}",
            "leave it on the CPU, unless a captured graph is to read it",
        )
    return seed


def check_points(points: Tensor, count: int, device: torch.device, columns: int = 2) -> None:
    """Raise if points are not float `[count, P, columns]` on the given device."""
    check_coordinates(points, f"[N, P, {columns}]", device)
    if points.shape[0] != count:
        raise Cause(
            "there must be points for every instance",
            f"{count} instances but points {list(points.shape)}",
            f"give [N, P, {columns}] with P at least 1",
        )


def check_coordinates(points: Tensor, shape: str, device: torch.device) -> None:
    """Raise unless points are float of the shape, `[N, P, 2]`, `[N, P, 3]` or `[..., P, 2]`, with P at least 1."""
    check_layout("points", points)
    names = "(x, y, z)" if shape.endswith("3]") else "(x, y)"
    fits = isinstance(points, Tensor) and points.ndim >= 2 and (points.ndim == 3 or "..." in shape)
    if not fits or points.shape[-1] != names.count(",") + 1 or not is_float(points):
        raise Cause(f"points must be float {shape}", f"got {describe(points)}", f"the last dimension holds {names}")
    if points.shape[-2] < 1:
        raise Cause("there must be points for every instance", f"got points {list(points.shape)}", f"give {shape}")
    check_device("points", points.device, device)


def threefry2x32(key0: int | Tensor, key1: int | Tensor, counter0: Tensor, counter1: Tensor) -> tuple[Tensor, Tensor]:
    """Encrypt a 64-bit counter with a 64-bit key: Threefry-2x32 with 20 rounds.

    A random number is a pure function of key and counter: nothing is stored, and every device, thread count and order
    of evaluation gives the same.

    Args:
        key0: low word of the key, a number or int64 tensor with values in [0, 2^32); the four arguments broadcast.
        key1: high word of the key.
        counter0: low word of the counter.
        counter1: high word of the counter.

    Returns:
        Two int64 tensors of the broadcast shape, with values in [0, 2^32).

    Source:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and the Random123 distribution. The
        32-bit words live in int64 tensors because torch has neither uint32 arithmetic nor a logical shift.

    Example:
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [hex(int(word)) for word in threefry2x32(zero, zero, zero, zero)]
        ['0x6b200159', '0x99ba4efe']
    """
    schedule = (key0, key1, key0 ^ key1 ^ THREEFRY_PARITY)
    x0 = (counter0 + key0) & _MASK
    x1 = (counter1 + key1) & _MASK
    for group in range(5):
        for rotation in THREEFRY_ROTATIONS[group % 2]:
            x0 = (x0 + x1) & _MASK
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) & _MASK ^ x0
        x0 = (x0 + schedule[(group + 1) % 3]) & _MASK
        x1 = (x1 + schedule[(group + 2) % 3] + (group + 1)) & _MASK
    return x0, x1


def instance_keys(seed: int | Tensor, image_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Derive one generator key per instance from (seed, global image number, target number).

    Args:
        seed: a 64-bit integer, or int64 `[]` on the device of the others.
        image_ids: int64 `[N]`, global number of each instance's image, in [0, 2^32).
        targets: int64 `[N]`, index of each instance's target within its image, in [0, 2^32).

    Returns:
        Two int64 `[N]` tensors: low and high word of the keys.
    """
    return threefry2x32(seed & _MASK, (seed >> 32) & _MASK, image_ids & _MASK, targets & _MASK)


def uniform_points(keys: tuple[Tensor, Tensor], num_points: int, layers: Tensor, stream: int) -> Tensor:
    """Draw uniform points in [0, 1)^2, on a grid of 2^-24.

    Point i of an instance is threefry(instance key, counter = (i, layer + 2^16 * stream)); the top 24 bits of its two
    words are x and y.

    Args:
        keys: two int64 `[N]` tensors, from `instance_keys`.
        num_points: points per instance.
        layers: int64 `[N]`, decoder layer of each instance, in [0, 2^16).
        stream: which of an instance's draws, in [0, 2^16).

    Returns:
        float32 `[N, num_points, 2]`, (x, y); every value is exact, so it is the same on every device.
    """
    counter = torch.arange(num_points, device=keys[0].device)
    words = threefry2x32(keys[0][:, None], keys[1][:, None], counter, layers[:, None] | (stream << STREAM_SHIFT))
    return torch.stack([(word >> 8).to(torch.float32) for word in words], dim=-1) * 2.0**-24


class Strata(NamedTuple):
    """K cells of equal area that tile the unit square, in rows, and what the position of a point is computed with.

    There are S = floor(sqrt(K)) rows. Row r has the cells f_r to f_(r + 1) - 1, where f_r = floor(r K / S), so n_r =
    f_(r + 1) - f_r of them, which is floor(K / S) or one more. Its cells are 1 / n_r wide and n_r / K high:

        row of cell i  = floor(((i + 1) S - 1) / K)
        point in it    = ((i - f_r + u) / n_r, (f_r + v n_r) / K),  u and v uniform in [0, 1)

    Every cell has the area 1 / K, whatever K is. S depends on K alone, not on the shape of the window, so that all
    images of a batch share the cells: oblong cells raise the standard deviation by a few percent only.

    u and v have 16 bits. Both quotients have a whole number below n 2^16 above n 2^16, and are rounded down to the grid
    of 2^-24 by a product with an inverse, in whole numbers below 2^63, so that every device finds the same:

        floor(m floor(2^47 / n) / 2^39) = floor(2^24 m / (n 2^16)), or one less

    Attributes:
        cells: K.
        rows: S.
        narrow: floor(K / S), the n of a narrow row.
        by_cells: the inverse of K.
        by_narrow: the inverse of n in a narrow row.
        by_wide: the inverse of n in a wide one.

    Example:
        >>> cells = Strata.of(7)
        >>> cells.rows, cells.narrow
        (2, 3)
    """

    cells: int
    rows: int
    narrow: int
    by_cells: int
    by_narrow: int
    by_wide: int

    @staticmethod
    def of(count: int) -> Strata:
        """Describe the cells of this many points. Zero points have one cell, in which nothing is drawn."""
        cells = max(count, 1)
        rows = math.isqrt(cells)
        narrow = cells // rows
        return Strata(cells, rows, narrow, *((1 << INVERSE_BITS) // n for n in (cells, narrow, narrow + 1)))


def stratified_points(keys: tuple[Tensor, Tensor], num_points: int, layers: Tensor, stream: int) -> Tensor:
    """Draw one uniform point in each of `num_points` cells of equal area, in the order of the cells (see `Strata`).

    Points 2 m and 2 m + 1 have the words of threefry(instance key, counter = (m, layer + 2^16 * stream)), the first
    and the second: u is the upper half of a word, v the lower half.

    Args:
        keys: two int64 `[N]` tensors, from `instance_keys`.
        num_points: points per instance, one for each cell; at most 2^20.
        layers: int64 `[N]`, decoder layer of each instance, in [0, 2^16).
        stream: which of an instance's draws, in [0, 2^16).

    Returns:
        float32 `[N, num_points, 2]`, (x, y) on a grid of 2^-24; the same on every device.
    """
    strata = Strata.of(num_points)
    i = torch.arange(num_points, device=keys[0].device)
    row = ((i + 1) * strata.rows - 1) // strata.cells
    first = row * strata.cells // strata.rows
    wide = (row + 1) * strata.cells // strata.rows - first
    pairs = torch.arange((num_points + 1) // 2, device=i.device)
    words = threefry2x32(keys[0][:, None], keys[1][:, None], pairs, layers[:, None] | (stream << STREAM_SHIFT))
    word = torch.stack(words, dim=-1).flatten(1)[:, :num_points]
    u, v = word >> CELL_BITS, word & ((1 << CELL_BITS) - 1)
    by_wide = torch.where(wide == strata.narrow, strata.by_narrow, strata.by_wide)
    x = (((i - first) << CELL_BITS) + u) * by_wide >> POSITION_SHIFT
    y = ((first << CELL_BITS) + v * wide) * strata.by_cells >> POSITION_SHIFT
    return torch.stack([x, y], dim=-1).to(torch.float32) * 2.0**-24


def draw_layout(layout: str, keys: tuple[Tensor, Tensor], num_points: int, layers: Tensor, stream: int) -> Tensor:
    """Draw points of a layout in [0, 1)^2: `uniform_points` or `stratified_points`."""
    draw = stratified_points if layout == "stratified" else uniform_points
    return draw(keys, num_points, layers, stream)


# ---------------------------------------------------------------------------------------------------- three dimensions


def _third_words(keys: tuple[Tensor, Tensor], counters: Tensor, layers: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    return threefry2x32(
        keys[0][:, None], keys[1][:, None], counters, layers[:, None] | ((stream + DEPTH_STREAM) << STREAM_SHIFT)
    )


def uniform_points3(keys: tuple[Tensor, Tensor], num_points: int, layers: Tensor, stream: int) -> Tensor:
    """Draw uniform points of a volume: float32 `[N, P, 3]`, (x, y) of `uniform_points`, and z of one more word."""
    plane = uniform_points(keys, num_points, layers, stream)
    counters = torch.arange(num_points, device=plane.device)
    third, _ = _third_words(keys, counters, layers, stream)
    return torch.cat([plane, ((third >> 8).to(torch.float32) * 2.0**-24)[..., None]], dim=-1)


def slabs_of(cells: int) -> int:
    """Into how many slabs a volume of this many cells is cut: floor(cells^(1/3)), at least 1."""
    slabs: int = round(cells ** (1 / 3))
    return max(1, slabs - 1 if slabs**3 > cells else slabs)


class Boxes(NamedTuple):
    """K boxes of equal volume that tile the unit cube, and what the position of a point is computed with.

    The cube has S = floor(K^(1/3)) slabs. Slab s has the boxes f_s to f_(s + 1) - 1, where f_s = floor(s K / S), so
    n_s = f_(s + 1) - f_s of them: it is n_s / K thick, and its boxes are the cells of `Strata` for n_s points.

    Attributes:
        cells: K.
        slabs: S.
        thin: floor(K / S), the n of a thin slab; that of a thick one is one more.
        rows_of_thin: the rows of a thin slab.
        rows_of_thick: the rows of a thick one.
        by_cells: the inverse of K.
    """

    cells: int
    slabs: int
    thin: int
    rows_of_thin: int
    rows_of_thick: int
    by_cells: int

    @staticmethod
    def of(count: int) -> Boxes:
        """Describe the boxes of this many points. Zero points have one box, in which nothing is drawn."""
        cells = max(count, 1)
        slabs = slabs_of(cells)
        thin = cells // slabs
        return Boxes(cells, slabs, thin, math.isqrt(thin), math.isqrt(thin + 1), (1 << INVERSE_BITS) // cells)


def stratified_points3(keys: tuple[Tensor, Tensor], num_points: int, layers: Tensor, stream: int) -> Tensor:
    """Draw one uniform point in each of K = `num_points` boxes of equal volume that tile the unit cube (see `Boxes`).

    u and v have the words of `stratified_points`, and the position across the slab 16 bits of a third word. Arguments
    and result are those of `uniform_points3`.
    """
    cells, slabs, thin, rows_of_thin, rows_of_thick, by_cells = Boxes.of(num_points)
    i = torch.arange(num_points, device=keys[0].device)
    slab = ((i + 1) * slabs - 1) // cells
    behind = slab * cells // slabs
    count = (slab + 1) * cells // slabs - behind
    own = i - behind
    rows = torch.where(count == thin, rows_of_thin, rows_of_thick)
    row = ((own + 1) * rows - 1) // count
    first = row * count // rows
    wide = (row + 1) * count // rows - first
    pairs = torch.arange((num_points + 1) // 2, device=i.device)
    words = threefry2x32(keys[0][:, None], keys[1][:, None], pairs, layers[:, None] | (stream << STREAM_SHIFT))
    word, third = (
        torch.stack(each, dim=-1).flatten(1)[:, :num_points]
        for each in (words, _third_words(keys, pairs, layers, stream))
    )
    u, v, depth = word >> CELL_BITS, word & ((1 << CELL_BITS) - 1), third >> CELL_BITS
    x = (((own - first) << CELL_BITS) + u) * ((1 << INVERSE_BITS) // wide) >> POSITION_SHIFT
    y = ((first << CELL_BITS) + v * wide) * ((1 << INVERSE_BITS) // count) >> POSITION_SHIFT
    z = ((behind << CELL_BITS) + depth * count) * by_cells >> POSITION_SHIFT
    return torch.stack([x, y, z], dim=-1).to(torch.float32) * 2.0**-24


def draw_layout3(layout: str, keys: tuple[Tensor, Tensor], num_points: int, layers: Tensor, stream: int) -> Tensor:
    """Draw points of a layout in [0, 1)^3: `uniform_points3` or `stratified_points3`."""
    draw = stratified_points3 if layout == "stratified" else uniform_points3
    return draw(keys, num_points, layers, stream)
