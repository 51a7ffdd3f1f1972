"""Scenes: what the model is trained on and what it is held to, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from maskloss.targets import MaskTargets


class Batch(NamedTuple):
    """One step's scenes.

    Attributes:
        images: float32 `[B, 3, S, S]` in [0, 1].
        targets: one dict per image, as `MaskCriterion` takes them: "masks" packed, "labels" int64 `[T]`.
    """

    images: Tensor
    targets: list[dict[str, Any]]

    def to(self, device: torch.device) -> Batch:
        """Move images and targets to a device."""
        moved = [{name: value.to(device) for name, value in entry.items()} for entry in self.targets]
        return Batch(self.images.to(device), moved)


class Scene(NamedTuple):
    """One held-out scene and its truth.

    The image lies in the top left corner of a square frame that the predictions cover. The truth keeps the resolution
    at which it was annotated, and is compared there.

    Attributes:
        image: float32 `[3, S, S]` in [0, 1], padded to a square and resized.
        targets: the masks, packed, of one image; their frame is the square.
        labels: int64 `[T]`.
        crowd: regions with too many instances of one class to tell apart; predictions in them are not counted.
        crowd_labels: the classes of those regions, int64 `[K]`.
        height: of the image, in pixels of the truth.
        width: of the image, in pixels of the truth.
        name: what to call it.
    """

    image: Tensor
    targets: MaskTargets
    labels: Tensor
    crowd: MaskTargets
    crowd_labels: Tensor
    height: int
    width: int
    name: str

    @property
    def frame(self) -> int:
        """The side of the square frame, in pixels of the truth."""
        return max(self.height, self.width)

    def masks(self) -> Tensor:
        """Unpack the truth: bool `[T, H, W]`."""
        return self.targets.dense()[:, : self.height, : self.width]

    def crowd_masks(self) -> Tensor:
        """Unpack the crowds: bool `[K, H, W]`."""
        return self.crowd.dense()[:, : self.height, : self.width]

    def picture(self) -> Tensor:
        """Return the image without its padding: `[3, h, w]`."""
        size = self.image.shape[-1]
        return self.image[:, : share(self.height, self.frame, size), : share(self.width, self.frame, size)]


class SceneSource(Protocol):
    """Where scenes come from."""

    @property
    def title(self) -> str:
        """What the scenes show, in a few words."""

    @property
    def class_names(self) -> Sequence[str]:
        """The classes, in the order of their labels."""

    @property
    def most_instances(self) -> int:
        """The most instances of any scene; the model needs as many queries."""

    @property
    def held_out(self) -> Sequence[Scene]:
        """Scenes that are never trained on."""

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Return the training scenes of a step: a function of the arguments, and nothing else."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return a generator that depends on the seed and the step, so that a step can be drawn without those before it."""
    # Torch's CPU generator reads 32 bits of its seed, so two numbers have to be hashed into one.
    [state] = np.random.SeedSequence((seed, step)).generate_state(1)
    return torch.Generator().manual_seed(int(state))


def share(length: int, frame: int, size: int) -> int:
    """Return how many of `size` pixels a length takes when `frame` takes all of them, at least one."""
    return max(1, round(length * size / frame))
