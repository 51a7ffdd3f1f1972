"""What the criteria of all integrations do with the decoder layers of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskloss import _classification, _inputs, distributed
from maskloss.factors import Layer
from maskloss.loss import InstanceLosses, MaskLoss
from maskloss.matches import Matches, wanted_classes
from maskloss.ops.abi import IMAGE, TARGET
from maskloss.points import draw_seed
from maskloss.targets import MaskTargets
from maskloss.targets.collate import collate


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
        numbers = distributed.image_numbers(None, logits.shape[0], logits.device)
        return Step(packed, joined, numbers, draw_seed())

    def target_rows(self, index: Tensor) -> Tensor:
        """Number the targets of matches `[N, 4]` over the whole batch: int64 `[N]`."""
        return self.targets.first_rows[index[:, IMAGE]] + index[:, TARGET]

    def wanted_classes(self, matches: Matches, shape: Sequence[int], no_object: int) -> Tensor:
        """Write the classes that queries should have, int64 `[L, B, Q]`; the unmatched ones get `no_object`."""
        return wanted_classes(matches, self.labels, self.targets.first_rows, shape, no_object)

    def mask_terms(self, loss: MaskLoss, logits: Sequence[Layer], matches: Matches) -> InstanceLosses:
        """Sum the mask terms of each layer over its instances: `[L]` each, not yet divided by anything."""
        losses = loss.instance_losses(logits, matches, self.targets, self.image_ids, self.seed)
        sizes = list(matches.layer_sizes)
        return InstanceLosses(*(torch.stack([part.sum() for part in term.split(sizes)]) for term in losses))


def accumulated(tensor: Tensor) -> Tensor:
    """Upcast half precision: everything is summed in float32, and in float64 where the input is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def mean_count(count: float, device: torch.device) -> float | Tensor:
    """Average a number of instances over the ranks, at least 1."""
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
    total = _classification.above_zero(_classification.weight_sums(wanted, weights))
    return _classification.softmax_sums(class_logits, wanted, weights) / total
