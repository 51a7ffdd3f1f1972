"""What a data set holds, image by image, in a form that does not grow with the number of Python objects.

Annotations are kept as one block of bytes and read when they are needed. A list of dicts would take ten times the
memory, and again in every worker, since counting references copies the pages that were shared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Entry(NamedTuple):
    """An image and its annotations.

    Attributes:
        file: path of the image.
        height: pixels.
        width: pixels.
        segments: of each instance: a COCO segmentation, or its number in the map.
        labels: the class of each instance.
        crowds: regions of many instances that nobody told apart, in the form of `segments`.
        crowd_labels: their classes.
        map: path of the label map; None: the segments are COCO's.
        colored: whether the map holds a number as red + 256 green + 65536 blue, as COCO panoptic does.
    """

    file: str
    height: int
    width: int
    segments: list[Any]
    labels: list[int]
    crowds: list[Any]
    crowd_labels: list[int]
    map: str | None = None
    colored: bool = False

    @property
    def name(self) -> str:
        """What to call the image."""
        return Path(self.file).name


class Catalog:
    """The images of a data set.

    Args:
        entries: in order.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        block, offsets, facts = bytearray(), [0], []
        for entry in entries:
            block += json.dumps(entry, separators=(",", ":")).encode()
            offsets.append(len(block))
            facts.append((entry.height, entry.width, len(entry.segments)))
        self._block = np.frombuffer(bytes(block), dtype=np.uint8)
        self._offsets = np.array(offsets, dtype=np.int64)
        table = np.array(facts, dtype=np.int64).reshape(-1, 3)
        self.sizes: NDArray[np.int64] = table[:, :2]
        self.counts: NDArray[np.int64] = table[:, 2]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, number: int) -> Entry:
        start, end = self._offsets[number], self._offsets[number + 1]
        return Entry(*json.loads(self._block[start:end].tobytes()))

    def select(self, numbers: Sequence[int]) -> Catalog:
        """Return a catalog of some of the images."""
        return Catalog(self[number] for number in numbers)

    def class_counts(self, classes: int) -> list[int]:
        """Count the instances of each class."""
        found = np.zeros(classes, dtype=np.int64)
        for number in range(len(self)):
            found += np.bincount(np.array(self[number].labels, dtype=np.int64), minlength=classes)
        return [int(count) for count in found]


class Found(NamedTuple):
    """A data set as it was found in a folder.

    Attributes:
        kind: "coco", "panoptic" or "labels".
        how: how it was recognized, one line for each part.
        class_names: in the order of the labels.
        category_ids: the numbers of the classes in COCO's files, in the same order.
        train: images to train on.
        held_out: images to score on.
        skipped: what was left out, and why.
    """

    kind: str
    how: list[str]
    class_names: list[str]
    category_ids: list[int]
    train: Catalog
    held_out: Catalog
    skipped: list[str]
