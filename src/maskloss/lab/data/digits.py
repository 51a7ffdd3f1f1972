"""Scenes of handwritten digits: several to a scene, overlapping, of any size and color, on noise and scratches.

The digits are those of `sklearn.datasets.load_digits` (1,797 digits of 43 writers, 8 x 8 pixels), which come with the
package. One in five is set aside, and held-out scenes are made of those only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad

from maskloss.errors import Cause, require
from maskloss.lab.data.problems import Finding
from maskloss.lab.data.scenes import Batch, Probe, Scene, step_generator
from maskloss.targets import MaskTargets

FEWEST, MOST = 2, 5
# Sides of a digit's 8 x 8 pixels, as shares of the scene.
SMALLEST, LARGEST = 0.24, 0.5
SCRATCHES = 4
# Digits keep a distance of this many mean sides, so that none hides another.
DISTANCE = 0.55
# The split and the held-out scenes are the same in every run, whatever its seed, so that runs can be compared.
_SPLIT_SEED, _HELD_OUT_SEED = 20, 77


class Split(NamedTuple):
    """Which digits of the data set may be seen in training, and which may not: int64 indices."""

    train: Tensor
    held_out: Tensor


def split(count: int) -> Split:
    """Set one digit in five aside."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return Split(order[count // 5 :], order[: count // 5])


class DigitScenes:
    """Scenes of handwritten digits, drawn as they are needed."""

    title = "handwritten digits"
    class_names: Sequence[str] = tuple("0123456789")
    category_ids: Sequence[int] = tuple(range(1, 11))
    channels = 3
    num_training = class_counts = None
    most_instances = MOST
    one_class_maps = False
    findings: Sequence[Finding] = ()

    def __init__(self, size: int, held_out: int) -> None:
        digits = require("sklearn.datasets", "train").load_digits()
        images = torch.from_numpy(digits.images).float() / 16
        # Enlarged once, smoothly, and read bilinearly from then on; the border keeps strokes whole.
        self._glyphs = interpolate(pad(images[:, None], (1, 1, 1, 1)), scale_factor=4, mode="bicubic").clamp(0, 1)
        self._labels = torch.from_numpy(digits.target).long()
        self.split = split(len(images))
        self.size, self._count = size, held_out

    def limit(self, most: int) -> None:
        """Check that a model has a query for each digit of a scene."""
        if most < MOST:
            raise Cause(
                "the model must have a query for each digit",
                f"a scene has up to {MOST}, the model {most}",
                "take --grid 4",
            )

    def batch(self, step: int, positions: range, batch_size: int, seed: int) -> Batch:
        """Draw a step's scenes, and return some of them."""
        drawn = self.draw(self.split.train, batch_size, step_generator(seed, step))
        masks, labels = drawn.instances()
        mine = slice(positions.start, positions.stop)
        packed = MaskTargets.cat([MaskTargets.from_masks(each) for each in masks[mine]])
        return Batch(drawn.images[mine], packed, torch.cat(labels[mine]), torch.tensor(list(positions)), [])

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the scenes are."""
        train, held_out = (len(part) for part in self.split)
        return [
            ("found", "no folder was given: scenes of handwritten digits, drawn as they are needed"),
            ("scenes", f"endless for training, {self._count:,} held out"),
            ("digits", f"{train:,} for training, {held_out:,} others held out; {FEWEST} to {MOST} in a scene"),
            ("image sizes", f"{self.size} x {self.size}"),
            ("classes", "10: 0 to 9"),
        ]

    @cached_property
    def held_out(self) -> list[Scene]:
        """Scenes of digits that training never shows."""
        drawn = self.draw(self.split.held_out, self._count, torch.Generator().manual_seed(_HELD_OUT_SEED))
        size, (masks, labels) = self.size, drawn.instances()
        nothing = MaskTargets.from_masks(torch.zeros(0, size, size, dtype=torch.bool))
        none = torch.zeros(0, dtype=torch.int64)
        return [
            Scene(image, MaskTargets.from_masks(mine), classes, nothing, none, None, f"scene {number}")
            for number, (image, mine, classes) in enumerate(zip(drawn.images, masks, labels, strict=True))
        ]

    def probe(self, number: int) -> Probe:
        """Return a held-out scene: the model sees all of it."""
        scene = self.held_out[number]
        return Probe(scene.image, scene.image, scene.targets, scene.labels, scene.name)

    def draw(self, digits: Tensor, count: int, generator: torch.Generator) -> Drawn:
        """Draw scenes made of the given digits only."""
        which = digits[torch.randint(len(digits), (count, MOST), generator=generator)]
        present = torch.arange(MOST) < torch.randint(FEWEST, MOST + 1, (count, 1), generator=generator)
        layout = _place(present, generator)
        ink = self._render(which[present], layout, present, generator)
        # The middle of the ramp is a digit's outline; a dark halo sets it off from what it covers.
        alpha, halo = ((ink - 0.36) / 0.16).clamp(0, 1), ((ink - 0.05) / 0.3).clamp(0, 1)
        images, masks = _background(count, self.size, generator), torch.zeros_like(ink, dtype=torch.bool)
        colors = _colors((count, MOST), generator)
        for layer in range(MOST):
            images = images * (1 - 0.6 * halo[:, layer, None])
            images = images + (colors[:, layer, :, None, None] - images) * alpha[:, layer, None]
            inside = alpha[:, layer] > 0.5
            masks &= ~inside[:, None]
            masks[:, layer] = inside
        images = (images + 0.06 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        return Drawn(images, masks, self._labels[which], which, present)

    def _render(self, which: Tensor, layout: Layout, present: Tensor, generator: torch.Generator) -> Tensor:
        """Render each digit on its own: `[B, MOST, size, size]`, 0 where there is none."""
        count = len(which)
        turn, shear, stretch = _uniform((3, count, 1, 1), generator, -1, 1).unbind()
        turn, shear, stretch = turn * math.radians(15), 0.2 * shear, torch.exp(0.15 * stretch)
        axis = (torch.arange(self.size) + 0.5) / self.size
        x = axis - layout.x[present][:, None, None]
        y = axis[:, None] - layout.y[present][:, None, None]
        x, y = turn.cos() * x + turn.sin() * y, turn.cos() * y - turn.sin() * x
        # The glyphs are 10 pixels wide, 8 of them the digit.
        half = layout.side[present][:, None, None] * (10 / 8) / 2
        grid = torch.stack([(x + shear * y) * stretch / half, y / stretch / half], dim=-1)
        ink = torch.zeros(*present.shape, self.size, self.size)
        ink[present] = grid_sample(self._glyphs[which], grid, align_corners=False)[:, 0]
        return ink


class Drawn(NamedTuple):
    """Scenes as they were drawn."""

    images: Tensor  # `[B, 3, S, S]` in [0, 1]
    masks: Tensor  # bool `[B, MOST, S, S]`, what is visible of each digit
    labels: Tensor  # int64 `[B, MOST]`
    which: Tensor  # index of each digit in the data set, int64 `[B, MOST]`
    present: Tensor  # bool `[B, MOST]`; the entries of digits that are not present mean nothing

    def instances(self) -> tuple[list[Tensor], list[Tensor]]:
        """List masks `[T, S, S]` and labels `[T]` of each scene."""
        masks = [mine[here] for mine, here in zip(self.masks, self.present, strict=True)]
        labels = [mine[here] for mine, here in zip(self.labels, self.present, strict=True)]
        return masks, labels


class Layout(NamedTuple):
    """Where digits lie, each `[B, MOST]`, in units of the scene."""

    x: Tensor
    y: Tensor
    side: Tensor


def _place(present: Tensor, generator: torch.Generator, tries: int = 12) -> Layout:
    """Place digits one after the other, each at the first of several spots that is not too close to the others."""
    count = len(present)
    side = SMALLEST * (LARGEST / SMALLEST) ** torch.rand(count, MOST, generator=generator)
    x, y = torch.zeros(2, count, MOST)
    for layer in range(MOST):
        margin = 0.45 * side[:, layer, None]
        spots = margin[..., None] + _uniform((count, tries, 2), generator) * (1 - 2 * margin[..., None])
        chosen = torch.zeros(count, 1, dtype=torch.int64)
        if layer:
            away = torch.hypot(
                spots[..., 0, None] - x[:, None, :layer],
                spots[..., 1, None] - y[:, None, :layer],
            )
            gap = (2 * away / (side[:, None, :layer] + side[:, layer, None, None])).amin(-1)
            free = gap > DISTANCE
            chosen = torch.where(free.any(1), free.int().argmax(1), gap.argmax(1))[:, None]
        x[:, layer], y[:, layer] = (spots[..., axis].gather(1, chosen)[:, 0] for axis in (0, 1))
    return Layout(x, y, side)


def _background(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw dark clouds with colored scratches: `[B, 3, size, size]`."""
    clouds = torch.randn(count, 3, 6, 6, generator=generator)
    images = 0.08 + _uniform((count, 3, 1, 1), generator, 0, 0.22) + 0.07 * interpolate(clouds, size, mode="bicubic")
    axis = (torch.arange(size) + 0.5) / size
    angle, x, y = _uniform((3, count, SCRATCHES, 1, 1), generator).unbind()
    length, width = _uniform((2, count, SCRATCHES, 1, 1), generator).unbind()
    across, down = axis - x, axis[:, None] - y
    cos, sin = (2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()
    along = (across * cos + down * sin).clamp(min=0).minimum(0.1 + 0.25 * length)
    distance = torch.hypot(across - along * cos, down - along * sin)
    alpha = 0.8 * ((0.018 + 0.018 * width - distance) * 64).clamp(0, 1)
    colors = _colors((count, SCRATCHES), generator)
    for layer in range(SCRATCHES):
        images = images + (colors[:, layer, :, None, None] - images) * alpha[:, layer, None]
    return images


def _colors(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw bright colors of any hue: `[*shape, 3]`."""
    hue, saturation, value = _uniform((3, *shape, 1), generator).unbind()
    saturation, value = 0.25 + 0.6 * saturation, 0.55 + 0.45 * value
    # The three channels of HSV's color circle are one function, shifted.
    place = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value * (1 - saturation * torch.minimum(place, 4 - place).clamp(0, 1))


def _uniform(shape: tuple[int, ...], generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)
