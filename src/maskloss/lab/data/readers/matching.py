"""Which label map belongs to which image, by the names of files and folders, or by what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from maskloss.errors import Cause, MaskLossError
from maskloss.lab.data import npy
from maskloss.lab.data.maps import count_apart, read_map
from maskloss.lab.data.problems import DECIDED, LEFT_OUT, Problems
from maskloss.lab.data.tree import IMAGE_WORDS, Tree, bare_key, is_mask_place, part_of, words

# What programs write beside their masks, and what is neither image nor mask.
_BYPRODUCTS = ("_flows", "_outlines", "_cp_output", "_overlay", "_prob", "_probs", "_probabilities", "_output")
# Of several maps for one image, the first of these is taken.
_RANK = ("masks", "mask", "labels", "label", "instances", "instance", "gt")
# A map of instances or classes has at most this many values.
_MOST_VALUES = 256

# Paths by what an image and its map have in common.
Named = dict[tuple[str, ...], list[str]]


class Pair(NamedTuple):
    """An image and its map, as paths relative to the folder."""

    image: str
    map: str


def find_pairs(tree: Tree, problems: Problems) -> list[Pair]:
    """Pair images with maps."""
    images: dict[tuple[str, ...], list[str]] = {}
    maps: dict[tuple[str, ...], list[str]] = {}
    for path in (*tree.images, *tree.ending(*npy.SUFFIXES)):
        stem = PurePosixPath(path).stem
        if stem.lower().endswith(_BYPRODUCTS) or (path.endswith(npy.SUFFIXES) and not is_mask_place(path)):
            continue
        place = maps if is_mask_place(path) else images
        place.setdefault(bare_key(path), []).append(path)
    # MVTec has images in train/ and test/, and the maps of both in ground_truth/. Folders of images have many names;
    # the names of files say what belongs together if each is there once.
    for change in (_without_parts, partial(_by_file_name, problems=problems), _without_common_end):
        if maps and not set(images) & set(maps):
            images, maps = change(images), change(maps)
    if not maps:
        images, maps = _by_content(tree)
    pairs, missing = [], []
    for key, some in images.items():
        found = sorted(maps.pop(key, []), key=_rank)
        if not found:
            missing += some
            continue
        if len(some) > 1 or len({_rank(path)[:2] for path in found}) < len(found):
            raise Cause(
                "an image must have one label map", f"{', '.join([*some, *found])} in {tree.root}", "move one away"
            )
        if len(found) > 1:
            problems.note(DECIDED, "several maps for one image, the first taken", f"{found[0]} before {found[1]}")
        pairs.append(Pair(some[0], found[0]))
    if pairs and missing:
        problems.note(LEFT_OUT, "images without a label map", missing[0], len(missing))
    if pairs and maps:
        problems.note(LEFT_OUT, "label maps without an image", next(iter(maps.values()))[0], len(maps))
    return sorted(pairs)


def _by_file_name(found: Named, problems: Problems) -> Named:
    """Sort paths by what their last names have in common; as they are where that is not enough to tell them apart.

    Of several folders with the same names, the one that is called images or masks is meant, not what was made of it.
    """
    every = [path for some in found.values() for path in some]
    last = _by_last_name(every)
    if len(last) < len(every):
        called = {PurePosixPath(path).parent.name for path in every}
        known = [name for name in called if is_mask_place(f"{name}/0.png") or set(words(name)) & IMAGE_WORDS]
        if known:
            first = min(known, key=lambda name: (*_rank(name)[1:2], len(name), name))
            last = _by_last_name([path for path in every if PurePosixPath(path).parent.name == first])
            problems.note(DECIDED, f"of folders with the same names, {first!r} taken", ", ".join(sorted(called)), 0)
    return last if all(len(some) == 1 for some in last.values()) else found


def _by_last_name(paths: Iterable[str]) -> Named:
    found: Named = {}
    for path in paths:
        name = re.sub(r"\d+", lambda digits: str(int(digits[0])), bare_key(path)[-1])
        found.setdefault((name,), []).append(path)
    return found


def _without_common_end(found: Named) -> Named:
    """Drop what the names of all files end in, such as the L of CamVid's maps or the "simple" of ilastik's."""
    tokens = {key: key[-1].split("_") for key in found}
    ends = zip(*(each[::-1] for each in tokens.values()), strict=False)
    same = sum(1 for _ in takewhile(lambda some: len(set(some)) == 1 and not some[0].isdigit(), ends))
    if len(found) < 2 or not same:
        return found
    return {(*key[:-1], "_".join(tokens[key][:-same])): some for key, some in found.items()}


def _without_parts(found: Named) -> Named:
    bare: Named = {}
    for key, some in found.items():
        bare.setdefault(tuple(name for name in key[:-1] if not part_of(f"{name}/x")) + key[-1:], []).extend(some)
    return bare


def _by_content(tree: Tree) -> tuple[Named, Named]:
    """Find folders with files of the same names, some with maps and some with images, whatever they are called."""
    folders = tree.by_folder
    if len(folders) < 2 or len(folders) % 2:
        return {}, {}
    maps = [name for name, some in folders.items() if all(_looks_like_a_map(tree.path(path)) for path in some[:3])]
    images = [name for name in folders if name not in maps]
    found: tuple[Named, Named] = {}, {}
    for image, mapped in _partners(folders, images, maps):
        for place, name in enumerate((image, mapped)):
            found[place].update({(mapped, PurePosixPath(path).stem): [path] for path in folders[name]})
    return found


def _partners(folders: dict[str, list[str]], images: list[str], maps: list[str]) -> list[tuple[str, str]]:
    """Pair folders of the same files, or of the same part, parent or name as well; none where that is ambiguous."""
    files = {name: frozenset(PurePosixPath(path).stem for path in some) for name, some in folders.items()}
    for more in (lambda _: "", lambda name: part_of(f"{name}/0"), _parent, lambda name: PurePosixPath(name).name):
        keys = [{(files[name], more(name)): name for name in some} for some in (images, maps)]
        if len(keys[0]) == len(images) and len(keys[1]) == len(maps) and set(keys[0]) == set(keys[1]):
            return [(keys[0][key], keys[1][key]) for key in keys[0]]
    return []


def _parent(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


def _looks_like_a_map(path: Path) -> bool:
    """Whether a file has one channel of few values that are not scattered, in a format that keeps them."""
    try:
        labels = read_map(path)
    except MaskLossError:
        return False
    values = [int(value) for value in np.unique(labels) if value]
    return 0 < len(values) <= _MOST_VALUES and 2 * count_apart(labels, values)[1] <= len(values)


def _rank(path: str) -> tuple[bool, int, str]:
    lowered = path.lower()
    places = [place for place, word in enumerate(_RANK) if word in lowered]
    return lowered.endswith(npy.SUFFIXES), min(places, default=len(_RANK)) + ("_cp_" in lowered), path
