"""What the predictions are compared with: masks as packed bits, label maps or soft values, never made dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from maskloss._abi import LABEL
from maskloss._numbers import check_flags, check_integer
from maskloss._tracing import on_host, outside, plain
from maskloss.errors import Cause, describe, reported
from maskloss.targets import bits, clips, coco, dense, joining, label_maps
from maskloss.targets.frames import Box, Frame, Size, Stored, describe_images
from maskloss.targets.storage import Packed


@dataclass(frozen=True, eq=False, repr=False)
class MaskTargets(Packed):
    """The target masks of one image or of a batch, in the form in which kernels read them.

    Make one with `from_masks`, `from_packed`, `from_label_map` or `from_coco`, and join images with `cat`.
    `len(targets)` is the number of images, `targets[i]` is image i, and `targets.select(...)` keeps some of the masks.
    Instances are immutable and own their pixels: what they were made from can be edited afterwards. They can be pickled
    and offer `to` and `pin_memory` as tensors do, so that a data-loading worker can pack masks, and a `DataLoader` can
    join and pin them.

    Three encodings: "bits" (1 bit a pixel; on a CPU each mask is cut down to its bounding box), "labels" (one integer
    map per image and the id of each target in it) and "values" (soft targets in [0, 1], as dense as they came).

    Attributes:
        encoding: "bits", "labels" or "values".
        data: 1-D, the pixels of all images: uint8, an integer type, or a float type.
        table: int64 `[T_all, 10]`, one row per target: offset into the data of its image, elements from one row of
            pixels to the next; top, left, height, width of the stored crop; height and width of the frame; id in the
            label map; 0, or for the frames of clips where their ignore region begins in that of the clip.
        images: int64 `[B, 11]`, one row per image: number of targets, elements in `data`, bytes in `ignore`; where
            these three begin: row in `table`, offsets into `data` and `ignore`; bytes per row, height, width of the
            ignore region; height and width of the frame.
        windows: float32 `[B, 4]`: left, top, width, height of the valid window, as fractions of the frame.
        ignore: uint8 1-D, the packed ignore regions; empty if no image has one.
        num_targets: the number of targets of each image.
        frames: T of clips, whose frames are stored one below the other; 1 for images.
        present: bool `[T_all, frames]`, in which frames a target of a clip has pixels; None for images.

    The frame is what predictions cover: the mask itself, or the canvas in whose top left corner the mask lies. Outside
    the stored crop every pixel is 0.

    Example:
        >>> masks = torch.zeros(2, 30, 40, dtype=torch.bool)
        >>> masks[0, 5:20, 8:24] = True
        >>> MaskTargets.from_masks(masks)
        MaskTargets(2 masks in 1 image, bits, 30 x 40, 30 bytes, cpu)
    """

    @staticmethod
    @reported("MaskTargets.from_masks")
    @outside
    def from_masks(
        masks: Any,
        *,
        ignore_value: int | None = None,
        soft: bool | None = None,
        canvas: Size | None = None,
        ignore: Tensor | None = None,
        valid: Box | None = None,
    ) -> MaskTargets:
        """Pack dense masks.

        Args:
            masks: `[T, H, W]` of one image, bool, integers that are 0 or 1, or float, a tensor or an array; or a list
                with one per image, of any sizes. `[0]` and None are an image without targets. Or those of clips:
                `[N, T, H, W]`, N targets in T frames, 0 where one is absent.
            ignore_value: the value of void pixels, 255 for instance: their points weigh nothing. A pixel that is void
                in one mask of an image, or of a frame, is void for all of them. Default None: there is no such value.
            soft: whether float masks in [0, 1] are soft targets, which are kept as they are, or binary ones, which are
                packed (non-zero is inside). Default None: on a CPU the values decide; elsewhere, and inside
                `torch.compile`, float masks count as soft, because looking at their values would stall the device.
            canvas: (height, width) of the padded canvas in whose top left corner the masks lie and which the
                predictions cover. Default: the masks fill the frame.
            ignore: bool `[H, W]`, of clips `[T, H, W]`, tensor or array: pixels whose points weigh nothing (void,
                crowd).
            valid: (top, left, height, width) in pixels of the frame, the part inside which points are drawn.
                Default: all of it. `canvas`, `ignore` and `valid` hold for every image of a list.

        Returns:
            The targets, on the device of the masks.

        Raises:
            MaskLossError: wrong rank or dtype, integers other than 0 and 1 or floats outside [0, 1], a canvas smaller
                than the masks, an ignore region of another size, or a window that is empty or leaves the frame. Where
                looking at values would stall a device, and inside `torch.compile`, what is packed has an assertion of
                the device instead, and what is kept as floats becomes NaN, and so does the loss.
        """
        given = [plain(each) for each in masks] if isinstance(masks, (list, tuple)) else [plain(masks)]
        if clips.are_clips(given, 3):
            tall, frames, region = clips.stacked(given, "[N, T, H, W]", canvas, ignore)
            packed = MaskTargets.from_masks(tall, ignore_value=ignore_value, soft=soft, ignore=region)
            return clips.described(packed, tall, frames, valid)
        if not given:
            raise Cause("masks must hold one tensor per image", "the list is empty", "an empty image is [0, H, W]")
        value = dense.check_void(ignore_value, dense=True)
        devices = [each.device for each in given if isinstance(each, Tensor)] or [torch.device("cpu")]
        images, void = [dense.check_masks(each, devices[0]) for each in given], []
        dense.check_devices(images)
        if value is not None:
            images, void = map(list, zip(*(dense.without_void(each, value) for each in images), strict=True))
        kept = dense.are_soft(images, soft)
        for each in filter(on_host, images):
            dense.check_values(each)
        return (_from_values if kept else _from_binary)(images, Frame(canvas, ignore, valid, void))

    @staticmethod
    @reported("MaskTargets.from_packed")
    @outside
    def from_packed(
        packed: Any,
        width: int,
        *,
        canvas: Size | None = None,
        ignore: Tensor | None = None,
        valid: Box | None = None,
    ) -> MaskTargets:
        """Take masks that are bit-packed already, by `numpy.packbits(masks, axis=-1, bitorder="little")`.

        Args:
            packed: uint8 `[T, H, ceil(width / 8)]`, a tensor or an array; the lowest bit is the leftmost pixel.
            width: pixels in a row.
            canvas: see `from_masks`.
            ignore: see `from_masks`.
            valid: see `from_masks`.

        Returns:
            The targets of one image, on the device of `packed`.

        Raises:
            MaskLossError: not uint8 `[T, H, ceil(width / 8)]`, or as in `from_masks`.
        """
        width, packed = check_integer("width", width, 0, hint="the number of pixels in a row"), plain(packed)
        fits = isinstance(packed, Tensor) and packed.dtype == torch.uint8 and packed.ndim == 3
        if not fits or packed.shape[2] != (width + 7) // 8:
            raise Cause(
                "packed masks must be uint8 [T, H, ceil(width / 8)]",
                f"got {describe(packed)} for width {width}",
                'numpy.packbits(masks, axis=-1, bitorder="little") makes them',
            )
        packed = packed.clone()
        if width % 8:
            packed[..., -1] &= (1 << width % 8) - 1
        data, place = bits.crop(packed, width)
        stored = Stored(place, len(data), (packed.shape[1], width))
        return _build("bits", data, [stored], Frame(canvas, ignore, valid))

    @staticmethod
    @reported("MaskTargets.from_label_map")
    @outside
    def from_label_map(
        labels: Any,
        ids: Any = None,
        *,
        ignore_value: int | None = None,
        allow_missing: bool = False,
        canvas: Size | None = None,
        ignore: Tensor | None = None,
        valid: Box | None = None,
    ) -> MaskTargets:
        """Take a label map: one integer map for all masks of an image.

        Args:
            labels: `[H, W]`, integers, a tensor or an array; target i is where the map equals `ids[i]`. Or a list with
                one map per image, of any sizes. Or those of clips: `[T, H, W]`, in which a target has one id in all T
                frames.
            ids: the ids to use, in the order of the targets, `[T]`. For a list of maps, a list with those of each.
                Default None: all that occur in the map but 0, the background, in ascending order; on a device this
                waits for it.
            ignore_value: the value of void pixels, 255 for instance: their points weigh nothing, and it is no target.
            allow_missing: accept ids that do not occur in the map, as empty masks (after a crop, say).
            canvas: see `from_masks`.
            ignore: see `from_masks`.
            valid: see `from_masks`.

        Returns:
            The targets, on the device of the map, with a copy of it. A map on a CPU is searched for the box of each id.

        Raises:
            MaskLossError: a map that is not `[H, W]` of integers, ids that do not occur in the map (looked for on a CPU
                only) or that are void, maps and ids that do not pair up, or as in `from_masks`.
        """
        check_flags(allow_missing=allow_missing)
        several = isinstance(labels, (list, tuple))
        maps, numbers = (list(labels), [None] * len(labels) if ids is None else ids) if several else ([labels], [ids])
        if not maps or not isinstance(numbers, (list, tuple)) or len(numbers) != len(maps):
            raise Cause(
                "a list of label maps needs a list of their ids",
                f"got {describe(labels)} and {describe(ids)}",
                "give the ids of each map, in the order of its targets",
            )
        maps, value = [plain(each) for each in maps], dense.check_void(ignore_value, dense=False)
        tall, frames = maps, 0
        if clips.are_clips(maps, 2):
            tall, frames, ignore = clips.stacked(maps, "label maps [T, H, W] of integers", canvas, ignore)
        tall = [label_maps.check_label_map(each) for each in tall]
        # Not from the canvas around the frames of a clip, where there is a number that is nobody's id.
        shown = [
            each.unflatten(0, (frames, -1))[:, : given.shape[-2], : given.shape[-1]] if frames else each
            for each, given in zip(tall, maps, strict=True)
        ]
        numbers = [
            label_maps.present_ids(each, value) if listed is None else listed
            for each, listed in zip(shown, numbers, strict=True)
        ]
        void = [] if value is None else [dense.where_void(each, value) for each in shown]
        if not frames:
            return _from_labels(tall, numbers, allow_missing, Frame(canvas, ignore, valid, void), value)
        frame = Frame(None, ignore, None, [clips.tall(each, canvas) for each in void])
        return clips.described(_from_labels(tall, numbers, allow_missing, frame, value), tall, frames, valid)

    @staticmethod
    @reported("MaskTargets.from_coco")
    def from_coco(
        segmentations: Sequence[Any],
        height: int,
        width: int,
        *,
        canvas: Size | None = None,
        ignore: Tensor | None = None,
        valid: Box | None = None,
    ) -> MaskTargets:
        """Pack COCO segmentations, one mask at a time.

        Args:
            segmentations: one per target: an RLE dict ("size", "counts" compressed or as a list), or a list of
                polygons `[[x0, y0, x1, y1, ...], ...]` in pixels, or an annotation with one of these as
                "segmentation". Arrays count as lists.
            height: of the image, pixels.
            width: of the image, pixels.
            canvas: see `from_masks`.
            ignore: see `from_masks`.
            valid: see `from_masks`.

        Returns:
            The targets of one image, on the CPU.

        Raises:
            MaskLossError: an RLE of another size or whose counts do not fill it, a polygon with an odd number of
                coordinates or fewer than 6, anything else that is no segmentation, or as in `from_masks`.
            MissingExtraError: pycocotools is not installed (extra `coco`).
        """
        data, place = coco.pack_coco(segmentations, height, width)
        return _build("bits", data, [Stored(place, len(data), (height, width))], Frame(canvas, ignore, valid))

    @reported("MaskTargets.with_presence")
    def with_presence(self, present: Tensor) -> MaskTargets:
        """Say in which frames the targets of clips are present, where that differs from where they have pixels.

        Args:
            present: bool `[T_all, frames]`.

        Returns:
            The same targets.

        Raises:
            MaskLossError: targets of images, or something else than bool `[T_all, frames]` on their device.
        """
        shape = (self.num_masks, self.frames)
        fits = isinstance(present, Tensor) and present.dtype == torch.bool and tuple(present.shape) == shape
        if self.present is None or not fits or present.device != self.device:
            raise Cause(
                f"presence must be bool {list(shape)} on {self.device}, for the targets of clips",
                f"got {describe(present)} for {self!r}",
                "one row for each target, one column for each frame",
            )
        return replace(self, present=present)

    @staticmethod
    @reported("MaskTargets.cat")
    def cat(parts: Sequence[MaskTargets]) -> MaskTargets:
        """Join images, or batches, into one batch.

        A batch has one encoding, so parts of others are converted, which on a device waits for it: label maps beside
        bits become bits, and both beside soft values become values. Types of one encoding become the widest of them.

        Args:
            parts: targets on one device, in the order of the images. An image without targets fits any encoding.

        Returns:
            The targets of all images.

        Raises:
            MaskLossError: nothing to join, or devices that differ.
        """
        fits = isinstance(parts, Sequence) and len(parts) > 0
        if not fits or not all(isinstance(part, MaskTargets) for part in parts):
            raise Cause("parts must be the MaskTargets to join", f"got {describe(parts)}", "give one per image")
        if len(parts) == 1:
            return parts[0]
        devices = sorted({str(part.device) for part in parts})
        if len(devices) > 1:
            raise Cause("the targets of a batch must be on one device", f"got {', '.join(devices)}", "move them first")
        return joining.join(parts)

    @reported("MaskTargets.__getitem__")
    def __getitem__(self, image: int) -> MaskTargets:
        """Return the targets of one image; on a device this waits for it."""
        if isinstance(image, int) and not -len(self) <= image < len(self):
            raise IndexError(f"there is no image {image}, targets of {len(self)} images end here")
        return joining.single_image(self, self.number_of(image))

    def __iter__(self) -> Iterator[MaskTargets]:
        """Iterate over the images."""
        return (self[image] for image in range(len(self)))

    @reported("MaskTargets.select")
    def select(self, keep: Tensor | Sequence[Tensor | Sequence[int]]) -> MaskTargets:
        """Keep some of the masks; the pixels are shared, not copied.

        Args:
            keep: bool `[T_all]`, True for the masks to keep. Or one entry per image: bool `[T]`, or the numbers of the
                masks within the image, in the order wanted, integers `[n]` or a list. A bool tensor on a device is
                waited for.

        Returns:
            The same images with the masks that were kept.

        Raises:
            MaskLossError: another number of entries than images or masks, or a number out of range.

        Example:
            >>> targets = MaskTargets.from_masks([torch.ones(3, 4, 4).bool(), torch.ones(2, 4, 4).bool()])
            >>> targets.select([[2, 0], []]).num_targets
            (2, 0)
        """
        return joining.select(self, keep)


def _from_binary(images: Sequence[Tensor], frame: Frame) -> MaskTargets:
    if not all(map(on_host, images)):
        stored = [dense.whole(masks, (masks.shape[2] + 7) // 8) for masks in images]
        return _build("bits", bits.pack_elsewhere(images), stored, frame)
    data, parts = bits.pack_and_crop(images)
    stored = [
        Stored(place, elements, (masks.shape[1], masks.shape[2]))
        for masks, (place, elements) in zip(images, parts, strict=True)
    ]
    return _build("bits", data, stored, frame)


def _from_values(images: Sequence[Tensor], frame: Frame) -> MaskTargets:
    values = [masks.detach() if masks.is_floating_point() else masks.float() for masks in images]
    join = bits.owned
    if not all(map(on_host, values)):
        # Nobody has looked at these: a value outside [0, 1] shows as a loss that is not finite.
        values, join = [each.masked_fill((each < 0) | (each > 1), float("nan")) for each in values], bits.joined
    stored = [dense.whole(masks, masks.shape[2]) for masks in images]
    return _build("values", join([masks.reshape(-1) for masks in values]), stored, frame)


def _from_labels(
    maps: Sequence[Tensor], ids: Sequence[Any], allow_missing: bool, frame: Frame, void: int | None
) -> MaskTargets:
    dense.check_devices(maps)
    parts, stored = [], []
    unread: list[tuple[int, Tensor]] = []
    first = 0
    for labels, numbers in zip(maps, ids, strict=True):
        known = not isinstance(numbers, Tensor) or on_host(labels) or on_host(numbers)
        listed = label_maps.listed_ids(numbers) if known else [0] * len(label_maps.check_ids(numbers))
        if not known:
            unread.append((first, numbers))
        elif void in listed:
            raise Cause("ignore_value must be no target's id", f"ignore_value={void} is among the ids", "leave it out")
        place = label_maps.label_places(labels, listed, allow_missing)
        # Without targets there is nothing to read, and such an image fits any encoding.
        parts.append(labels.detach().reshape(-1) if listed else labels.new_empty(0))
        stored.append(Stored(place, len(parts[-1]), (labels.shape[0], labels.shape[1]), listed))
        first += len(listed)
    targets = _build("labels", bits.owned(parts), stored, frame)
    # To list ids that are on a device would wait for it.
    if len(unread) == len(maps):
        targets.table[:, LABEL] = bits.joined([numbers for _, numbers in unread])
    else:
        for first, numbers in unread:
            targets.table[first : first + len(numbers), LABEL] = numbers
    return targets


def _build(encoding: str, data: Tensor, stored: Sequence[Stored], frame: Frame) -> MaskTargets:
    """Put pixels and their description together."""
    table, images, windows, ignore = describe_images(stored, frame, data.device)
    counts = tuple(len(image.place) for image in stored)
    return MaskTargets(encoding, data.contiguous(), table, images, windows, ignore, counts)
