"""A folder for each image with a mask file for each instance, as the Data Science Bowl of 2018 has them."""

from __future__ import annotations

from pathlib import PurePosixPath

from maskloss.errors import Cause
from maskloss.lab.data.catalog import Entry, Instance, Part
from maskloss.lab.data.images import check_lossless, read_size
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LEFT_OUT, Problems
from maskloss.lab.data.readers.pairs import CLASS
from maskloss.lab.data.tree import Tree, part_of


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find folders with images/ of one image and masks/ of any number of masks."""
    if options.annotations is not None:
        return None
    parents = [PurePosixPath(each).parent for each in tree.folders("masks") if each not in {".", "masks"}]
    images = {parent: tree.under(f"{parent}/images") for parent in parents}
    single = {parent: some[0] for parent, some in images.items() if len(some) == 1}
    # Of a single folder with one image and one mask, nobody can say whether it is this or a label map.
    if len(single) < 2 or len(single) < len(images):
        return None
    parts: dict[str, list[Entry]] = {}
    for parent, image in single.items():
        with problems.tolerated():
            entry = _read(tree, image, tree.under(f"{parent}/masks"))
            if not entry.instances:
                problems.note(LEFT_OUT, "images without a mask, taken for images without instances", image)
            parts.setdefault(part_of(image), []).append(entry)
    first = next(iter(single.values()))
    how = f"a folder for each image with a mask for each instance: {len(single)} such as {first}"
    return [Part(part, [(1, CLASS)], entries, f"{how}{f', {part}' if part else ''}") for part, entries in parts.items()]


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
