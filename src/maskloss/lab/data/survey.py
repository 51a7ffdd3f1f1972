"""A look at every image before anything is trained on: how much there is of what, and what is suspicious."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import MaskLossError
from maskloss.lab.data import truth
from maskloss.lab.data.ahead import in_order
from maskloss.lab.data.catalog import Catalog, Entry
from maskloss.lab.data.folder import FolderScenes, Reading
from maskloss.lab.data.problems import SUSPICIOUS, Problems
from maskloss.lab.data.tiff import Array
from maskloss.lab.data.truth import Box, Loaded, Measured

# What the model sees of an instance must have this many pixels.
LEAST_SEEN = 4
# Two instances that share this much of the pixels of both are one that was annotated twice.
_SAME = 0.9
# Images that are looked at before a training run; a check looks at all.
LOOKED_AT = 200
# Images that are in memory at once.
AHEAD = 4
# Places that are kept of each finding.
_PLACES = 4

EMPTY = "instances without a pixel, left out"
TWICE = "instances that are there twice: more than nine tenths of their pixels are the same"
BACKGROUND = "instances with all four corners of most images: is it the background that has a number?"
LEAKED = "images with the very pixels of an image in the other part: scores on them mean nothing"
REPEATED = "images with the very pixels of another one"


class Place(NamedTuple):
    """Where something is to be seen."""

    held_out: bool  # whether in a held-out image
    number: int  # of the image in its part
    box: Box | None = None  # top, left, bottom and right, in pixels of the image; None: all of it


class Look(NamedTuple):
    """What was seen of an image."""

    labels: NDArray[np.int64]  # int64 `[T]`
    areas: NDArray[np.int64]  # of the instances, pixels, int64 `[T]`
    signs: list[tuple[str, Box | None]]  # what is suspicious, and the box of the instance; None: of the whole image
    content: bytes | None  # equal for equal pixels; None: the image is of one color, which many may be


class Seen(NamedTuple):
    """What was seen of a part."""

    numbers: list[int]  # of the images that were looked at
    labels: NDArray[np.int64]  # of all instances in them
    areas: NDArray[np.int64]  # of these instances, pixels
    shown: NDArray[np.float64]  # areas as the model sees them, in its pixels


class Survey(NamedTuple):
    """What was seen."""

    train: Seen  # of the images to train on
    held_out: Seen  # of the others
    places: dict[str, list[Place]]  # for each finding, where it is to be seen first


def survey(
    source: FolderScenes, most: int | None = None, advance: Callable[[int, int], None] = lambda *_: None
) -> Survey:
    """Look at images, and note what is suspicious. They are read a few at a time and never kept.

    Args:
        source: its `problems` are told.
        most: images to look at, evenly chosen; None: all.
        advance: told how many are done, and of how many.
    """
    found, reading, problems = source.found, source.reading, source.problems
    every = [Place(held_out, number) for held_out in (False, True) for number in range(len(found.part(held_out)))]
    if most is not None and most < len(every):
        every = [every[place] for place in np.linspace(0, len(every) - 1, most).astype(int)]
    places: dict[str, list[Place]] = {}
    seen: tuple[list[tuple[int, Look]], list[tuple[int, Look]]] = ([], [])
    owner: dict[bytes, Place] = {}

    def work(place: Place) -> tuple[Entry, Look | MaskLossError]:
        entry = found.part(place.held_out)[place.number]
        try:
            return entry, _look(truth.load(entry), reading)
        except MaskLossError as error:
            return entry, error

    with in_order(work, every, AHEAD) as looks:
        for place, (entry, look) in zip(every, looks, strict=True):
            advance(sum(map(len, seen)) + 1, len(every))
            with problems.tolerated():
                if isinstance(look, MaskLossError):
                    raise look
                seen[place.held_out].append((place.number, look))
                signs = [(what, place._replace(box=box)) for what, box in look.signs if what != BACKGROUND]
                before = owner.setdefault(look.content, place) if look.content else place
                if before != place:
                    signs.append((LEAKED if before.held_out != place.held_out else REPEATED, place))
                for what, where in signs:
                    _note(problems, places, what, entry.name, where)
    _note_background(source, seen, places)
    train, held_out = (
        _together(part, each, reading) for part, each in zip((found.train, found.held_out), seen, strict=True)
    )
    return Survey(train, held_out, places)


def _note(problems: Problems, places: dict[str, list[Place]], what: str, example: str, where: Place) -> None:
    problems.note(SUSPICIOUS, what, example)
    kept = places.setdefault(what, [])
    if len(kept) < _PLACES:
        kept.append(where)


def _note_background(
    source: FolderScenes, seen: Sequence[list[tuple[int, Look]]], places: dict[str, list[Place]]
) -> None:
    """One image may be filled by an instance; if most of them are, it is no object."""
    if source.found.kind == "panoptic":
        return
    filled = [
        (Place(bool(held_out), number, box), look)
        for held_out, part in enumerate(seen)
        for number, look in part
        for what, box in look.signs
        if what == BACKGROUND
    ]
    full = sum(len(look.labels) > 0 for part in seen for _, look in part)
    if len(filled) > 1 and 2 * len(filled) > full:
        for place, _ in filled:
            name = source.found.part(place.held_out)[place.number].name
            _note(source.problems, places, BACKGROUND, name, place._replace(box=None))


def _look(loaded: Loaded, reading: Reading) -> Look:
    scale = magnification(loaded.entry, reading)
    found = list(loaded.measured())
    signs: list[tuple[str, Box | None]] = []
    for each in found:
        if not each.area:
            signs.append((EMPTY, None))
        elif each.area * scale**2 < LEAST_SEEN:
            signs.append((tiny(reading), each.box))
        if each.corners:
            signs.append((BACKGROUND, each.box))
    signs += [(TWICE, box) for box in _twice(loaded, found)]
    labels = np.array([each.label for each in found], dtype=np.int64)
    areas = np.array([each.area for each in found], dtype=np.int64)
    return Look(labels, areas, signs, _content(loaded.image))


def tiny(reading: Reading) -> str:
    """Say that instances are too small for what the model sees."""
    more = "a larger --size" if reading.crop else "a larger --size, or --crop,"
    return f"instances of fewer than {LEAST_SEEN} pixels at the size {reading.size}: {more} shows more of them"


def magnification(entry: Entry, reading: Reading) -> float:
    """Return how many pixels of the model a pixel of an image becomes, along a side."""
    return reading.size / (reading.crop or max(entry.height, entry.width))


def _twice(loaded: Loaded, found: Sequence[Measured]) -> list[Box]:
    """Return the boxes of instances that another one, listed before, covers. Those of a map cannot overlap."""
    if loaded.map is not None or len(found) < 2:
        return []
    areas = np.array([each.area for each in found], dtype=np.float64)
    boxes = np.array([each.box for each in found], dtype=np.float64)
    again = []
    for second in range(1, len(found)):
        if not areas[second]:
            continue
        # Masks that are alike have boxes and areas that are alike: few have to be decoded once more.
        ratio = np.minimum(areas[:second], areas[second]) / np.maximum(areas[:second], areas[second])
        side = max(boxes[second, 2:] - boxes[second, :2])
        near = np.abs(boxes[:second] - boxes[second]).max(1) <= max(1, (1 - _SAME) * side)
        alike = np.flatnonzero((ratio > _SAME) & near)
        if len(alike):
            mask = loaded.mask(found[second].source)
            if any(_iou(mask, loaded.mask(found[int(first)].source)) > _SAME for first in alike):
                again.append(found[second].box)
    return again


def _iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(np.count_nonzero(one & other) / np.count_nonzero(one | other))


def _content(image: Array) -> bytes | None:
    if image.min() == image.max():
        return None
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16, key=str(image.shape).encode()).digest()


def _together(catalog: Catalog, seen: Sequence[tuple[int, Look]], reading: Reading) -> Seen:
    scales = [np.full(len(look.areas), magnification(catalog[number], reading) ** 2) for number, look in seen]
    looks = [look for _, look in seen]
    areas = np.concatenate([np.zeros(0, dtype=np.int64), *(look.areas for look in looks)])
    labels = np.concatenate([np.zeros(0, dtype=np.int64), *(look.labels for look in looks)])
    return Seen([number for number, _ in seen], labels, areas, areas * np.concatenate([np.zeros(0), *scales]))


def part_table(source: FolderScenes, seen: Survey) -> list[list[str]]:
    """Return what each part holds, a row for each fact, under a head."""
    rows = [["", "training", "held out"]]
    columns = []
    for catalog, part in ((source.found.train, seen.train), (source.found.held_out, seen.held_out)):
        sizes = catalog.sizes
        sides = "–" if not len(sizes) else _span(np.sort(sizes, axis=1)[:, ::-1].prod(1), sizes)
        columns.append(
            {
                "images": f"{len(catalog):,}",
                "without instances": f"{int((catalog.counts == 0).sum()):,}",
                "height x width": sides,
                "instances": f"{int(catalog.counts.sum()):,}",
                "instances in an image": spread(catalog.counts),
                "area, pixels": spread(part.areas),
                "side, as the model sees it": spread(np.sqrt(part.shown)),
            }
        )
    return rows + [[name, columns[0][name], columns[1][name]] for name in columns[0]]


def _span(areas: NDArray[np.int64], sizes: NDArray[np.int64]) -> str:
    low, high = sizes[areas.argmin()], sizes[areas.argmax()]
    first, last = (f"{int(size[0])} x {int(size[1])}" for size in (low, high))
    return first if first == last else f"{first} to {last}"


def spread(values: NDArray[np.int64] | NDArray[np.float64]) -> str:
    """Show the median and both ends of some numbers."""
    if not len(values):
        return "–"
    low, middle, high = np.percentile(values, [0, 50, 100])
    ends = "" if low == high else f" ({_short(low)} to {_short(high)})"
    return _short(middle) + ends


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def class_table(source: FolderScenes, seen: Survey) -> list[list[str]]:
    """Return how many instances of each class there are, the most frequent first, under a head."""
    count = len(source.class_names)
    train, held_out = (np.bincount(part.labels, minlength=count) for part in (seen.train, seen.held_out))
    areas = np.concatenate([seen.train.areas, seen.held_out.areas])
    labels = np.concatenate([seen.train.labels, seen.held_out.labels])
    order = sorted(range(count), key=lambda label: -int(train[label] + held_out[label]))
    rows = [
        [source.class_names[label], f"{train[label]:,}", f"{held_out[label]:,}", spread(areas[labels == label])]
        for label in order
    ]
    return [["class", "training", "held out", "area, pixels"], *rows]
