"""The number of instances over ranks and accumulation steps, which normalises the loss.

With gradients averaged over R ranks, dividing each rank's sum by `max(total / R, 1)` gives the gradient of one
process that holds the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from maskloss.errors import Cause, describe, reported
from maskloss.targets.bits import on_host


class StepTotals(NamedTuple):
    """What a training step holds over all its ranks and micro-batches, divided by the number of ranks.

    Attributes:
        instances: matched instances of one decoder layer, per rank; not yet at least 1. Number, or float tensor `[]`.
        queries: predicted queries (B times Q), per rank. Number, or float tensor `[]`.
    """

    instances: float | Tensor
    queries: float | Tensor


def rank() -> int:
    """Return this process's rank, 0 without torch.distributed."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without torch.distributed."""
    return dist.get_world_size() if _is_distributed() else 1


def mean_over_ranks(counts: Sequence[float], device: torch.device) -> list[float | Tensor]:
    """Average host-side counts over the ranks, in one reduction.

    Args:
        counts: numbers that every rank has, in the same order.
        device: where the reduction runs; a CUDA device for NCCL, the CPU for gloo.

    Returns:
        The numbers themselves with one rank; otherwise float32 tensors `[]` on `device`, which are not waited for.
    """
    if world_size() == 1:
        return list(counts)
    # Filled there and not copied there: a copy from pageable memory waits.
    total = torch.stack([torch.full((), count, dtype=torch.float32, device=device) for count in counts])
    dist.all_reduce(total)
    return list((total / world_size()).unbind())


def mean_of_tensor(count: Tensor) -> Tensor:
    """Average a device-side count `[]` over the ranks."""
    if world_size() == 1:
        return count
    total = count.clone()
    dist.all_reduce(total)
    return total / world_size()


@reported("step_totals")
def step_totals(
    num_targets: Sequence[Sequence[int]], num_queries: int, *, device: torch.device | str = "cpu"
) -> StepTotals:
    """Count the instances of a whole training step, for gradient accumulation.

    Call it once per step, on every rank, before the first micro-batch, and give the result to `MaskCriterion` with
    every micro-batch: the gradients of the micro-batches then add up to that of the whole batch.

    Args:
        num_targets: for each micro-batch of this rank, the number of targets of each of its images
            (`MaskTargets.num_targets`, or `[len(t["labels"]) for t in targets]`).
        num_queries: Q, queries per image; an image with more targets has Q matched instances.
        device: where the sum over the ranks runs; a CUDA device for NCCL.

    Returns:
        The totals, divided by the number of ranks.

    Raises:
        MaskLossError: a negative number of targets, or fewer than one query.

    Example:
        >>> step_totals([[3, 5], [0, 2]], num_queries=100)
        StepTotals(instances=10.0, queries=400.0)
    """
    if not isinstance(num_queries, int) or num_queries < 1:
        raise Cause("num_queries must be a positive integer", f"num_queries={num_queries!r}", "it is Q of the logits")
    if not isinstance(num_targets, Sequence) or not all(isinstance(counts, Sequence) for counts in num_targets):
        raise Cause(
            "num_targets must list the micro-batches, and of each the number of targets of its images",
            f"got {describe(num_targets)}",
            "a step of a single batch is [targets.num_targets]",
        )
    counts = [count for micro_batch in num_targets for count in micro_batch]
    if min(counts, default=0) < 0:
        raise Cause("numbers of targets must not be negative", f"got {min(counts)}", "count the masks of each image")
    matched = sum(min(count, num_queries) for count in counts)
    return StepTotals(*mean_over_ranks([float(matched), float(num_queries * len(counts))], torch.device(device)))


def image_numbers(image_ids: Tensor | Sequence[int] | None, batch: int, device: torch.device) -> Tensor:
    """Number the images of this batch globally: int64 `[B]`. Default: consecutive over the ranks."""
    if image_ids is None:
        first = rank() * batch
        return torch.arange(first, first + batch, device=device)
    ids = torch.as_tensor(image_ids)
    if ids.shape != (batch,) or ids.dtype not in (torch.int64, torch.int32):
        raise Cause(
            "image_ids must hold one integer per image",
            f"got {describe(ids)} for {batch} image{'s' * (batch != 1)}",
            "number the images of all ranks and micro-batches of a step",
        )
    if on_host(ids) and batch and not 0 <= int(ids.min()) <= int(ids.max()) < 2**32:
        raise Cause(
            "image_ids must lie in [0, 2^32)",
            f"they reach from {int(ids.min())} to {int(ids.max())}",
            "number the images, do not hash them: the generator has 32 bits for an image",
        )
    return ids.to(device=device, dtype=torch.int64, non_blocking=True).contiguous()


def at_least_one(count: float | Tensor) -> float | Tensor:
    """Bound a normaliser below by 1, without waiting for a device."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(float(count), 1.0)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
