"""Tools that list the objects of each image: a function finds them, and one draws one of them."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from maskloss.errors import Cause, MaskLossError, describe
from maskloss.lab.data.catalog import Entry, Part
from maskloss.lab.data.images import read_size
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import DECIDED, LEFT_OUT, SUSPICIOUS, Problems, cause_of
from maskloss.lab.data.readers.segmentation import box_of, integer, number
from maskloss.lab.data.readers.shapes import Drawn, listed, note_others, parts_of
from maskloss.lab.data.tiff import MOST_PIXELS
from maskloss.lab.data.tree import Tree, part_of

# What damaged content makes a reader raise that takes it as it is.
_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, OverflowError, MemoryError, zlib.error, struct.error)
# Files that are looked into to see whose they are.
_LOOKED_AT = 3


class Picture(NamedTuple):
    """An image as a tool lists it."""

    name: Any  # of the file; "", or a folder with its slash: the file of annotations is named after it
    height: int  # pixels; 0: the file says it
    width: int
    objects: list[Any] | None  # as the tool writes them; None: nobody has annotated the image, it is left out
    inside: bool = False  # whether the JSON file holds the image itself, as labelme's imageData
    part: str = ""  # of the data set, as the file says; "": its folder does
    id: Any = None  # what the tool calls the image; None: nothing
    told: Sequence[tuple[str, str]] = ()  # findings of the image, (kind, what)


class Tool(NamedTuple):
    """How a tool writes its annotations."""

    name: str
    pictures: Callable[[Any], list[Picture]]  # of a file; raises one of _DAMAGE where it is none of the tool's
    draw: Callable[[Drawn, Any], None]
    endings: tuple[str, ...] = (".json", ".json.gz", ".jsonl", ".ndjson", ".geojson")
    content: Callable[[Tree, str], Any] = Tree.json  # reads a file

    def find(self, tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
        """Find files of the tool, of the whole data set or one for each image."""
        named = [options.annotations] if options.annotations else tree.files
        files = [path for path in named if path.lower().endswith(self.endings)]
        of_one = [path for path in files if path in tree.of_one]
        some = [*of_one[:_LOOKED_AT], *(path for path in files if path not in tree.of_one)][: 2 * _LOOKED_AT]
        if not any(self._is_of(tree, path) for path in some):
            return None
        names: dict[str, int] = {}
        parts: dict[str, list[Entry]] = {}
        mine = []
        for path in files:
            pictures: list[Picture] = []
            with problems.tolerated():
                pictures = self._of(tree, path)
            tree.forget()
            mine += [path] if pictures else []
            part = part_of(path, stem=len(pictures) > 1)
            for picture in pictures:
                with problems.tolerated():
                    drawn = self._read(tree, path, picture, names, problems)
                    if drawn is not None and drawn.usable:
                        parts.setdefault(picture.part or part, []).append(drawn.entry)
        note_others(tree, parts, "images that no file of annotations lists", problems)
        return parts_of(parts, names, f"{self.name}: {mine[0]}{_and(len(mine))}") if mine else None

    def _is_of(self, tree: Tree, path: str) -> bool:
        try:
            return bool(self._of(tree, path))
        except MaskLossError as error:  # what is broken may be of anything
            tree.broken.setdefault(path, cause_of(error))
            return False

    def _of(self, tree: Tree, path: str) -> list[Picture]:
        try:
            return self.pictures(self.content(tree, path))
        except MaskLossError:
            raise
        except _DAMAGE:
            return []

    def _read(self, tree: Tree, path: str, picture: Picture, names: dict[str, int], problems: Problems) -> Drawn | None:
        name = picture.name
        if isinstance(name, str) and (not name or name.endswith("/")):
            name += PurePosixPath(path).stem
        if not isinstance(name, str) or "\0" in name:
            raise Cause("every image must be named", f"{path} has {describe(name)}", "export it again")
        for kind, what in picture.told:
            problems.note(kind, what, f"{path}: {name}")
        if picture.objects is None:
            return None
        try:
            file = tree.find(name, path, problems)
        except MaskLossError:
            if not picture.inside:
                raise
            file = tree.path(path)
        height, width = (integer(number(side)) for side in (picture.height, picture.width))
        size = (height, width) if height and width else read_size(file)
        drawn = Drawn(Entry(str(file), *size, [], None, picture.id), names, f"{path}: {name}", problems)
        for each in listed(picture.objects, drawn.what):
            with drawn.guarded():
                try:
                    self.draw(drawn, each)
                except MaskLossError:
                    raise
                except _DAMAGE:
                    rule = f"objects must be as {self.name} writes them"
                    raise Cause(rule, f"{drawn.what} has {describe(each)}", "export it again") from None
        return drawn


def _and(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def flat(points: Any) -> list[Any]:
    """Return the numbers of points, each of which is [x, y]."""
    return [side for x, y in points for side in (x, y)]


def xy(points: Any, across: float = 1, down: float = 1) -> list[float]:
    """Return the numbers of points that are called x and y, in units of pixels or of the sides of the image."""
    return [side for point in points for side in (point["x"] * across, point["y"] * down)]


def unread(drawn: Drawn, kind: str) -> Cause:
    """Make an error of a form of masks that is not read."""
    return Cause("masks must be polygons or in COCO's form", f"{drawn.what} has a {kind}", "export COCO instead")


# ---------------------------------------------------------------------------------------------------- Darwin, of V7


def _darwin(content: Any) -> list[Picture]:
    objects = list(content["annotations"])
    if "item" in content:
        slot = content["item"]["slots"][0]
        return [Picture(content["item"]["name"], slot["height"], slot["width"], objects)]
    image = content["image"]
    return [Picture(image.get("original_filename", image["filename"]), image["height"], image["width"], objects)]


def _draw_darwin(drawn: Drawn, each: Any) -> None:
    polygon, box = each.get("polygon") or each.get("complex_polygon"), each.get("bounding_box")
    if polygon:
        paths = polygon.get("paths") or polygon["path"]
        paths = [paths] if isinstance(paths[0], Mapping) else paths
        drawn.even_odd(each["name"], [xy(path) for path in paths])
    elif "mask" in each:
        raise unread(drawn, "mask")
    elif box:
        drawn.box(each["name"], [float(box[side]) for side in "xywh"])
    elif "tag" not in each:
        drawn.problems.note(LEFT_OUT, "objects that enclose nothing", drawn.what)


# ---------------------------------------------------------------------------------------------------- SuperAnnotate


def _superannotate(content: Any) -> list[Picture]:
    head, objects = content["metadata"], list(content["instances"])
    return [Picture(head["name"], head.get("height", 0), head.get("width", 0), objects)]


def _draw_superannotate(drawn: Drawn, each: Any) -> None:
    name, points, kind = str(each.get("className") or each["classId"]), each.get("points"), each["type"]
    if kind == "polygon":
        drawn.polygons(name, [points], each.get("exclude") or [])
    elif kind in {"bbox", "rbbox"}:
        xs, ys = ([points[key] for key in points if key[0] == side] for side in "xy")
        drawn.box(name, [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)])
    elif kind == "ellipse":
        drawn.ellipse(name, (points["cx"], points["cy"]), (points["rx"], points["ry"]), points.get("angle") or 0)
    elif kind in {"mask", "pixel"} or "parts" in each:
        raise unread(drawn, "mask in colors")
    else:
        drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({kind})", drawn.what)


# ------------------------------------------------------------------------------------------------------------ Hasty


def _hasty(content: Any) -> list[Picture]:
    listed = content["images"]
    return [Picture(each["image_name"], each["height"], each["width"], list(each["labels"])) for each in listed]


def _draw_hasty(drawn: Drawn, each: Any) -> None:
    if each.get("polygon"):
        drawn.polygons(each["class_name"], [flat(each["polygon"])])
    elif each.get("mask"):
        raise unread(drawn, "mask")
    else:
        left, top, right, bottom = map(float, each["bbox"])
        drawn.box(each["class_name"], [left, top, right - left, bottom - top])


# --------------------------------------------------------------------------------------------------------- Datumaro


def _datumaro(content: Any) -> list[Picture]:
    names = [each["name"] for each in content["categories"]["label"]["labels"]]
    found = []
    for item in content["items"]:
        image = item.get("image") or item.get("media") or {}
        grouped: dict[Any, list[Any]] = {}
        for place, each in enumerate(item["annotations"]):
            named = {**each, "name": names[each["label_id"]]} if isinstance(each.get("label_id"), int) else each
            grouped.setdefault((each.get("group") or -place - 1, each.get("label_id"), each["type"]), []).append(named)
        height, width = image.get("size") or (0, 0)
        found.append(Picture(image.get("path") or item["id"], height, width, list(grouped.values())))
    return found


def _draw_datumaro(drawn: Drawn, group: Any) -> None:
    kind, name = group[0]["type"], str(group[0].get("name", "object"))
    if kind == "polygon":
        drawn.polygons(name, [each["points"] for each in group])
    elif kind == "mask":
        for each in group:
            drawn.segmentation(name, each["rle"])
    elif kind == "bbox":
        for each in group:
            drawn.box(name, each["bbox"])
    elif kind not in {"label", "caption"}:
        drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({kind})", drawn.what)


# ------------------------------------------------------------------------------------------------------------- ISAT


def _isat(content: Any) -> list[Picture]:
    head = content["info"]
    grouped: dict[Any, list[Any]] = {}
    for each in content["objects"]:
        grouped.setdefault((each["category"], each["group"]), []).append(flat(each["segmentation"]))
    objects = [(name, polygons) for (name, _), polygons in grouped.items()]
    return [Picture(head["name"], head["height"], head["width"], objects)]


def _draw_isat(drawn: Drawn, each: Any) -> None:
    drawn.polygons(*each)


# --------------------------------------------------------------------------------------------------------- FiftyOne


# What FiftyOne calls the field of annotations; predictions are in others.
_TRUTH = "ground_truth"


def _fiftyone(content: Any) -> list[Picture]:
    found = []
    for sample in content["samples"]:
        fields = {key: each for key, each in sample.items() if isinstance(each, Mapping)}
        drawn = {key: [*each.get("detections", []), *each.get("polylines", [])] for key, each in fields.items()}
        drawn = {key: some for key, some in drawn.items() if some or key == _TRUTH}
        told = []
        if len(drawn) > 1 and _TRUTH in drawn:
            told = [(DECIDED, f"samples with several fields of objects, {_TRUTH} taken")]
            drawn = {_TRUTH: drawn[_TRUTH]}
        elif len(drawn) > 1:
            told = [(SUSPICIOUS, f"objects of several fields joined ({', '.join(drawn)}): are predictions among them?")]
        found.append(Picture(sample["filepath"], 0, 0, [each for some in drawn.values() for each in some], told=told))
    return found


def _draw_fiftyone(drawn: Drawn, each: Any) -> None:
    height, width = drawn.entry.height, drawn.entry.width
    if "points" in each:
        polygons = [[side for x, y in path for side in (x * width, y * height)] for path in each["points"]]
        return drawn.even_odd(each["label"], polygons)
    left, top, across, down = (
        number * side for number, side in zip(each["bounding_box"], (width, height) * 2, strict=True)
    )
    if each.get("mask_path"):
        raise unread(drawn, "mask in a file of its own")
    if not each.get("mask"):
        return drawn.box(each["label"], [left, top, across, down])
    packed = each["mask"]["$binary"]
    text = packed["base64"] if isinstance(packed, Mapping) else packed
    raw = zlib.decompressobj().decompress(base64.b64decode(text), 8 * MOST_PIXELS)
    mask = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    # A mask may have another resolution than its box.
    rows, columns = (
        (np.arange(max(1, round(side))) * length // max(1, round(side)))
        for side, length in zip((down, across), mask.shape, strict=True)
    )
    return drawn.bitmap(each["label"], mask[np.ix_(rows, columns)] > 0, round(left), round(top))


# ----------------------------------------------------------------------------------------------------------- GeoJSON


def _geojson(content: Any) -> list[Picture]:
    """Take QuPath's features in pixels, a file for each image, or HuBMAP's lines of polygons."""
    if isinstance(content, list) and "annotations" in content[0]:
        return [Picture(row["id"], 0, 0, [_feature(each) for each in row["annotations"]]) for row in content]
    features = content if isinstance(content, list) else content["features"]
    # Those with a reference system lie on the Earth, and so do those that no pixel could show.
    if "crs" in content or any(each["type"] != "Feature" for each in features) or _are_degrees(features):
        return []
    return [Picture("", 0, 0, list(features))]


def _are_degrees(features: Sequence[Any]) -> bool:
    """Whether there are polygons, and none is larger than a pixel."""
    polygons = [each["geometry"] for each in features if each["geometry"]["type"] in {"Polygon", "MultiPolygon"}]
    boxes = [box_of(None, each["coordinates"]) for each in polygons]
    return bool(boxes) and all(box is not None and max(box[2:]) <= 1 for box in boxes)


def _feature(each: Any) -> dict[str, Any]:
    geometry = {"type": "Polygon", "coordinates": each["coordinates"]}
    return {"geometry": geometry, "properties": {"name": each["type"]}}


def _draw_geojson(drawn: Drawn, each: Any) -> None:
    geometry, properties = each["geometry"], each.get("properties") or {}
    named = properties.get("classification") or properties
    name, kind, rings = str(named.get("name") or "object"), geometry["type"], geometry.get("coordinates")
    if kind not in {"Polygon", "MultiPolygon"}:
        return drawn.problems.note(LEFT_OUT, f"shapes that enclose nothing ({kind})", drawn.what)
    rings = rings if kind == "Polygon" else [ring for rings in rings for ring in rings]
    return drawn.even_odd(name, [flat(ring) for ring in rings])


# ------------------------------------------------------------------------------------------------ Segment Anything


def _segment_anything(content: Any) -> list[Picture]:
    image, objects = content["image"], content["annotations"]
    return [Picture(image["file_name"], image["height"], image["width"], [each["segmentation"] for each in objects])]


def _draw_segment(drawn: Drawn, each: Any) -> None:
    drawn.segmentation("object", each)


DARWIN = Tool("Darwin", _darwin, _draw_darwin)
SUPERANNOTATE = Tool("SuperAnnotate", _superannotate, _draw_superannotate)
HASTY = Tool("Hasty", _hasty, _draw_hasty)
DATUMARO = Tool("Datumaro", _datumaro, _draw_datumaro)
ISAT = Tool("ISAT", _isat, _draw_isat)
FIFTYONE = Tool("FiftyOne", _fiftyone, _draw_fiftyone)
GEOJSON = Tool("GeoJSON", _geojson, _draw_geojson)
SEGMENT_ANYTHING = Tool("Segment Anything", _segment_anything, _draw_segment)
