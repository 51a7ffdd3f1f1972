"""Join images, take single ones out of a batch, select and repeat masks, convert between encodings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from maskloss._abi import BASE, COUNT, FIRST, IGNORE_BASE, IGNORE_SIZE, PLACE_COLUMNS, SIZE, SIZES
from maskloss._tracing import as_tensor, on_host
from maskloss.errors import Cause, describe
from maskloss.targets import bits, dense
from maskloss.targets.storage import Packed

P = TypeVar("P", bound=Packed)

# From the one that holds least to the one that holds everything.
_ENCODINGS = ("labels", "bits", "values")


def join(parts: Sequence[P]) -> P:
    """Concatenate; where each image begins follows from the sizes of those before it, without asking a device."""
    full = [part for part in parts if part.num_masks] or [parts[0]]
    lengths = sorted({(part.present is not None, part.frames) for part in parts})
    if len(lengths) > 1:
        raise Cause(
            "the targets of a batch must be images, or clips with one number of frames",
            f"got {' and '.join(f'clips of {frames} frames' if clip else 'images' for clip, frames in lengths)}",
            "cut the clips to one length",
        )
    kinds = [part.encoding for part in full]
    encoding = [kind for kind in _ENCODINGS if kind in kinds][-1]
    dtypes = [part.data.dtype for part in full if part.encoding == encoding]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        if other != dtype:
            dtype = torch.promote_types(dtype, other)
    parts = [_converted(part, encoding, dtype) for part in parts]
    images = torch.cat([part.images for part in parts])
    return replace(
        parts[0],
        encoding=encoding,
        data=bits.joined([part.data for part in parts]),
        table=torch.cat([part.table for part in parts]),
        images=_add_up(images),
        windows=torch.cat([part.windows for part in parts]),
        ignore=bits.joined([part.ignore for part in parts if part.ignore.numel()] or [parts[0].ignore]),
        num_targets=tuple(count for part in parts for count in part.num_targets),
        present=None if parts[0].present is None else torch.cat([p.present for p in parts if p.present is not None]),
    )


def _add_up(images: Tensor) -> Tensor:
    """Fill in where each image begins, from the sizes of those before it."""
    sizes = images[:, :SIZES]
    images[:, SIZES : 2 * SIZES] = sizes.cumsum(0) - sizes
    return images


def _converted(part: P, encoding: str, dtype: torch.dtype) -> P:
    """Convert targets to an encoding that holds what theirs does, with data of a type."""
    if not part.num_masks:
        images = part.images.clone()
        images[:, SIZE] = 0
        return replace(part, encoding=encoding, data=part.data.new_empty(0, dtype=dtype), images=_add_up(images))
    if part.encoding == encoding:
        return part if part.data.dtype == dtype else replace(part, data=part.data.to(dtype))
    pieces, places, sizes = [], [], []
    for image in range(len(part)):
        masks = part.dense(image)
        masks = masks if part.present is None else masks.flatten(1, 2)
        if encoding == "bits":
            data, place = bits.crop(bits.pack(masks), masks.shape[2])
        else:
            data, place = masks.to(dtype).reshape(-1), dense.whole(masks, masks.shape[2]).place
        pieces.append(data)
        places.append(place)
        sizes.append(len(data))
    table, images = part.table.clone(), part.images.clone()
    table[:, :PLACE_COLUMNS] = torch.from_numpy(np.concatenate(places)).to(table.device)
    images[:, SIZE] = torch.tensor(sizes, device="cpu").to(table.device)
    return replace(part, encoding=encoding, data=bits.joined(pieces), table=table, images=_add_up(images))


def single_image(targets: P, image: int) -> P:
    """Take one image out of a batch; copied, because a view would keep the whole batch alive, pickled too."""
    row = targets.images[image].tolist()

    def cut(tensor: Tensor, first: int, count: int) -> Tensor:
        return tensor[first : first + count].clone()

    return replace(
        targets,
        data=cut(targets.data, row[BASE], row[SIZE]),
        table=cut(targets.table, row[FIRST], row[COUNT]),
        images=_add_up(cut(targets.images, image, 1)),
        windows=cut(targets.windows, image, 1),
        ignore=cut(targets.ignore, row[IGNORE_BASE], row[IGNORE_SIZE]),
        num_targets=(row[COUNT],),
        present=None if targets.present is None else cut(targets.present, row[FIRST], row[COUNT]),
    )


def select(targets: P, keep: Tensor | Sequence[Any]) -> P:
    """Keep the masks that are marked or listed."""
    if isinstance(keep, Tensor):
        if tuple(keep.shape) != (targets.num_masks,) or keep.dtype != torch.bool:
            raise Cause(
                "keep must be bool [T_all], or have one entry for each image",
                f"got {describe(keep)} for {targets.num_masks} masks in {len(targets)} images",
                "numbers of masks are listed image by image",
            )
        keep = keep.split(list(targets.num_targets))
    if not isinstance(keep, Sequence) or len(keep) != len(targets):
        raise Cause(
            "keep must have one entry for each image",
            f"got {describe(keep)} for {len(targets)} images",
            "an image whose masks all go has an empty list",
        )
    pairs = enumerate(zip(keep, targets.num_targets, strict=True))
    kept = [_numbers(entry, count, image) for image, (entry, count) in pairs]
    counts = tuple(map(len, kept))
    device = targets.device
    first = targets.first_rows.repeat_interleave(torch.tensor(counts, device="cpu").to(device), output_size=sum(counts))
    images = targets.images.clone()
    images[:, COUNT] = torch.tensor(counts, device="cpu").to(device, non_blocking=True)
    rows = first + torch.cat([numbers.to(device, non_blocking=True) for numbers in kept])
    present = None if targets.present is None else targets.present[rows]
    return replace(targets, table=targets.table[rows], images=_add_up(images), num_targets=counts, present=present)


def _numbers(entry: Any, count: int, image: int) -> Tensor:
    """Turn what is kept of an image into the numbers of its masks, int64 `[n]`."""
    try:
        numbers = as_tensor(entry)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty((), device="cpu")
    if not numbers.numel() and numbers.ndim == 1 and numbers.dtype != torch.bool:
        return torch.empty(0, dtype=torch.int64, device=numbers.device)
    if numbers.dtype == torch.bool and tuple(numbers.shape) == (count,):
        return numbers.nonzero()[:, 0]
    if numbers.ndim != 1 or numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.is_complex():
        raise Cause(
            "what is kept of an image must be bool [T], or numbers of masks",
            f"that of image {image} is {describe(entry)} for {count} masks",
            "True marks the masks to keep",
        )
    if on_host(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
        raise Cause(
            f"numbers of masks must lie in [0, {count})",
            f"those of image {image} reach from {int(numbers.min())} to {int(numbers.max())}",
            "they count the masks of the image, from 0",
        )
    return numbers.long()


def repeat(targets: P, times: int) -> P:
    """List the targets of every image `times` times; the pixels are shared, not copied.

    Where one target supervises several queries of a layer, each of them draws its own points: they are drawn by the
    number of the target, and copy g of target t has the number g * T + t.
    """
    if times == 1:
        return targets
    counts = tuple(count * times for count in targets.num_targets)
    images = targets.images.clone()
    images[:, COUNT] *= times
    images[:, FIRST] *= times
    which = torch.arange(len(targets), device=targets.device)
    image = which.repeat_interleave(images[:, COUNT], output_size=sum(counts))
    copy = torch.arange(sum(counts), device=targets.device) - images[:, FIRST][image]
    rows = targets.first_rows[image] + copy % targets.counts[image]
    present = None if targets.present is None else targets.present[rows]
    return replace(targets, table=targets.table[rows], images=images, num_targets=counts, present=present)
