"""ImageJ and Fiji: an archive of regions for each image, as the ROI Manager, StarDist and Cellpose save them."""

from __future__ import annotations

import lzma
import re
import struct
import zipfile
import zlib
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
# The most that the regions of an image may unpack to.
_MOST_BYTES = 1 << 28
# Types of regions; those of corners are drawn by polygons, by hand, and by the wand.
_CORNERS, _BOX, _OVAL = (0, 7, 8), 1, 2
_SUBPIXELS = 128


def _content(tree: Tree, path: str) -> Any:
    """Return the name of the image, after which the archive is named or beside which it lies, and all regions."""
    check_file(tree.path(path), _RULE)
    try:
        with zipfile.ZipFile(tree.path(path)) as archive:
            inner = [each for each in archive.infolist() if each.filename.lower().endswith(".roi")]
            if sum(each.file_size for each in inner) > _MOST_BYTES:
                raise Cause(_RULE, f"{tree.path(path)} unpacks to more than {_MOST_BYTES:,} bytes", "is it damaged?")
            regions = [_unpacked(archive, each) for each in inner]
    except Cause:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise Cause(_RULE, f"{tree.path(path)}: {explain(error)}", "save it again") from None
    pure = PurePosixPath(path)
    name = re.sub(r"(?i)(^|[\s_.-]+)roi[\s_-]*(set|s)?$|^roi[\s_-]*(set|s)?[\s_.-]+", "", pure.stem)
    beside = [] if name else tree.by_folder.get(pure.parent.as_posix(), [])
    return (name or (beside[0] if len(beside) == 1 else pure.stem)), regions


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Unpack no more than the archive says that there is."""
    with archive.open(member) as opened:
        return opened.read(member.file_size)


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
