"""What the criteria of all integrations do with the decoder layers of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from maskloss import _inputs, distributed
from maskloss._collate import collate
from maskloss.distributed import StepTotals
from maskloss.loss import InstanceLosses, MaskLoss
from maskloss.matches import Matches, wanted_classes
from maskloss.points import draw_seed
from maskloss.targets import MaskTargets


class Given(NamedTuple):
    """What a training loop knows about a step and a model's `forward` has no arguments for.

    Attributes:
        totals: of the whole step, over its ranks and micro-batches.
        image_ids: of this batch within the step, int64 `[B]`.
        seed: of the step's points.
    """

    totals: StepTotals
    image_ids: Tensor
    seed: int


_given: ContextVar[Given | None] = ContextVar("_given", default=None)


@contextmanager
def given(totals: StepTotals, image_ids: Tensor, seed: int) -> Iterator[None]:
    """Let the criteria of patched models take these, so that micro-batches add up to the whole step exactly."""
    token = _given.set(Given(totals, image_ids, seed))
    try:
        yield
    finally:
        _given.reset(token)


@dataclass(frozen=True)
class Step:
    """The targets of a step, and what decides its points.

    Attributes:
        targets: of all images.
        labels: int64 `[T_all]`.
        image_ids: int64 `[B]`, global numbers of the images.
        seed: int64 `[]`.
    """

    targets: MaskTargets
    labels: Tensor
    image_ids: Tensor
    seed: Tensor

    @staticmethod
    def begin(targets: MaskTargets, labels: Sequence[Tensor], logits: Tensor) -> Step:
        """Check targets and labels against logits `[B, Q, h, w]`, and draw a seed from torch's default generator."""
        _inputs.check_targets(targets, logits)
        on_device = [
            label.to(logits.device, non_blocking=True) if isinstance(label, Tensor) else label for label in labels
        ]
        packed, joined = collate({"masks": targets, "labels": on_device})
        told = _given.get()
        ids = None if told is None else told.image_ids
        numbers = distributed.image_numbers(ids, logits.shape[0], logits.device)
        return Step(packed, joined, numbers, draw_seed() if told is None else draw_seed(told.seed))

    def target_rows(self, index: Tensor) -> Tensor:
        """Number the targets of matches `[N, 4]` over the whole batch: int64 `[N]`."""
        return self.targets.first_rows[index[:, 1]] + index[:, 3]

    def wanted_classes(self, matches: Matches, shape: Sequence[int], no_object: int) -> Tensor:
        """Write the classes that queries should have, int64 `[L, B, Q]`; the unmatched ones get `no_object`."""
        return wanted_classes(matches, self.labels, self.targets.first_rows, shape, no_object)

    def mask_terms(self, loss: MaskLoss, logits: Sequence[Tensor], matches: Matches) -> InstanceLosses:
        """Sum the mask terms of each layer over its instances: `[L]` each, not yet divided by anything."""
        losses = loss.instance_losses(logits, matches, self.targets, self.image_ids, self.seed)
        sizes = list(matches.layer_sizes)
        return InstanceLosses(*(torch.stack([part.sum() for part in term.split(sizes)]) for term in losses))


def accumulated(tensor: Tensor) -> Tensor:
    """Upcast half precision: everything is summed in float32, and in float64 where the input is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def mean_count(count: float, device: torch.device) -> float | Tensor:
    """Average a number of instances over the ranks, at least 1; the step's, if a training loop has given it."""
    told = _given.get()
    if told is not None:
        return distributed.at_least_one(told.totals.instances)
    return distributed.at_least_one(distributed.mean_over_ranks([count], device)[0])


def weighted_cross_entropy(class_logits: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Compute the cross-entropy of each layer, weighted by class and divided by the sum of the weights: `[L]`.

    Args:
        class_logits: `[L, B, Q, C + 1]`, float32 or float64.
        wanted: int64 `[L, B, Q]`.
        weights: `[C + 1]`.
    """
    weights = weights.to(class_logits)
    nll = cross_entropy(class_logits.flatten(0, 2), wanted.flatten(), weights, reduction="none")
    told = _given.get()
    total = weights[wanted].flatten(1).sum(1) if told is None else _step_weight(told.totals, weights)
    total = total.clamp(min=torch.finfo(weights.dtype).tiny)
    return nll.view(len(class_logits), -1).sum(1) / total


def _step_weight(totals: StepTotals, weights: Tensor) -> Tensor:
    """Sum the weights of all queries of a step, `[]`; Transformers weighs all classes alike, but not "no object"."""
    return weights[0] * totals.instances + weights[-1] * (totals.queries - totals.instances)
