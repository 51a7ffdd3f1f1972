"""Aperio ImageScope, as MoNuSeg and MoNuSAC have it: an XML file of regions beside each image, or of its name."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from maskloss.errors import Cause
from maskloss.lab.data.catalog import Entry, Part
from maskloss.lab.data.images import read_size
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.readers.segmentation import number
from maskloss.lab.data.readers.shapes import Drawn, note_others, parts_of, read_xml
from maskloss.lab.data.tree import Tree, part_of

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_RULE = "an XML file of annotations must be ImageScope's"
CLASS = "object"
_LOOKED_AT = 3


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find XML files with regions; the first few decide, as there are images without any."""
    files = [path for path in tree.ending(".xml") if options.annotations in (None, path)]
    if all(read_xml(tree.path(path), _RULE).find(".//Region/Vertices") is None for path in files[:_LOOKED_AT]):
        return None
    names: dict[str, int] = {}
    parts: dict[str, list[Entry]] = {}
    for path in files:
        with problems.tolerated():
            file = tree.find(PurePosixPath(path).stem, path, problems)
            drawn = Drawn(Entry(str(file), *read_size(file), []), names, path, problems)
            for layer in read_xml(tree.path(path), _RULE).iter("Annotation"):
                _draw(drawn, layer)
            if drawn.usable:
                parts.setdefault(part_of(path), []).append(drawn.entry)
    note_others(tree, parts, "images without an XML file", problems)
    return parts_of(parts, names, f"ImageScope: {len(files)} XML files such as {files[0]}")


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
