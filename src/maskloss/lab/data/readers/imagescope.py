"""An XML file of regions beside each image, or of its name: Aperio's ImageScope (MoNuSeg), LabelMe, Roboflow's VOC."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from maskloss.lab.data.readers.objects import Picture, Tool
from maskloss.lab.data.readers.shapes import Drawn
from maskloss.lab.data.tree import Tree

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

CLASS = "object"


def _pictures(root: Element) -> list[Picture]:
    if root.tag == "Annotations":
        regions = [(_layer(layer), region) for layer in root.iter("Annotation") for region in layer.iter("Region")]
        return [Picture("", 0, 0, regions)]
    objects = [each for each in root.iterfind("object") if each.findtext("deleted") != "1"]
    # PASCAL VOC's own files have boxes only; without objects, the size of the image shows them.
    of_boxes = all(each.find("polygon") is None for each in objects) if objects else root.find("size") is not None
    named = [(each.findtext("name") or CLASS, each) for each in objects]
    return [] if root.tag != "annotation" or of_boxes else [Picture("", 0, 0, named)]


def _layer(layer: Element) -> str:
    """Return the class of a layer: its name, or that of its attribute."""
    attribute = layer.find("Attributes/Attribute")
    return layer.get("Name") or (attribute.get("Name") if attribute is not None else "") or CLASS


def _draw(drawn: Drawn, each: Any) -> None:
    name, shape = each
    polygon, box = shape.find("polygon"), shape.find("bndbox")
    if shape.tag == "Region":
        corners = [float(vertex.get(side)) for vertex in shape.iter("Vertex") for side in ("X", "Y")]
        # A negative region is a hole, in which nothing is known to be.
        drawn.polygons("ignore" if shape.get("NegativeROA") == "1" else name, [corners])
    elif polygon is not None:
        # LabelMe's corners are points, Roboflow's are x1, y1, x2 ...
        corners = [float(one.text) for one in polygon.iter() if re.fullmatch(r"[xy]\d*", one.tag)]
        drawn.polygons(name, [corners])
    else:
        left, top, right, bottom = (float(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax"))
        drawn.box(name, [left, top, right - left, bottom - top])


def _content(tree: Tree, path: str) -> Element:
    return tree.xml(path, "an XML file of annotations must be XML")


IMAGESCOPE = Tool("ImageScope", _pictures, _draw, (".xml",), _content)
