"""What the criteria of all integrations do with the decoder layers of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from maskloss import _classification, _inputs, distributed, ops
from maskloss._abi import IMAGE, TARGET
from maskloss.distributed import StepTotals
from maskloss.layers import Layer
from maskloss.loss import InstanceLosses, MaskLoss
from maskloss.matcher import HungarianMatcher
from maskloss.matches import Matches, wanted_classes
from maskloss.points import draw_seed
from maskloss.targets import MaskTargets
from maskloss.targets.collate import collate


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
    def begin(targets: MaskTargets, labels: Sequence[Tensor], logits: Layer) -> Step:
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
        return self.targets.first_rows[index[:, IMAGE]] + index[:, TARGET]

    def wanted_classes(self, matches: Matches, shape: Sequence[int], no_object: int) -> Tensor:
        """Write the classes that queries should have, int64 `[L, B, Q]`; the unmatched ones get `no_object`."""
        return wanted_classes(matches, self.labels, self.targets.first_rows, shape, no_object)

    def mask_terms(
        self, loss: MaskLoss, logits: Sequence[Layer], matches: Matches, reduction: ops.Reduction
    ) -> InstanceLosses:
        """Sum the mask terms of each layer over its instances: `[L]` each, not yet divided by anything.

        `reduction` tells what the training loop will make of them, as far as that is known.
        """
        losses = loss.instance_losses(logits, matches, self.targets, self.image_ids, self.seed, reduction=reduction)
        sizes = list(matches.layer_sizes)
        return InstanceLosses(*(torch.stack([part.sum() for part in term.split(sizes)]) for term in losses))


def match(
    matcher: HungarianMatcher,
    class_logits: Tensor,
    mask_logits: Sequence[Layer],
    step: Step,
    extra_costs: Tensor | None = None,
) -> Matches:
    """Match all layers, where labels may lie in [0, C]: the original criteria train on targets of class "no object".

    Args:
        matcher: its weights and options.
        class_logits: `[L, B, Q, C + 1]`, or `[L, B, Q, C]` for the classification "focal".
        mask_logits: one `[B, Q, h, w]` per layer.
        step: targets and seed.
        extra_costs: `[L, B, Q, T_max]`, or None.
    """
    logits, outputs = class_logits.detach(), class_logits.shape[-1]
    cost = matcher.costs(logits, mask_logits, step.targets, step.labels, step.image_ids, step.seed, extra_costs)
    index, wanted = ops.assign(cost, step.labels, step.targets.num_targets, outputs)
    # A query without a target has the first number that is no label, which is one too many if C is a label as well.
    no_object = outputs - (matcher.classification == "softmax")
    queries, counts = class_logits.shape[2], step.targets.num_targets
    sizes = (ops.count_matches(counts, queries),) * len(mask_logits)
    matched = ops.matched_counts(counts, queries) * len(mask_logits)
    return Matches(index, sizes, queries, counts, wanted.clamp(max=no_object), no_object, matched)


def accumulated(tensor: Tensor) -> Tensor:
    """Upcast half precision: everything is summed in float32, and in float64 where the input is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def likely_reduction(weights: Mapping[str, float], count: float | Tensor) -> ops.Reduction:
    """Tell how a training loop sums mask terms that it weighs by these, and that are divided by `count`."""
    return ops.Reduction(weights.get("loss_mask", 1.0), weights.get("loss_dice", 1.0), count)


def mean_count(count: float, device: torch.device) -> float | Tensor:
    """Average a number of instances over the ranks, at least 1; the step's, if a training loop has given it."""
    told = _given.get()
    if told is not None:
        return distributed.at_least_one(told.totals.instances)
    return distributed.at_least_one(distributed.mean_over_ranks([count], device)[0])


def weighted_cross_entropy(class_logits: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Divide the weighted cross-entropy of each layer by the sum of the weights on this rank, as the originals do.

    Args:
        class_logits: `[L, B, Q, C + 1]`, float32 or float64.
        wanted: int64 `[L, B, Q]`.
        weights: `[C + 1]`.

    Returns:
        `[L]`.
    """
    weights = weights.to(class_logits)
    told = _given.get()
    summed = _classification.weight_sums(wanted, weights) if told is None else _step_weight(told.totals, weights)
    return _classification.softmax_sums(class_logits, wanted, weights) / _classification.above_zero(summed)


def _step_weight(totals: StepTotals, weights: Tensor) -> Tensor:
    """Sum the weights of all queries of a step, `[]`; Transformers weighs all classes alike, but not "no object"."""
    return weights[0] * totals.instances + weights[-1] * (totals.queries - totals.instances)
