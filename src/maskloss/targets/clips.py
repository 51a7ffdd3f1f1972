"""The targets of clips and volumes: frames stored one below the other, and what the operations read instead, planes.

A target of a clip is one tall mask, `[T * H, W]`. What packs, joins, selects and stores masks need not know of frames.
The losses read planes: an instance in a frame. They are rows of a table that follows from the tall masks' by
arithmetic, so that nothing is stored twice and no device is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskloss._abi import (
    COUNT,
    CROP_H,
    FIRST,
    FRAME_H,
    FRAME_W,
    IGNORE_H,
    IGNORE_OFFSET,
    IMAGE_H,
    LABEL,
    OFFSET,
    STRIDE,
    TOP,
)
from maskloss._tracing import plain
from maskloss.errors import Cause, check_layout, describe
from maskloss.targets.frames import Box, Size, check_ignore, frame_size, window_row
from maskloss.targets.storage import Packed

P = TypeVar("P", bound=Packed)


def are_clips(images: Sequence[Any], rank: int) -> bool:
    """Whether masks, or label maps, have a dimension of frames more than those of images, which have `rank`."""
    return any(isinstance(each, Tensor) and each.ndim == rank + 1 for each in images)


def tall(clip: Tensor, canvas: Size | None, outside: int = 0) -> Tensor:
    """Put the frames `[..., T, H, W]` of a clip one below the other, each on the canvas: `[..., T * H, W]`."""
    height, width = frame_size((clip.shape[-2], clip.shape[-1]), canvas)
    padding = (0, width - clip.shape[-1], 0, height - clip.shape[-2])
    return (pad(clip, padding, value=outside) if any(padding) else clip).flatten(-3, -2)


def stacked(
    clips: Sequence[Any], shape: str, canvas: Size | None, ignore: Any
) -> tuple[list[Tensor], int, Tensor | None]:
    """Put the frames of each clip one below the other (see `tall`); return T, and the ignore region in the same form.

    Args:
        clips: dense masks or label maps.
        shape: what they should be, for a message.
        canvas: height and width that every frame gets.
        ignore: bool `[T, H, W]`, for every clip; or None.
    """
    rank, lengths = shape.count(",") + 1, set()
    clips = _filled(clips) if rank == 4 else clips
    for each in clips:
        check_layout(shape, each)
        fits = isinstance(each, Tensor) and each.ndim == rank and each.shape[-3] > 0
        if not fits or (rank == 3 and (each.is_floating_point() or each.is_complex() or each.dtype == torch.bool)):
            raise Cause(
                f"the targets of all clips must be {shape}", f"got {describe(each)}", "T counts the frames, at least 1"
            )
        lengths.add(each.shape[-3])
    if len(lengths) > 1:
        raise Cause(
            "the clips of a batch must have one number of frames", f"got {sorted(lengths)}", "cut them to one length"
        )
    region = plain(ignore)
    if region is not None:
        for each in clips:
            check_ignore(region, each.shape[-3:], each.device)
        region = tall(region, canvas)
    if rank == 4:
        return [tall(each, canvas) for each in clips], lengths.pop(), region
    # Beside a label map lies a number that is nobody's id.
    maps = [each.to(torch.int16) if canvas is not None and each.dtype.itemsize == 1 else each for each in clips]
    return [tall(each, canvas, torch.iinfo(each.dtype).min) for each in maps], lengths.pop(), region


def _filled(clips: Sequence[Any]) -> list[Any]:
    """Give clips without targets, of which a mapper leaves None or `[0]`, the frames of another."""
    [some, *_] = [each for each in clips if isinstance(each, Tensor) and each.ndim == 4]
    nothing = some[:0, :, :1, :1]
    return [nothing if each is None or tuple(getattr(each, "shape", ())) == (0,) else each for each in clips]


def described(targets: P, stored: Sequence[Tensor], frames: int, valid: Box | None) -> P:
    """Say of targets that they are clips; `stored` are masks `[N, T * H, W]` or label maps `[T * H, W]`, as packed."""
    windows = targets.windows
    if valid is not None:
        rows = [window_row(valid, each.shape[-2] // frames, each.shape[-1]) for each in stored]
        windows = torch.cat([torch.from_numpy(row) for row in rows]).to(windows.device)
    stacked_up = replace(targets, windows=windows, frames=frames)
    if targets.encoding == "bits":
        found = planes(stacked_up).inhabited().view(targets.num_masks, frames)
    elif targets.encoding == "values":
        # As they are kept, without void pixels.
        kept = zip(targets.data.split([each.numel() for each in stored]), stored, strict=True)
        values = [data.view(each.shape) for data, each in kept]
        found = torch.cat([(each != 0).unflatten(1, (frames, -1)).flatten(2).any(2) for each in values])
    else:
        # One frame after the other: all pixels of all ids at once would be the dense masks.
        listed = zip(stored, targets.table[:, LABEL].split(list(targets.num_targets)), strict=True)
        found = torch.cat([_occurrences(each.unflatten(0, (frames, -1)), ids) for each, ids in listed])
    return replace(stacked_up, present=found)


def _occurrences(labels: Tensor, ids: Tensor) -> Tensor:
    """Return in which frames of a label map `[T, H, W]` ids `[N]` occur: bool `[N, T]`."""
    return torch.stack([(frame == ids[:, None]).any(1) for frame in labels.flatten(1)], 1)


def planes(targets: P) -> P:
    """Describe the frames of each target on their own: an image with N * T targets, target n in frame t as n * T + t.

    Returns:
        The same pixels as targets of images; themselves if that is what they are.
    """
    count = targets.frames
    if count == 1:
        return targets
    table = targets.table.repeat_interleave(count, 0)
    frame = torch.arange(count, device=table.device).repeat(targets.num_masks)
    height = table[:, FRAME_H] // count
    top = table[:, TOP]
    first = torch.maximum(top, frame * height)
    last = torch.minimum(top + table[:, CROP_H], (frame + 1) * height)
    inside = last > first
    table[:, OFFSET] += torch.where(inside, first - top, 0) * table[:, STRIDE]
    table[:, TOP] = torch.where(inside, first - frame * height, 0)
    table[:, CROP_H] = torch.where(inside, last - first, 0)
    table[:, FRAME_H] = height
    table[:, IGNORE_OFFSET] = frame * height * ((table[:, FRAME_W] + 7) // 8)
    images = targets.images.clone()
    for column in (COUNT, FIRST):  # one by one: a list would be copied to the device, which waits
        images[:, column] *= count
    for column in (IMAGE_H, IGNORE_H):
        images[:, column] //= count
    numbers = tuple(number * count for number in targets.num_targets)
    return replace(targets, table=table, images=images, num_targets=numbers, frames=1, present=None)
