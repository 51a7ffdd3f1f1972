"""How masks are stored: the tensors that kernels read, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from maskloss._abi import (
    BASE,
    COUNT,
    CROP_H,
    FIRST,
    IMAGE_H,
    IMAGE_W,
    LABEL,
    OFFSET,
    SIZE,
    STRIDE,
)
from maskloss._tracing import as_device
from maskloss.errors import Cause, describe, reported


@dataclass(frozen=True, eq=False, repr=False)
class Packed:
    """The tensors of `MaskTargets`, which documents them."""

    encoding: str
    data: Tensor
    table: Tensor
    images: Tensor
    windows: Tensor
    ignore: Tensor
    num_targets: tuple[int, ...]
    frames: int = 1
    present: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.num_targets)

    def number_of(self, image: int) -> int:
        """Check the number of an image; negative ones count from the end."""
        try:
            number = range(len(self))[image]
        except (TypeError, IndexError):
            number = None
        if not isinstance(number, int):
            raise Cause(
                "an image is chosen by its number",
                f"got {describe(image)} for {len(self)} images",
                "MaskTargets.cat([targets[i] for i in ...]) picks images, targets.select picks masks",
            )
        return number

    def __repr__(self) -> str:
        if self.device.type == "meta":
            return f"MaskTargets({self.num_masks} masks, {self.encoding}, meta)"
        sizes = sorted({(row[IMAGE_H] // self.frames, row[IMAGE_W]) for row in self.images.tolist()})
        size = f"{sizes[0][0]} x {sizes[0][1]}" if len(sizes) == 1 else f"{len(sizes)} sizes"
        masks, images = self.num_masks, len(self)
        kind, length = "image", ""
        if self.present is not None:
            kind, length = "clip", f" of {self.frames} frame{'s' * (self.frames != 1)}"
        extras = "".join(
            text
            for text, given in (
                (", ignore regions", self.ignore.numel()),
                (", valid windows", self._has_windows()),
            )
            if given
        )
        return (
            f"MaskTargets({masks} mask{'s' * (masks != 1)} in {images} {kind}{'s' * (images != 1)}{length}, "
            f"{self.encoding}, {size}, {self.nbytes} bytes{extras}, {self.device})"
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

    def inhabited(self) -> Tensor:
        """Return which masks have a pixel inside, bool `[T_all]`, without waiting for a device."""
        size = self.table[:, CROP_H] * self.table[:, STRIDE]
        image = torch.arange(len(self), device=self.device).repeat_interleave(self.counts, output_size=self.num_masks)
        if self.encoding == "labels":
            return (size > 0) & self._occurs(image)
        start = self.images[image, BASE] + self.table[:, OFFSET]
        before = pad((self.data != 0).cumsum(0, dtype=torch.int32), (1, 0))
        return before[start + size] > before[start]

    def _occurs(self, image: Tensor) -> Tensor:
        """Look for the id of each target in the label map of its image, whose number is given: bool `[T_all]`."""
        if not self.num_masks:
            return image > 0
        ids = self.table[:, LABEL].sort().values
        where = torch.arange(len(self), device=self.device)
        pixel_image = where.repeat_interleave(self.images[:, SIZE], output_size=len(self.data))
        values = self.data.long()
        rank = torch.searchsorted(ids, values)
        wanted = ids[rank.clamp(max=len(ids) - 1)] == values
        # One more place for pixels of no target.
        seen = torch.zeros(len(self) * len(ids) + 1, dtype=torch.bool, device=self.device)
        seen.scatter_(0, torch.where(wanted, pixel_image * len(ids) + rank, len(seen) - 1), True)
        return seen[image * len(ids) + torch.searchsorted(ids, self.table[:, LABEL].contiguous())]

    @reported("MaskTargets.to")
    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Self:
        """Move to a device; returns self if it is there already. The types of the tensors are part of the encoding.

        Raises:
            MaskLossError: anything but a device, such as a dtype.
        """
        moved = [tensor.to(as_device(device), non_blocking=non_blocking) for tensor in self._all]
        return self if moved[0] is self.data else self._with(moved)

    def pin_memory(self) -> Self:
        """Copy into page-locked memory, for a faster transfer; `DataLoader(pin_memory=True)` calls this."""
        return self._with([tensor.pin_memory() for tensor in self._all])

    @reported("MaskTargets.dense")
    def dense(self, image: int = 0) -> Tensor:
        """Unpack the masks of image number `image`, to look at: `[T, frame height, frame width]`, bool, float if soft.

        Those of a clip are `[N, T, frame height, frame width]`. On a device this waits for it.
        """
        row = self.images[self.number_of(image)].tolist()
        count, height, width = row[COUNT], row[IMAGE_H], row[IMAGE_W]
        dtype = self.data.dtype if self.encoding == "values" else torch.bool
        masks = torch.zeros(count, height, width, dtype=dtype, device=self.device)
        for mask, (pixels, top, left) in zip(masks, self.crops(image), strict=True):
            mask[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return masks if self.present is None else masks.unflatten(1, (self.frames, height // self.frames))

    def crops(self, image: int = 0) -> Iterator[tuple[Tensor, int, int]]:
        """Unpack what is stored of each mask of image number `image`, with its top and left in the frame.

        On a device this waits for it.
        """
        row = self.images[self.number_of(image)].tolist()
        first, count, base = row[FIRST], row[COUNT], row[BASE]
        for offset, stride, top, left, h, w, _, _, label, _ in self.table[first : first + count].tolist():
            across = (w + 7) // 8 if self.encoding == "bits" else w
            pixels = self.data[base + offset if h * w else 0 :].as_strided((h, across), (stride, 1))
            yield self._decode(pixels, w, label), top, left

    def _decode(self, pixels: Tensor, width: int, label: int) -> Tensor:
        if self.encoding == "labels":
            return pixels == label
        if self.encoding == "values":
            return pixels
        shifts = torch.arange(8, dtype=torch.uint8, device=self.device)
        return ((pixels[..., None] >> shifts) & 1).flatten(1)[:, :width].bool()

    def _with(self, tensors: Sequence[Tensor]) -> Self:
        data, table, images, windows, ignore, *rest = tensors
        present = rest[0] if rest else None
        return replace(self, data=data, table=table, images=images, windows=windows, ignore=ignore, present=present)

    @property
    def _all(self) -> list[Tensor]:
        return self.tensors if self.present is None else [*self.tensors, self.present]

    def _has_windows(self) -> bool:
        return bool((self.windows != self.windows.new_tensor([0.0, 0.0, 1.0, 1.0])).any())
