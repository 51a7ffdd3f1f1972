"""Dense masks: what is accepted, and whether they are soft."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskloss._abi import OFFSET, PLACE_COLUMNS
from maskloss._tracing import on_host
from maskloss.errors import Cause, check_layout, describe
from maskloss.targets.frames import Stored


def check_masks(masks: Tensor) -> None:
    """Raise unless masks are `[T, H, W]` and of a type that can be packed or kept."""
    check_layout("masks", masks)
    if not isinstance(masks, Tensor) or masks.ndim != 3:
        raise Cause(
            "masks must be a tensor [T, H, W]",
            f"got {describe(masks)}",
            "a single mask is masks[None]; label maps go with their ids; torch.as_tensor converts arrays",
        )
    if masks.dtype not in (torch.bool, torch.uint8) and not masks.is_floating_point():
        raise Cause(
            "masks must be bool, uint8 or float",
            f"got {masks.dtype}",
            "an integer map of instance ids goes to MaskTargets.from_label_map",
        )


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
        raise Cause("soft must be True, False or None", f"soft={soft!r}", "None: on a CPU the values decide")
    floats = [image for image in images if image.is_floating_point()]
    if soft is False or not floats:
        return False
    on_cpu = [image for image in floats if on_host(image)]
    if soft is None and len(on_cpu) == len(floats) and all(bool(((i == 0) | (i == 1)).all()) for i in floats):
        return False
    for image in on_cpu:
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise Cause(
                "soft masks must lie in [0, 1]",
                f"values reach from {float(image.min()):g} to {float(image.max()):g}",
                "divide masks in [0, 255] by 255, or compare with a threshold",
            )
    return True
