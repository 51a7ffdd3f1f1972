"""The instances of an image as they are annotated, seen through a view (a crop, flips), packed without being dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss.errors import Cause, MaskLossError, require
from maskloss.lab.data.catalog import Entry
from maskloss.lab.data.images import Array, read_image, read_label_map, read_size
from maskloss.targets import MaskTargets

# An instance of which a crop shows less than this many pixels is not asked for; its pixels weigh nothing.
LEAST_PIXELS = 4


class View(NamedTuple):
    """What is shown of an image: a crop, turned and flipped. Only pixels are picked, none is computed.

    Attributes:
        top: of the crop, in pixels of the image.
        left: of the crop.
        height: of the crop, before it is turned.
        width: of the crop, before it is turned.
        turn: whether rows and columns change places, after cropping and before flipping.
        flip_y: whether rows run backward.
        flip_x: whether columns run backward.
    """

    top: int
    left: int
    height: int
    width: int
    turn: bool = False
    flip_y: bool = False
    flip_x: bool = False

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
    """The instances of a view.

    Attributes:
        masks: of one image, with its ignore region and its window.
        labels: int64 `[T]`.
    """

    masks: MaskTargets
    labels: Tensor


class Loaded(NamedTuple):
    """An image with its annotations.

    Attributes:
        image: `[H, W, C]`, as `read_image` gives it.
        entry: the annotations.
        map: int32 `[H, W]`, the label map; None: the annotations are COCO's.
    """

    image: Array
    entry: Entry
    map: NDArray[np.int32] | None

    def pack(self, view: View, frame: tuple[int, int]) -> Packed:
        """Pack the instances that a view shows.

        Args:
            view: what is shown.
            frame: height and width of what the model sees, in pixels of the view, which lies in its top left corner.
        """
        ids, labels = self.entry.segments, self.entry.labels
        pack = _pack_masks if self.map is None else _pack_map
        return pack(self, view, frame, ids, labels)

    def crowds(self) -> Packed:
        """Pack the crowds of the whole image, each as a mask of its own."""
        view = View.whole(self.entry.height, self.entry.width)
        masks = [self._mask(each) for each in self.entry.crowds]
        stacked = np.stack(masks) if masks else np.zeros((0, *view.size), dtype=bool)
        labels = torch.tensor(self.entry.crowd_labels, dtype=torch.int64)
        return Packed(MaskTargets.from_masks(torch.from_numpy(stacked)), labels)

    def ignored(self) -> NDArray[np.bool_] | None:
        """Return the pixels that weigh nothing, `[H, W]`: crowds, and what a panoptic map leaves void."""
        regions = [self._mask(each) for each in self.entry.crowds]
        if self.map is not None and self.entry.colored:
            regions.append(self.map == 0)
        return np.logical_or.reduce(regions) if regions else None

    def _mask(self, segment: Any) -> NDArray[np.bool_]:
        if self.map is not None:
            return np.asarray(self.map == segment)
        return decode(segment, self.entry.height, self.entry.width).astype(bool)


def load(entry: Entry) -> Loaded:
    """Read an image, and its label map if it has one.

    Raises:
        Cause: a file that cannot be read, or sizes that differ.
    """
    # Before any pixel is read: a small file may hold a large map.
    for file in (entry.file, entry.map):
        if file is not None and (found := read_size(Path(file))) != (entry.height, entry.width):
            raise Cause(
                "annotations must have the size of the image",
                f"{file} is {found[0]} x {found[1]}, expected are {entry.height} x {entry.width}",
                "store images and annotations at the same resolution",
            )
    image = read_image(Path(entry.file))
    labels = None
    if entry.map is not None:
        labels = _read_colored(Path(entry.map)) if entry.colored else read_label_map(Path(entry.map))
    return Loaded(image, entry, labels)


def decode(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Decode a checked COCO segmentation: uint8 `[H, W]`.

    Raises:
        Cause: compressed counts that do not fill the image.
    """
    codec = require("pycocotools.mask", "train")
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        # Checked by the library's own reader: pycocotools would write past the end of the image.
        [mask] = MaskTargets.from_coco([segmentation], height, width).dense()
        decoded: NDArray[np.uint8] = mask.numpy().view(np.uint8)
        return decoded
    run = codec.frPyObjects(segmentation, height, width)
    return np.asarray(codec.decode(codec.merge(run) if isinstance(run, list) else run))


def _pack_masks(loaded: Loaded, view: View, frame: tuple[int, int], segments: list[Any], labels: list[int]) -> Packed:
    height, width = view.size
    entry = loaded.entry
    rows, kept = [], []
    ignored = _seen(loaded, view)
    for number, (segment, label) in enumerate(zip(segments, labels, strict=True)):
        try:
            mask = view.apply(decode(segment, entry.height, entry.width))
        except MaskLossError as error:
            rule, cause, hint = error.parts or (str(error), "", "")
            raise Cause(rule, f"{entry.name}, annotation {number}: {cause}", hint) from None
        seen = int(np.count_nonzero(mask))
        if seen >= LEAST_PIXELS or _is_whole(view, entry):
            rows.append(np.packbits(mask, axis=-1, bitorder="little"))
            kept.append(label)
        elif seen:
            ignored = mask.astype(bool) if ignored is None else ignored | mask.astype(bool)
    packed = np.stack(rows) if rows else np.zeros((0, height, (width + 7) // 8), dtype=np.uint8)
    masks = MaskTargets.from_packed(
        torch.from_numpy(packed),
        width,
        canvas=frame,
        ignore=None if ignored is None else torch.from_numpy(np.ascontiguousarray(ignored)),
        valid=(0, 0, height, width),
    )
    return Packed(masks, torch.tensor(kept, dtype=torch.int64))


def _pack_map(loaded: Loaded, view: View, frame: tuple[int, int], ids: list[Any], labels: list[int]) -> Packed:
    assert loaded.map is not None
    height, width = view.size
    label_of = dict(zip(ids, labels, strict=True))
    # Numbered anew, 0 for what is no instance: a crop with few of them then fits into bytes.
    numbers, inverse, counts = np.unique(view.apply(loaded.map), return_inverse=True, return_counts=True)
    least = 1 if _is_whole(view, loaded.entry) else LEAST_PIXELS
    new = np.zeros(len(numbers), dtype=np.int32)
    small = np.zeros(len(numbers), dtype=bool)
    kept: list[int] = []
    for place, (number, count) in enumerate(zip(numbers.tolist(), counts.tolist(), strict=True)):
        if number in label_of and count >= least:
            kept.append(label_of[number])
            new[place] = len(kept)
        small[place] = number in label_of and count < least
    fitting = np.uint8 if len(kept) < 256 else np.int16 if len(kept) < 2**15 else np.int32
    relabeled = new.astype(fitting)[inverse].reshape(height, width)
    ignored = _seen(loaded, view)
    if small.any():
        slivers = small[inverse].reshape(height, width)
        ignored = slivers if ignored is None else ignored | slivers
    masks = MaskTargets.from_label_map(
        torch.from_numpy(relabeled),
        list(range(1, len(kept) + 1)),
        canvas=frame,
        ignore=None if ignored is None else torch.from_numpy(np.ascontiguousarray(ignored)),
        valid=(0, 0, height, width),
    )
    return Packed(masks, torch.tensor(kept, dtype=torch.int64))


def _is_whole(view: View, entry: Entry) -> bool:
    return (view.height, view.width) == (entry.height, entry.width)


def _seen(loaded: Loaded, view: View) -> NDArray[np.bool_] | None:
    ignored = loaded.ignored()
    return None if ignored is None else view.apply(ignored)


def _read_colored(path: Path) -> NDArray[np.int32]:
    """Read the map of a panoptic annotation: red + 256 green + 65536 blue."""
    color = read_image(path)
    if color.dtype != np.uint8 or color.shape[-1] not in {3, 4}:
        raise Cause(
            "a panoptic map must be a color PNG", f"{path} has {color.shape[-1]} channel(s)", "see COCO's format"
        )
    red, green, blue = (color[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 65536 * blue
