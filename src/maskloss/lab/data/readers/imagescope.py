"""An XML file of regions beside each image, or of its name: Aperio's ImageScope (MoNuSeg), LabelMe, Roboflow's VOC."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from maskloss.errors import Cause, MaskLossError
from maskloss.lab.data.catalog import Entry, Part
from maskloss.lab.data.images import read_size
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.readers.segmentation import number
from maskloss.lab.data.readers.shapes import Drawn, note_others, parts_of
from maskloss.lab.data.tree import Tree, part_of

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_RULE = "an XML file of annotations must have regions or objects"
CLASS = "object"
_LOOKED_AT = 3


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find XML files with regions; the first few decide, as there are images without any."""
    files = [path for path in tree.ending(".xml") if options.annotations in (None, path)]
    if not any(_is_of(tree, path) for path in files[:_LOOKED_AT]):
        return None
    names: dict[str, int] = {}
    parts: dict[str, list[Entry]] = {}
    for path in files:
        with problems.tolerated():
            file = tree.find(PurePosixPath(path).stem, path, problems)
            drawn = Drawn(Entry(str(file), *read_size(file), []), names, path, problems)
            root = tree.xml(path, _RULE)
            for layer in root.iter("Annotation"):
                _draw(drawn, layer)
            for each in root.iterfind("object"):
                if each.findtext("deleted") == "1":
                    continue
                with drawn.guarded():
                    _draw_object(drawn, each)
            if drawn.usable:
                parts.setdefault(part_of(path), []).append(drawn.entry)
    note_others(tree, parts, "images without an XML file", problems)
    return parts_of(parts, names, f"ImageScope: {len(files)} XML files such as {files[0]}")


def _is_of(tree: Tree, path: str) -> bool:
    """Whether an XML file has regions; what is broken may be of anything."""
    with suppress(MaskLossError):
        root = tree.xml(path, _RULE)
        return root.find(".//Region/Vertices") is not None or root.find("object/polygon") is not None
    return False


def _draw_object(drawn: Drawn, each: Element) -> None:
    """Draw an object of LabelMe, whose corners are points, or of Roboflow's VOC, whose corners are x1, y1, x2 ..."""
    name, polygon, box = each.findtext("name") or CLASS, each.find("polygon"), each.find("bndbox")
    if polygon is None and box is not None:
        left, top, right, bottom = (number(box.findtext(side)) or 0.0 for side in ("xmin", "ymin", "xmax", "ymax"))
        drawn.box(name, [left, top, right - left, bottom - top])
        return
    corners = [] if polygon is None else [one for one in polygon.iter() if re.fullmatch(r"[xy]\d*", one.tag)]
    values = [number(one.text) for one in corners]
    if None in values or [one.tag[0] for one in corners] != list("xy") * (len(values) // 2):
        raise Cause(_RULE, f"{drawn.what}: the polygon of a {name} has no numbers", "export it again")
    drawn.polygons(name, [values])


def _draw(drawn: Drawn, layer: Element) -> None:
    """Draw the regions of a layer, whose name, or the name of whose attribute, is their class."""
    attribute = layer.find("Attributes/Attribute")
    name = layer.get("Name") or (attribute.get("Name") if attribute is not None else "") or CLASS
    for region in layer.iter("Region"):
        with drawn.guarded():
            corners = [number(vertex.get(side)) for vertex in region.iter("Vertex") for side in ("X", "Y")]
            if None in corners:
                raise Cause(_RULE, f"{drawn.what}: region {region.get('Id')} has no numbers", "export it again")
            # A negative region is a hole, in which nothing is known to be.
            drawn.polygons("ignore" if region.get("NegativeROA") == "1" else name, [corners])
