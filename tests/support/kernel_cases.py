"""Configurations of the Triton kernels and their inputs, on a GPU or under Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from maskloss._abi import INDEX_COLUMNS, Term
from maskloss.ops import reference
from maskloss.targets import MaskTargets
from support.batches import Batch, Sampling

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# Of the largest value: sums of float32 in another order; half precision rounds a gradient once (the interpreter cuts
# off the digits of a bfloat16).
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
    torch.float16: 2**-10,
}


@dataclass(frozen=True)
class Case:
    """One configuration. `sampling` is P, K, the number of uncertain points, and the layout."""

    dtype: torch.dtype = torch.float32
    sizes: tuple[tuple[int, int], ...] = ((13, 9),)
    frame: tuple[int, int] = (21, 30)
    targets: str = "bits"
    sampling: Sampling = (123, 369, 92)
    padding: str = "zeros"
    target_mode: str = "bilinear"
    focal: tuple[float, float] = (-1.0, -1.0)
    dice: str = "standard"
    extra: bool = False
    given: bool = False
    rows: tuple[tuple[int, int, int, int], ...] = ((0, 0, 1, 1), (0, 1, 0, 0))

    @property
    def layout(self) -> str:
        return self.sampling[3] if len(self.sampling) > 3 else "independent"

    def term(self) -> Term:
        return Term(self.padding, self.target_mode, *self.focal, self.dice)


class Inputs:
    """The tensors of a case, and the operations called with them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.targets = _targets(case).to(DEVICE)
        self.logits = [_logits(case, size) for size in case.sizes]
        self.index = torch.tensor(case.rows, dtype=torch.int64).reshape(-1, INDEX_COLUMNS).to(DEVICE)
        self.layer_sizes = [sum(row[0] == layer for row in case.rows) for layer in range(len(case.sizes))]
        self.image_ids = torch.tensor([7, 2**32 + 3], device=DEVICE)
        self.seed = torch.tensor(-(2**61) + 987654321)
        self.points = None
        if case.given:
            points = torch.rand(len(case.rows), 2, case.sampling[0]).transpose(1, 2) * 1.4 - 0.2
            points[0, 0], points[0, 1, 0], points[-1, 2] = 1.0, -50.0, 0.0
            self.points = points.to(DEVICE)

    def exact(self) -> Inputs:
        """The same points on float64 logits."""
        other = Inputs.__new__(Inputs)
        other.__dict__.update(self.__dict__)
        if self.points is None:
            other.points = self.drawn(reference)
        other.logits = [layer.double() for layer in self.logits]
        return other

    def batch(self) -> Batch:
        return Batch(self.logits, self.index, self.layer_sizes, self.targets, self.image_ids, self.seed)

    def drawn(self, ops: Any) -> Tensor:
        return self.batch().points(ops, self.case.sampling, self.case.padding)

    def loss(self, ops: Any) -> tuple[Tensor, ...]:
        return self.batch().loss(ops, self.case.sampling, self.case.term(), self.points)

    def gradients(
        self, ops: Any, saved: tuple[Tensor, ...], needed: list[bool] | None = None, live: Tensor | float = 1.0
    ) -> list[Tensor]:
        case = self.case
        return self.batch().gradients(ops, saved, case.sampling, case.term(), self.points, needed, live)

    def costs(self, ops: Any, num_points: int) -> tuple[Tensor, Tensor]:
        return self.batch().costs(ops, num_points, self.case.term(), self.case.layout)


def _logits(case: Case, size: tuple[int, int]) -> Tensor:
    """Strided in every dimension, and larger than what is read of it."""
    height, width = size
    whole = (torch.randn(3, width, 2, height, 2) * 3).to(case.dtype).to(DEVICE)
    return whole.permute(2, 0, 3, 1, 4)[..., 0][:, :2]


def _targets(case: Case) -> MaskTargets:
    kind, _, dtype = case.targets.partition(" ")
    height, width = case.frame
    images = []
    for count in (2, 3):
        options: dict[str, Any] = {}
        if case.extra:
            options["ignore"] = torch.rand(height, width) > 0.6
            options["canvas"] = (height + 3, width + 1)
            options["valid"] = (1, 2, height - 2, width - 5)
        if kind == "labels":
            label_map = torch.randint(5, (height, width)).to(getattr(torch, dtype))
            images.append(MaskTargets.from_label_map(label_map, range(1, count + 1), allow_missing=True, **options))
        elif kind == "values":
            images.append(
                MaskTargets.from_masks(torch.rand(count, height, width).to(getattr(torch, dtype)), soft=True, **options)
            )
        else:
            masks = torch.zeros(count, height, width, dtype=torch.bool)
            masks[0, height // 3 :, : width // 2 + 1] = True
            masks[1] = torch.rand(height, width) > 0.5
            images.append(MaskTargets.from_masks(masks, **options))
    return MaskTargets.cat(images)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from maskloss.ops import gpu
    from maskloss.ops.gpu import choose, cost, loss, scatter

    for module in (choose, cost, loss, scatter, gpu):
        monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(choose, "WIDE", 128)
