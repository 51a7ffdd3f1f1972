"""Augmentation: crops of any scale, flips, quarter turns, and color.

Written here, and not taken from a library, because nothing has to be computed on a mask: the loss reads targets at
their own resolution, so a crop of the image that is resized for the model is a scale jitter, while the annotations are
only cropped and flipped, which is exact and costs next to nothing. Libraries of augmentation resize masks along with
images, one dense plane for each instance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskloss.lab.data.truth import View

# Sides of a crop, as shares of the whole image or of the crop that was asked for.
SMALLEST, LARGEST = 0.6, 1.3
# How far brightness, contrast and the balance of the channels move.
BRIGHTNESS, CONTRAST, BALANCE = 0.12, 0.25, 0.08


def random_view(
    height: int, width: int, crop: int | None, turns: bool, generator: torch.Generator
) -> tuple[View, tuple[int, int]]:
    """Draw what is shown of an image.

    Args:
        height: of the image.
        width: of the image.
        crop: side of the square to crop, pixels; None: about the whole image.
        turns: whether an image may be turned and stood on its head, as under a microscope.
        generator: where randomness comes from.

    Returns:
        The view, and height and width of the frame in whose top left corner it lies.
    """
    scale, top, left, turn, flip_y, flip_x = torch.rand(6, generator=generator).tolist()
    side = crop or max(height, width)
    frame = max(8, round(side * SMALLEST * (LARGEST / SMALLEST) ** scale))
    view = _crop(height, width, frame, top, left)
    view = view._replace(turn=turns and turn < 0.5, flip_y=turns and flip_y < 0.5, flip_x=flip_x < 0.5)
    return view, (frame, frame)


def plain_view(height: int, width: int, crop: int | None, generator: torch.Generator) -> tuple[View, tuple[int, int]]:
    """Show an image as it is, or a random crop of it."""
    frame = crop or max(height, width)
    top, left = torch.rand(2, generator=generator).tolist()
    return _crop(height, width, frame, top, left), (frame, frame)


def recolor(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and the balance of the channels of an image `[C, H, W]` in [0, 1]."""
    brightness, contrast = (2 * torch.rand(2, generator=generator) - 1).tolist()
    balance = 1 + BALANCE * (2 * torch.rand(image.shape[0], 1, 1, generator=generator) - 1)
    mean = image.mean()
    changed = (image - mean) * math.exp(CONTRAST * contrast) + mean + BRIGHTNESS * brightness
    recolored: Tensor = (changed * balance).clamp(0, 1)
    return recolored


def _crop(height: int, width: int, frame: int, top: float, left: float) -> View:
    rows, columns = min(frame, height), min(frame, width)
    return View(round(top * (height - rows)), round(left * (width - columns)), rows, columns)
