"""Images with label maps beside them: of Cellpose, of StarDist, of U-Nets, and semantic ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from maskloss.errors import Cause, MaskLossError
from maskloss.lab.data import tiff
from maskloss.lab.data.ahead import in_order
from maskloss.lab.data.catalog import Entry, Instance, Map, Part
from maskloss.lab.data.maps import (
    COLORED_COMPONENTS,
    COLORS,
    COMPONENTS,
    NUMBERS,
    components,
    count_apart,
    fitting_size,
    has_colors,
    read_map,
)
from maskloss.lab.data.options import CLASSES, INSTANCES, DataOptions
from maskloss.lab.data.options import COMPONENTS as OF_CLASSES
from maskloss.lab.data.problems import DECIDED, SUSPICIOUS, Problems
from maskloss.lab.data.readers import names
from maskloss.lab.data.readers.matching import Pair, find_pairs
from maskloss.lab.data.tree import Tree, part_of

CLASS = "instance"
VOID = 255
# Maps that a look at their values is taken from, and how many parts of one value make it look like a class.
_LOOKED_AT = 50
_APART = 0.3
_MOST_CLASSES = 64
# Cityscapes and KITTI number an instance by its class times one of these, and by how many were before.
_BASES = (1000, 256)
# No map of classes has this many.
_TOO_MANY = 1000
# Names of colors that stand for nothing known, and of those that stand for nothing.
_UNKNOWN = frozenset({"void", "unlabeled", "unlabelled", "ignore", "__ignore__", "unknown"})
_GROUND = frozenset({"background", "_background_", "__background__", "bg"})
# A map of at least this many values that are scattered was a JPEG.
_NOISE = 5


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
    return [Part(part, classes, entries, text) for part, entries in parts.items()]


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
    elif any(_is_code(every, base) for base in _BASES):
        why = f"they have the values {shown}, which may be {' or '.join(map(str, _BASES))} times a class and a number"
    elif VOID in every and VOID - 1 not in every and any(VOID in scan.values for scan in some):
        why = f"they have the values {shown} and {VOID}, which usually stands for void"
    if why is not None:
        ask(f"those of {tree.path(scans[0][0].map).parent} look like classes: {why}", problems)
    if every == {1} and len(scans) > 1:
        problems.note(SUSPICIOUS, "every map has one instance, number 1: objects that touch would be one", "", 0)


def ask(what: str, problems: Problems) -> None:
    """Ask what the numbers of maps, or the pieces of masks, are."""
    problems.ask(
        Cause(
            "the numbers of label maps must be known to be instances or classes",
            what,
            "--semantic components makes each connected region an instance, --semantic classes each class one mask, "
            "--semantic instances takes the numbers as they are",
        )
    )


def _is_code(every: set[int], base: int) -> bool:
    """Whether numbers are classes times a base plus numbers that count the instances of each, but for a few classes."""
    groups: dict[int, list[int]] = {}
    for value in every:
        groups.setdefault(value // base, []).append(value % base)
    few = groups.pop(0, [])
    counted = all(min(rest) < 2 and max(rest) < base // 2 for rest in groups.values())
    return bool(groups) and counted and max(groups) < _MOST_CLASSES and max(few, default=0) < _MOST_CLASSES


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
