"""CVAT for images: one XML file with polygons, masks, ellipses and boxes."""

from __future__ import annotations

import itertools
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from maskloss.errors import Cause
from maskloss.lab.data.problems import LEFT_OUT
from maskloss.lab.data.readers.objects import Picture, Tool
from maskloss.lab.data.readers.shapes import Drawn
from maskloss.lab.data.tiff import MOST_PIXELS
from maskloss.lab.data.tree import Tree, part_of

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_RULE = "an XML file of annotations must be CVAT's"


def _content(tree: Tree, path: str) -> Element:
    root = tree.xml(path, _RULE)
    is_video = root.tag == "annotations" and root.find("image") is None and root.find("track") is not None
    return _frames(tree, root) if is_video else root


def _pictures(root: Element) -> list[Picture]:
    found = []
    for image in root.iterfind("image") if root.tag == "annotations" else ():
        height, width = (int(image.get(side) or 0) for side in ("height", "width"))
        groups: dict[tuple[str, ...], list[Element]] = {}
        for place, shape in enumerate(image):
            label, group = shape.get("label") or "object", shape.get("group_id") or "0"
            alone = group == "0" or shape.tag != "polygon"
            groups.setdefault((label, str(place), "alone") if alone else (label, group), []).append(shape)
        objects = [(key[0], some) for key, some in groups.items()]
        part = part_of(f"{image.get('subset') or ''}/0")
        found.append(Picture(image.get("name") or None, height, width, objects, part=part))
    return found


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
            frame = int(shape.get("frame") or 0)
            name = by_number.get(frame, f"frame {frame}")
            image = images.setdefault(frame, ET.Element("image", sides | {"name": name}))
            if shape.get("outside") != "1":
                shape.set("label", track.get("label") or "object")
                image.append(shape)
    framed = ET.Element("annotations")
    framed.extend(image for _, image in sorted(images.items()))
    return framed


def _draw(drawn: Drawn, each: Any) -> None:
    label, [shape, *others] = each
    if shape.tag == "polygon":
        drawn.polygons(label, [_points(one) for one in (shape, *others)])
    elif shape.tag == "mask":
        left, top, width, height = (round(side) for side in _numbers(shape, "left", "top", "width", "height"))
        counts = [int(run) for run in (shape.get("rle") or "").split(",")]
        if min(counts) < 0 or min(width, height) <= 0 or width * height > MOST_PIXELS or sum(counts) != width * height:
            what = f"{drawn.what} has a mask of {sum(counts)} pixels in {height} x {width}"
            raise Cause(_RULE, what, "export it again")
        bits = np.repeat(np.fromiter(itertools.cycle((False, True)), bool, len(counts)), counts)
        drawn.bitmap(label, bits.reshape(height, width), left, top)
    elif shape.tag == "ellipse":
        x, y, across, down = _numbers(shape, "cx", "cy", "rx", "ry")
        drawn.ellipse(label, (x, y), (across, down), float(shape.get("rotation") or 0))
    elif shape.tag == "box":
        x, y, right, bottom = _numbers(shape, "xtl", "ytl", "xbr", "ybr")
        drawn.box(label, [x, y, right - x, bottom - y])
    elif shape.tag != "tag":
        drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({shape.tag})", drawn.what)


def _numbers(element: Element, *wanted: str) -> list[float]:
    return [float(element.attrib[each]) for each in wanted]


def _points(shape: Element) -> list[float]:
    return [float(side) for point in shape.attrib["points"].split(";") for side in point.split(",")]


CVAT = Tool("CVAT", _pictures, _draw, (".xml",), _content)
