"""labelme: a JSON file of shapes beside each image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from maskloss.errors import Cause, describe
from maskloss.lab.data.catalog import Entry, Part
from maskloss.lab.data.images import read_size
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LEFT_OUT, Problems
from maskloss.lab.data.readers.segmentation import number
from maskloss.lab.data.readers.shapes import Drawn, note_others, parts_of, unpack_png
from maskloss.lab.data.tree import Tree, part_of

_RULE = "a JSON file beside an image must be labelme's"
# Of any other shape the box is known at least, such as of AnyLabeling's "rotation".
_OPEN = frozenset({"point", "points", "line", "linestrip"})


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find JSON files with shapes."""
    if options.annotations is not None:
        return None
    whole = set(tree.whole_jsons)
    files = [path for path in tree.ending(".json") if path not in whole]
    # The first few decide; files of an image that is not there are found by what they hold.
    if not any(_is_labelme(tree.json(path, _RULE)) for path in (files or tree.ending(".json"))[:3]):
        return None
    names: dict[str, int] = {}
    parts: dict[str, list[Entry]] = {}
    count = 0
    for path in tree.ending(".json"):
        with problems.tolerated():
            content = tree.json(path, _RULE)
            if _is_labelme(content):
                count += 1
                drawn = _read(tree, path, content, names, problems)
                if drawn.usable:
                    parts.setdefault(part_of(path), []).append(drawn.entry)
        tree.forget()
    note_others(tree, parts, "images without a JSON file", problems)
    return parts_of(parts, names, f"labelme: {count} JSON files such as {files[0] if files else path}")


def _is_labelme(content: Any) -> bool:
    return isinstance(content, Mapping) and isinstance(content.get("shapes"), list)


def _read(tree: Tree, path: str, content: Mapping[str, Any], names: dict[str, int], problems: Problems) -> Drawn:
    written = content.get("imagePath")
    if not isinstance(written, str) or not written or "\0" in written:
        raise Cause(_RULE, f"{tree.path(path)} has the imagePath {describe(written)}", "name the image")
    name = (PurePosixPath(path).parent / written.replace("\\", "/")).as_posix()
    try:
        file = tree.find(name if tree.path(name).is_file() else written, path, problems)
    except Cause:
        if content.get("imageData"):
            what = f"that of {tree.path(path)} is in the JSON file only, as imageData"
            raise Cause("every image must be a file", what, "labelme_export_json writes it out") from None
        raise
    height, width = (content.get(side) for side in ("imageHeight", "imageWidth"))
    if not isinstance(height, int) or not isinstance(width, int) or not height or not width:
        height, width = read_size(file)
    drawn = Drawn(Entry(str(file), height, width, []), names, path, problems)
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for place, shape in enumerate(content["shapes"]):
        with drawn.guarded():
            if not isinstance(shape, Mapping) or not isinstance(shape.get("points"), list):
                raise Cause(_RULE, f"{tree.path(path)} has the shape {describe(shape)}", "export it again")
            group = shape.get("group_id")
            # Polygons of one group are one instance that something hides in part.
            key = (place,) if group is None else (str(shape.get("label")), str(group))
            groups.setdefault(key, []).append(shape)
    for shapes in groups.values():
        with drawn.guarded():
            _draw(drawn, shapes)
    return drawn


def _draw(drawn: Drawn, shapes: list[Mapping[str, Any]]) -> None:
    corners, name = [], str(shapes[0].get("label"))
    for shape in shapes:
        kind, points = shape.get("shape_type") or "polygon", [_point(each, drawn.what) for each in shape["points"]]
        if kind == "polygon":
            corners.append([each for point in points for each in point])
        elif kind == "mask" and points:
            bitmap = unpack_png(shape.get("mask"), drawn.what)
            drawn.bitmap(name, bitmap, round(points[0][0]), round(points[0][1]))
        elif kind == "circle" and len(points) == 2:
            radius = math.dist(*points)
            drawn.ellipse(name, points[0], (radius, radius))
        elif len(points) > (1 if kind == "rectangle" else 2) and kind not in _OPEN:
            xs, ys = zip(*points, strict=True)
            drawn.box(name, [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)])
        else:
            drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({kind})", drawn.what)
    if corners:
        drawn.polygons(name, corners)


def _point(value: Any, what: str) -> tuple[float, float]:
    pair = [number(each) for each in value] if isinstance(value, list) and len(value) == 2 else [None]
    if None in pair:
        raise Cause(_RULE, f"{what} has the point {describe(value)}", "each is [x, y]")
    return float(pair[0] or 0), float(pair[1] or 0)
