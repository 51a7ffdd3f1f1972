"""The Cell Tracking Challenge: 01/t000.tif, and 01_GT/SEG/man_seg000.tif for the frames that were segmented."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from maskloss.lab.data.catalog import Part
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LEFT_OUT, Problems
from maskloss.lab.data.readers.matching import Pair
from maskloss.lab.data.readers.pairs import read_pairs
from maskloss.lab.data.tree import Tree

_SEGMENTATION = re.compile(r"man_seg_?(\d+)$", re.IGNORECASE)
_FRAME = re.compile(r"(\d+)$")


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find sequences with their segmented frames; gold truth (_GT) comes before silver truth (_ST)."""
    if options.annotations is not None:
        return None
    frames: dict[tuple[str, int], str] = {}
    for path in tree.images:
        number = _FRAME.search(PurePosixPath(path).stem)
        if number and not _SEGMENTATION.search(PurePosixPath(path).stem):
            frames[PurePosixPath(path).parent.as_posix(), int(number[1])] = path
    maps: dict[tuple[str, int], str] = {}
    for path in sorted(tree.images, key=lambda each: "_ST/" in each):
        number = _SEGMENTATION.search(PurePosixPath(path).stem)
        truth = next((each for each in PurePosixPath(path).parents if each.name.upper().endswith(("_GT", "_ST"))), None)
        if number and truth is not None:
            sequence = (truth.parent / truth.name[:-3]).as_posix()
            maps.setdefault((sequence, int(number[1])), path)
    pairs = [Pair(frames[key], mapped) for key, mapped in sorted(maps.items()) if key in frames]
    if not pairs:
        return None
    sequences = {sequence for sequence, _ in maps}
    others = [
        path for (sequence, number), path in frames.items() if sequence in sequences and (sequence, number) not in maps
    ]
    if others:
        problems.note(LEFT_OUT, "frames that nobody segmented", others[0], len(others))
    # The name man_seg says that the numbers are instances.
    return read_pairs(tree, pairs, options._replace(semantic=options.semantic or "instances"), problems)
