"""What the predictions are compared with: masks as packed bits, label maps or soft values, never made dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskloss.errors import Cause, describe, reported
from maskloss.ops.abi import BASE, COUNT, FIRST, IMAGE_H, IMAGE_W, LABEL, OFFSET, PLACE_COLUMNS, SIZES
from maskloss.targets import bits, coco, dense, label_maps
from maskloss.targets.frames import Box, Frame, Size, Stored, describe_images


@dataclass(frozen=True, eq=False, repr=False)
class MaskTargets:
    """The target masks of one image or of a batch, in the form in which kernels read them.

    Make one with `from_masks`, `from_packed`, `from_label_map` or `from_coco`, join images with `cat`. Instances are
    immutable, can be pickled, and offer `to` and `pin_memory` as tensors do, so a data-loading worker can pack masks
    and a `DataLoader` can pin them.

    Three encodings: "bits" (1 bit a pixel; on a CPU each mask is cut down to its bounding box), "labels" (one integer
    map per image and the id of each target in it) and "values" (soft targets in [0, 1], as dense as they came).

    Attributes:
        encoding: "bits", "labels" or "values".
        data: 1-D, the pixels of all images: uint8, an integer type, or a float type.
        table: int64 `[T_all, 9]`, one row per target: offset into the data of its image, elements from one row of
            pixels to the next; top, left, height, width of the stored crop; height and width of the frame; id in the
            label map.
        images: int64 `[B, 11]`, one row per image: number of targets, elements in `data`, bytes in `ignore`; where
            these three begin: row in `table`, offsets into `data` and `ignore`; bytes per row, height, width of the
            ignore region; height and width of the frame.
        windows: float32 `[B, 4]`: left, top, width, height of the valid window, as fractions of the frame.
        ignore: uint8 1-D, the packed ignore regions; empty if no image has one.
        num_targets: the number of targets of each image.

    The frame is what predictions cover: the mask itself, or the canvas in whose top left corner the mask lies. Outside
    the stored crop every pixel is 0.

    Example:
        >>> masks = torch.zeros(2, 30, 40, dtype=torch.bool)
        >>> masks[0, 5:20, 8:24] = True
        >>> MaskTargets.from_masks(masks)
        MaskTargets(2 masks in 1 image, bits, 30 x 40, 30 bytes, cpu)
    """

    encoding: str
    data: Tensor
    table: Tensor
    images: Tensor
    windows: Tensor
    ignore: Tensor
    num_targets: tuple[int, ...]

    @staticmethod
    @reported("MaskTargets.from_masks")
    def from_masks(
        masks: Tensor | Sequence[Tensor],
        *,
        soft: bool | None = None,
        canvas: Size | None = None,
        ignore: Tensor | None = None,
        valid: Box | None = None,
    ) -> MaskTargets:
        """Pack dense masks.

        Args:
            masks: `[T, H, W]` of one image, bool, uint8 (non-zero is inside) or float, or a list with one such tensor
                per image, of any sizes.
            soft: whether float masks are soft targets in [0, 1], which are kept as they are, or binary ones, which are
                packed (non-zero is inside). Default None: on a CPU the values decide; elsewhere, and inside
                `torch.compile`, float masks count as soft, because looking at their values would stall the device.
            canvas: (height, width) of the padded canvas in whose top left corner the masks lie and which the
                predictions cover. Default: the masks fill the frame.
            ignore: bool `[H, W]`, pixels whose points weigh nothing (void, crowd).
            valid: (top, left, height, width) in pixels of the frame, the part inside which points are drawn.
                Default: all of it. `canvas`, `ignore` and `valid` hold for every image of a list.

        Returns:
            The targets, on the device of the masks.

        Raises:
            MaskLossError: wrong rank or dtype, float values outside [0, 1], a canvas smaller than the masks, an ignore
                region of another size, or a window that is empty or leaves the frame.
        """
        listed = list(masks) if isinstance(masks, Sequence) else [masks]
        for image in listed:
            dense.check_masks(image)
        if not listed:
            raise Cause("masks must hold one tensor per image", "the list is empty", "an empty image is [0, H, W]")
        dense.check_devices(listed)
        make = _from_values if dense.are_soft(listed, soft) else _from_binary
        return make(listed, Frame(canvas, ignore, valid))

    @staticmethod
    @reported("MaskTargets.from_packed")
    def from_packed(
        packed: Tensor,
        width: int,
        *,
        canvas: Size | None = None,
        ignore: Tensor | None = None,
        valid: Box | None = None,
    ) -> MaskTargets:
        """Take masks that are bit-packed already, by `numpy.packbits(masks, axis=-1, bitorder="little")`.

        Args:
            packed: uint8 `[T, H, ceil(width / 8)]`; the lowest bit is the leftmost pixel.
            width: pixels in a row.
            canvas: see `from_masks`.
            ignore: see `from_masks`.
            valid: see `from_masks`.

        Returns:
            The targets of one image, on the device of `packed`.

        Raises:
            MaskLossError: not uint8 `[T, H, ceil(width / 8)]`, or as in `from_masks`.
        """
        fits = isinstance(packed, Tensor) and packed.dtype == torch.uint8 and packed.ndim == 3
        if not fits or packed.shape[2] != (width + 7) // 8:
            raise Cause(
                "packed masks must be uint8 [T, H, ceil(width / 8)]",
                f"got {describe(packed)} for width {width}",
                'numpy.packbits(masks, axis=-1, bitorder="little") makes them',
            )
        if width % 8:
            packed = packed.clone()
            packed[..., -1] &= (1 << width % 8) - 1
        data, place = bits.crop(packed, width)
        stored = Stored(place, len(data), (packed.shape[1], width))
        return _build("bits", data, [stored], Frame(canvas, ignore, valid))

    @staticmethod
    @reported("MaskTargets.from_label_map")
    def from_label_map(
        labels: Tensor | Sequence[Tensor],
        ids: Tensor | Sequence[int] | Sequence[Tensor | Sequence[int]] | None,
        *,
        allow_missing: bool = False,
        canvas: Size | None = None,
        ignore: Tensor | None = None,
        valid: Box | None = None,
    ) -> MaskTargets:
        """Take a label map: one integer map for all masks of an image.

        Args:
            labels: `[H, W]`, integers; target i is where the map equals `ids[i]`. Or a list with one map per image,
                of any sizes.
            ids: the ids to use, in the order of the targets, `[T]`. For a list of maps, a list with those of each.
            allow_missing: accept ids that do not occur in the map, as empty masks (after a crop, say).
            canvas: see `from_masks`.
            ignore: see `from_masks`.
            valid: see `from_masks`.

        Returns:
            The targets, on the device of the map. A map on a CPU is searched for the box of each id.

        Raises:
            MaskLossError: a map that is not `[H, W]` of integers, no ids, ids that do not occur in the map (looked for
                on a CPU only), maps and ids that do not pair up, or as in `from_masks`.
        """
        maps, numbers = (list(labels), ids) if isinstance(labels, Sequence) else ([labels], [ids])
        if not maps or not isinstance(numbers, Sequence) or len(numbers) != len(maps):
            raise Cause(
                "a list of label maps goes with a list of their ids",
                f"got {describe(labels)} and {describe(ids)}",
                "give the ids of each map, in the order of its targets",
            )
        return _from_labels(maps, numbers, allow_missing, Frame(canvas, ignore, valid))

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
                polygons `[[x0, y0, x1, y1, ...], ...]` in pixels.
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

    @staticmethod
    @reported("MaskTargets.cat")
    def cat(parts: Sequence[MaskTargets]) -> MaskTargets:
        """Join images, or batches, into one batch.

        Args:
            parts: targets of the same encoding and device, in the order of the images. An image without targets fits
                any encoding.

        Returns:
            The targets of all images.

        Raises:
            MaskLossError: nothing to join, or encodings or devices that differ.
        """
        if not parts or not all(isinstance(part, MaskTargets) for part in parts):
            raise Cause("parts must be the MaskTargets to join", f"got {describe(parts)}", "give one per image")
        if len(parts) == 1:
            return parts[0]
        full = [part for part in parts if part.num_masks] or [parts[0]]
        encodings, devices = {part.encoding for part in full}, {str(part.device) for part in parts}
        if len(encodings) > 1 or len(devices) > 1:
            raise Cause(
                "the targets of a batch must have one encoding and one device",
                f"got {', '.join(sorted(encodings))} on {', '.join(sorted(devices))}",
                "make all of them the same way",
            )
        return _join(parts, full)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.num_targets)

    def __repr__(self) -> str:
        if self.device.type == "meta":
            return f"MaskTargets({self.num_masks} masks, {self.encoding}, meta)"
        sizes = sorted({(row[IMAGE_H], row[IMAGE_W]) for row in self.images.tolist()})
        size = f"{sizes[0][0]} x {sizes[0][1]}" if len(sizes) == 1 else f"{len(sizes)} sizes"
        masks, images = self.num_masks, len(self)
        extras = "".join(
            text
            for text, given in (
                (", ignore regions", self.ignore.numel()),
                (", valid windows", self._has_windows()),
            )
            if given
        )
        return (
            f"MaskTargets({masks} mask{'s' * (masks != 1)} in {images} image{'s' * (images != 1)}, {self.encoding}, "
            f"{size}, {self.nbytes} bytes{extras}, {self.device})"
        )

    @property
    def num_masks(self) -> int:
        """The number of masks of all images together."""
        return sum(self.num_targets)

    @property
    def counts(self) -> Tensor:
        """The number of targets of each image, int64 `[B]` on the device."""
        return self.images[:, COUNT]

    @property
    def first_rows(self) -> Tensor:
        """The row of `table` with which each image begins, int64 `[B]`."""
        return self.images[:, FIRST]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of pixel data: targets and ignore regions."""
        return self.data.numel() * self.data.element_size() + self.ignore.numel()

    @property
    def tensors(self) -> list[Tensor]:
        """What the operations take: `[data, table, images, windows, ignore]`."""
        return [self.data, self.table, self.images, self.windows, self.ignore]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MaskTargets:
        """Move to a device; returns self if it is there already."""
        moved = [tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors]
        return self if moved[0] is self.data else self._with(moved)

    def pin_memory(self, device: torch.device | str | None = None) -> MaskTargets:
        """Copy into page-locked memory, for a faster transfer; `DataLoader(pin_memory=True)` calls this."""
        return self._with([tensor.pin_memory() for tensor in self.tensors])

    def dense(self, image: int = 0) -> Tensor:
        """Unpack the masks of one image, to look at: `[T, frame height, frame width]`, bool, or float if soft."""
        row = self.images[image].tolist()
        first, count, height, width = row[FIRST], row[COUNT], row[IMAGE_H], row[IMAGE_W]
        base = row[BASE]
        dtype = self.data.dtype if self.encoding == "values" else torch.bool
        masks = torch.zeros(count, height, width, dtype=dtype, device=self.device)
        for mask, place in zip(masks, self.table[first : first + count].tolist(), strict=True):
            offset, stride, top, left, h, w, _, _, label = place
            if h * w:
                across = (w + 7) // 8 if self.encoding == "bits" else w
                pixels = self.data.as_strided((h, across), (stride, 1), base + offset)
                mask[top : top + h, left : left + w] = self._decode(pixels, w, label)
        return masks

    def _decode(self, pixels: Tensor, width: int, label: int) -> Tensor:
        if self.encoding == "labels":
            return pixels == label
        if self.encoding == "values":
            return pixels
        shifts = torch.arange(8, dtype=torch.uint8, device=self.device)
        return ((pixels[..., None] >> shifts) & 1).flatten(1)[:, :width].bool()

    def _with(self, tensors: Sequence[Tensor]) -> MaskTargets:
        data, table, images, windows, ignore = tensors
        return replace(self, data=data, table=table, images=images, windows=windows, ignore=ignore)

    def _has_windows(self) -> bool:
        return bool((self.windows != self.windows.new_tensor([0.0, 0.0, 1.0, 1.0])).any())


def _from_binary(images: Sequence[Tensor], frame: Frame) -> MaskTargets:
    if not all(map(bits.on_host, images)):
        stored = [_whole(masks, (masks.shape[2] + 7) // 8) for masks in images]
        return _build("bits", bits.pack_elsewhere(images), stored, frame)
    crops = [bits.crop(bits.pack(masks), masks.shape[2]) for masks in images]
    stored = [
        Stored(place, len(data), (masks.shape[1], masks.shape[2]))
        for masks, (data, place) in zip(images, crops, strict=True)
    ]
    return _build("bits", _joined([data for data, _ in crops]), stored, frame)


def _from_values(images: Sequence[Tensor], frame: Frame) -> MaskTargets:
    values = [masks if masks.is_floating_point() else (masks != 0).float() for masks in images]
    stored = [_whole(masks, masks.shape[2]) for masks in images]
    return _build("values", _joined([masks.detach().reshape(-1) for masks in values]), stored, frame)


def _whole(masks: Tensor, stride: int) -> Stored:
    """Masks that are stored from edge to edge, `stride` elements a row."""
    count, height, width = masks.shape
    place = np.zeros((count, PLACE_COLUMNS), dtype=np.int64)
    place[:] = (0, stride, 0, 0, height, width)
    place[:, OFFSET] = np.arange(count) * (height * stride)
    return Stored(place, count * height * stride, (height, width))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _from_labels(maps: Sequence[Tensor], ids: Sequence[Any], allow_missing: bool, frame: Frame) -> MaskTargets:
    maps = [label_maps.check_label_map(labels) for labels in maps]
    dense.check_devices(maps)
    parts, stored = [], []
    unread: list[tuple[int, Tensor]] = []
    first = 0
    for labels, numbers in zip(maps, ids, strict=True):
        known = not isinstance(numbers, Tensor) or bits.on_host(labels) or bits.on_host(numbers)
        listed = label_maps.listed_ids(numbers) if known else [0] * len(label_maps.check_ids(numbers))
        if not known:
            unread.append((first, numbers))
        place = label_maps.label_places(labels, listed, allow_missing)
        # Without targets there is nothing to read, and such an image fits any encoding.
        parts.append(labels.detach().reshape(-1) if listed else labels.new_empty(0))
        stored.append(Stored(place, len(parts[-1]), (labels.shape[0], labels.shape[1]), listed))
        first += len(listed)
    targets = _build("labels", _joined(parts), stored, frame)
    # To list ids that are on a device would wait for it.
    if len(unread) == len(maps):
        targets.table[:, LABEL] = _joined([numbers for _, numbers in unread])
    else:
        for first, numbers in unread:
            targets.table[first : first + len(numbers), LABEL] = numbers
    return targets


def _build(encoding: str, data: Tensor, stored: Sequence[Stored], frame: Frame) -> MaskTargets:
    """Put pixels and their description together."""
    table, images, windows, ignore = describe_images(stored, frame, data.device)
    counts = tuple(len(image.place) for image in stored)
    return MaskTargets(encoding, data.contiguous(), table, images, windows, ignore, counts)


def _join(parts: Sequence[MaskTargets], full: Sequence[MaskTargets]) -> MaskTargets:
    """Concatenate; where each image begins follows from the sizes of those before it, without asking a device."""
    images = torch.cat([part.images for part in parts])
    sizes = images[:, :SIZES]
    images[:, SIZES : 2 * SIZES] = sizes.cumsum(0) - sizes
    return MaskTargets(
        encoding=full[0].encoding,
        data=_joined([part.data for part in parts if part.encoding == full[0].encoding]),
        table=torch.cat([part.table for part in parts]),
        images=images,
        windows=torch.cat([part.windows for part in parts]),
        ignore=_joined([part.ignore for part in parts if part.ignore.numel()] or [parts[0].ignore]),
        num_targets=tuple(count for part in parts for count in part.num_targets),
    )
