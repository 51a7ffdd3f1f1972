"""One step as a digest of all its bits: importable by processes however they are started."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from maskloss import CriterionOutput, MaskCriterion, PointSampling

IMAGES = 3


def inputs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[dict[str, Any]]]:
    """Class logits and mask logits of two layers, and the targets of three images."""
    drawn = torch.Generator().manual_seed(7)
    classes = [torch.randn(IMAGES, 12, 4, generator=drawn).to(dtype) for _ in range(2)]
    masks = [torch.randn(IMAGES, 12, 40, 37, generator=drawn).to(dtype) * 3 for _ in range(2)]
    targets = [
        {
            "masks": torch.rand(count, 80, 74, generator=drawn) > 0.6,
            "labels": torch.randint(3, (count,), generator=drawn),
        }
        for count in (5, 0, 9)
    ]
    return classes, masks, targets


def run(
    backend: str, images: Sequence[int] = range(IMAGES), layout: str = "independent"
) -> tuple[CriterionOutput, list[Tensor]]:
    """A step on some of the images, and the gradients of its mask logits."""
    classes, masks, targets = inputs()
    chosen = list(images)
    leaves = [layer[chosen].requires_grad_() for layer in masks]
    criterion = MaskCriterion(3, sampling=PointSampling(num_points=300, layout=layout), backend=backend)
    out = criterion(
        [layer[chosen] for layer in classes],
        leaves,
        [targets[image] for image in chosen],
        seed=11,
        image_ids=[100 + image for image in chosen],
    )
    return out, list(torch.autograd.grad(out.total, leaves))


def digest(backend: str, threads: int | None = None) -> str:
    """A digest of the bits of losses, matches and gradients, computed on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        out, gradients = run(backend)
    finally:
        torch.set_num_threads(before)
    bits = sha256()
    for tensor in (out.total, out.loss_class, *out.per_instance, out.matches.index, *gradients):
        bits.update(tensor.detach().numpy().tobytes())
    return bits.hexdigest()
