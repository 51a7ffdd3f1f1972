"""The VGG Image Annotator: regions of each image in one JSON file, as it exports them or saves its project."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from typing import Any

from maskloss.errors import Cause, describe
from maskloss.lab.data.problems import LEFT_OUT, SUSPICIOUS
from maskloss.lab.data.readers.names import read_text
from maskloss.lab.data.readers.objects import Picture, Tool, flat
from maskloss.lab.data.readers.segmentation import number
from maskloss.lab.data.readers.shapes import Drawn, listed
from maskloss.lab.data.tree import Tree
from maskloss.lab.files import check_file, explain

_RULE = "a file of VIA must list regions with their shapes"
CLASS = "object"
_LONGEST_HEAD = 4096
_COLUMNS = ("region_shape_attributes", "region_attributes")
# The shapes of VIA 3, by their numbers, and what their numbers are.
_SHAPES = {
    2: ("rect", ("x", "y", "width", "height")),
    3: ("circle", ("cx", "cy", "r")),
    4: ("ellipse", ("cx", "cy", "rx", "ry")),
}
_POLYGON = 7
# Attributes that people call the class by, in this order.
_ATTRIBUTES = ("class", "label", "name", "category", "type", "object")


def _of_csv(tree: Tree, path: str) -> list[Mapping[str, Any]] | None:
    """Read the table that VIA exports: a row for each region."""
    check_file(tree.path(path), _RULE)
    with tree.path(path).open("rb") as opened:
        # A table of something else may be of any size and in any encoding.
        head = opened.readline(_LONGEST_HEAD).decode("utf-8", "replace")
    if not all(column in head for column in ("filename", *_COLUMNS)):
        return None
    try:
        rows = list(csv.DictReader(read_text(tree, path).splitlines()))
    except csv.Error as error:
        raise Cause(_RULE, f"{path}: {explain(error)}", "export it as JSON") from None
    if not rows or not set(rows[0]) >= {"filename", *_COLUMNS}:
        return None
    regions: dict[str, list[Any]] = {}
    for row in rows:
        try:
            shape, attributes = (json.loads(row[column] or "{}") for column in _COLUMNS)
        except (ValueError, TypeError, RecursionError) as error:
            raise Cause(_RULE, f"{path}, {row['filename']}: {explain(error)}", "export it again") from None
        kept = regions.setdefault(row["filename"], [])
        if shape:
            kept.append({"shape_attributes": shape, "region_attributes": attributes})
    return [{"filename": name, "regions": some} for name, some in regions.items()]


def _content(tree: Tree, path: str) -> Any:
    return _of_csv(tree, path) if path.lower().endswith(".csv") else tree.json(path)


def _pictures(content: Any) -> list[Picture]:
    if isinstance(content, Mapping) and {"metadata", "file", "view", "attribute"} <= set(content):
        content = _of_third(content)
    if isinstance(content, Mapping):
        content = content.get("_via_img_metadata", content)
    images = list(content.values()) if isinstance(content, Mapping) else content
    return [Picture(each["filename"], 0, 0, listed(each["regions"], each["filename"])) for each in images]


def _of_third(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the images of a project of VIA 3 as those of VIA 2 are written."""
    files, views, attributes = (content[each] for each in ("file", "view", "attribute"))
    regions: dict[str, list[Any]] = {}
    each: Any = files
    try:
        for each in files.values():
            regions[each["fname"]] = []
        for each in content["metadata"].values():
            [number] = views[str(each["vid"])]["fid_list"]
            kind, *values = each["xy"]
            chosen = {}
            for key, value in each["av"].items():
                options = attributes[key].get("options") or {}
                chosen[attributes[key]["aname"]] = options.get(value, value)
            shape = {"name": "polygon", "all_points_x": values[::2], "all_points_y": values[1::2]}
            if kind != _POLYGON:
                name, needed = _SHAPES.get(kind, (f"shape {kind}", ()))
                shape = {"name": name, **dict(zip(needed, values, strict=False))}
            regions[files[str(number)]["fname"]].append({"shape_attributes": shape, "region_attributes": chosen})
    except (ValueError, TypeError, LookupError, AttributeError):
        raise Cause(_RULE, f"a project of VIA 3 has {describe(each)}", "export it again") from None
    return [{"filename": name, "regions": some} for name, some in regions.items()]


def _name(attributes: Any, drawn: Drawn) -> str:
    """Return the class of a region: one of the usual attributes, else the only one whose value is no number."""
    if not isinstance(attributes, Mapping):
        return CLASS
    values = {str(each).lower(): value for each, value in attributes.items() if value not in ("", None, {})}
    chosen = next((values[each] for each in _ATTRIBUTES if each in values), None)
    named = [value for value in values.values() if number(value) is None]
    if chosen is None and len(named) == 1:
        [chosen] = named
    elif chosen is None and values:
        what = f"regions whose attributes ({', '.join(sorted(values))}) name no class: all are called {CLASS!r}"
        drawn.problems.note(SUSPICIOUS, what, drawn.what)
    if isinstance(chosen, Mapping):
        chosen = next((each for each, on in chosen.items() if on), None)
    return CLASS if chosen is None else str(chosen)


def _draw(drawn: Drawn, region: Any) -> None:
    shape, name = region["shape_attributes"], _name(region.get("region_attributes"), drawn)

    def need(*wanted: str) -> list[float]:
        return [float(shape[each]) for each in wanted]

    kind = shape.get("name")
    if kind == "polygon":
        drawn.polygons(name, [flat(zip(shape["all_points_x"], shape["all_points_y"], strict=True))])
    elif kind == "rect":
        drawn.box(name, need("x", "y", "width", "height"))
    elif kind == "circle":
        x, y, radius = need("cx", "cy", "r")
        drawn.ellipse(name, (x, y), (radius, radius))
    elif kind == "ellipse":
        x, y, across, down = need("cx", "cy", "rx", "ry")
        drawn.ellipse(name, (x, y), (across, down), math.degrees(float(shape.get("theta") or 0)))
    else:
        drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({kind})", drawn.what)


VIA = Tool("VIA", _pictures, _draw, (".json", ".json.gz", ".csv"), _content)
