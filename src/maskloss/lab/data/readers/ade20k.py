"""ADE20K: colors that hold a class and a number, of the full data set (_seg.png) and of its instance challenge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from maskloss.lab.data.catalog import Entry, Instance, Map, Part, numbered
from maskloss.lab.data.maps import COLORS, fitting_size, read_map
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LEFT_OUT, Problems
from maskloss.lab.data.readers import names
from maskloss.lab.data.tree import Tree, folded, is_mask_place, part_of


def _of_full(color: int) -> int:
    """Return the class of a color in _seg.png: a tenth of red times 256, and green; blue numbers the instances."""
    return (color & 255) // 10 * 256 + (color >> 8 & 255)


def _of_challenge(color: int) -> int:
    """Return the class of a color in annotations_instance/: red; green numbers the instances."""
    return color & 255 if color >> 8 & 255 else 0


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find ADE's own names of files and folders."""
    if options.annotations is not None:
        return None
    full = [path for path in tree.ending("_seg.png") if PurePosixPath(path).name.startswith("ADE_")]
    challenge = [path for each in tree.folders("annotations_instance") for path in tree.under(each)]
    if full:
        return _parts(tree, {path.removesuffix("_seg.png"): path for path in full}, _of_full, problems)
    if challenge:
        return _parts(tree, {path: path for path in challenge}, _of_challenge, problems)
    return None


def _parts(tree: Tree, maps: dict[str, str], class_of: Callable[[int], int], problems: Problems) -> list[Part]:
    images = {folded(PurePosixPath(path).stem): path for path in tree.images if not is_mask_place(path)}
    images = {stem: path for stem, path in images.items() if path not in maps.values()}
    found: dict[str, list[Entry]] = {}
    for stem, path in maps.items():
        image = images.get(folded(PurePosixPath(stem).stem if stem == path else PurePosixPath(stem).name))
        if image is None:
            problems.note(LEFT_OUT, "maps without an image", path)
            continue
        with problems.tolerated():
            entry = _read(tree.path(image), tree.path(path), class_of)
            found.setdefault(part_of(path), []).append(entry)
    used = {each.label for entries in found.values() for entry in entries for each in entry.instances}
    known = {number: name for number, name in names.of_values(tree).items() if number in used}
    return numbered(found, known, "ADE20K")


def _read(image: Path, mapped: Path, class_of: Callable[[int], int]) -> Entry:
    height, width = fitting_size(image, mapped)
    colors = np.unique(read_map(mapped, COLORS)).tolist()
    instances = [Instance(color, class_of(color)) for color in colors if class_of(color)]
    return Entry(str(image), height, width, instances, Map(str(mapped), COLORS))
