"""ImageJ and Fiji: an archive of regions for each image, as the ROI Manager, StarDist and Cellpose save them."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import PurePosixPath
from typing import Any

from maskloss.errors import Cause
from maskloss.lab.data.problems import LEFT_OUT
from maskloss.lab.data.readers.objects import Picture, Tool, flat, unread
from maskloss.lab.data.readers.shapes import Drawn
from maskloss.lab.data.tree import Tree
from maskloss.lab.files import check_file, explain

CLASS = "object"
_RULE = "an archive of regions must be one of ImageJ"
_MOST_BYTES = 1 << 24
# Types of regions; those of corners are drawn by polygons, by hand, and by the wand.
_CORNERS, _BOX, _OVAL = (0, 7, 8), 1, 2
_SUBPIXELS = 128


def _content(tree: Tree, path: str) -> Any:
    """Return the name of the image, after which the archive is named or beside which it lies, and all regions."""
    check_file(tree.path(path), _RULE)
    try:
        with zipfile.ZipFile(tree.path(path)) as archive:
            inner = [each for each in archive.infolist() if each.filename.lower().endswith(".roi")]
            regions = [archive.read(each) for each in inner if each.file_size <= _MOST_BYTES]
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise Cause(_RULE, f"{tree.path(path)}: {explain(error)}", "save it again") from None
    pure = PurePosixPath(path)
    beside = [each for each in tree.images if PurePosixPath(each).parent == pure.parent]
    name = re.sub(r"(?i)[\s_.-]*roi[\s_-]*(set|s)?[\s_-]*", "", pure.stem)
    return (name or (beside[0] if len(beside) == 1 else pure.stem)), regions


def _pictures(content: Any) -> list[Picture]:
    name, regions = content
    return [Picture(name, 0, 0, regions)] if regions else []


def _draw(drawn: Drawn, data: Any) -> None:
    magic, kind, top, left, bottom, right, count = struct.unpack(">4s2xBx4hH", data[:18])
    composite, options = struct.unpack(">36xi10xH", data[:52])
    if magic != b"Iout" or composite:
        raise unread(drawn, "region of several outlines" if composite else "file that is no region")
    if kind in _CORNERS:
        if options & _SUBPIXELS:
            numbers = struct.unpack(f">{2 * count}f", data[64 + 4 * count : 64 + 12 * count])
        else:
            whole = struct.unpack(f">{2 * count}h", data[64 : 64 + 4 * count])
            numbers = tuple(side + (left, top)[place >= count] for place, side in enumerate(whole))
        drawn.polygons(CLASS, [flat(zip(numbers[:count], numbers[count:], strict=True))])
    elif kind == _OVAL:
        drawn.ellipse(CLASS, ((left + right) / 2, (top + bottom) / 2), ((right - left) / 2, (bottom - top) / 2))
    elif kind == _BOX:
        drawn.box(CLASS, [left, top, right - left, bottom - top])
    else:
        drawn.problems.note(LEFT_OUT, f"regions that enclose nothing (type {kind})", drawn.what)


IMAGEJ = Tool("ImageJ", _pictures, _draw, (".zip",), _content)
