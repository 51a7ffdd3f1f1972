"""Cityscapes: in _instanceIds.png a thing has 1000 times its class and a number, a group of things its class alone."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np

from maskloss.lab.data.catalog import CROWD, OBJECT, Entry, Instance, Map, Part
from maskloss.lab.data.maps import NUMBERS, fitting_size, read_map
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LEFT_OUT, Problems
from maskloss.lab.data.readers import names
from maskloss.lab.data.tree import Tree, part_of

# The classes with instances.
CLASSES = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 29: "caravan", 30: "trailer", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
_PER_CLASS = 1000
_ENDING = "_instanceids.png"


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find maps that end in _instanceIds.png, and the images with the same beginning of their names."""
    maps = tree.ending(_ENDING)
    if options.annotations is not None or not maps:
        return None
    images = {
        PurePosixPath(path).name.rsplit("_leftImg8bit", 1)[0]: path for path in tree.images if "_leftImg8bit" in path
    }
    # CVAT numbers its classes in the order of a list, with the background first.
    classes = dict(list(enumerate(names.of_colors(tree)))[1:]) or CLASSES
    parts: dict[str, list[Entry]] = {}
    for path in maps:
        # aachen_000000_000019_gtFine_instanceIds.png
        image = images.get(PurePosixPath(path).name[: -len(_ENDING)].rsplit("_gt", 1)[0])
        if image is None:
            problems.note(LEFT_OUT, "maps without an image", path)
            continue
        with problems.tolerated():
            parts.setdefault(part_of(path), []).append(_read(tree.path(image), tree.path(path), list(classes)))
    return [Part(part, list(classes.items()), entries, "Cityscapes") for part, entries in parts.items()] or None


def _read(image: Path, mapped: Path, classes: list[int]) -> Entry:
    height, width = fitting_size(image, mapped)
    instances = []
    place = {number: label for label, number in enumerate(classes)}
    for value in np.unique(read_map(mapped)).tolist():
        of_class = value // _PER_CLASS or value
        if of_class in place:
            instances.append(Instance(value, place[of_class], OBJECT if value >= _PER_CLASS else CROWD))
    return Entry(str(image), height, width, instances, Map(str(mapped), NUMBERS))
