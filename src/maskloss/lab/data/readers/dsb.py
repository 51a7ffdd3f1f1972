"""A mask file for each instance, as the Data Science Bowl of 2018 has them, or for each class of an image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from maskloss.errors import Cause, MaskLossError
from maskloss.lab.data.catalog import Entry, Instance, Part
from maskloss.lab.data.images import check_lossless, read_size
from maskloss.lab.data.maps import components as connected
from maskloss.lab.data.maps import count_apart, read_map
from maskloss.lab.data.options import COMPONENTS, DataOptions
from maskloss.lab.data.problems import LEFT_OUT, SUSPICIOUS, Problems
from maskloss.lab.data.readers.pairs import CLASS, ask
from maskloss.lab.data.readers.segmentation import encode
from maskloss.lab.data.tree import Tree, bare, bare_key, is_mask_place, part_of

# Masks whose values are looked at.
_LOOKED_AT = 20
# An object may be hidden in part, and then lie in several places; this share of all masks may.
_APART = 0.3
# How Label Studio names its masks, after their tasks; how Open Images does, by class and box.
_TASK = re.compile(r"task-(\d+)-annotation-\d+-by-[^-]*-[^-]+-(.+)-\d+")
_OPEN_IMAGES = re.compile(r"(.+)_(m0[0-9a-z_]+)_[0-9a-f]{8}")


class Mask(NamedTuple):
    """A mask file of an image."""

    path: str
    kind: str  # the class that its name or its folder says; "": none


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find images with any number of masks each: in a folder of their own, or named after them."""
    if options.annotations is not None:
        return None
    found = _apart(tree) or _named(tree, problems)
    looked = [mask for some in found.values() for mask in some][:_LOOKED_AT]
    apart = [mask for mask in looked if _values(tree, mask.path)[1]]
    classes = sorted({mask.kind for some in found.values() for mask in some if mask.kind}) or [CLASS]
    if len(apart) > _APART * len(looked) and options.semantic is None:
        if classes == [CLASS]:
            what = f"mask files with pixels in several places, each taken for one instance, of {len(looked)} looked at"
            problems.note(SUSPICIOUS, what, apart[0].path, len(apart))
        else:
            what = f"the masks of classes in {tree.root} have pixels in several places, such as {apart[0].path}"
            ask(what, problems)
    parts: dict[str, list[Entry]] = {}
    for image, masks in found.items():
        with problems.tolerated():
            entry = _read(tree, image, masks, classes, components=options.semantic == COMPONENTS)
            if not masks:
                problems.note(LEFT_OUT, "images without a mask, taken for images without instances", image)
            parts.setdefault(part_of(image), []).append(entry)
    what = "instance" if classes == [CLASS] else "class"
    how = f"a mask file for each {what}: {len(found)} images such as {next(iter(found), None)}"
    listed = list(enumerate(classes, start=1))
    return [Part(part, listed, entries, how) for part, entries in parts.items()] or None


def _apart(tree: Tree) -> dict[str, list[Mask]]:
    """Return the masks of each image, where each image has a folder."""
    parents = [PurePosixPath(each).parent for each in tree.folders("masks") if each not in {".", "masks"}]
    images = {parent: tree.under(f"{parent}/images") for parent in parents}
    single = {parent: some[0] for parent, some in images.items() if len(some) == 1}
    # Of a single folder with one image and one mask, nobody can say whether it is this or a label map.
    if len(single) < 2 or len(single) < len(images):
        return {}
    found = {image: [Mask(path, "") for path in tree.under(f"{parent}/masks")] for parent, image in single.items()}
    return {} if _number(tree, found) else found


def _named(tree: Tree, problems: Problems) -> dict[str, list[Mask]]:
    """Return the masks of each image, where names say whose they are, and which class they have.

    As in masks/a_1.png, masks/a_nut_1.png, masks/a/1.png, masks/a/nut.png and masks/nut/a.png, all of a.png.
    """
    images = {bare_key(path): path for path in tree.images if not is_mask_place(path)}
    found: dict[str, list[Mask]] = {image: [] for image in images.values()}
    if len({key[-1] for key in images}) == len(images):
        images |= {key[-1:]: path for key, path in images.items()}
    masks = [path for path in tree.images if is_mask_place(path)]
    for path in masks:
        owned = _owner(path, images)
        if owned is None:
            _tell_tasks(tree, masks)
            return {}
        found[owned[0]].append(Mask(path, owned[1]))
    # One mask an image may as well be a label map, and so may be what has several values.
    if len(found) < 2 or all(len(some) < 2 for some in found.values()) or _number(tree, found):
        return {}
    kinds = [mask.kind for some in found.values() for mask in some]
    # Numbers of boxes, names of people: what differs from file to file is no class.
    if 2 * len(set(kinds)) > len(kinds) or "" in kinds:
        if any(kinds):
            what = f"names of masks that say more than a number: all are called {CLASS!r}"
            problems.note(SUSPICIOUS, what, masks[0], sum(map(bool, kinds)))
        return {image: [mask._replace(kind="") for mask in some] for image, some in found.items()}
    return found


def _number(tree: Tree, found: Mapping[str, Sequence[Mask]]) -> bool:
    """Whether the files number instances, so that they are label maps."""
    looked = [mask.path for some in found.values() for mask in some][:_LOOKED_AT]
    return any(_values(tree, path)[0] > 1 for path in looked)


def _owner(path: str, images: Mapping[tuple[str, ...], str]) -> tuple[str, str] | None:
    """Return the image of a mask, and the class that its name says; None: there is none, or a map of this name."""
    *folders, name = bare_key(path)
    if (*folders, name) in images:
        return None
    stem = PurePosixPath(path).stem
    special = _TASK.fullmatch(stem) or _OPEN_IMAGES.fullmatch(stem)
    if special:
        for before in (special[1], f"task_{special[1]}"):
            owner = images.get((*folders, bare(before)))
            if owner:
                return owner, special[2]
    tokens = name.split("_")
    for cut in range(len(tokens) - 1, 0, -1):
        owner = images.get((*folders, "_".join(tokens[:cut])))
        if owner:
            return owner, _kind(tokens[cut:])
    if tuple(folders) in images:
        return images[tuple(folders)], _kind(tokens)
    for place, folder in enumerate(folders):
        owner = images.get((*folders[:place], *folders[place + 1 :], name))
        if owner:
            return owner, next((part for part in PurePosixPath(path).parts if bare(part) == folder), folder)
    return None


def _kind(tokens: Sequence[str]) -> str:
    return "_".join(token for token in tokens if not any(map(str.isdigit, token)))


def _tell_tasks(tree: Tree, masks: Sequence[str]) -> None:
    """Raise if the masks are those of tasks, and no image is named after its task."""
    if masks and all(_TASK.fullmatch(PurePosixPath(path).stem) for path in masks):
        what = f"{tree.path(masks[0])} and others name tasks of Label Studio, and no image has the number of its task"
        raise Cause("masks must say whose they are", what, "export JSON instead: it has brush masks, too")


def _values(tree: Tree, mask: str) -> tuple[int, bool]:
    """Return how many values a mask has beside 0, and whether one lies in several places; broken ones fail later."""
    try:
        labels = read_map(tree.path(mask))
    except MaskLossError:
        return 0, False
    values = [int(value) for value in np.unique(labels) if value]
    return len(values), len(values) == 1 and bool(count_apart(labels, values)[0])


def _read(tree: Tree, image: str, masks: Sequence[Mask], classes: Sequence[str], *, components: bool) -> Entry:
    path = tree.path(image)
    height, width = read_size(path)
    entry = Entry(str(path), height, width, [])
    for mask, kind in masks:
        file = tree.path(mask)
        check_lossless(file)
        found = read_size(file)
        if found != (height, width):
            raise Cause(
                "a mask must have the size of its image",
                f"{mask} is {found[0]} x {found[1]}, {path.name} is {height} x {width}",
                "store both at the same resolution",
            )
        label = classes.index(kind) if kind else 0
        if components:
            regions, value_of = connected(read_map(file))
            entry.instances.extend(Instance(encode(regions == number), label) for number in value_of)
        elif not kind or read_map(file).any():
            # Where each class has a file, it is empty where the class is not to be seen.
            entry.instances.append(Instance({"file": str(file)}, label))
    return entry
