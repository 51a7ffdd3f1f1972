"""Label Studio's own JSON: tasks with polygons in percent, and brush masks in its own run lengths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause, MaskLossError, describe
from maskloss.lab.data.catalog import Entry, Part
from maskloss.lab.data.images import SUFFIXES, read_size
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import DECIDED, LEFT_OUT, SUSPICIOUS, Problems
from maskloss.lab.data.readers.coco import as_id
from maskloss.lab.data.readers.segmentation import number
from maskloss.lab.data.readers.shapes import Drawn, listed, parts_of
from maskloss.lab.data.tiff import MOST_PIXELS
from maskloss.lab.data.tree import Tree, part_of

_RULE = "a file of Label Studio must list tasks with annotations"


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find JSON files with tasks."""
    files = [options.annotations] if options.annotations else tree.whole_jsons
    found = [path for path in files if _is_tasks(tree, path)]
    names: dict[str, int] = {}
    parts: dict[str, list[Entry]] = {}
    for path in found:
        for task in map(_whole, tree.json(path)):
            with problems.tolerated():
                drawn = _read(tree, path, task, names, problems)
                if drawn is not None and drawn.usable:
                    parts.setdefault(part_of(path, stem=True), []).append(drawn.entry)
    return parts_of(parts, names, f"Label Studio: {', '.join(found)}") if found else None


def _is_tasks(tree: Tree, path: str) -> bool:
    try:
        content = tree.json(path)
    except MaskLossError:
        return False
    return (
        isinstance(content, list)
        and bool(content)
        and all(
            isinstance(each, Mapping) and "data" in each and ("annotations" in each or "completions" in each)
            for each in map(_whole, content)
        )
    )


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


def _read(tree: Tree, path: str, task: Mapping[str, Any], names: dict[str, int], problems: Problems) -> Drawn | None:
    data, what = task["data"], f"{path}: task {task.get('id')}"
    urls = [each for each in data.values() if isinstance(each, str)] if isinstance(data, Mapping) else []
    # The key is named by whoever set up the project, and there may be texts beside it.
    images = [each for each in urls if PurePosixPath(each.split("?d=")[-1].split("?")[0]).suffix.lower() in SUFFIXES]
    written = data.get("image", next(iter([*images, *urls]), None)) if isinstance(data, Mapping) else None
    if not isinstance(written, str) or "\0" in written:
        raise Cause(_RULE, f"{what} has the data {describe(data)}", "name the image")
    annotations = listed(task.get("annotations", task.get("completions")), what)
    some = [each for each in annotations if isinstance(each, Mapping) and not each.get("was_cancelled")]
    if not some:
        problems.note(LEFT_OUT, "tasks that nobody annotated", what)
        return None
    if len(some) > 1:
        problems.note(DECIDED, "tasks with several annotations, the last taken", what)
    file = tree.find(written, path, problems)
    height, width = read_size(file)
    drawn = Drawn(Entry(str(file), height, width, [], None, as_id(task.get("id"))), names, what, problems)
    results = [each for each in listed(some[-1].get("result"), what) if isinstance(each, Mapping)]
    drawings = [(each, value) for each in results if isinstance(value := each.get("value"), Mapping)]
    # With one control for shapes and one for labels, a shape and its label are two results of one id.
    names_of = {str(each.get("id")): label for each, value in drawings if (label := _label(value))}
    for result, value in drawings:
        with drawn.guarded():
            if result.get("image_rotation"):
                problems.note(SUSPICIOUS, "results drawn while the image was turned: are they in place?", what)
            if result.get("type") != "labels":
                _draw(drawn, result, value, _label(value) or names_of.get(str(result.get("id")), "object"))
    return drawn


def _label(value: Mapping[str, Any]) -> str | None:
    found = next((each for key, each in value.items() if str(key).endswith("labels")), None)
    return str(found[0]) if isinstance(found, list) and found else None


def _draw(drawn: Drawn, result: Mapping[str, Any], value: Mapping[str, Any], name: str) -> None:
    kind = str(result.get("type"))
    across, down = drawn.entry.width / 100, drawn.entry.height / 100

    def need(*wanted: str) -> list[float]:
        found = [number(value.get(each)) for each in wanted]
        if None in found:
            raise Cause(_RULE, f"{drawn.what} has the {kind} {describe(value)}", "export it again")
        return [each or 0.0 for each in found]

    if kind in {"polygonlabels", "polygon"}:
        corners = listed(value.get("points"), drawn.what)
        points = [[number(each) for each in point] for point in corners if isinstance(point, list)]
        if not points or any(len(point) != 2 or None in point for point in points):
            raise Cause(_RULE, f"{drawn.what} has the polygon {describe(value.get('points'))}", "export it again")
        drawn.polygons(name, [[one for x, y in points for one in ((x or 0) * across, (y or 0) * down)]])
    elif kind in {"brushlabels", "brush"} and isinstance(value.get("rle"), list):
        height, width = (int(number(result.get(each)) or 0) for each in ("original_height", "original_width"))
        if (height, width) != (drawn.entry.height, drawn.entry.width):
            size = f"{drawn.entry.height} x {drawn.entry.width}"
            raise Cause(
                "a mask must have the size of its image",
                f"{drawn.what}: {height} x {width}, not {size}",
                "export it again",
            )
        drawn.bitmap(name, decode_brush(value["rle"], height, width), 0, 0)
    elif kind in {"rectanglelabels", "rectangle"}:
        x, y, width_, height_ = need("x", "y", "width", "height")
        drawn.box(name, [x * across, y * down, width_ * across, height_ * down])
    elif kind in {"ellipselabels", "ellipse"}:
        x, y, radius_x, radius_y = need("x", "y", "radiusX", "radiusY")
        turn = number(value.get("rotation")) or 0.0
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
