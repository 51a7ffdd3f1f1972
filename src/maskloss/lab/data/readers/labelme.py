"""labelme: a JSON file of shapes beside each image, which may hold the image itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from maskloss.errors import Cause, describe
from maskloss.lab.data.problems import LEFT_OUT
from maskloss.lab.data.readers.objects import Picture, Tool
from maskloss.lab.data.readers.segmentation import number
from maskloss.lab.data.readers.shapes import Drawn, unpack_png

# Of any other shape the box is known at least, such as of AnyLabeling's "rotation".
_OPEN = frozenset({"point", "points", "line", "linestrip"})


def _pictures(content: Any) -> list[Picture]:
    groups: dict[Any, list[Any]] = {}
    for place, shape in enumerate(list(content["shapes"])):
        group = shape.get("group_id") if isinstance(shape, Mapping) else None
        # Polygons of one group are one instance that something hides in part.
        groups.setdefault((place,) if group is None else (str(shape.get("label")), str(group)), []).append(shape)
    size = content.get("imageHeight") or 0, content.get("imageWidth") or 0
    return [Picture(content["imagePath"], *size, list(groups.values()), inside=bool(content.get("imageData")))]


def _draw(drawn: Drawn, shapes: Any) -> None:
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
        raise Cause("a point must be [x, y]", f"{what} has {describe(value)}", "export it again")
    return float(pair[0] or 0), float(pair[1] or 0)


LABELME = Tool("labelme", _pictures, _draw)
