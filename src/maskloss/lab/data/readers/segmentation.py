"""COCO's segmentations as converters write them: checked, and mended where only one meaning is possible."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause, describe, require
from maskloss.lab.data.problems import MENDED, Problems

# Farther off than this, a coordinate is a mistake.
FARTHEST = 1 << 20
_FEWEST = 6
_CORNERS = "a polygon must list x and y of at least three corners"
_COUNTS = "the counts of an RLE must be whole numbers that add up to the pixels of its image"


class Frame(NamedTuple):
    """What a segmentation belongs to."""

    height: int  # of the image, pixels
    width: int  # of the image, pixels
    what: str  # what to call the annotation in messages
    problems: Problems  # told of what was mended


def segmentation(value: Any, frame: Frame) -> Any:
    """Return polygons or run lengths that need no more checks but decoding; None where there is no mask.

    Raises:
        Cause: what nobody can read.
    """
    if isinstance(value, str) and value.strip()[:1] in {"[", "{"}:
        value = _parsed(value, frame)
    if value is None or value in ({}, "", [], [[]]):
        return None
    if isinstance(value, Mapping):
        return run_lengths(value, frame)
    if not isinstance(value, list):
        raise Cause("every annotation must have a segmentation", f"{frame.what} has {describe(value)}", _HINT)
    if all(isinstance(each, Mapping) and "counts" in each for each in value):
        parts = [run_lengths(each, frame) for each in value]
        _mended(frame, "lists of RLE joined")
        return parts[0] if len(parts) == 1 else encode(_union(parts, frame))
    if _is_bitmap(value, frame):
        _mended(frame, "arrays of zeros and ones read as masks")
        return encode(np.array(value, dtype=np.uint8))
    return polygons(value, frame)


_HINT = "masks are learned from masks: give polygons or RLE, boxes alone do not do"


def polygons(value: list[Any], frame: Frame) -> list[list[float]] | None:
    """Return polygons of at least three corners; None if there is none."""
    if all(_is_number(each) for each in value):
        _mended(frame, "flat polygons, without the list around them")
        value = [value]
    elif all(_is_pair(each) for each in value):
        _mended(frame, "polygons as lists of points")
        value = [[number for point in value for number in _pair(point)]]
    found, dropped = [], 0
    for each in value:
        polygon = each
        if isinstance(each, list) and each and all(isinstance(one, str) for one in each):
            numbers = [number(one) for one in each]
            if None not in numbers:
                _mended(frame, "coordinates as text")
                polygon = numbers
        if isinstance(each, list) and each and all(_is_pair(point) for point in each):
            _mended(frame, "polygons as lists of points")
            polygon = [number for point in each for number in _pair(point)]
        if not isinstance(polygon, list) or len(polygon) % 2 or not all(_is_coordinate(one) for one in polygon):
            hint = f"coordinates are numbers below {FARTHEST:,}"
            raise Cause(_CORNERS, f"{frame.what} has {describe(each)}", hint)
        corners = [float(one) for one in polygon]
        if len(corners) < _FEWEST or not _extent(corners):
            dropped += 1
        else:
            found.append(corners)
    if dropped:
        kept = "their instances kept" if found else "only their boxes are known"
        frame.problems.note(MENDED, f"polygons without an area dropped, {kept}", frame.what, dropped)
    return found or None


def run_lengths(value: Mapping[str, Any], frame: Frame) -> dict[str, Any]:
    """Check run lengths, as far as it is possible without decoding them."""
    height, width, what, _ = frame
    counts, size = value.get("counts"), value.get("size")
    sides = [integer(number(side)) for side in size] if isinstance(size, list) else None
    if sides != [height, width]:
        raise Cause(
            "the size of an RLE must be that of its image",
            f"{what} has the size {describe(size)}, the image is {height} x {width}",
            "size is [height, width]",
        )
    if isinstance(counts, str):
        if counts.startswith(("b'", 'b"')) and counts[-1] == counts[1]:
            _mended(frame, "counts of an RLE written as Python's bytes")
            counts = ast.literal_eval(counts).decode("latin-1")
        if re.fullmatch(r"\[?\s*\d+([\s,]+\d+)+\s*\]?", counts):
            _mended(frame, "counts of an RLE written as text")
            return run_lengths({**value, "counts": re.findall(r"\d+", counts)}, frame)
        if counts.isascii():
            return {"size": [height, width], "counts": counts}
    elif isinstance(counts, list):
        whole = [integer(number(run) if isinstance(run, str) else run) for run in counts]
        if all(run is not None and run >= 0 for run in whole) and sum(run or 0 for run in whole) == height * width:
            return {"size": [height, width], "counts": whole}
    hint = "the counts alternate between outside and inside, column by column"
    raise Cause(_COUNTS, f"{what} has {describe(counts)}", hint)


def box_of(value: Any, polygon_source: Any = None) -> list[float] | None:
    """Return [x, y, width, height] of a box as COCO writes it, else around the points of a polygon; None: unknown."""
    if isinstance(value, (list, tuple)) and len(value) == 4:
        numbers = [number(each) for each in value]
        if all(each is not None and abs(each) < FARTHEST for each in numbers):
            x, y, width, height = (each or 0.0 for each in numbers)
            if width > 0 and height > 0:
                return [x, y, width, height]
    points = [float(each) for each in _flat(polygon_source) if _is_coordinate(each)]
    if len(points) >= 2 and len(points) % 2 == 0:
        xs, ys = points[::2], points[1::2]
        return [min(xs), min(ys), max(1.0, max(xs) - min(xs)), max(1.0, max(ys) - min(ys))]
    return None


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the IoU of two boxes [x, y, width, height]."""
    sides = [
        max(0.0, min(one[axis] + one[axis + 2], other[axis] + other[axis + 2]) - max(one[axis], other[axis]))
        for axis in (0, 1)
    ]
    both = sides[0] * sides[1]
    return both / (one[2] * one[3] + other[2] * other[3] - both)


def integer(value: Any) -> int | None:
    """Return a whole number, which some tools write as 128.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else None
    return value


def number(value: Any) -> float | None:
    """Return a number, which some tools write as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if _is_number(value) and abs(value) <= sys.float_info.max else None


def encode(mask: NDArray[Any]) -> dict[str, Any]:
    """Return a mask `[H, W]` as run lengths."""
    codec = require("pycocotools.mask", "train")
    run = codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": run["counts"].decode()}


def _parsed(text: str, frame: Frame) -> Any:
    """Return what a mask that was written as text holds."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    _mended(frame, "masks as text")
    return value


def _union(parts: Sequence[dict[str, Any]], frame: Frame) -> NDArray[np.uint8]:
    from maskloss.targets import MaskTargets

    masks = MaskTargets.from_coco(parts, frame.height, frame.width).dense()
    union: NDArray[np.uint8] = masks.any(0).numpy().astype(np.uint8)
    return union


def _mended(frame: Frame, what: str) -> None:
    frame.problems.note(MENDED, what, frame.what)


def _is_bitmap(value: list[Any], frame: Frame) -> bool:
    rows = len(value) == frame.height and all(isinstance(row, list) and len(row) == frame.width for row in value)
    return rows and all(cell in (0, 1) for row in value for cell in row)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_coordinate(value: Any) -> bool:
    return _is_number(value) and -FARTHEST < value < FARTHEST


def _is_pair(value: Any) -> bool:
    if isinstance(value, Mapping):
        return {"x", "y"} <= set(value)
    return isinstance(value, list) and len(value) == 2 and all(_is_number(each) for each in value)


def _pair(value: Any) -> Sequence[Any]:
    return [value["x"], value["y"]] if isinstance(value, Mapping) else value


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [value.get("x"), value.get("y")]
    if isinstance(value, list):
        return [each for part in value for each in _flat(part)]
    return [value]


def _extent(corners: list[float]) -> bool:
    xs, ys = corners[::2], corners[1::2]
    return max(xs) > min(xs) and max(ys) > min(ys)
