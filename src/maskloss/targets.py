"""What the predictions are compared with: masks as packed bits, label maps or soft values, never made dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss import _packing
from maskloss._frames import Box, Frame, Size, frame_size, packed_ignore, window_row
from maskloss.errors import Cause, describe, reported

_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
# Integer types without arithmetic in torch, and what holds their values.
_WIDER = {torch.int8: torch.int16, torch.uint16: torch.int32, torch.uint32: torch.int64}


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
        table: int64 `[T_all, 9]`, one row per target: offset into `data`, elements from one row of pixels to the next;
            top, left, height, width of the stored crop; height and width of the frame; id in the label map.
        images: int64 `[B, 8]`, one row per image: first row in `table`, number of targets; offset (-1: none), bytes
            per row, height, width of the ignore region; height and width of the frame.
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
            _packing.check_masks(image)
        make = _from_values if _packing.are_soft(listed, soft) else _from_binary
        return MaskTargets.cat([make(image, Frame(canvas, ignore, valid)) for image in listed])

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
        return _from_bits(packed, width, Frame(canvas, ignore, valid))

    @staticmethod
    @reported("MaskTargets.from_label_map")
    def from_label_map(
        labels: Tensor,
        ids: Tensor | Sequence[int] | None,
        *,
        allow_missing: bool = False,
        canvas: Size | None = None,
        ignore: Tensor | None = None,
        valid: Box | None = None,
    ) -> MaskTargets:
        """Take a label map: one integer map for all masks of an image.

        Args:
            labels: `[H, W]`, integers; target i is where the map equals `ids[i]`.
            ids: the ids to use, in the order of the targets.
            allow_missing: accept ids that do not occur in the map, as empty masks (after a crop, say).
            canvas: see `from_masks`.
            ignore: see `from_masks`.
            valid: see `from_masks`.

        Returns:
            The targets of one image, on the device of the map. A map on a CPU is searched for the box of each id.

        Raises:
            MaskLossError: a map that is not `[H, W]` of integers, no ids, ids that do not occur in the map (looked for
                on a CPU only), or as in `from_masks`.
        """
        return _from_labels(labels, ids, allow_missing, Frame(canvas, ignore, valid))

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
        data, place = _packing.pack_coco(segmentations, height, width)
        return _build("bits", data, place, (height, width), Frame(canvas, ignore, valid))

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
        full = [part for part in parts if len(part)] or [parts[0]]
        encodings, devices = {part.encoding for part in full}, {str(part.device) for part in parts}
        if len(encodings) > 1 or len(devices) > 1:
            raise Cause(
                "the targets of a batch must have one encoding and one device",
                f"got {', '.join(sorted(encodings))} on {', '.join(sorted(devices))}",
                "make all of them the same way",
            )
        return _join(parts, full)

    def __len__(self) -> int:
        """Return the number of masks of all images together."""
        return sum(self.num_targets)

    def __repr__(self) -> str:
        if self.device.type == "meta":
            return f"MaskTargets({len(self)} masks, {self.encoding}, meta)"
        sizes = sorted({(int(row[6]), int(row[7])) for row in self.images.tolist()})
        size = f"{sizes[0][0]} x {sizes[0][1]}" if len(sizes) == 1 else f"{len(sizes)} sizes"
        masks, images = len(self), self.batch_size
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
    def batch_size(self) -> int:
        """The number of images."""
        return len(self.num_targets)

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
        first, count, *_, height, width = self.images[image].tolist()
        dtype = self.data.dtype if self.encoding == "values" else torch.bool
        masks = torch.zeros(count, height, width, dtype=dtype, device=self.device)
        for mask, row in zip(masks, self.table[first : first + count].tolist(), strict=True):
            offset, stride, top, left, h, w, _, _, label = row
            if h * w:
                across = (w + 7) // 8 if self.encoding == "bits" else w
                pixels = self.data.as_strided((h, across), (stride, 1), offset)
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


def _from_binary(masks: Tensor, frame: Frame) -> MaskTargets:
    return _from_bits(_packing.pack(masks), masks.shape[2], frame)


def _from_bits(packed: Tensor, width: int, frame: Frame) -> MaskTargets:
    data, place = _packing.crop(packed, width)
    return _build("bits", data, place, (packed.shape[1], width), frame)


def _from_values(masks: Tensor, frame: Frame) -> MaskTargets:
    count, height, width = masks.shape
    place = np.zeros((count, _packing.PLACE), dtype=np.int64)
    place[:] = (0, width, 0, 0, height, width)
    place[:, 0] = np.arange(count) * (height * width)
    values = masks if masks.is_floating_point() else (masks != 0).float()
    return _build("values", values.detach().reshape(-1), place, (height, width), frame)


def _from_labels(labels: Tensor, ids: Tensor | Sequence[int] | None, allow_missing: bool, frame: Frame) -> MaskTargets:
    if isinstance(labels, Tensor) and labels.dtype in _WIDER:
        labels = labels.to(_WIDER[labels.dtype])
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.dtype not in _INTEGERS:
        raise Cause(
            "a label map must be a tensor [H, W] with an integer dtype",
            f"got {describe(labels)}",
            "give one map per image; masks of shape [T, H, W] go to from_masks",
        )
    listed = _packing.listed_ids(ids)
    height, width = labels.shape
    place = np.zeros((len(listed), _packing.PLACE), dtype=np.int64)
    place[:] = (0, width, 0, 0, height, width)
    if _packing.on_host(labels):
        boxes = _packing.label_boxes(labels, listed)
        missing = [number for number, box in zip(listed, boxes, strict=True) if not box[2]]
        if missing and not allow_missing:
            raise Cause(
                "every id must occur in its label map",
                f"{len(missing)} of {len(listed)} do not, the first is {missing[0]}",
                "drop those targets, or pass allow_missing=True to count them as empty masks",
            )
        place[:, 0] = boxes[:, 0] * width + boxes[:, 1]
        place[:, 2:] = boxes
    return _build("labels", labels.detach().reshape(-1), place, (height, width), frame, listed)


def _build(
    encoding: str,
    data: Tensor,
    place: NDArray[np.int64],
    size: Size,
    frame: Frame,
    ids: Sequence[int] | None = None,
) -> MaskTargets:
    """Put the targets of one image together: the place of each mask, its frame, the ignore region and the window."""
    count = len(place)
    height, width = frame_size(size, frame.canvas)
    table = np.zeros((count, 9), dtype=np.int64)
    table[:, : _packing.PLACE] = place
    table[:, 6:8] = height, width
    table[:, 8] = 0 if ids is None else ids
    image = np.array([[0, count, -1, 0, 0, 0, height, width]], dtype=np.int64)
    ignore = torch.empty(0, dtype=torch.uint8, device=data.device)
    if frame.ignore is not None:
        ignore = packed_ignore(frame.ignore, size, data.device)
        image[0, 2:6] = (0, (size[1] + 7) // 8, *size)
    return MaskTargets(
        encoding=encoding,
        data=data,
        table=torch.from_numpy(table).to(data.device),
        images=torch.from_numpy(image).to(data.device),
        windows=torch.from_numpy(window_row(frame.valid, height, width)).to(data.device),
        ignore=ignore,
        num_targets=(count,),
    )


def _join(parts: Sequence[MaskTargets], full: Sequence[MaskTargets]) -> MaskTargets:
    """Concatenate, shifting what points into the concatenated tensors."""
    tables, images = [], []
    pixels = masks = bytes_ignored = 0
    for part in parts:
        table, image = part.table.clone(), part.images.clone()
        table[:, 0] += pixels
        image[:, 0] += masks
        image[:, 2] = torch.where(image[:, 2] < 0, -1, image[:, 2] + bytes_ignored)
        tables.append(table)
        images.append(image)
        pixels += part.data.numel() if part.encoding == full[0].encoding else 0
        masks += len(part)
        bytes_ignored += part.ignore.numel()
    return MaskTargets(
        encoding=full[0].encoding,
        data=torch.cat([part.data for part in parts if part.encoding == full[0].encoding]),
        table=torch.cat(tables),
        images=torch.cat(images),
        windows=torch.cat([part.windows for part in parts]),
        ignore=torch.cat([part.ignore for part in parts]),
        num_targets=tuple(count for part in parts for count in part.num_targets),
    )
