"""The options of a training run, each written once: arguments, checks and the table in the docs are read off here."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch

from maskloss._abi import LAYOUTS
from maskloss.errors import Cause
from maskloss.lab.data.folder import NORMALIZE
from maskloss.lab.data.options import CROWD, SEMANTIC, DataOptions
from maskloss.lab.data.problems import ON_ERROR
from maskloss.lab.data.recognize import FORMATS
from maskloss.lab.option import Field, Option
from maskloss.lab.terminal import did_you_mean
from maskloss.points import PointSampling

COMPACT = "compact"
STEPS = 1000
BEST, LAST = "best", "last"
# What Accelerate has trackers for.
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
# What can be said where one is not there. On mps, Apple's GPUs, the losses are computed by the reference backend.
_DEVICES = {"cpu": "", "cuda": "torch sees no CUDA device", "mps": "torch sees no GPU of Apple"}


_STEPS = 100_000_000
_IMAGES = 65_536


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. The defaults find handwritten digits within three minutes on two CPU cores.

    `maskloss train --help` says what each does: the text is that of the annotations below.

    Raises:
        MaskLossError: an option outside its range, or a device that is not there.
    """

    # fmt: off
    data: Annotated[str | None, Option("data", "FOLDER", "images with annotations; default: handwritten digits")] = None
    format: Annotated[str | None, Option("data", "FORMAT",
        f"format of the data: {', '.join(FORMATS)}; default: recognized", choices=FORMATS)] = None
    annotations: Annotated[str | None, Option("data", "FILE",
        "file of annotations, if the folder holds several; default: recognized")] = None
    images: Annotated[str | None, Option("data", "FOLDER",
        "where the images of the annotations lie; default: anywhere in --data")] = None
    val: Annotated[str | None, Option("data", "WHAT",
        "held-out images: another folder or file of annotations, a share such as 0.1, or a text file with their names; "
        "default: the part val or test of the data, else one image in five")] = None
    semantic: Annotated[str | None, Option("data", "WHAT",
        "what label maps number: components (classes, and each connected region is an instance), classes (each is one "
        "mask) or instances; default: instances, unless they look like classes", choices=SEMANTIC)] = None
    ignore_value: Annotated[int | None, Option("data", "N",
        "value in label maps that is ignored; default: 255 beside classes", 1, 2**31 - 1)] = None
    crowd: Annotated[str | None, Option("data", "WHAT",
        "what iscrowd 1 means: ignore (a region that is ignored) or instances; default: ignore, unless all run lengths "
        "have it, as CVAT's brush writes them", choices=CROWD)] = None
    normalize: Annotated[str, Option("data", "HOW",
        "how brightness is scaled: range (of the data type), percentile (1 to 99.8 of each channel) or auto: "
        "percentile for label maps and for images of more than 8 bits", choices=NORMALIZE)] = "auto"
    augment: Annotated[bool, Option("data", "", "no random crops, flips or changes of color")] = True
    on_error: Annotated[str, Option("data", "WHAT",
        "at a broken image or annotation: stop or skip", choices=ON_ERROR)] = "stop"
    crop: Annotated[int | None, Option("data", "PIXELS",
        "train on squares cut out of the images; default: whole images", 16, 1 << 16)] = None
    size: Annotated[int | None, Option("data", "PIXELS",
        "side of the square that the model sees; default: 64 for digits, that of a pretrained model, or the usual side "
        "of the images, at most 256", 16, 4096)] = None
    held_out: Annotated[int, Option("data", "N", "held-out scenes of digits", 1, 100_000)] = 400
    workers: Annotated[int | None, Option("data", "N",
        "processes that read images; default: 0 for digits, else one for each core, up to 4", 0, 256)] = None
    model: Annotated[str, Option("model", "NAME",
        "compact, the name or folder of a segmentation model of Transformers, or a run, to begin with its "
        "weights")] = COMPACT
    grid: Annotated[int | None, Option("model", "N",
        "the compact model has N x N queries; default: by the fullest image", 1, 64)] = None
    norm: Annotated[str | None, Option("model", "KIND",
        "normalization of the compact model, batch or group; default: batch, or group where batches are divided",
        choices=("batch", "group"))] = None
    num_points: Annotated[int | None, Option("loss", "N",
        "points per instance; default: 256, or those of a pretrained model", 1, 1_000_000)] = None
    layout: Annotated[str, Option("loss", "LAYOUT",
        "how these points are drawn: independent, or stratified, which is less noisy",
        choices=LAYOUTS)] = PointSampling.layout
    class_weight: Annotated[float | None, Option("loss", "WEIGHT",
        "weight of the classification; default: 10, or that of a pretrained model", above=0)] = None
    no_object_weight: Annotated[float | None, Option("loss", "WEIGHT",
        "weight of 'no object' in the classification; default: 0.4, or that of a pretrained model", 0)] = None
    balance: Annotated[bool, Option("loss", "",
        "weigh rare classes more in the classification: by 1 / sqrt(n) for n training instances, with a mean of "
        "1")] = False
    steps: Annotated[int | None, Option("training", "N",
        f"optimizer steps; default: {STEPS}, unless there are --epochs", 1, _STEPS)] = None
    epochs: Annotated[int | None, Option("training", "N",
        "how often every training image is shown, instead of --steps", 1, _STEPS)] = None
    patience: Annotated[int, Option("training", "N",
        "stop after this many evaluations without a higher AP; 0: never", 0, 10_000)] = 0
    batch_size: Annotated[int, Option("training", "N",
        "images in a step, over all processes and micro-batches", 1, _IMAGES)] = 16
    accumulate: Annotated[int, Option("training", "N", "micro-batches in a step", 1, _IMAGES)] = 1
    lr: Annotated[float | None, Option("training", "RATE",
        "highest learning rate; default: 0.003, or 0.0001 for a pretrained model", above=0)] = None
    backbone_lr: Annotated[float | None, Option("training", "RATE",
        "learning rate of a pretrained backbone; default: a tenth of --lr, but --lr for EoMT, which is nearly all "
        "backbone", above=0)] = None
    layer_decay: Annotated[float, Option("training", "FACTOR",
        "factor on the learning rate from each block of a pretrained backbone to the block before it", 0, 1)] = 1.0
    freeze_backbone: Annotated[bool, Option("training", "", "leave a pretrained backbone as it is")] = False
    weight_decay: Annotated[float, Option("training", "DECAY",
        "weight decay of AdamW, on matrices and kernels", 0)] = 0.05
    clip: Annotated[float, Option("training", "NORM", "largest norm of the gradient; 0: no limit", 0)] = 1.0
    schedule: Annotated[str, Option("training", "KIND",
        "schedule of the learning rate: cosine, linear or constant",
        choices=("cosine", "linear", "constant"))] = "cosine"
    warmup: Annotated[float, Option("training", "SHARE",
        "share of the steps in which the learning rate rises", 0, 1)] = 0.05
    ema: Annotated[bool, Option("training", "",
        "score and keep a moving average of the weights instead of the weights themselves")] = False
    ema_decay: Annotated[float, Option("training", "DECAY",
        "largest decay of that average; after step n it is at most (1 + n) / (10 + n)", 0, 1)] = 0.999
    precision: Annotated[str, Option("training", "KIND",
        "no, bf16 or fp16: mixed precision", choices=("no", "bf16", "fp16"))] = "no"
    seed: Annotated[int, Option("training", "N",
        "the same seed gives the same run, bit for bit on one machine", 0, 2**31 - 1)] = 0
    keep: Annotated[str, Option("run", "WHICH",
        "best or last: the weights of the evaluation with the highest AP, or those of the last step",
        choices=(BEST, LAST))] = BEST
    checkpoint_every: Annotated[int, Option("run", "STEPS", "steps between two checkpoints", 1, _STEPS)] = 250
    evaluations: Annotated[int, Option("run", "N", "evaluations during training", 1, 10_000)] = 8
    log: Annotated[tuple[str, ...], Option("run", "LOGGER",
        f"also write to these loggers: {', '.join(LOGGERS)}", choices=LOGGERS)] = ()
    threads: Annotated[int | None, Option("run", "N",
        "CPU threads; default: torch's choice", 1, max(64, os.cpu_count() or 1))] = None
    device: Annotated[str | None, Option("run", "DEVICE",
        "cpu, cuda or mps (GPUs of Apple); default: cuda where there is a device, else cpu")] = None
    # fmt: on

    def __post_init__(self) -> None:
        loggers: Any = self.log
        if isinstance(loggers, list):  # as JSON has them
            object.__setattr__(self, "log", tuple(loggers))
        for name, kind, optional, _, option in fields():
            value = getattr(self, name)
            if value is not None or not optional:
                option.check("--" + name.replace("_", "-"), kind, value)
        if self.batch_size % self.accumulate:
            raise Cause(
                "--batch-size must be a multiple of --accumulate",
                f"got {self.batch_size} and {self.accumulate}",
                "--batch-size counts the images of a whole step",
            )
        if self.steps is not None and self.epochs is not None:
            raise Cause(
                "--steps and --epochs exclude each other", f"got {self.steps} and {self.epochs}", "leave one out"
            )
        if self.freeze_backbone and (self.backbone_lr is not None or self.layer_decay < 1):
            given = "--layer-decay" if self.backbone_lr is None else "--backbone-lr"
            raise Cause(f"{given} is for a backbone that is trained", "got --freeze-backbone as well", "leave one out")
        if self.device is not None:
            _check_device(self.device)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> TrainConfig:
        """Make a configuration from what `as_dict` gave.

        Raises:
            MaskLossError: an option that does not exist, or one outside its range.
        """
        known = {field.name for field in fields()}
        unknown = sorted(set(options) - known)
        if unknown:
            raise Cause(
                "every option of a configuration must be known",
                f"there is no {unknown[0]}{did_you_mean(unknown[0], known)}",
                "or does it come from another version?",
            )
        return cls(**options)

    @property
    def num_steps(self) -> int:
        """The number of steps; what --epochs amounts to is known when the data have been read."""
        return self.steps or STEPS

    def with_steps(self, images: int | None) -> TrainConfig:
        """Return the options with the steps that their epochs of this many images amount to; None: without end."""
        if self.epochs is None:
            return dataclasses.replace(self, steps=self.num_steps)
        if images is None:
            raise Cause("--epochs needs a number of images", "scenes of digits have no end", "take --steps")
        return dataclasses.replace(self, epochs=None, steps=math.ceil(self.epochs * images / self.batch_size))

    @property
    def command(self) -> str:
        """The command that begins such a run."""
        words = ["maskloss", "train"]
        for field in fields():
            value = getattr(self, field.name)
            if value != field.default:
                given = value if field.kind is tuple else () if field.kind is bool else (str(value),)
                words += [field.flag, *given]
        return shlex.join(words)

    @property
    def data_options(self) -> DataOptions:
        """What the options say of the folder of data."""
        return DataOptions(**{name: getattr(self, name) for name in DataOptions._fields})

    def anchored(self) -> TrainConfig:
        """Return the options with absolute paths, so that the run can be used from elsewhere."""
        places = {name: getattr(self, name) for name in ("data", "images", "annotations", "val")}
        inner = {
            name for name in ("images", "annotations") if places[name] and Path(self.data or "", places[name]).exists()
        }
        found: dict[str, Any] = {
            name: str(Path(place).absolute())
            for name, place in places.items()
            if place is not None and name not in inner and (name == "data" or Path(place).exists())
        }
        return dataclasses.replace(self, **found)

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


@functools.cache
def fields() -> tuple[Field, ...]:
    """List the options of a run, in order."""
    hints = get_type_hints(TrainConfig, include_extras=True)
    found = []
    for each in dataclasses.fields(TrainConfig):
        hint, option = get_args(hints[each.name])
        optional = get_origin(hint) is UnionType
        kind = get_args(hint)[0] if optional else get_origin(hint) or hint
        found.append(Field(each.name, kind, optional, each.default, option))
    return tuple(found)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = f"take one of {', '.join(_DEVICES)}"
        raise Cause("--device must be one that torch knows", f"got {name!r}", hint) from None
    if device.type not in _DEVICES:
        rule = f"--device must be one of {', '.join(_DEVICES)}"
        raise Cause(rule, f"got {name!r}", "training has been tried on no other")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[device.type]:
        raise Cause("the device must be there", f"--device {name}, but {_DEVICES[device.type]}", "take --device cpu")
