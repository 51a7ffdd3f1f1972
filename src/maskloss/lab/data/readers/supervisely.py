"""Supervisely: ds/img/x.jpg, ds/ann/x.jpg.json with objects that are polygons or bitmaps."""

from __future__ import annotations

from typing import Any

from maskloss.lab.data.problems import LEFT_OUT
from maskloss.lab.data.readers.objects import Picture, Tool
from maskloss.lab.data.readers.segmentation import box_of
from maskloss.lab.data.readers.shapes import Drawn, unpack_png


def _pictures(content: Any) -> list[Picture]:
    objects, size = list(content["objects"]), content.get("size") or {}
    if not {"tags", "size"} & set(content):
        return []
    return [Picture("img/", size.get("height", 0), size.get("width", 0), objects)]


def _draw(drawn: Drawn, each: Any) -> None:
    kind, name, points = str(each.get("geometryType", each.get("type"))), each["classTitle"], each.get("points")
    if kind in {"bitmap", "alpha_mask"}:
        left, top = (int(side) for side in each["bitmap"]["origin"])
        drawn.bitmap(name, unpack_png(each["bitmap"]["data"], drawn.what, compressed=True), left, top)
    elif kind == "polygon":
        drawn.polygons(name, [points["exterior"]], points.get("interior") or [])
    elif kind == "rectangle":
        drawn.box(name, box_of(None, points["exterior"]))
    else:
        drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({kind})", drawn.what)


SUPERVISELY = Tool("Supervisely", _pictures, _draw)
