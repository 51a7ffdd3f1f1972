"""Label Studio's own JSON: tasks with polygons in percent, and brush masks in its own run lengths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause
from maskloss.lab.data.images import SUFFIXES
from maskloss.lab.data.problems import DECIDED, LEFT_OUT, SUSPICIOUS
from maskloss.lab.data.readers.coco import as_id
from maskloss.lab.data.readers.objects import Picture, Tool
from maskloss.lab.data.readers.shapes import Drawn, listed
from maskloss.lab.data.tiff import MOST_PIXELS


def _pictures(content: Any) -> list[Picture]:
    tasks = [_whole(task) for task in content]
    return [_picture(task) for task in tasks]


def _whole(task: Any) -> Any:
    """Return a task of the short form (JSON-MIN) in the long one; what is none stays as it is."""
    if not isinstance(task, Mapping) or "data" in task or not isinstance(task.get("image"), str):
        return task
    values = [each for some in task.values() if isinstance(some, list) for each in some if isinstance(each, Mapping)]
    results = []
    for value in values:
        kind = next((key for key in value if str(key).endswith("labels")), None)
        if kind is not None:
            sides = {side: value[side] for side in ("original_width", "original_height") if side in value}
            results.append({"type": kind, "value": value, **sides})
    if not results and "annotation_id" not in task:
        return task
    return {"id": task.get("id"), "data": {"image": task["image"]}, "annotations": [{"result": results}]}


def _picture(task: Mapping[str, Any]) -> Picture:
    data, annotations = task["data"], task["annotations"] if "annotations" in task else task["completions"]
    urls = [each for each in data.values() if isinstance(each, str)] if isinstance(data, Mapping) else []
    # The key is named by whoever set up the project, and there may be texts beside it.
    images = [each for each in urls if PurePosixPath(each.split("?d=")[-1].split("?")[0]).suffix.lower() in SUFFIXES]
    written = data.get("image", next(iter([*images, *urls]), None)) if isinstance(data, Mapping) else None
    some = [
        each for each in listed(annotations, "a task") if isinstance(each, Mapping) and not each.get("was_cancelled")
    ]
    number = as_id(task.get("id"))
    if not some:
        return Picture(written, 0, 0, None, id=number, told=[(LEFT_OUT, "tasks that nobody annotated")])
    told = [(DECIDED, "tasks with several annotations, the last taken")] * (len(some) > 1)
    results = [each for each in listed(some[-1].get("result"), "a task") if isinstance(each, Mapping)]
    if any(each.get("image_rotation") for each in results):
        told.append((SUSPICIOUS, "results drawn while the image was turned: are they in place?"))
    # With one control for shapes and one for labels, a shape and its label are two results of one id.
    names_of = {str(each.get("id")): label for each in results if (label := _label(each.get("value")))}
    drawings = [
        (each, _label(each["value"]) or names_of.get(str(each.get("id")), "object"))
        for each in results
        if isinstance(each.get("value"), Mapping) and each.get("type") != "labels"
    ]
    return Picture(written, 0, 0, drawings, id=number, told=told)


def _label(value: Any) -> str | None:
    items = value.items() if isinstance(value, Mapping) else ()
    found = next((each for key, each in items if str(key).endswith("labels")), None)
    return str(found[0]) if isinstance(found, list) and found else None


def _draw(drawn: Drawn, drawing: Any) -> None:
    result, name = drawing
    kind, value = str(result.get("type")).removesuffix("labels"), result["value"]
    across, down = drawn.entry.width / 100, drawn.entry.height / 100

    if kind == "polygon":
        drawn.polygons(name, [[one for x, y in value["points"] for one in (float(x) * across, float(y) * down)]])
    elif kind == "brush" and isinstance(value.get("rle"), list):
        size = tuple(int(result[each]) for each in ("original_height", "original_width"))
        if size != (drawn.entry.height, drawn.entry.width):
            what = f"{drawn.what}: {size[0]} x {size[1]}, not {drawn.entry.height} x {drawn.entry.width}"
            raise Cause("a mask must have the size of its image", what, "export it again")
        drawn.bitmap(name, decode_brush(value["rle"], *size), 0, 0)
    elif kind == "rectangle":
        x, y, wide, high = (float(value[each]) for each in ("x", "y", "width", "height"))
        drawn.box(name, [x * across, y * down, wide * across, high * down])
    elif kind == "ellipse":
        x, y, radius_x, radius_y = (float(value[each]) for each in ("x", "y", "radiusX", "radiusY"))
        turn = float(value.get("rotation") or 0)
        drawn.ellipse(name, (x * across, y * down), (radius_x * across, radius_y * down), turn)
    else:
        drawn.problems.note(LEFT_OUT, f"results that enclose nothing ({kind})", drawn.what)


def decode_brush(packed: list[Any], height: int, width: int) -> NDArray[np.bool_]:
    """Decode the run lengths of Label Studio's brush: RGBA bytes; alpha is the mask.

    A stream of bits: 32 for the number of bytes, 5 for the bits of a byte less 1, four times 4 for the bits of lengths
    less 1; then blocks of a flag (1: one byte is repeated), two bits that choose the size of the length, the length
    less 1, and the byte or bytes.
    """
    rule = "a brush mask must be run lengths of Label Studio"
    if not all(isinstance(byte, int) and 0 <= byte < 256 for byte in packed):
        raise Cause(rule, "it holds what is no byte", "export it again")
    bits = np.unpackbits(np.array(packed, dtype=np.uint8))
    place = 0

    def take(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise Cause(rule, "it ends too early", "export it again")
        found = 0
        for bit in bits[place : place + count].tolist():
            found = 2 * found + bit
        place += count
        return found

    total, size = take(32), take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    if total != 4 * height * width or total > 4 * MOST_PIXELS:
        raise Cause(rule, f"it has {total} values for {height} x {width} pixels of 4", "export it again")
    values = np.zeros(total, dtype=np.uint8)
    filled = 0
    while filled < total:
        repeated, count = take(1), 0
        count = take(lengths[take(2)]) + 1
        if filled + count > total:
            raise Cause(rule, "it has more values than pixels", "export it again")
        values[filled : filled + count] = take(size) if repeated else [take(size) for _ in range(count)]
        filled += count
    return np.asarray(values.reshape(height, width, 4)[..., 3] > 0)


LABEL_STUDIO = Tool("Label Studio", _pictures, _draw)
