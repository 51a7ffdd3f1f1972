"""The logits of all decoder layers, dense or as factors: which operations compute their costs and losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskloss import ops
from maskloss._abi import IMAGE, LAYER, Stack
from maskloss.factors import MaskFactors, joined
from maskloss.matches import Matches
from maskloss.ops import Job, Reduction

Layer = Tensor | MaskFactors


def with_masks(layers: Sequence[Layer | None]) -> tuple[tuple[int, ...], list[Layer]]:
    """List the layers that have masks: their numbers, and their logits."""
    numbers = tuple(number for number, layer in enumerate(layers) if layer is not None)
    return numbers, [layer for layer in layers if layer is not None]


def spread(values: Tensor, numbers: Sequence[int], count: int) -> Tensor:
    """Put the values of some layers at their places among those of all, which are 0."""
    if len(numbers) == count:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, places(numbers, values.device), values)


def places(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Take numbers of layers to a device; a list as an index would be copied there, which waits."""
    return torch.tensor(numbers, device="cpu").to(device, non_blocking=True)


def match_cost(
    layers: Sequence[Layer], num_targets: Sequence[int], job: Job, backend: str, stack: Stack | None = None
) -> tuple[Tensor, Tensor]:
    """Compute both mask terms of the matching cost, `[L, B, Q, T_max]` each.

    Those of clips with targets as planes; of whole clips and volumes, which `stack` describes, with targets as stored.
    """
    if stack is not None:
        return ops.volume_cost(_formed(layers), num_targets, job, stack, backend)
    dense, factored = _alike(layers, backend)
    if factored:
        return ops.factored_match_cost(joined(factored), num_targets, job, backend)
    return ops.match_cost(dense, num_targets, job, backend)


def mask_loss(
    layers: Sequence[Layer],
    matches: Matches,
    job: Job,
    backend: str,
    reduction: Reduction | None = None,
    stack: Stack | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and Dice `[N]` of instances; of clips they are planes, query q in frame t is q * T + t."""
    if stack is not None:
        instances = ops.Instances(_formed(layers), matches.index, matches.layer_sizes)
        return ops.volume_loss(instances, job, stack, backend, reduction)
    dense, factored = _alike(layers, backend)
    index, sizes = matches.index, matches.layer_sizes
    if not factored:
        dense = [layer.flatten(1, 2) if layer.ndim == 5 else layer for layer in dense]
        return ops.mask_loss(ops.Instances(dense, index, sizes), job, backend, reduction)
    factors = joined(factored)
    if matches.counts is not None:
        return ops.factored_mask_loss(factors, index, matches.counts, job, backend)
    block = index[:, LAYER] * matches.batch_size + index[:, IMAGE]
    counts = block.bincount(minlength=len(layers) * matches.batch_size).tolist()
    order = block.argsort(stable=True)
    given = job if job.points is None else job._replace(points=job.points[order])
    ce, dice = ops.factored_mask_loss(factors, index[order], counts, given, backend)
    back = order.argsort()
    return ce[back], dice[back]


def _alike(layers: Sequence[Layer], backend: str) -> tuple[list[Tensor], list[MaskFactors]]:
    """List the layers as dense or as factored ones: all are formed if some are dense, and in the reference backend."""
    factored = [layer for layer in layers if isinstance(layer, MaskFactors)]
    if len(factored) == len(layers) and backend != "reference":
        return [], factored
    return _formed(layers), []


def _formed(layers: Sequence[Layer]) -> list[Tensor]:
    return [layer.dense() if isinstance(layer, MaskFactors) else layer for layer in layers]
