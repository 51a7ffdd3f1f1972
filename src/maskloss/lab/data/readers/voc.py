"""PASCAL VOC: SegmentationObject numbers the instances, SegmentationClass says their classes, borders are void."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause
from maskloss.lab.data.catalog import Entry, Instance, Map, Part, numbered
from maskloss.lab.data.images import is_color
from maskloss.lab.data.maps import COLORS, NUMBERS, fitting_size, read_map
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LEFT_OUT, Problems
from maskloss.lab.data.readers import names
from maskloss.lab.data.tree import TEST, TRAIN, VAL, Tree, folded

# The classes of PASCAL VOC itself, in the order of their numbers.
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_VOID = 255


def color_of(number: int) -> int:
    """Return VOC's color of a number, red + 256 green + 65536 blue: its bits are dealt to the channels in turn."""
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (number >> channel & 1) << (7 - place)
        number >>= 3
    return channels[0] + 256 * channels[1] + 65536 * channels[2]


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find SegmentationObject/ and SegmentationClass/ beside the images."""
    objects, of_class = tree.folders("SegmentationObject"), tree.folders("SegmentationClass")
    if options.annotations is not None or not objects or not of_class:
        return None
    maps = {folded(PurePosixPath(path).stem): path for path in tree.under(objects[0])}
    classes = {folded(PurePosixPath(path).stem): path for path in tree.under(of_class[0])}
    images = {
        folded(PurePosixPath(path).stem): path
        for path in tree.images
        if not path.startswith((f"{objects[0]}/", f"{of_class[0]}/")) and "Visualization" not in path
    }
    stems = sorted(set(maps) & set(classes) & set(images))
    if not stems:
        return None
    if len(images) > len(stems):
        problems.note(LEFT_OUT, "images without SegmentationObject and SegmentationClass", "", len(images) - len(stems))
    read = {}
    for stem in stems:
        with problems.tolerated():
            read[stem] = _read(*(tree.path(each[stem]) for each in (images, maps, classes)))
    known = _names(tree)
    used = {label for entry in read.values() for _, label, _ in entry.instances}
    parts = {part: [read[stem] for stem in some if stem in read] for part, some in _parts(tree, stems).items()}
    named = {number: known.get(number, f"class {number}") for number in used}
    return numbered(parts, named, f"VOC: {objects[0]} and {of_class[0]}")


def _read(image: Path, objects: Path, classes: Path) -> Entry:
    """Read one image; the label of each instance is the value of its class for now."""
    height, width = fitting_size(image, objects)
    reading = COLORS if is_color(objects) else NUMBERS
    void = _VOID if reading == NUMBERS else color_of(_VOID)
    numbers = read_map(objects, reading)
    values = read_map(classes, COLORS if is_color(classes) else NUMBERS)
    if numbers.shape != values.shape:
        raise Cause("both maps must have one size", f"{objects} and {classes} differ", "export the data set again")
    instances = [
        Instance(int(number), _usual(values[numbers == number], void))
        for number in np.unique(numbers)
        if number not in {0, void}
    ]
    return Entry(str(image), height, width, instances, Map(str(objects), reading, [void]))


def _usual(values: NDArray[np.int32], void: int) -> int:
    """Return the most frequent value that is a class."""
    found, counts = np.unique(values[(values != 0) & (values != void)], return_counts=True)
    return int(found[counts.argmax()]) if len(found) else 0


def _names(tree: Tree) -> dict[int, str]:
    """Return the names of classes, by number and by color."""
    colors = names.colors(tree)
    listed = names.of_values(tree)
    if not listed and tree.folders("ImageSets") and tree.folders("Annotations"):
        listed = dict(enumerate(CLASSES))
    return {**{color_of(number): name for number, name in listed.items()}, **listed, **colors}


def _parts(tree: Tree, stems: Sequence[str]) -> dict[str, list[str]]:
    """Divide the images as ImageSets/Segmentation says."""
    parts: dict[str, list[str]] = {}
    for part in (TRAIN, VAL, TEST):
        for path in tree.ending(f"imagesets/segmentation/{part}.txt"):
            wanted = {folded(line.split()[0]) for line in names.read_text(tree, path).splitlines() if line.split()}
            parts[part] = [stem for stem in stems if stem in wanted]
    divided = {part: some for part, some in parts.items() if some}
    return divided if TRAIN in divided else {"": list(stems)}
