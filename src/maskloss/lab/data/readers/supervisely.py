"""Supervisely: ds/img/x.jpg, ds/ann/x.jpg.json with objects that are polygons or bitmaps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from maskloss.errors import Cause, describe
from maskloss.lab.data.catalog import Entry, Part
from maskloss.lab.data.images import read_size
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LEFT_OUT, Problems
from maskloss.lab.data.readers.segmentation import box_of, integer
from maskloss.lab.data.readers.shapes import Drawn, listed, parts_of, unpack_png
from maskloss.lab.data.tree import Tree, part_of

_RULE = "a file in ann/ must be Supervisely's"


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find folders ann/ with a JSON file for each image."""
    files = [path for each in tree.folders("ann") for path in tree.under(each, tree.ending(".json"))]
    if options.annotations is not None or not files or not _is_annotation(tree.json(files[0], _RULE)):
        return None
    names: dict[str, int] = {}
    parts: dict[str, list[Entry]] = {}
    for path in files:
        with problems.tolerated():
            content = tree.json(path, _RULE)
            if not _is_annotation(content):
                raise Cause(_RULE, f"{tree.path(path)} has no objects", "export it again")
            drawn = _read(tree, path, content, names, problems)
            if drawn.usable:
                parts.setdefault(part_of(path), []).append(drawn.entry)
        tree.forget()
    return parts_of(parts, names, f"Supervisely: {len(files)} files such as {files[0]}")


def _is_annotation(content: Any) -> bool:
    return isinstance(content, Mapping) and isinstance(content.get("objects"), list)


def _read(tree: Tree, path: str, content: Mapping[str, Any], names: dict[str, int], problems: Problems) -> Drawn:
    pure = PurePosixPath(path)
    file = tree.find(f"{pure.parent.parent.name}/img/{pure.stem}", path, problems)
    size = content.get("size")
    sides = [integer(size.get(side)) if isinstance(size, Mapping) else None for side in ("height", "width")]
    height, width = (side or 0 for side in sides) if None not in sides else read_size(file)
    drawn = Drawn(Entry(str(file), height, width, []), names, path, problems)
    for each in content["objects"]:
        with drawn.guarded():
            if not isinstance(each, Mapping):
                raise Cause(_RULE, f"{path} has the object {describe(each)}", "export it again")
            _draw(drawn, each)
    return drawn


def _draw(drawn: Drawn, each: Mapping[str, Any]) -> None:
    kind, name = str(each.get("geometryType", each.get("type"))), str(each.get("classTitle"))
    points = each.get("points")
    if kind in {"bitmap", "alpha_mask"}:
        bitmap = each.get("bitmap")
        origin = bitmap.get("origin") if isinstance(bitmap, Mapping) else None
        corner = [integer(each) for each in origin] if isinstance(origin, list) else []
        if not isinstance(bitmap, Mapping) or len(corner) != 2 or None in corner:
            raise Cause(_RULE, f"{drawn.what} has the bitmap {describe(bitmap)}", "export it again")
        found = unpack_png(bitmap.get("data"), drawn.what, compressed=True)
        drawn.bitmap(name, found, corner[0] or 0, corner[1] or 0)
    elif kind in {"polygon", "rectangle"}:
        outer = points.get("exterior") if isinstance(points, Mapping) else None
        if not isinstance(points, Mapping) or not isinstance(outer, list):
            raise Cause(_RULE, f"{drawn.what} has the points {describe(points)}", "export it again")
        if kind == "polygon":
            drawn.polygons(name, [outer], listed(points.get("interior"), drawn.what))
        else:
            drawn.box(name, box_of(None, outer))
    else:
        drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({kind})", drawn.what)
