"""A batch, and the operations called with it: for every backend, on any device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskloss import MaskTargets
from maskloss._abi import Draw, Gradients, Instances, Job, Saved, Targets, Term

# P, K, the number of uncertain points, and the layout if it is not the default.
Sampling = tuple[int, int, int] | tuple[int, int, int, str]
PLAIN = Term()


def group(targets: MaskTargets) -> Targets:
    return Targets(targets.encoding, *targets.tensors)


class Batch(NamedTuple):
    logits: list[Tensor]
    index: Tensor
    layer_sizes: list[int]
    targets: MaskTargets
    image_ids: Tensor
    seed: Tensor

    @property
    def instances(self) -> Instances:
        return Instances(self.logits, self.index, self.layer_sizes)

    def draw(self, *numbers: Any) -> Draw:
        return Draw(self.image_ids, self.seed, *numbers)

    def job(self, sampling: Sampling, term: Term = PLAIN, points: Tensor | None = None) -> Job:
        return Job(group(self.targets), self.draw(*sampling), term, points)

    def loss(self, ops: Any, sampling: Sampling, term: Term = PLAIN, points: Tensor | None = None) -> Any:
        ce, dice, saved = ops.mask_loss(self.instances, self.job(sampling, term, points))
        return ce, dice, *saved

    def gradients(
        self,
        ops: Any,
        saved: Any,
        sampling: Sampling,
        term: Term = PLAIN,
        points: Tensor | None = None,
        needs_grad: list[bool] | None = None,
        live: Tensor | float = 1.0,
    ) -> list[Tensor]:
        """Gradients of a weighted sum of the losses; `saved` is what `loss` returned, `live` weighs the instances."""
        needed = needs_grad or [True] * len(self.logits)
        weights = self._weights(saved[0].dtype, live)
        return ops.mask_loss_backward(
            weights, Saved(*saved[2:]), self.instances, self.job(sampling, term, points), needed
        )

    def early_gradients(
        self, ops: Any, dtype: torch.dtype, sampling: Sampling, term: Term = PLAIN, points: Tensor | None = None
    ) -> list[Tensor]:
        """The same gradients, computed along with losses of this dtype."""
        job, needed = self.job(sampling, term, points), [True] * len(self.logits)
        found: list[Tensor] = ops.mask_loss_ahead(self._weights(dtype, 1.0), self.instances, job, needed)[-1]
        return found

    def _weights(self, dtype: torch.dtype, live: Tensor | float) -> Gradients:
        weight = torch.linspace(0.5, 1.5, len(self.index), dtype=dtype, device=self.index.device)
        return Gradients(weight * live, (2 - weight) * live)

    def points(self, ops: Any, sampling: Sampling, padding: str = "zeros") -> Tensor:
        return ops.uncertain_points(self.instances, self.draw(*sampling), self.targets.windows, padding)

    def costs(
        self, ops: Any, num_points: int, term: Term = PLAIN, layout: str = "independent"
    ) -> tuple[Tensor, Tensor]:
        return ops.match_cost(self.logits, self.targets.num_targets, self.job((num_points, 0, 0, layout), term))

    def exact(self) -> Batch:
        """The same in float64."""
        return self._replace(logits=[layer.double() for layer in self.logits])
