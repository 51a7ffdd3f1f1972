"""Comparing the annotated sizes of images with the heads of their files, and cutting those that are too large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskloss.errors import Cause
from maskloss.lab.data import tiff
from maskloss.lab.data.catalog import Entry
from maskloss.lab.data.images import read_head
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import MENDED, SUSPICIOUS, Problems
from maskloss.lab.data.readers.pairs import tell_pieces
from maskloss.lab.data.readers.segmentation import box_of

# More heads of files than this are not read before training; workers check the rest as they come to it.
_HEADS = 2000
# A polygon may leave its image by this many pixels, or by this share of its own side, before it is suspicious.
_ROUNDING, _BEYOND = 2.0, 0.1


def checked(entries: list[Entry], options: DataOptions, problems: Problems) -> list[Entry]:
    """Compare the annotated sizes with the heads of the files, and cut images that are too large to be read."""
    kept: list[Entry] = []
    for number, entry in enumerate(entries):
        with problems.tolerated():
            whole = _within(_sized(entry, problems) if number < _HEADS else entry, problems)
            large = whole.height * whole.width > tiff.MOST_PIXELS
            kept += _pieces(whole, options, problems) if large else [whole]
    return kept


def _pieces(entry: Entry, options: DataOptions, problems: Problems) -> list[Entry]:
    """Cut an image whose instances are polygons or boxes into pieces, each an image of its own."""
    if options.pieces is None:
        tiff.check_pixels(Path(entry.file), entry.height, entry.width)
    cut = tiff.windows(Path(entry.file), options.pieces or 0)
    if entry.map or any(isinstance(each.source, dict) and "box" not in each.source for each in entry.instances):
        what = f"{entry.name}, which has run lengths, mask files or the map of a benchmark"
        raise Cause("images that are read in pieces must have polygons or a label map", what, "convert them")
    tell_pieces(problems, entry.name, len(cut))
    pieces = []
    for ending, window in cut:
        moved = [each._replace(source=_moved(each.source, window)) for each in entry.instances]
        seen = [each for each in moved if each.source]
        pieces.append(Entry(entry.file + ending, window.height, window.width, seen))
    return pieces


def _moved(source: Any, window: tiff.Window) -> Any:
    """Return polygons or a box as a piece of the image shows them; None: it shows nothing of them."""
    boxes = [source["box"]] if isinstance(source, dict) else [box_of(None, [each]) or [0.0] * 4 for each in source]
    seen = [
        box[0] < window.left + window.width
        and box[0] + box[2] > window.left
        and box[1] < window.top + window.height
        and box[1] + box[3] > window.top
        for box in boxes
    ]
    if isinstance(source, dict):
        left, top, *sides = boxes[0]
        return {"box": [left - window.left, top - window.top, *sides]} if seen[0] else None
    kept = [polygon for polygon, is_seen in zip(source, seen, strict=True) if is_seen]
    corner = (window.left, window.top)
    return [[side - corner[place % 2] for place, side in enumerate(polygon)] for polygon in kept]


def _within(entry: Entry, problems: Problems) -> Entry:
    """Leave out polygons that lie outside of their image: nothing of them can be seen."""

    def is_seen(source: Any) -> bool:
        if not isinstance(source, list):
            return True
        xs, ys = ([value for polygon in source for value in polygon[place::2]] for place in (0, 1))
        return bool(max(xs) > 0 and max(ys) > 0 and min(xs) < entry.width and min(ys) < entry.height)

    def reaches_beyond(source: Any) -> bool:
        """Whether a polygon leaves its image by more than rounding explains."""
        if not isinstance(source, list):
            return False
        for place, side in ((0, entry.width), (1, entry.height)):
            values = [value for polygon in source for value in polygon[place::2]]
            if max(-min(values), max(values) - side) > max(_ROUNDING, _BEYOND * (max(values) - min(values))):
                return True
        return False

    lost = [each for each in entry.instances if not is_seen(each.source)]
    beyond = sum(reaches_beyond(each.source) for each in entry.instances) - len(lost)
    if beyond:
        problems.note(SUSPICIOUS, "instances that reach beyond their image, cut at its edge", entry.name, beyond)
    if not lost:
        return entry
    problems.note(SUSPICIOUS, "instances outside of their image left out", entry.name, len(lost))
    return entry._replace(instances=[each for each in entry.instances if is_seen(each.source)])


def _sized(entry: Entry, problems: Problems) -> Entry:
    """Return an image with a size that can be true."""
    head = read_head(Path(entry.file))
    size = (entry.height, entry.width)
    if size == head.displayed:
        if head.orientation > 1:
            problems.note(
                MENDED, "images turned as their orientation tag (EXIF) says, as viewers show them", entry.name
            )
        return entry
    if size == head.stored:
        what = "images that their orientation tag (EXIF) turns left as stored, which has the annotated size"
        problems.note(SUSPICIOUS, what, entry.name)
        return entry
    if entry.map is None and size[::-1] in (head.displayed, head.stored) and _fits(entry, *size[::-1]):
        problems.note(MENDED, "height and width exchanged", entry.name)
        return entry._replace(height=size[1], width=size[0])
    turned = f", {head.displayed[0]} x {head.displayed[1]} as displayed (EXIF)" if head.stored != head.displayed else ""
    raise Cause(
        "annotations must give the size of the image",
        f"{entry.file} is {head.height} x {head.width}{turned}, annotated as {entry.height} x {entry.width}",
        "annotate the image as it is stored, or store it as it was annotated",
    )


def _fits(entry: Entry, height: int, width: int) -> bool:
    """Whether all instances are polygons within the image."""
    polygons = [polygon for each in entry.instances for polygon in each.source if isinstance(each.source, list)]
    if any(not isinstance(each.source, list) for each in entry.instances) or not polygons:
        return False
    return all(max(each[::2]) <= width + 1 and max(each[1::2]) <= height + 1 for each in polygons)
