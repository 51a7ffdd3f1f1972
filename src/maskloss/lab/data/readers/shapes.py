"""Instances as labeling tools draw them, turned into what the catalog holds; classes known by their names only."""

from __future__ import annotations

import base64
import binascii
import io
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause, MaskLossError, describe, require
from maskloss.lab.data import tiff
from maskloss.lab.data.catalog import BOX, CROWD, OBJECT, Entry, Instance, Part
from maskloss.lab.data.problems import DECIDED, LEFT_OUT, MENDED, Problems
from maskloss.lab.data.readers.segmentation import FARTHEST, Frame, box_of, encode, overlap, polygons, segmentation
from maskloss.lab.data.tree import Tree
from maskloss.lab.data.truth import decode

# Labels that tools keep for what is not to be looked at.
_IGNORED = frozenset({"__ignore__", "ignore", "_ignore_"})
_BACKGROUND = frozenset({"_background_", "__background__", "background"})
_CORNERS = 64
_NO_CLASS = -1
# A box with this IoU is that of the instance.
_SAME = 0.8


class Drawn:
    """The instances of one image, one after the other.

    Args:
        entry: filled in; labels are numbers of `names`.
        names: the classes of the whole data set, in the order in which they come up.
        what: what to call the annotations of the image in messages.
        problems: told of what was mended.
    """

    def __init__(self, entry: Entry, names: dict[str, int], what: str, problems: Problems) -> None:
        if not 0 < entry.height * entry.width <= FARTHEST**2:
            size = f"{entry.height} x {entry.width}"
            raise Cause("annotations must give the size of the image", f"{what} says {size}", "export it again")
        self.entry, self.names, self.what, self.problems = entry, names, what, problems
        # An unknown instance would be learned as background.
        self.usable = True
        self._boxes: list[list[float]] = []
        self._kinds: set[tuple[int, str]] = set()

    @property
    def frame(self) -> Frame:
        """What the instances belong to."""
        return Frame(self.entry.height, self.entry.width, self.what, self.problems)

    def _blank(self) -> NDArray[np.bool_]:
        """Return a mask of the whole image to draw in; what is not a polygon needs one."""
        height, width = self.entry.height, self.entry.width
        if height * width > tiff.MOST_PIXELS:
            rule = f"masks, and holes in polygons, need an image of at most {tiff.MOST_PIXELS:,} pixels"
            raise Cause(rule, f"{self.what} has {height} x {width}", "draw polygons without holes, or a label map")
        return np.zeros((height, width), dtype=bool)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Read one instance; what is broken in it stops the command, or costs the image with `--on-error skip`."""
        try:
            yield
        except MaskLossError as error:
            self.problems.tolerate(error)
            self.usable = False

    def polygons(self, name: str, value: list[Any], holes: Sequence[list[Any]] = ()) -> None:
        """Add an instance of several polygons."""
        source: Any = polygons(value, self.frame) if value else None
        if source is None:
            self.box(name, box_of(None, value))
        else:
            pierced = [hole for hole in (polygons([each], self.frame) for each in holes) if hole]
            if pierced:
                mask = self._blank()
                mask |= decode(source, *mask.shape).astype(bool)
                for hole in pierced:
                    mask &= ~decode(hole, *mask.shape).astype(bool)
                source = encode(mask)
            self._add(name, source, OBJECT)

    def even_odd(self, name: str, paths: list[list[Any]]) -> None:
        """Add an instance of polygons of which one inside of another is a hole."""
        if len(paths) == 1:
            return self.polygons(name, paths)
        mask = self._blank()
        for path in filter(None, (polygons([each], self.frame) for each in paths)):
            mask ^= decode(path, *mask.shape).astype(bool)
        return self._add(name, encode(mask), OBJECT)

    def segmentation(self, name: str, value: Any) -> None:
        """Add an instance as COCO writes it."""
        self._add(name, segmentation(value, self.frame), OBJECT)

    def ellipse(self, name: str, center: tuple[float, float], radii: tuple[float, float], turn: float = 0.0) -> None:
        """Add an ellipse, as a polygon of many corners; `turn` is in degrees."""
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        corners = []
        for step in range(_CORNERS):
            angle = 2 * math.pi * step / _CORNERS
            x, y = radii[0] * math.cos(angle), radii[1] * math.sin(angle)
            corners += [center[0] + cos * x - sin * y, center[1] + sin * x + cos * y]
        self.polygons(name, [corners])

    def bitmap(self, name: str, mask: NDArray[np.bool_], left: int, top: int) -> None:
        """Add an instance whose place a piece of the image shows."""
        whole = self._blank()
        if max(abs(left), abs(top)) > FARTHEST:
            raise Cause("a mask must lie in its image", f"{self.what} has one at {left}, {top}", "export it again")
        y, x = (np.arange(length) + start for start, length in zip((top, left), mask.shape, strict=True))
        rows, columns = (y >= 0) & (y < self.entry.height), (x >= 0) & (x < self.entry.width)
        whole[np.ix_(y[rows], x[columns])] = mask[np.ix_(rows, columns)]
        self._add(name, encode(whole), OBJECT)

    def box(self, name: str, box: Sequence[float] | None) -> None:
        """Add a box, in which nothing is asked for: x, y, width, height."""
        checked = box_of(None if box is None else list(box))
        if checked is None:
            self.problems.note(LEFT_OUT, "shapes without an area", self.what)
            return
        self.problems.note(DECIDED, "instances with a box only made ignore regions of that box", self.what)
        self._add(name, {"box": checked}, BOX)

    def _add(self, name: str, source: Any, kind: str) -> None:
        if name.lower() in _BACKGROUND:
            self.problems.note(LEFT_OUT, "shapes drawn around the background", self.what)
            return
        if name.lower() in _IGNORED:
            self.problems.note(DECIDED, "shapes labeled ignore made ignore regions", self.what)
            label, kind = _NO_CLASS, CROWD if kind == OBJECT else kind
        else:
            label = self.names.setdefault(name, len(self.names))
        instances, around = self.entry.instances, _box_around(source)
        # Most images have instances of one kind only, and some have very many.
        others = instances if (label, BOX if kind == OBJECT else OBJECT) in self._kinds else []
        for place, each in enumerate(others):
            # The rectangle that a mask was made from is no second object.
            if (
                each.label == label
                and {each.kind, kind} == {OBJECT, BOX}
                and overlap(self._boxes[place], around) > _SAME
            ):
                self.problems.note(MENDED, "boxes around an instance of their class left out", self.what)
                if kind == BOX:
                    return
                del instances[place], self._boxes[place]
                break
        self._kinds.add((label, kind))
        instances.append(Instance(source, label, kind))
        self._boxes.append(around)


def _box_around(source: Any) -> list[float]:
    """Return [x, y, width, height] of an instance that was checked or encoded here."""
    if isinstance(source, list) or "box" in source:
        return (box_of(None, source) if isinstance(source, list) else source["box"]) or [0.0] * 4
    counts = source["counts"]
    codec = require("pycocotools.mask", "train")
    packed = codec.frPyObjects(source, *source["size"]) if isinstance(counts, list) else source
    return [float(each) for each in codec.toBbox(packed)]


def listed(value: Any, what: str) -> list[Any]:
    """Return the members of a list, or the values of a dict, as some versions of a tool write; none for null."""
    if value is None or isinstance(value, list):
        return value or []
    if isinstance(value, Mapping):
        return list(value.values())
    raise Cause("annotations must be in a list", f"{what} has {describe(value)}", "export it again")


def note_others(tree: Tree, parts: Mapping[str, list[Entry]], what: str, problems: Problems) -> None:
    """Note the images of a folder that are in no part."""
    images = {entry.file for some in parts.values() for entry in some}
    others = [path for path in tree.images if str(tree.path(path)) not in images]
    if others:
        problems.note(LEFT_OUT, what, others[0], len(others))


def parts_of(entries: Mapping[str, list[Entry]], names: Mapping[str, int], how: str) -> list[Part]:
    """Return the parts, with classes numbered from 1 in the order of their names."""
    order = sorted(names)
    place = {names[name]: label for label, name in enumerate(order)}
    for each in (entry for some in entries.values() for entry in some):
        each.instances[:] = [one._replace(label=place.get(one.label, _NO_CLASS)) for one in each.instances]
    classes = list(enumerate(order, start=1))
    return [Part(part, classes, some, how) for part, some in entries.items()]


def unpack_png(text: Any, what: str, *, compressed: bool = False) -> NDArray[np.bool_]:
    """Decode a mask that is written into JSON: a PNG in base64."""
    pillow = require("PIL.Image", "train")
    rule = "a mask in JSON must be a PNG in base64"
    try:
        packed = base64.b64decode(text, validate=False)
        if compressed:
            packed = zlib.decompressobj().decompress(packed, tiff.MOST_PIXELS)
        with pillow.open(io.BytesIO(packed), formats=("PNG",)) as opened:
            if opened.size[0] * opened.size[1] > tiff.MOST_PIXELS:
                raise Cause(rule, f"{what} has {opened.size[1]} x {opened.size[0]} pixels", "is it damaged?")
            # Where there is an alpha channel, it is the mask.
            found = (
                np.array(opened.convert("RGBA"))[..., 3]
                if opened.mode in {"RGBA", "LA"}
                else np.array(opened.convert("L"))
            )
    except (binascii.Error, TypeError, ValueError, OSError, SyntaxError, zlib.error) as error:
        if isinstance(error, MaskLossError):
            raise
        raise Cause(rule, f"{what}: {error}", "export it again") from None
    return np.asarray(found > 0)
