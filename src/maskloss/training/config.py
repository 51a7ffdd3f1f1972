"""The options of a training run: their defaults, their ranges, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from maskloss.errors import Cause, reported

# The model halves its input four times.
STRIDE = 16


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. The defaults find handwritten digits within three minutes on two CPU cores.

    Args:
        data: a folder with images and COCO annotations; None: scenes of handwritten digits.
        size: images are brought to size x size pixels; a multiple of 16.
        steps: optimiser steps.
        batch_size: scenes per step.
        lr: highest learning rate of AdamW; it rises during the first steps and falls to zero in a cosine.
        weight_decay: weight decay of AdamW, on matrices and kernels.
        num_points: points per instance, for the loss and for matching.
        grid: the model has grid x grid queries, each born at its place in the image.
        class_weight: weight of the classification in the loss; matching keeps Mask2Former's weights.
        no_object_weight: weight of "no object" in the classification.
        evaluations: how often held-out scenes are looked at during training.
        held_out: number of held-out scenes of digits; a folder says itself which of its images are held out.
        seed: decides the initial weights, the training scenes and the points.
        threads: CPU threads; None: as many as torch takes by itself.
        device: where to train, "cpu" or "cuda".

    Raises:
        MaskLossError: an option outside its range, or a device that is not there.
    """

    data: str | None = None
    size: int = 64
    steps: int = 1000
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.05
    num_points: int = 256
    grid: int = 4
    class_weight: float = 10.0
    no_object_weight: float = 0.4
    evaluations: int = 8
    held_out: int = 400
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        self._check()

    @reported("TrainConfig")
    def _check(self) -> None:
        for name in ("size", "steps", "batch_size", "num_points", "grid", "evaluations", "held_out"):
            _check_integer(name, getattr(self, name), 1)
        _check_integer("seed", self.seed, 0)
        if self.seed >= 2**31:
            raise Cause("seed must be below 2^31", f"seed={self.seed}", "the numbers of the steps need the other bits")
        if self.threads is not None:
            _check_integer("threads", self.threads, 1)
        for name in ("lr", "class_weight", "no_object_weight"):
            _check_number(name, getattr(self, name), positive=True)
        _check_number("weight_decay", self.weight_decay, positive=False)
        if self.size % STRIDE:
            raise Cause(
                f"size must be a multiple of {STRIDE}", f"size={self.size}", f"the model halves its input to 1/{STRIDE}"
            )
        _check_device(self.device)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    @reported("TrainConfig.from_dict")
    def from_dict(cls, options: Mapping[str, Any]) -> TrainConfig:
        """Make a configuration from what `as_dict` gave.

        Raises:
            MaskLossError: an option that does not exist, or one outside its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise Cause(
                "every option must be known",
                f"unknown: {', '.join(unknown)}",
                "the configuration comes from another version",
            )
        return cls(**options)


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise Cause(f"{name} must be an integer, at least {least}", f"{name}={value!r}", "see maskloss train --help")


def _check_number(name: str, value: object, *, positive: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= float(str(value)) < float("inf") or (positive and value == 0):
        least = "above 0" if positive else "at least 0"
        raise Cause(f"{name} must be a finite number, {least}", f"{name}={value!r}", "see maskloss train --help")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Cause("device must be one that torch knows", f"device={name!r}", "take cpu or cuda") from None
    if device.type not in {"cpu", "cuda"}:
        raise Cause("device must be cpu or cuda", f"device={name!r}", "the losses have kernels for these two")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Cause("the device must be there", f"device={name!r}, but torch sees no CUDA device", "take --device cpu")
