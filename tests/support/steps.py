"""Predictions and targets of a small step, shared by the tests of matching and criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskloss import (
    CriterionOutput,
    HungarianMatcher,
    MaskCriterion,
    MaskTargets,
    PointSampling,
)
from maskloss.step import Step

CLASSES, QUERIES = 3, 5
FEW = PointSampling(num_points=60)
# One pair of layers of different sizes, three images: some targets, none, more targets than queries.
SIZES = ((9, 12), (16, 7))
COUNTS = (3, 0, 7)


def entries(counts: Sequence[int] = COUNTS, size: tuple[int, int] = (20, 26)) -> list[dict[str, Any]]:
    return [{"masks": torch.rand(n, *size) > 0.6, "labels": torch.randint(CLASSES, (n,))} for n in counts]


def predictions(
    images: int = len(COUNTS), sizes: Sequence[tuple[int, int]] = SIZES, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Class and mask logits of each layer, leaves."""
    classes = [torch.randn(images, QUERIES, CLASSES + 1).to(dtype).requires_grad_() for _ in sizes]
    masks = [(2 * torch.randn(images, QUERIES, *size)).to(dtype).requires_grad_() for size in sizes]
    return classes, masks


def criterion(backend: str, **options: Any) -> MaskCriterion:
    return MaskCriterion(CLASSES, **{"sampling": FEW, "backend": backend, **options})


def gradients(out: CriterionOutput, *layers: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out.total, [logits for listed in layers for logits in listed], retain_graph=True))


def costs(
    matcher: HungarianMatcher, classes: Sequence[Tensor], masks: Sequence[Tensor], targets: Any, seed: int
) -> Tensor:
    packed = MaskTargets.from_masks([entry["masks"] for entry in targets])
    labels = torch.cat([entry["labels"] for entry in targets])
    numbers = torch.arange(len(targets))
    layers = torch.stack([layer.detach() for layer in classes])
    return matcher.costs(layers, [layer.detach() for layer in masks], Step(packed, labels, numbers, torch.tensor(seed)))
