"""The options of a training run: their defaults, their ranges, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from maskloss._abi import LAYOUTS
from maskloss.errors import Cause
from maskloss.lab.data.folder import NORMALIZE
from maskloss.lab.data.problems import ON_ERROR
from maskloss.lab.data.recognize import FORMATS
from maskloss.points import PointSampling

COMPACT = "compact"
# The compact model halves its input four times.
STRIDE = 16
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("no", "bf16", "fp16")
NORMS = ("batch", "group")
# Least and most of each whole number. Beyond the most, a machine would run out of memory or threads before it said so.
_INTEGERS = {
    "size": (16, 4096),
    "crop": (16, 1 << 16),
    "grid": (1, 64),
    "num_points": (1, 1_000_000),
    "steps": (1, 100_000_000),
    "batch_size": (1, 65_536),
    "accumulate": (1, 65_536),
    "checkpoint_every": (1, 100_000_000),
    "evaluations": (1, 10_000),
    "held_out": (1, 100_000),
    "seed": (0, 2**31 - 1),
    "workers": (0, 256),
    "threads": (1, max(64, os.cpu_count() or 1)),
}
_POSITIVE = ("lr", "class_weight")
_NOT_NEGATIVE = ("weight_decay", "no_object_weight", "clip")
_CHOICES = {
    "layout": LAYOUTS,
    "format": FORMATS,
    "normalize": NORMALIZE,
    "on_error": ON_ERROR,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "norm": NORMS,
}
_MAY_BE_NONE = frozenset(
    {"size", "crop", "grid", "num_points", "workers", "threads", "lr", "class_weight", "no_object_weight", "format"}
    | {"norm"}
)


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. The defaults find handwritten digits within three minutes on two CPU cores.

    Args:
        data: a folder with images and annotations; None: scenes of handwritten digits.
        format: "coco", "panoptic" or "labels"; None: recognized.
        normalize: "auto" (percentiles for label maps and deep images), "percentile" or "range".
        augment: whether training images are cropped, flipped and recolored at random.
        on_error: "stop" or "skip", at a broken image or annotation.
        crop: train on squares of this many pixels cut out of the images; None: whole images.
        size: side of the square that the model sees, pixels; None: 64 for digits, that of the processor of a
            pretrained model, else the usual side of the images, at most 256.
        held_out: number of held-out scenes of digits; a folder says itself which of its images are held out.
        model: "compact", or the name or the folder of a universal-segmentation model of Transformers.
        grid: the compact model has grid x grid queries; None: by the most instances of an image.
        norm: normalization in the compact model, "batch" or "group"; None: "batch" on one process without
            accumulation, else "group", whose result does not depend on how a batch is divided.
        num_points: points per instance, for the loss and for matching; None: 256, or what a pretrained model has.
        layout: how these points lie to each other, "independent" or "stratified" (see `PointSampling`).
        class_weight: weight of the classification in the loss; None: 10, or what a pretrained model has.
        no_object_weight: weight of "no object" in the classification; None: 0.4, or what a pretrained model has.
        steps: optimizer steps.
        batch_size: images of a step, over all processes and micro-batches.
        accumulate: micro-batches of a step in each process.
        lr: highest learning rate of AdamW; None: 3e-3, or 1e-4 for a pretrained model.
        weight_decay: weight decay of AdamW, on matrices and kernels.
        clip: the gradient's norm is brought to this much at most; 0: never.
        schedule: how the learning rate falls, "cosine", "linear" or "constant".
        warmup: share of the steps in which it rises.
        precision: "no", "bf16" or "fp16".
        seed: decides initial weights, training scenes and points.
        checkpoint_every: steps between two checkpoints.
        evaluations: how often held-out scenes are looked at during training.
        workers: processes that read images; None: none for digits, else one for each core, at most 4.
        threads: CPU threads; None: as many as torch takes by itself.
        device: "cpu" or "cuda"; None: cuda where there is a device.

    Raises:
        MaskLossError: an option outside its range, or a device that is not there.
    """

    data: str | None = None
    format: str | None = None
    normalize: str = "auto"
    augment: bool = True
    on_error: str = "stop"
    crop: int | None = None
    size: int | None = None
    held_out: int = 400
    model: str = COMPACT
    grid: int | None = None
    norm: str | None = None
    num_points: int | None = None
    layout: str = PointSampling.layout
    class_weight: float | None = None
    no_object_weight: float | None = None
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    lr: float | None = None
    weight_decay: float = 0.05
    clip: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.05
    precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 250
    evaluations: int = 8
    workers: int | None = None
    threads: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name, limits in _INTEGERS.items():
            self._check_integer(name, *limits)
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            self._check_number(name, positive=name in _POSITIVE)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name in _MAY_BE_NONE):
                raise Cause(f"{_option(name)} must be one of {', '.join(choices)}", f"got {value!r}", _HELP)
        if not _is_number(self.warmup) or not 0 <= self.warmup <= 1:
            raise Cause("--warmup must be a share of the steps, from 0 to 1", f"got {self.warmup!r}", _HELP)
        if self.model == COMPACT and self.size is not None and self.size % STRIDE:
            raise Cause(
                f"--size must be a multiple of {STRIDE}",
                f"got {self.size}",
                f"the model halves its input to 1/{STRIDE}",
            )
        if self.batch_size % self.accumulate:
            raise Cause(
                "--batch-size must be a multiple of --accumulate",
                f"got {self.batch_size} and {self.accumulate}",
                "--batch-size counts the images of a whole step",
            )
        for name in ("data", "model"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text or "\0" in text):
                raise Cause(f"{_option(name)} must be a name", f"got {text!r}", _HELP)
        if self.device is not None:
            _check_device(self.device)

    def _check_integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if value is None and name in _MAY_BE_NONE:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise Cause(f"{_option(name)} must be a whole number from {least:,} to {most:,}", f"got {value!r}", _HELP)

    def _check_number(self, name: str, *, positive: bool) -> None:
        value = getattr(self, name)
        if value is None and name in _MAY_BE_NONE:
            return
        if not _is_number(value) or not 0 <= value < math.inf or (positive and value == 0):
            least = "above 0" if positive else "at least 0"
            raise Cause(f"{_option(name)} must be a finite number, {least}", f"got {value!r}", _HELP)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> TrainConfig:
        """Make a configuration from what `as_dict` gave.

        Raises:
            MaskLossError: an option that does not exist, or one outside its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise Cause(
                "every option of a configuration must be known",
                f"unknown: {', '.join(unknown)}",
                "it comes from another version",
            )
        return cls(**options)

    @property
    def torch_device(self) -> torch.device:
        """The device, chosen."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def num_workers(self) -> int:
        """The number of processes that read images, chosen."""
        if self.workers is not None:
            return self.workers
        return 0 if self.data is None else min(4, os.cpu_count() or 1)


_HELP = "see maskloss train --help"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Cause("--device must be one that torch knows", f"got {name!r}", "take cpu or cuda") from None
    if device.type not in {"cpu", "cuda"}:
        raise Cause("--device must be cpu or cuda", f"got {name!r}", "the losses have kernels for these two")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Cause("the device must be there", f"--device {name}, but torch sees no CUDA device", "take --device cpu")
