"""The instances of an image as they are annotated, seen through a view (a crop, flips), packed without being dense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss.errors import Cause, MaskLossError, require
from maskloss.lab.data.catalog import Entry
from maskloss.lab.data.images import read_head, read_image
from maskloss.lab.data.maps import REGIONAL, map_size, read_map
from maskloss.lab.data.tiff import Array
from maskloss.targets import MaskTargets

# An instance with fewer pixels than this in a crop is not asked for; its pixels weigh nothing.
LEAST_PIXELS = 4
_CORNERS = ([0, 0, -1, -1], [0, -1, 0, -1])
# Top, left, bottom and right, in pixels of an image.
Box = tuple[int, int, int, int]


class View(NamedTuple):
    """What is shown of an image: a crop, turned and flipped. Only pixels are picked, none is computed."""

    top: int  # of the crop, in pixels of the image
    left: int  # of the crop
    height: int  # of the crop, before it is turned
    width: int  # of the crop, before it is turned
    turn: bool = False  # whether rows and columns change places, after cropping and before flipping
    flip_y: bool = False  # whether rows run backward
    flip_x: bool = False  # whether columns run backward

    @staticmethod
    def whole(height: int, width: int) -> View:
        """Show all of an image, as it is."""
        return View(0, 0, height, width)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what is shown."""
        return (self.width, self.height) if self.turn else (self.height, self.width)

    def apply(self, array: Array) -> Array:
        """Show `[H, W, ...]`."""
        shown = array[self.top : self.top + self.height, self.left : self.left + self.width]
        if self.turn:
            shown = shown.swapaxes(0, 1)
        return shown[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


class Packed(NamedTuple):
    """The instances of a view."""

    masks: MaskTargets  # of one image, with its ignore region and its window
    labels: Tensor  # int64 `[T]`


class Measured(NamedTuple):
    """An instance of a whole image."""

    source: Any  # as in the catalog
    label: int  # its class
    area: int  # pixels
    box: Box  # zeros without a pixel
    corners: bool  # whether it has all four corners of the image


class Loaded(NamedTuple):
    """An image with its annotations."""

    image: Array  # `[H, W, C]`, as `read_image` gives it
    entry: Entry  # the annotations
    # int32 `[H, W]`, the map in which instances are numbers; None: they have sources of their own
    map: NDArray[np.int32] | None

    def pack(self, view: View, frame: tuple[int, int], most: int | None = None) -> Packed:
        """Pack the instances that a view shows.

        Args:
            view: what is shown.
            frame: height and width of what the model sees, in pixels of the view, which lies in its top left corner.
            most: the most instances that the model can find; of more, the smallest become an ignore region.
        """
        pack = _pack_masks if self.map is None else _pack_map
        return pack(self, view, frame, most)

    def regions(self) -> Packed:
        """Pack the regions of the whole image in which nothing is asked for, each as a mask of its own."""
        view = View.whole(self.entry.height, self.entry.width)
        masks = [self.mask(each.source) for each in self.entry.regions]
        stacked = np.stack(masks) if masks else np.zeros((0, *view.size), dtype=bool)
        labels = torch.tensor([each.label for each in self.entry.regions], dtype=torch.int64)
        return Packed(MaskTargets.from_masks(torch.from_numpy(stacked)), labels)

    def ignored(self) -> NDArray[np.bool_] | None:
        """Return the pixels that weigh nothing, `[H, W]`: crowds, boxes without masks, and what is void in a map."""
        regions = [self.mask(each.source) for each in self.entry.regions]
        described = self.entry.map
        if self.map is not None and described is not None and described.void:
            void = [-1] if described.reading in REGIONAL else described.void
            regions.append(np.isin(self.map, void))
        return np.logical_or.reduce(regions) if regions else None

    def measured(self) -> Iterator[Measured]:
        """Measure the instances to find, one after the other."""
        if self.map is None:
            for number, (source, label, _) in enumerate(self.entry.objects):
                with _naming(self.entry, number):
                    mask = self.mask(source)
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                box = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1) if len(rows) else (0, 0, 0, 0)
                area, corners = int(np.count_nonzero(mask)), bool(mask[_CORNERS].all())
                yield Measured(source, label, area, (int(box[0]), int(box[1]), int(box[2]), int(box[3])), corners)
            return
        from scipy.ndimage import find_objects

        numbers, ranks = np.unique(self.map, return_inverse=True)
        ranks = ranks.reshape(self.map.shape)
        areas, boxes = np.bincount(ranks.ravel()), find_objects(ranks + 1)
        place = {int(number): rank for rank, number in enumerate(numbers)}
        for source, label, _ in self.entry.objects:
            rank = place.get(source)
            if rank is None:
                yield Measured(source, label, 0, (0, 0, 0, 0), corners=False)
                continue
            rows, columns = boxes[rank]
            box = (rows.start, columns.start, rows.stop, columns.stop)
            yield Measured(source, label, int(areas[rank]), box, corners=bool((ranks[_CORNERS] == rank).all()))

    def mask(self, source: Any) -> NDArray[np.bool_]:
        """Return the pixels of an instance, bool `[H, W]`."""
        if self.map is not None and isinstance(source, int):
            return np.asarray(self.map == source)
        return decode(source, self.entry.height, self.entry.width).astype(bool)


def load(entry: Entry) -> Loaded:
    """Read an image, and its map if it has one."""
    head, wanted = read_head(Path(entry.file)), (entry.height, entry.width)
    # Before any pixel is read: a small file may hold a large map.
    sizes = [(entry.file, head.stored if wanted == head.stored else head.displayed)]
    if entry.map is not None:
        sizes.append((entry.map.file, map_size(Path(entry.map.file))))
    for file, found in sizes:
        if found != wanted:
            raise Cause(
                "annotations must have the size of the image",
                f"{file} is {found[0]} x {found[1]}, expected are {entry.height} x {entry.width}",
                "store images and annotations at the same resolution",
            )
    image = read_image(Path(entry.file), upright=wanted == head.displayed)
    labels = None
    if entry.map is not None:
        labels = read_map(Path(entry.map.file), entry.map.reading, tuple(entry.map.void))
    return Loaded(image, entry, labels)


def decode(source: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Decode the source of an instance: uint8 `[H, W]`."""
    codec = require("pycocotools.mask", "train")
    if isinstance(source, dict) and "box" in source:
        x, y, across, down = source["box"]
        region = np.zeros((height, width), dtype=np.uint8)
        region[
            max(0, math.floor(y)) : max(0, math.ceil(y + down)), max(0, math.floor(x)) : max(0, math.ceil(x + across))
        ] = 1
        return region
    if isinstance(source, dict) and "file" in source:
        found = read_map(Path(source["file"]))
        if found.shape != (height, width):
            shape = " x ".join(map(str, found.shape))
            raise Cause("a mask must have the size of its image", f"{source['file']} is {shape}", "store both alike")
        return (found > 0).astype(np.uint8)
    if isinstance(source, dict) and isinstance(source["counts"], str):
        # Checked by the library's own reader: pycocotools would write past the end of the image.
        [mask] = MaskTargets.from_coco([source], height, width).dense()
        decoded: NDArray[np.uint8] = mask.numpy().view(np.uint8)
        return decoded
    run = codec.frPyObjects(source, height, width)
    return np.asarray(codec.decode(codec.merge(run) if isinstance(run, list) else run))


def _pack_masks(loaded: Loaded, view: View, frame: tuple[int, int], most: int | None) -> Packed:
    height, width = view.size
    entry = loaded.entry
    rows, kept, areas = [], [], []
    least = 1 if _is_whole(view, entry) else LEAST_PIXELS
    ignored = _seen(loaded, view)
    for number, (source, label, _) in enumerate(entry.objects):
        with _naming(entry, number):
            mask = view.apply(decode(source, entry.height, entry.width))
        seen = int(np.count_nonzero(mask))
        if seen >= least:
            rows.append(np.packbits(mask, axis=-1, bitorder="little"))
            kept.append(label)
            areas.append(seen)
        elif seen:
            ignored = mask.astype(bool) if ignored is None else ignored | mask.astype(bool)
    chosen = _largest(areas, most)
    for place in sorted(set(range(len(rows))) - set(chosen)):
        left_out = np.unpackbits(rows[place], axis=-1, count=width, bitorder="little").astype(bool)
        ignored = left_out if ignored is None else ignored | left_out
    packed = [rows[place] for place in chosen]
    masks = MaskTargets.from_packed(
        torch.from_numpy(np.stack(packed) if packed else np.zeros((0, height, (width + 7) // 8), dtype=np.uint8)),
        width,
        canvas=frame,
        ignore=None if ignored is None else torch.from_numpy(np.ascontiguousarray(ignored)),
        valid=(0, 0, height, width),
    )
    return Packed(masks, torch.tensor([kept[place] for place in chosen], dtype=torch.int64))


@contextmanager
def _naming(entry: Entry, number: int) -> Iterator[None]:
    """Name the annotation in errors."""
    try:
        yield
    except MaskLossError as error:
        rule, cause, hint = error.parts or (str(error), "", "")
        raise Cause(rule, f"{entry.name}, annotation {number}: {cause}", hint) from None


def _largest(areas: list[int], most: int | None) -> list[int]:
    """Return which instances to ask for, in their order: the largest, if there are more than the model can find."""
    if most is None or len(areas) <= most:
        return list(range(len(areas)))
    return sorted(np.argsort(-np.array(areas), kind="stable")[:most].tolist())


def _pack_map(loaded: Loaded, view: View, frame: tuple[int, int], most: int | None) -> Packed:
    assert loaded.map is not None
    height, width = view.size
    label_of = {each.source: each.label for each in loaded.entry.objects}
    # Numbered anew, 0 for what is no instance: a crop with few of them then fits into bytes.
    numbers, inverse, counts = np.unique(view.apply(loaded.map), return_inverse=True, return_counts=True)
    least = 1 if _is_whole(view, loaded.entry) else LEAST_PIXELS
    known = [place for place, number in enumerate(numbers.tolist()) if number in label_of]
    seen = [place for place in known if counts[place] >= least]
    chosen = [seen[place] for place in _largest([int(counts[place]) for place in seen], most)]
    new = np.zeros(len(numbers), dtype=np.int32)
    new[chosen] = np.arange(1, len(chosen) + 1)
    left_out = np.zeros(len(numbers), dtype=bool)
    left_out[sorted(set(known) - set(chosen))] = True
    fitting = np.uint8 if len(chosen) < 256 else np.int16 if len(chosen) < 2**15 else np.int32
    relabeled = new.astype(fitting)[inverse].reshape(height, width)
    ignored = _seen(loaded, view)
    if left_out.any():
        slivers = left_out[inverse].reshape(height, width)
        ignored = slivers if ignored is None else ignored | slivers
    masks = MaskTargets.from_label_map(
        torch.from_numpy(relabeled),
        list(range(1, len(chosen) + 1)),
        canvas=frame,
        ignore=None if ignored is None else torch.from_numpy(np.ascontiguousarray(ignored)),
        valid=(0, 0, height, width),
    )
    labels = [label_of[int(numbers[place])] for place in chosen]
    return Packed(masks, torch.tensor(labels, dtype=torch.int64))


def _is_whole(view: View, entry: Entry) -> bool:
    return (view.height, view.width) == (entry.height, entry.width)


def _seen(loaded: Loaded, view: View) -> NDArray[np.bool_] | None:
    ignored = loaded.ignored()
    return None if ignored is None else view.apply(ignored)
