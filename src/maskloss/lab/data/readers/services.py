"""What labeling services export: Scalabel, Labelbox, Encord, Scale, Kili, Dataloop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskloss.lab.data.problems import DECIDED, LEFT_OUT
from maskloss.lab.data.readers.objects import Picture, Tool, flat, unread, xy
from maskloss.lab.data.readers.segmentation import box_of
from maskloss.lab.data.readers.shapes import Drawn, unpack_png

# --------------------------------------------------------------------------------------------- Scalabel, of BDD100K


def _scalabel(content: Any) -> list[Picture]:
    frames = content["frames"] if isinstance(content, Mapping) else content
    found = [Picture(each["name"], 0, 0, list(each["labels"] or [])) for each in frames if "labels" in each]
    return found if any("category" in one for each in found for one in each.objects or []) else []


def _draw_scalabel(drawn: Drawn, each: Any) -> None:
    name, box = each["category"], each.get("box2d")
    if each.get("rle"):
        drawn.segmentation(name, each["rle"])
    elif each.get("poly2d"):
        if not all(path.get("closed", True) for path in each["poly2d"]):
            return drawn.problems.note(LEFT_OUT, "shapes that enclose nothing (open lines)", drawn.what)
        if any("C" in (path.get("types") or "") for path in each["poly2d"]):
            raise unread(drawn, "curve")
        drawn.polygons(name, [flat(path["vertices"]) for path in each["poly2d"]])
    elif box:
        drawn.box(name, [box["x1"], box["y1"], box["x2"] - box["x1"], box["y2"] - box["y1"]])
    return None


# --------------------------------------------------------------------------------------------------------- Labelbox


def _last(name: Any, size: Mapping[str, Any], labels: list[list[Any]]) -> Picture:
    """Return an image with the last of its annotations, of which several people may each have made one."""
    told = [(DECIDED, "images with several annotations, the last taken")] * (len(labels) > 1)
    told += [(LEFT_OUT, "images that nobody annotated")] * (not labels)
    height, width = size.get("height", 0), size.get("width", 0)
    return Picture(name, height, width, labels[-1] if labels else None, told=told)


def _labelbox(content: Any) -> list[Picture]:
    found = []
    for row in content if isinstance(content, list) else [content]:
        if "Label" in row:
            found.append(_last(row["External ID"], {}, [row["Label"]["objects"]] if row["Label"] else []))
            continue
        labels = [one for p in row["projects"].values() for one in p["labels"]]
        objects = [list(label["annotations"]["objects"]) for label in labels]
        found.append(_last(row["data_row"]["external_id"], row.get("media_attributes") or {}, objects))
    return found


def _draw_labelbox(drawn: Drawn, each: Any) -> None:
    name, box = each.get("name") or each["title"], each.get("bounding_box") or each.get("bbox")
    if each.get("polygon"):
        drawn.polygons(name, [xy(each["polygon"])])
    elif box:
        drawn.box(name, [box[side] for side in ("left", "top", "width", "height")])
    elif {"mask", "composite_mask", "instanceURI"} & set(each):
        raise unread(drawn, "mask that is an address")
    else:
        drawn.problems.note(LEFT_OUT, "objects that enclose nothing", drawn.what)


# ---------------------------------------------------------------------------------------- Encord, Scale, Kili, Dataloop


def _encord(content: Any) -> list[Picture]:
    units = [unit for row in content for unit in row["data_units"].values()]
    return [_last(each["data_title"], each, [each["labels"]["objects"]] if each["labels"] else []) for each in units]


def _draw_encord(drawn: Drawn, each: Any) -> None:
    name, kind, height, width = each["name"], each["shape"], drawn.entry.height, drawn.entry.width
    if kind == "polygon":
        points = each["polygon"]
        order = sorted(points, key=int)
        drawn.polygons(name, [xy([points[place] for place in order], width, height)])
    elif kind == "bounding_box":
        x, y, across, down = (each["boundingBox"][side] for side in "xywh")
        drawn.box(name, [x * width, y * height, across * width, down * height])
    elif kind in {"bitmask", "rotatable_bounding_box"}:
        raise unread(drawn, kind)
    else:
        drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({kind})", drawn.what)


def _scale(content: Any) -> list[Picture]:
    drawn = [[task["response"]["annotations"]] if task.get("response") else [] for task in content]
    return [_last(task["params"]["attachment"], {}, some) for task, some in zip(content, drawn, strict=True)]


def _draw_scale(drawn: Drawn, each: Any) -> None:
    if each["type"] == "polygon":
        drawn.polygons(each["label"], [xy(each["vertices"])])
    elif each["type"] == "box":
        drawn.box(each["label"], [each[side] for side in ("left", "top", "width", "height")])
    else:
        drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({each['type']})", drawn.what)


def _kili(content: Any) -> list[Picture]:
    found = []
    for asset in content:
        jobs = [each["jsonResponse"].values() for each in asset["labels"]]
        drawn = [[one for job in some for one in job.get("annotations", [])] for some in jobs]
        found.append(_last(asset["externalId"], {}, drawn))
    return found


def _draw_kili(drawn: Drawn, each: Any) -> None:
    size, name = (drawn.entry.width, drawn.entry.height), each["categories"][0]["name"]
    paths = [xy(path["normalizedVertices"], *size) for path in each["boundingPoly"]]
    if each["type"] == "rectangle":
        drawn.box(name, box_of(None, paths[0]))
    else:
        drawn.even_odd(name, paths)


def _dataloop(content: Any) -> list[Picture]:
    size = (content.get("metadata") or {}).get("system") or {}
    objects = [each for each in content["annotations"] if each["type"] and "label" in each]
    return [Picture(content["filename"], size.get("height", 0), size.get("width", 0), objects)]


def _draw_dataloop(drawn: Drawn, each: Any) -> None:
    name, kind, points = each["label"], each["type"], each.get("coordinates")
    if kind == "segment":
        paths = points if isinstance(points[0], list) else [points]
        drawn.polygons(name, [xy(path) for path in paths])
    elif kind == "binary":
        text = points["data"] if isinstance(points, Mapping) else points
        drawn.bitmap(name, unpack_png(text.rsplit(",", 1)[-1], drawn.what), 0, 0)
    elif kind == "box":
        drawn.box(name, box_of(None, xy(points)))
    elif kind != "class":
        drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({kind})", drawn.what)


SCALABEL = Tool("Scalabel", _scalabel, _draw_scalabel)
LABELBOX = Tool("Labelbox", _labelbox, _draw_labelbox)
ENCORD = Tool("Encord", _encord, _draw_encord)
SCALE = Tool("Scale", _scale, _draw_scale)
KILI = Tool("Kili", _kili, _draw_kili)
DATALOOP = Tool("Dataloop", _dataloop, _draw_dataloop)
