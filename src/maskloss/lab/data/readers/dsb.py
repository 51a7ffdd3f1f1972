"""A folder for each image with a mask file for each instance, as the Data Science Bowl of 2018 has them."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import numpy as np

from maskloss.errors import Cause, MaskLossError
from maskloss.lab.data.catalog import Entry, Instance, Part
from maskloss.lab.data.images import check_lossless, read_size
from maskloss.lab.data.maps import read_map
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LEFT_OUT, SUSPICIOUS, Problems
from maskloss.lab.data.readers.pairs import CLASS, count_apart
from maskloss.lab.data.tree import Tree, bare_key, is_mask_place, part_of

# Masks whose values are looked at.
_LOOKED_AT = 20
# An object may be hidden in part, and then lie in several places; this share of all masks may.
_APART = 0.3


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find images with any number of masks each: in a folder of their own, or named after them."""
    if options.annotations is not None:
        return None
    found = _apart(tree) or _named(tree)
    parts: dict[str, list[Entry]] = {}
    for image, masks in found.items():
        with problems.tolerated():
            entry = _read(tree, image, masks)
            if not entry.instances:
                problems.note(LEFT_OUT, "images without a mask, taken for images without instances", image)
            parts.setdefault(part_of(image), []).append(entry)
    looked = [mask for some in found.values() for mask in some][:_LOOKED_AT]
    apart = [mask for mask in looked if _values(tree, mask)[1]]
    if len(apart) > _APART * len(looked):
        what = f"mask files with pixels in several places, each taken for one instance, of {len(looked)} looked at"
        problems.note(SUSPICIOUS, what, apart[0], len(apart))
    how = f"a mask file for each instance: {len(found)} images such as {next(iter(found), None)}"
    return [
        Part(part, [(1, CLASS)], entries, f"{how}{f', {part}' if part else ''}") for part, entries in parts.items()
    ] or None


def _apart(tree: Tree) -> dict[str, list[str]]:
    """Return the masks of each image, where each image has a folder."""
    parents = [PurePosixPath(each).parent for each in tree.folders("masks") if each not in {".", "masks"}]
    images = {parent: tree.under(f"{parent}/images") for parent in parents}
    single = {parent: some[0] for parent, some in images.items() if len(some) == 1}
    # Of a single folder with one image and one mask, nobody can say whether it is this or a label map.
    if len(single) < 2 or len(single) < len(images):
        return {}
    return {image: tree.under(f"{parent}/masks") for parent, image in single.items()}


def _named(tree: Tree) -> dict[str, list[str]]:
    """Return the masks of each image, where they are named after it: masks/a_1.png, or masks/a/1.png, of a.png."""
    images = {bare_key(path): path for path in tree.images if not is_mask_place(path)}
    found: dict[str, list[str]] = {image: [] for image in images.values()}
    masks = [path for path in tree.images if is_mask_place(path)]
    for mask in masks:
        *folders, name = bare_key(mask)
        before = re.sub(r"_?\d+$", "", name)
        owner = images.get((*folders, before)) or images.get(tuple(folders)) if (*folders, name) not in images else None
        if owner is None:
            return {}
        found[owner].append(mask)
    # One mask an image may as well be a label map, and so may be what has several values.
    several = len(found) > 1 and any(len(some) > 1 for some in found.values())
    values = [_values(tree, mask)[0] for mask in masks[:_LOOKED_AT]] if several else []
    return found if several and max(values, default=0) < 2 else {}


def _values(tree: Tree, mask: str) -> tuple[int, bool]:
    """Return how many values a mask has beside 0, and whether one lies in several places; broken ones fail later."""
    try:
        labels = read_map(tree.path(mask))
    except MaskLossError:
        return 0, False
    values = [int(value) for value in np.unique(labels) if value]
    return len(values), len(values) == 1 and bool(count_apart(labels, values)[0])


def _read(tree: Tree, image: str, masks: list[str]) -> Entry:
    path = tree.path(image)
    height, width = read_size(path)
    instances = []
    for mask in masks:
        check_lossless(tree.path(mask))
        found = read_size(tree.path(mask))
        if found != (height, width):
            raise Cause(
                "a mask must have the size of its image",
                f"{mask} is {found[0]} x {found[1]}, {path.name} is {height} x {width}",
                "store both at the same resolution",
            )
        instances.append(Instance({"file": str(tree.path(mask))}, 0))
    return Entry(str(path), height, width, instances)
