"""What a data set holds, image by image, in a form that does not grow with the number of Python objects.

Annotations are kept as one block of bytes and read when they are needed. A list of dicts would take ten times the
memory, and again in every worker, since counting references copies the pages that were shared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Kinds of instances: one object; many that nobody told apart; an object with a known box and no mask.
OBJECT, CROWD, BOX = "object", "crowd", "box"


class Instance(NamedTuple):
    """An annotated region of an image."""

    # where its pixels are: COCO's polygons or run lengths; the number in the map of the image; the path of a mask
    # of its own; or {"box": [x, y, width, height]}
    source: Any
    label: int  # its class
    kind: str = OBJECT  # "object"; "crowd" and "box" are regions in which nothing is asked for


class Map(NamedTuple):
    """A file that says for each pixel what it belongs to."""

    file: str  # its path
    reading: str  # how a number is made of a pixel, see `maps.READINGS`
    void: Sequence[int] = ()  # numbers of pixels that belong to nothing known, which weigh nothing


class Entry(NamedTuple):
    """An image and its annotations."""

    file: str  # path of the image
    height: int  # pixels, of the image as it was annotated
    width: int  # pixels
    instances: list[Instance]  # in the order of the source
    map: Map | None = None  # what the numbers of instances are looked up in; None: they have sources of their own
    id: int | str | None = None  # what the source calls the image; None: nothing

    @property
    def name(self) -> str:
        """What to call the image."""
        return Path(self.file).name

    @property
    def objects(self) -> list[Instance]:
        """The instances to find."""
        return [each for each in self.instances if each.kind == OBJECT]

    @property
    def regions(self) -> list[Instance]:
        """The instances in which nothing is asked for: crowds, and boxes without masks."""
        return [each for each in self.instances if each.kind != OBJECT]


class Part(NamedTuple):
    """A part of a data set, as its source divides it."""

    name: str  # "train", "val", "test", or "" where the source does not say
    classes: list[tuple[int, str]]  # (number, name) of each class, in the order of the labels
    entries: list[Entry]  # the images
    how: str  # how it was recognized
    # numbers of classes that stand for nothing where they have no instances, such as an exporter's class 0
    idle: frozenset[int] = frozenset()


def numbered(entries: Mapping[str, list[Entry]], names: Mapping[int, str], how: str) -> list[Part]:
    """Return parts whose labels have been the numbers of their classes; `names` lists those that are named."""
    used = {each.label for some in entries.values() for entry in some for each in entry.instances}
    classes = [(number, names.get(number, f"class {number}")) for number in sorted(used | set(names))]
    place = {number: label for label, (number, _) in enumerate(classes)}

    def labeled(entry: Entry) -> Entry:  # a new one: an image may be in two parts
        return entry._replace(instances=[each._replace(label=place[each.label]) for each in entry.instances])

    return [Part(part, classes, list(map(labeled, some)), how) for part, some in entries.items()]


class Catalog:
    """The images of a data set."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        block, offsets, facts = bytearray(), [0], []
        for entry in entries:
            # The kind of an object is left out, as it is the usual one.
            instances = [each[:2] if each.kind == OBJECT else each for each in entry.instances]
            block += json.dumps(entry._replace(instances=instances), separators=(",", ":")).encode()  # type: ignore[arg-type]
            offsets.append(len(block))
            facts.append((entry.height, entry.width, len(entry.objects)))
        self._block = np.frombuffer(bytes(block), dtype=np.uint8)
        self._offsets = np.array(offsets, dtype=np.int64)
        table = np.array(facts, dtype=np.int64).reshape(-1, 3)
        self.sizes: NDArray[np.int64] = table[:, :2]
        self.counts: NDArray[np.int64] = table[:, 2]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, number: int) -> Entry:
        start, end = self._offsets[number], self._offsets[number + 1]
        file, height, width, instances, found, name = json.loads(self._block[start:end].tobytes())
        listed = [Instance(*each) for each in instances]
        return Entry(file, height, width, listed, None if found is None else Map(*found), name)

    def select(self, numbers: Sequence[int]) -> Catalog:
        """Return a catalog of some of the images."""
        return Catalog(self[number] for number in numbers)

    @property
    def files(self) -> list[str]:
        """The paths of the images."""
        return [self[number].file for number in range(len(self))]


class Found(NamedTuple):
    """A data set as it was found in a folder."""

    kind: str  # the name of the reader
    how: list[str]  # how it was recognized, one line for each part
    class_names: list[str]  # in the order of the labels
    category_ids: list[int]  # the numbers of the classes in their source, in the same order
    train: Catalog  # images to train on
    held_out: Catalog  # images to score on
    microscopy: bool  # whether these are label maps of one class, which microscopy scores in its own way

    def part(self, held_out: bool) -> Catalog:
        """Return one of the two catalogs."""
        return self.held_out if held_out else self.train
