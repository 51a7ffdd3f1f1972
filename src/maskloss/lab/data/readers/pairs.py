"""Images with label maps beside them: of Cellpose, of StarDist, of U-Nets, and semantic ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause, MaskLossError
from maskloss.lab.data import npy, tiff
from maskloss.lab.data.ahead import in_order
from maskloss.lab.data.catalog import Entry, Instance, Map, Part
from maskloss.lab.data.images import read_head
from maskloss.lab.data.maps import (
    COLORED_COMPONENTS,
    COLORS,
    COMPONENTS,
    NUMBERS,
    components,
    has_colors,
    map_size,
    read_map,
)
from maskloss.lab.data.options import CLASSES, INSTANCES, DataOptions
from maskloss.lab.data.options import COMPONENTS as OF_CLASSES
from maskloss.lab.data.problems import DECIDED, LEFT_OUT, SUSPICIOUS, Problems
from maskloss.lab.data.readers import names
from maskloss.lab.data.tree import IMAGE_WORDS, Tree, bare_key, is_mask_place, part_of, words

CLASS = "instance"
VOID = 255
# What programs write beside their masks, and what is neither image nor mask.
_BYPRODUCTS = ("_flows", "_outlines", "_cp_output", "_overlay", "_prob", "_probs", "_output")
# Of several maps for one image, the first of these is taken.
_RANK = ("masks", "mask", "labels", "label", "instances", "instance", "gt")
# Maps that a look at their values is taken from, and how many parts of one value make it look like a class.
_LOOKED_AT = 50
_APART = 0.3
_MOST_CLASSES = 64
# No map of classes has this many.
_TOO_MANY = 1000
# Names of colors that stand for nothing known, and of those that stand for nothing.
_UNKNOWN = frozenset({"void", "unlabeled", "unlabelled", "ignore", "__ignore__", "unknown"})
_GROUND = frozenset({"background", "_background_", "__background__", "bg"})
# A part of fewer pixels is a stray, not a second object.
_STRAY = 8
# A value in this many strays is scattered; a map of at least this many such values was a JPEG.
_PIECES, _NOISE = 2, 5


# Paths by what an image and its map have in common.
Named = dict[tuple[str, ...], list[str]]


class Pair(NamedTuple):
    """An image and its map, as paths relative to the folder."""

    image: str
    map: str


class Scan(NamedTuple):
    """What a map holds."""

    size: tuple[int, int]  # height and width of the image as the map has them
    values: list[int]  # its numbers without 0
    apart: int  # how many of them have pixels in several places
    scattered: int  # how many of them lie in pieces of a few pixels or in thin lines, as what JPEG or resizing invents
    value_of: dict[int, int]  # value of each connected region, where regions were asked for


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find images with maps of the same names: in another folder, or side by side."""
    if options.annotations is not None:
        return None
    pairs = find_pairs(tree, problems)
    return read_pairs(tree, pairs, options, problems) if pairs else None


def find_pairs(tree: Tree, problems: Problems) -> list[Pair]:
    """Pair images with maps."""
    images: dict[tuple[str, ...], list[str]] = {}
    maps: dict[tuple[str, ...], list[str]] = {}
    for path in (*tree.images, *tree.ending(*npy.SUFFIXES)):
        stem = PurePosixPath(path).stem
        if stem.endswith(_BYPRODUCTS) or (path.endswith(npy.SUFFIXES) and not is_mask_place(path)):
            continue
        place = maps if is_mask_place(path) else images
        place.setdefault(bare_key(path), []).append(path)
    if maps and not set(images) & set(maps):
        # Folders of images have many names; the names of files say what belongs together if each is there once.
        images, maps = _by_file_name(images, problems), _by_file_name(maps, problems)
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


def _by_content(tree: Tree) -> tuple[Named, Named]:
    """Find folders with files of the same names, some with maps and some with images, whatever they are called."""
    folders: dict[str, list[str]] = {}
    for path in tree.images:
        folders.setdefault(PurePosixPath(path).parent.as_posix(), []).append(path)
    if len(folders) < 2 or len(folders) % 2:
        return {}, {}
    maps = [name for name, some in folders.items() if all(_looks_like_a_map(tree.path(path)) for path in some[:3])]
    images = [name for name in folders if name not in maps]
    found: tuple[Named, Named] = {}, {}
    for image, mapped in zip(sorted(images), sorted(maps), strict=False):
        keys = [[(mapped, PurePosixPath(path).stem) for path in folders[name]] for name in (image, mapped)]
        if len(images) != len(maps) or set(keys[0]) != set(keys[1]):
            return {}, {}
        for place, name in enumerate((image, mapped)):
            found[place].update({key: [path] for key, path in zip(keys[place], folders[name], strict=True)})
    return found


def _looks_like_a_map(path: Path) -> bool:
    """Whether a file has one channel of few values that are not scattered, in a format that keeps them."""
    try:
        labels = read_map(path)
    except MaskLossError:
        return False
    values = [int(value) for value in np.unique(labels) if value]
    return 0 < len(values) <= 4 * _MOST_CLASSES and 2 * count_apart(labels, values)[1] <= len(values)


def _rank(path: str) -> tuple[bool, int, str]:
    lowered = path.lower()
    places = [place for place, word in enumerate(_RANK) if word in lowered]
    return lowered.endswith(npy.SUFFIXES), min(places, default=len(_RANK)) + ("_cp_" in lowered), path


def read_pairs(tree: Tree, pairs: Sequence[Pair], options: DataOptions, problems: Problems) -> list[Part]:
    """Look into every map: which instances it has, and whether it fits its image."""
    scans: list[tuple[Pair, Scan]] = []
    pairs = _in_pieces(tree, pairs, options, problems)
    meaning = _meaning(tree, pairs, options, problems)
    with in_order(lambda each: _scan(tree, each[1], each[0], options, meaning), enumerate(pairs), 64) as found:
        for pair, scan in zip(pairs, found, strict=True):
            with problems.tolerated():
                if isinstance(scan, MaskLossError):
                    raise scan
                scans.append((pair, scan))
    every = {value for _, scan in scans for value in scan.values}
    how = options.semantic
    _ask_about_noise(tree, scans, how, problems)
    if how is None and not all(_is_sure(pair.map) for pair in pairs):
        _ask(tree, scans, every, meaning, problems)
    void = meaning.void if meaning.colored else _void(every, options, problems)
    classes = list(_classes(every - void - meaning.ground, meaning).items()) if _of_classes(how) else [(1, CLASS)]
    if len(classes) > _TOO_MANY:
        found_values = f"those of {tree.path(pairs[0].map).parent} have {len(classes):,} values"
        raise Cause(
            "maps of classes must have few values", found_values, "do they number instances, or were they JPEG?"
        )
    reading = meaning.regional if how == OF_CLASSES else meaning.plain
    label = {value: place for place, (value, _) in enumerate(classes)} if _of_classes(how) else {}
    parts: dict[str, list[Entry]] = {}
    idle = void | meaning.ground
    for pair, scan in scans:
        values = scan.value_of if how == OF_CLASSES else {value: value for value in scan.values}
        instances = [Instance(number, label.get(value, 0)) for number, value in values.items() if value not in idle]
        mapped = Map(str(tree.path(pair.map)), reading, sorted(void))
        entry = Entry(str(tree.path(pair.image)), *scan.size, instances, mapped)
        parts.setdefault(part_of(pair.image), []).append(entry)
    first = pairs[0]
    kind = {OF_CLASSES: "regions of semantic maps", CLASSES: "classes of semantic maps"}.get(how or "", "label maps")
    text = f"{kind}: {len(pairs)} pair{'s' * (len(pairs) > 1)} such as {first.image} and {first.map}"
    return [Part(part, classes, entries, f"{text}{f', {part}' if part else ''}") for part, entries in parts.items()]


def _in_pieces(tree: Tree, pairs: Sequence[Pair], options: DataOptions, problems: Problems) -> list[Pair]:
    """Cut images that are too large to be read, and their maps, into pieces."""
    found: list[Pair] = []
    for pair in pairs:
        image, mapped, large = tree.path(pair.image), tree.path(pair.map), False
        with suppress(MaskLossError):  # what cannot be read, or differs in size, is told when it is read
            large = math.prod(fitting_size(image, mapped)) > tiff.MOST_PIXELS
        if not large or options.pieces is None:
            found.append(pair)
            continue
        with problems.tolerated():
            cut, _ = (tiff.windows(each, options.pieces) for each in (image, mapped))
            tell_pieces(problems, pair.image, len(cut))
            found += [Pair(pair.image + ending, pair.map + ending) for ending, _ in cut]
    return found


def tell_pieces(problems: Problems, name: str, count: int) -> None:
    """Note that an image was cut."""
    what = f"images of more than {tiff.MOST_PIXELS:,} pixels cut into pieces, each an image of its own"
    problems.note(DECIDED, what, f"{name}: {count} pieces")


class Meaning(NamedTuple):
    """What the values of maps are."""

    colored: bool  # whether they are colors, red + 256 green + 65536 blue, and no numbers
    names: dict[int, str]  # of values
    void: set[int]  # values that weigh nothing, as far as their names or --ignore-value say so
    ground: set[int]  # values that are the background, beside 0

    @property
    def plain(self) -> str:
        """How values are read."""
        return COLORS if self.colored else NUMBERS

    @property
    def regional(self) -> str:
        """How the connected regions of values are read."""
        return COLORED_COMPONENTS if self.colored else COMPONENTS


def _meaning(tree: Tree, pairs: Sequence[Pair], options: DataOptions, problems: Problems) -> Meaning:
    """Find out whether maps have colors, and what their values are called."""
    asked = set() if options.ignore_value is None else {options.ignore_value}
    colored = False
    for pair in pairs[:_LOOKED_AT]:
        with problems.tolerated():
            colored = colored or has_colors(tree.path(pair.map))
    if not colored:
        return Meaning(False, names.of_values(tree), asked, set())
    known = names.colors(tree)
    void = asked or {value for value, name in known.items() if name.lower() in _UNKNOWN}
    if void - asked:
        problems.note(
            DECIDED, f"colors called {', '.join(sorted(known[value] for value in void))} weigh nothing", "", 0
        )
    return Meaning(True, known, void, {value for value, name in known.items() if name.lower() in _GROUND})


def _of_classes(how: str | None) -> bool:
    return how in {OF_CLASSES, CLASSES}


def _is_sure(path: str) -> bool:
    """Whether the name of a map says that it numbers instances."""
    return path.endswith("_seg.npy") or "_cp_masks" in path


def _void(every: set[int], options: DataOptions, problems: Problems) -> set[int]:
    if options.ignore_value is not None:
        return {options.ignore_value}
    if _of_classes(options.semantic) and VOID in every and len(every) > 1:
        problems.note(
            DECIDED, f"pixels of value {VOID} beside classes weigh nothing; --ignore-value names another", "", 0
        )
        return {VOID}
    return set()


def _classes(values: set[int], meaning: Meaning) -> dict[int, str]:
    if len(values) == 1:
        [only] = values
        return {only: meaning.names.get(only, CLASS)}
    return {value: meaning.names.get(value, f"class {_shown(value, meaning)}") for value in sorted(values)}


def _shown(value: int, meaning: Meaning) -> str:
    """Show a value: a number, or a color as it is usually written."""
    if not meaning.colored:
        return str(value)
    return "#" + "".join(f"{value >> shift & 255:02x}" for shift in (0, 8, 16))


def _ask_about_noise(tree: Tree, scans: list[tuple[Pair, Scan]], how: str | None, problems: Problems) -> None:
    """Ask if maps hold what JPEG makes of sharp edges, although they are no JPEG any more."""
    noisy = [(pair, scan) for pair, scan in scans if scan.scattered >= _NOISE and 2 * scan.scattered > len(scan.values)]
    if not noisy:
        return
    pair, scan = noisy[0]
    why = f"{scan.scattered} of the {len(scan.values)} values of {pair.map} lie in pieces of a few pixels or in lines"
    if how == INSTANCES:
        what = "label maps with the noise of a JPEG or of resizing, taken as they are"
        problems.note(SUSPICIOUS, what, why, len(noisy))
        return
    problems.ask(
        Cause(
            "label maps must hold values that somebody drew",
            f"{len(noisy)} in {tree.root} look like a JPEG that was stored again, or were resized smoothly: {why}",
            "export the masks again as PNG or TIFF; --semantic instances takes the numbers as they are",
        )
    )


def _ask(tree: Tree, scans: list[tuple[Pair, Scan]], every: set[int], meaning: Meaning, problems: Problems) -> None:
    """Ask if the numbers of the maps look like classes: only a person knows what their instances are."""
    some = [scan for _, scan in scans[:_LOOKED_AT] if scan.values]
    count, apart = sum(len(scan.values) for scan in some), sum(scan.apart for scan in some)
    shown = ", ".join(_shown(value, meaning) for value in sorted(every)[:6]) + (", ..." if len(every) > 6 else "")
    why = None
    if meaning.colored:
        why = f"they have {len(every)} color{'s' * (len(every) > 1)}, {shown}"
    elif every == {VOID}:
        why = f"all {len(scans)} maps have the values 0 and {VOID} only"
    elif len(every) <= _MOST_CLASSES and count and apart > (0 if every == {1} else _APART * count):
        why = f"they have the values {shown}, and in {apart} of {count} cases the pixels of one value lie apart"
    elif VOID in every and VOID - 1 not in every and any(VOID in scan.values for scan in some):
        why = f"they have the values {shown} and {VOID}, which usually stands for void"
    if why is not None:
        problems.ask(
            Cause(
                "the numbers of label maps must be known to be instances or classes",
                f"those of {tree.path(scans[0][0].map).parent} look like classes: {why}",
                "--semantic components makes each connected region an instance, --semantic classes each class one "
                "mask, --semantic instances takes the numbers as they are",
            )
        )
    if every == {1} and len(scans) > 1:
        problems.note(SUSPICIOUS, "every map has one instance, number 1: objects that touch would be one", "", 0)


def _scan(tree: Tree, pair: Pair, number: int, options: DataOptions, meaning: Meaning) -> Scan | MaskLossError:
    image, mapped = tree.path(pair.image), tree.path(pair.map)
    try:
        size = fitting_size(image, mapped)
        labels = read_map(mapped, meaning.plain)
        void = tuple(meaning.void)
        values = [int(value) for value in np.unique(labels) if value]
        scattered = apart = 0
        if number < _LOOKED_AT and len(values) <= 4 * _MOST_CLASSES:
            apart, scattered = count_apart(labels, values)
        if options.semantic == OF_CLASSES:
            if not void and not meaning.colored and VOID in values and values != [VOID]:
                void = (VOID,)
            return Scan(size, values, apart, scattered, components(labels, void)[1])
        return Scan(size, values, apart, scattered, {})
    except MaskLossError as error:
        return error


def fitting_size(image: Path, mapped: Path) -> tuple[int, int]:
    """Return the size of a map, before any pixel is read: a small file may hold a large map."""
    head, found = read_head(image), map_size(mapped)
    if found not in (head.displayed, head.stored):
        height, width = head.displayed
        raise Cause(
            "a label map must have the size of its image",
            f"{mapped.name} is {found[0]} x {found[1]}, {image.name} is {height} x {width}",
            "store both at the same resolution",
        )
    return found


def count_apart(labels: NDArray[np.int32], values: list[int]) -> tuple[int, int]:
    """Count the values with pixels in several places, and those in pieces of a few pixels or in thin lines."""
    from scipy.ndimage import find_objects, label

    apart = scattered = 0
    ranks = np.searchsorted(np.array([0, *values]), labels)
    for place, box in enumerate(find_objects(ranks), start=1):
        if box is not None:
            regions, _ = label(ranks[box] == place, structure=np.ones((3, 3), dtype=np.int8))
            pieces = np.bincount(regions.ravel())[1:]
            apart += int((pieces >= _STRAY).sum() > 1)
            own = ranks[box] == place
            block = own[:-1, :-1] & own[1:, :-1] & own[:-1, 1:] & own[1:, 1:]
            line = pieces.sum() >= _STRAY and not block.any()
            scattered += int(line or (len(pieces) >= _PIECES and pieces.mean() < _STRAY))
    return apart, scattered
