"""Dense masks: what is accepted, which pixels of them are void, and whether they are soft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskloss._abi import OFFSET, PLACE_COLUMNS
from maskloss._numbers import check_integer, is_float
from maskloss._tracing import on_host, plain
from maskloss.errors import Cause, check_layout, describe
from maskloss.targets.bits import VOID_HINT
from maskloss.targets.frames import Stored


def check_void(value: Any, *, dense: bool) -> int | None:
    """Check the value of void pixels; in dense masks, 0 and 1 are taken."""
    if value is None:
        return None
    hint = "255 and -1 are usual"
    number = check_integer("ignore_value", value, -(2**63), hint=hint)
    if dense and number in (0, 1):
        raise Cause(
            "ignore_value must be neither 0 nor 1 where masks are dense",
            f"ignore_value={number}",
            "0 is outside and 1 inside; ignore= takes a region apart from the masks",
        )
    return number


def where_void(pixels: Tensor, value: int) -> Tensor:
    """Mark void pixels: bool, of the shape of `pixels`."""
    limits = None if pixels.is_floating_point() or pixels.dtype == torch.bool else torch.iinfo(pixels.dtype)
    if pixels.dtype == torch.bool or (limits is not None and not limits.min <= value <= limits.max):
        # The type cannot hold the value; a comparison would wrap it around.
        return torch.zeros_like(pixels, dtype=torch.bool)
    return pixels == value


def without_void(masks: Tensor, value: int) -> tuple[Tensor, Tensor]:
    """Take the void pixels out of masks `[T, H, W]`, and say where they are in any of them, bool `[H, W]`."""
    void = where_void(masks, value)
    return masks.masked_fill(void, 0), void.any(0)


def check_masks(masks: Any, device: torch.device) -> Tensor:
    """Take the masks of an image, `[T, H, W]`, or what an augmentation leaves of one without any: `[0]` or None."""
    check_layout("masks", masks)
    given, masks = masks, plain(masks)
    if masks is None or (isinstance(masks, Tensor) and tuple(masks.shape) == (0,)):
        return torch.zeros(0, 0, 0, dtype=torch.bool, device=device)
    if not isinstance(masks, Tensor) or masks.ndim != 3:
        single = isinstance(masks, Tensor) and masks.ndim == 4 and masks.shape[1] == 1
        raise Cause(
            "masks must be a tensor or an array [T, H, W]",
            f"got {describe(given)}",
            "masks[:, 0] has no channel"
            if single
            else "a single mask is masks[None], a list of single ones torch.stack(masks)",
        )
    if masks.is_complex() or (masks.is_floating_point() and not is_float(masks)):
        raise Cause("masks must be bool, integer or float", f"got {masks.dtype}", "masks.bool() converts")
    return masks


def check_values(masks: Tensor) -> None:
    """Raise if masks on the host are integers other than 0 and 1, or floats outside [0, 1]."""
    if masks.dtype == torch.bool or not masks.numel():
        return
    low, high = (float(each) for each in masks.detach().aminmax())
    if not 0 <= low <= high <= 1:
        kind = "soft masks must lie in [0, 1]" if masks.is_floating_point() else "integer masks must be 0 or 1"
        more = (
            "divide masks in [0, 255] by 255, or compare with a threshold"
            if masks.is_floating_point()
            else "masks > 0 if every other value is inside; a map of instance ids goes to MaskTargets.from_label_map"
        )
        raise Cause(kind, f"values reach from {low:g} to {high:g}", f"{VOID_HINT}; {more}")


def check_devices(images: Sequence[Tensor]) -> None:
    """Raise if images are on several devices."""
    devices = sorted({str(image.device) for image in images})
    if len(devices) > 1:
        raise Cause(
            "the targets of a batch must be on one device", f"got {', '.join(devices)}", "move all of them to one"
        )


def whole(masks: Tensor, stride: int) -> Stored:
    """Describe masks `[T, H, W]` that are stored from edge to edge, `stride` elements a row."""
    count, height, width = masks.shape
    place = np.zeros((count, PLACE_COLUMNS), dtype=np.int64)
    place[:] = (0, stride, 0, 0, height, width)
    place[:, OFFSET] = np.arange(count) * (height * stride)
    return Stored(place, count * height * stride, (height, width))


def are_soft(images: Sequence[Tensor], soft: bool | None) -> bool:
    """Decide for a whole batch, which must have one encoding, whether its masks are kept as soft values."""
    if soft is not None and not isinstance(soft, bool):
        raise Cause("soft must be True, False or None", f"soft={describe(soft)}", "None: on a CPU the values decide")
    floats = [image for image in images if image.is_floating_point()]
    if soft is False or not floats:
        return False
    return soft is True or not all(on_host(image) and bool((image == (image != 0)).all()) for image in floats)
