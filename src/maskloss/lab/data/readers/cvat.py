"""CVAT for images: one XML file with polygons, masks, ellipses and boxes."""

from __future__ import annotations

import itertools
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from maskloss.errors import Cause, MaskLossError, describe
from maskloss.lab.data.catalog import Entry, Part
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LEFT_OUT, Problems
from maskloss.lab.data.readers.segmentation import number
from maskloss.lab.data.readers.shapes import Drawn, parts_of
from maskloss.lab.data.tree import TEST, TRAIN, VAL, Tree, part_of

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_RULE = "an XML file of annotations must be CVAT's"
# A file that is called so must be right; another one may be of anything.
_SURE = "annotation"
_PARTS = {"train": TRAIN, "training": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find annotations.xml, or another XML file with images in it."""
    files = [path for path in tree.ending(".xml") if options.annotations in (None, path)]
    likely = [path for path in files if PurePosixPath(path).name.startswith(_SURE)] or files[:1]
    roots = {path: root for path in likely if (root := _root(tree, path)) is not None}
    names: dict[str, int] = {}
    parts: dict[str, list[Entry]] = {}
    for path, root in roots.items():
        for image in root.iter("image"):
            with problems.tolerated():
                drawn = _read(tree, path, image, names, problems)
                part = _PARTS.get((image.get("subset") or "").lower()) or part_of(path)
                if drawn.usable:
                    parts.setdefault(part, []).append(drawn.entry)
    return parts_of(parts, names, f"CVAT: {', '.join(roots)}") if roots else None


def _root(tree: Tree, path: str) -> Element | None:
    """Return the root of an XML file of CVAT; None: it is of something else."""
    try:
        root = tree.xml(path, _RULE)
    except MaskLossError:
        if PurePosixPath(path).name.startswith(_SURE):
            raise
        return None
    if root.tag != "annotations":
        return None
    if root.find("image") is None and root.find("track") is not None:
        return _frames(tree, root)
    return root if root.find("image") is not None else None


def _frames(tree: Tree, root: Element) -> Element:
    """Sort the shapes of a video's tracks by its frames, which are images with its number in their names, or in order.

    An image is left alone if no track says anything of it: nobody may have looked at it.
    """
    from xml.etree import ElementTree as ET

    numbered = {re.sub(r".*?(\d+)$", r"\1", PurePosixPath(path).stem): path for path in tree.images}
    by_number = {int(each): path for each, path in numbered.items() if each.isdecimal()}
    if len(by_number) < len(tree.images):
        by_number = dict(enumerate(tree.images))
    size = root.find(".//original_size")
    sides: dict[str, str] = {
        side: (size.findtext(side) or "") if size is not None else "" for side in ("width", "height")
    }
    images: dict[int, Element] = {}
    for track in root.iter("track"):
        for shape in track:
            frame = number(shape.get("frame"))
            if frame is None:
                raise Cause(_RULE, f"a shape of a track has {describe(dict(shape.attrib))}", "export it again")
            name = by_number.get(int(frame), f"frame {int(frame)}")
            image = images.setdefault(int(frame), ET.Element("image", sides | {"name": name}))
            if shape.get("outside") != "1":
                shape.set("label", track.get("label") or "object")
                image.append(shape)
    framed = ET.Element("annotations")
    framed.extend(image for _, image in sorted(images.items()))
    return framed


def _read(tree: Tree, path: str, image: Element, names: dict[str, int], problems: Problems) -> Drawn:
    name = image.get("name") or ""
    file = tree.find(name, path, problems)
    height, width = _numbers(image, path, "height", "width")
    drawn = Drawn(Entry(str(file), int(height), int(width), []), names, f"{path}: {name}", problems)
    groups: dict[tuple[str, str], list[list[float]]] = {}
    for place, shape in enumerate(image):
        with drawn.guarded():
            group, label = shape.get("group_id") or "0", shape.get("label") or "object"
            if shape.tag == "polygon":
                key = (label, group if group != "0" else f"alone {place}")
                groups.setdefault(key, []).append(_points(shape, drawn.what))
            else:
                _draw(drawn, shape, label)
    for (label, _), some in groups.items():
        with drawn.guarded():
            drawn.polygons(label, some)
    return drawn


def _draw(drawn: Drawn, shape: Element, label: str) -> None:
    if shape.tag == "mask":
        left, top, width, height = (int(each) for each in _numbers(shape, drawn.what, "left", "top", "width", "height"))
        runs = [number(each) for each in (shape.get("rle") or "").split(",")]
        counts = [int(each) for each in runs if each is not None and each >= 0]
        if len(counts) < len(runs) or width <= 0 or height <= 0 or sum(counts) != width * height:
            raise Cause(
                _RULE, f"{drawn.what} has a mask of {sum(counts)} pixels in {height} x {width}", "export it again"
            )
        bits = np.repeat(np.fromiter(itertools.cycle((False, True)), bool, len(counts)), counts)
        drawn.bitmap(label, bits.reshape(height, width), left, top)
    elif shape.tag == "ellipse":
        x, y, across, down = _numbers(shape, drawn.what, "cx", "cy", "rx", "ry")
        drawn.ellipse(label, (x, y), (across, down), number(shape.get("rotation")) or 0.0)
    elif shape.tag == "box":
        x, y, right, bottom = _numbers(shape, drawn.what, "xtl", "ytl", "xbr", "ybr")
        drawn.box(label, [x, y, right - x, bottom - y])
    elif shape.tag != "tag":
        drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({shape.tag})", drawn.what)


def _numbers(element: Element, what: str, *wanted: str) -> list[float]:
    found = [number(element.get(each)) for each in wanted]
    if None in found:
        raise Cause(_RULE, f"{what}: a {element.tag} has {describe(dict(element.attrib))}", "export it again")
    return [each or 0.0 for each in found]


def _points(shape: Element, what: str) -> list[float]:
    found = [number(each) for point in (shape.get("points") or "").split(";") for each in point.split(",")]
    if None in found:
        raise Cause(_RULE, f"{what} has the points {describe(shape.get('points'))}", "export it again")
    return [each or 0.0 for each in found]
