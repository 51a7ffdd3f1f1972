"""Scenes: what a model is trained on and what it is held to, wherever they come from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from maskloss._abi import IMAGE_H, IMAGE_W
from maskloss.errors import Cause, MaskLossError
from maskloss.lab.data.problems import Finding
from maskloss.lab.files import explain
from maskloss.targets import MaskTargets

# Seconds to wait for a worker, and one more for each image, before it counts as stopped.
PATIENCE = 600
# What ends a run after its step: Ctrl-C, `kill`, a terminal that closes, and a scheduler's warning.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


class Batch(NamedTuple):
    """Some of a step's scenes."""

    images: Tensor  # float32 `[B, C, S, S]` in [0, 1]
    masks: MaskTargets  # the instances of all images
    labels: Tensor  # int64 `[T_all]`
    # the number of each image within its step, int64 `[B]`: its points depend on it, and not on which process or
    # micro-batch it is in
    image_ids: Tensor
    skipped: list[str]  # broken images that others took the place of

    def to(self, device: torch.device) -> Batch:
        """Move to a device."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.masks.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.image_ids.to(device, non_blocking=True),
            self.skipped,
        )

    def boxes(self) -> list[Tensor]:
        """Return the boxes of each image's instances, (cx, cy, w, h) as fractions of what the model sees, `[T, 4]`."""
        masks = self.masks.to("cpu")
        found = []
        for image, count in enumerate(masks.num_targets):
            frame = masks.images[image, [IMAGE_W, IMAGE_H]]
            corners = torch.zeros(count, 2, 2)
            for corner, (pixels, top, left) in zip(corners, masks.crops(image), strict=True):
                inside = [pixels.any(axis).nonzero() for axis in (0, 1)]
                corner[0] = torch.stack([each[0, 0] for each in inside]) + torch.tensor([left, top])
                corner[1] = torch.stack([each[-1, 0] for each in inside]) + torch.tensor([left, top]) + 1
            low, high = (corners / frame).unbind(1)
            found.append(torch.cat([(low + high) / 2, high - low], dim=1).to(self.images.device))
        return found

    @property
    def targets(self) -> dict[str, Any]:
        """The instances, as `MaskCriterion` takes a collated batch."""
        return {"masks": self.masks, "labels": self.labels}


class Scene(NamedTuple):
    """One held-out scene and its truth, at the resolution at which it was annotated."""

    image: Tensor  # float32 `[C, H, W]` in [0, 1]
    targets: MaskTargets  # the instances, packed, of one image
    labels: Tensor  # int64 `[T]`
    # regions with too many instances of one class to tell apart; predictions in them are not counted
    crowd: MaskTargets
    crowd_labels: Tensor  # the classes of those regions, int64 `[K]`
    ignored: Tensor | None  # pixels that are not counted in mean IoU and in pictures, bool `[H, W]`; None: all are
    name: str  # what to call it

    @property
    def height(self) -> int:
        """Of the image, pixels."""
        return int(self.image.shape[1])

    @property
    def width(self) -> int:
        """Of the image, pixels."""
        return int(self.image.shape[2])

    def masks(self) -> Tensor:
        """Unpack the truth: bool `[T, H, W]`."""
        return self.targets.dense()

    def crowd_masks(self) -> Tensor:
        """Unpack the crowds: bool `[K, H, W]`."""
        return self.crowd.dense()

    def picture(self) -> Tensor:
        """Return the image in three channels, to look at: `[3, H, W]`."""
        return in_color(self.image)


class Probe(NamedTuple):
    """A held-out scene as the model sees it, or the square in its middle: what the points of the loss are shown on."""

    image: Tensor  # float32 `[C, size, size]` in [0, 1]
    picture: Tensor  # float32 `[3, frame, frame]`, to look at
    masks: MaskTargets  # the instances, packed, of one image; they cover the square
    labels: Tensor  # int64 `[T]`
    name: str  # of the scene


class Source(Protocol):
    """Where scenes come from."""

    @property
    def title(self) -> str:
        """What the scenes show, in a few words."""

    @property
    def class_names(self) -> Sequence[str]:
        """The classes, in the order of their labels."""

    @property
    def category_ids(self) -> Sequence[int]:
        """The numbers of the classes in COCO results, in the same order."""

    @property
    def channels(self) -> int:
        """The channels of the images."""

    @property
    def num_training(self) -> int | None:
        """The number of images to train on; None: they are made as they are needed, without end."""

    @property
    def class_counts(self) -> Sequence[int] | None:
        """The number of training instances of each class; None where they are drawn alike."""

    @property
    def most_instances(self) -> int:
        """The most instances of any scene; a model should have as many queries."""

    @property
    def one_class_maps(self) -> bool:
        """Whether the truth is label maps of one class, which microscopy scores in its own way."""

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the data are: names and values to show."""

    @property
    def findings(self) -> Sequence[Finding]:
        """What a person should know of the data: what was mended, decided or left out, and what is suspicious."""

    @property
    def held_out(self) -> Sequence[Scene]:
        """Scenes that are never trained on; read as they are asked for."""

    def limit(self, most: int) -> None:
        """Ask for this many instances of a scene at most: a model has as many queries."""

    def probe(self, number: int) -> Probe:
        """Return a held-out scene as the model sees it."""

    def batch(self, step: int, positions: range, batch_size: int, seed: int) -> Batch:
        """Return the scenes at some positions of a step of `batch_size`: a function of the arguments, nothing else."""


class Trouble(NamedTuple):
    """An error that a worker met, which crosses to the main process as a value."""

    rule: str
    cause: str
    hint: str


class LostReader(RuntimeError):
    """A worker has ended, or does not answer; the message goes on from "a run must keep all of its processes"."""


class Sharing(NamedTuple):
    """Which images of a step this process takes."""

    batch_size: int  # images of a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches of a process
    rank: int = 0  # of this process
    ranks: int = 1  # number of processes

    def positions(self, micro: int) -> range:
        """Return the positions of a micro-batch within the step."""
        count = self.batch_size // (self.accumulate * self.ranks)
        first = (micro * self.ranks + self.rank) * count
        return range(first, first + count)


class Steps(Dataset["Batch | Trouble"]):
    """Micro-batches, found by their step and their number in it."""

    def __init__(self, source: Source, plan: Sharing, seed: int) -> None:
        self.source, self.plan, self.seed = source, plan, seed

    def __getitem__(self, key: tuple[int, int]) -> Batch | Trouble:
        step, micro = key
        try:
            return self.source.batch(step, self.plan.positions(micro), self.plan.batch_size, self.seed)
        except MaskLossError as error:
            return Trouble(*(error.parts or ("the data must be readable", str(error), "")))


def batches(source: Source, plan: Sharing, seed: int, steps: range, workers: int, pin: bool) -> Iterator[list[Batch]]:
    """Load the micro-batches of this process, step by step.

    Raises:
        Cause: an image that cannot be read.
        LostReader: a worker has ended, or does not answer.
    """
    keys = [(step, micro) for step in steps for micro in range(plan.accumulate)]
    loader = DataLoader(
        Steps(source, plan, seed),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=pin,
        worker_init_fn=_begin_worker if workers else None,
        # Without one of its own it draws from torch's, which would differ after a checkpoint.
        generator=torch.Generator(),
    )
    others = active_children()
    loaded: Any = iter(loader)
    own = [child for child in active_children() if child not in others]
    try:
        for _ in steps:
            yield [_checked(_next(loaded, own, len(plan.positions(0)))) for _ in range(plan.accumulate)]
    finally:
        if workers:
            loaded._shutdown_workers()
        for child in own:
            # One that is stopped, or reads from a disk that does not answer: the command would wait for it at its end.
            if child.is_alive():
                child.kill()
                child.join(1)


def _next(loaded: Iterator[Batch | Trouble], workers: Sequence[BaseProcess], images: int) -> Batch | Trouble:
    """Return the next micro-batch.

    The loader's own time limit does not hold while it takes over the memory of a worker that has been stopped: that
    waits until the worker is killed.
    """
    if not workers:
        return next(loaded)
    late = threading.Event()

    def give_up() -> None:
        late.set()
        for worker in workers:
            worker.kill()

    timer = threading.Timer(PATIENCE + images, give_up)
    timer.daemon = True
    timer.start()
    try:
        return next(loaded)
    except (RuntimeError, OSError, EOFError) as error:
        if late.is_set():
            raise LostReader(f"those that read images have not answered for {PATIENCE + images} seconds") from None
        # A connection breaks a moment before the death of its worker is known.
        broken = isinstance(error, (ConnectionError, EOFError))
        if not broken and all(worker.is_alive() for worker in workers):
            raise
        raise LostReader(f"one that reads images has ended: {explain(error)}") from None
    finally:
        timer.cancel()


def _checked(found: Batch | Trouble) -> Batch:
    if isinstance(found, Trouble):
        raise Cause(*found)
    return found


def _begin_worker(_: int) -> None:
    # A terminal, systemd and Slurm signal all processes; the main one finishes its step and needs its workers for that.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def step_generator(*numbers: int) -> torch.Generator:
    """Return a generator that depends on all numbers, so that a step can be drawn without those before it."""
    return torch.Generator().manual_seed(hashed(*numbers))


def hashed(*numbers: int) -> int:
    """Make one seed of several numbers: torch's CPU generator reads 32 bits of its own."""
    [state] = np.random.SeedSequence(numbers).generate_state(1)
    return int(state)


def in_color(image: Tensor) -> Tensor:
    """Return three channels of an image `[C, H, W]`, to look at."""
    return image[:3] if image.shape[0] >= 3 else image.mean(0, keepdim=True).expand(3, -1, -1)


def share(length: int, frame: int, size: int) -> int:
    """Return how many of `size` pixels a length takes when `frame` takes all of them, at least one."""
    return max(1, round(length * size / frame))


def fit(image: NDArray[Any] | Tensor, frame: int, size: int) -> Tensor:
    """Resize an image and put it into the top left corner of a square filled with its mean color.

    An image is brought to the same pixels whatever the other images of its batch are, which is why batches are padded
    to a fixed square and not to their largest image.

    Args:
        image: `[H, W, C]` of an array, or `[C, H, W]` of a tensor; uint8 or float32.
        frame: side of the square in pixels of the image.
        size: side of the square that is returned.

    Returns:
        float32 `[C, size, size]`, in the range of the image.
    """
    planes = image if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    height, width = share(planes.shape[1], frame, size), share(planes.shape[2], frame, size)
    if planes.shape[1:] != (height, width):
        planes = interpolate(planes[None], (height, width), mode="bilinear", antialias=True)[0]
    planes = planes.float()
    if (height, width) == (size, size):
        return planes
    square = planes.mean((1, 2), keepdim=True).expand(-1, size, size).clone()
    square[:, :height, :width] = planes
    return square
