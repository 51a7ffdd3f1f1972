"""The number of instances over ranks and accumulation steps, by which the loss is normalized.

With gradients averaged over R ranks, dividing each rank's sum by `max(total / R, 1)` gives the gradient of one
process that holds the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from maskloss import _inputs
from maskloss._numbers import check_integer
from maskloss._tracing import as_device, as_tensor, on_host
from maskloss.errors import Cause, describe, reported
from maskloss.targets.collate import check_labels


class StepTotals(NamedTuple):
    """What a training step holds over all its ranks and micro-batches, divided by the number of ranks.

    Numbers, or tensors of one element, finite and at least 0. Tensors on a device are used as they are, since looking
    at them would wait for it: a NaN there makes the loss NaN.

    Attributes:
        instances: matched instances of one decoder layer, per rank; not yet at least 1.
        queries: predicted queries (B times Q), per rank.
        instance_weight: the sum of the matched instances' weights, per rank. Needed with `instance_weights`.
        class_weight: the sum of the matched targets' class weights, per rank. Needed by a softmax with `class_weights`.
    """

    instances: float | Tensor
    queries: float | Tensor
    instance_weight: float | Tensor | None = None
    class_weight: float | Tensor | None = None


# Whom a step counts with: None, all ranks; a group of them; False, nobody.
Group: TypeAlias = "dist.ProcessGroup | Literal[False] | None"


def rank() -> int:
    """Return this process's rank, 0 without torch.distributed."""
    return dist.get_rank() if _is_distributed() else 0


def check_group(group: Group) -> None:
    """Raise if a group is none, or if this rank is not in it."""
    if group is None or group is False:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise Cause(
            "group must be a process group that this rank is in, False or None",
            f"got {describe(group)}",
            "torch.distributed.new_group makes one; False counts this rank alone, None all ranks",
        )


def world_size(group: Group) -> int:
    """Count the ranks of a group; False is this rank alone."""
    return dist.get_world_size(group) if group is not False and _is_distributed() else 1


def mean_over_ranks(
    counts: Sequence[float | Tensor], device: torch.device, group: Group = None
) -> list[float | Tensor]:
    """Average counts over the ranks of a group, in one reduction.

    Args:
        counts: numbers or tensors that every rank has, in the same order and of the same shapes.
        device: where the reduction runs; a CUDA device for NCCL, the CPU for gloo.
        group: None: all ranks; False: no reduction.

    Returns:
        The counts themselves with one rank; otherwise float tensors on `device`, which are not waited for.
    """
    size = world_size(group)
    if size == 1:
        return list(counts)
    # Filled there and not copied there: a copy from pageable memory waits.
    parts = [
        count.to(device) if isinstance(count, Tensor) else torch.full((), count, dtype=torch.float32, device=device)
        for count in counts
    ]
    total = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(total, group=group)
    means = (total / size).split([part.numel() for part in parts])
    return [mean.view(part.shape) for mean, part in zip(means, parts, strict=True)]


@reported("step_totals")
def step_totals(
    num_targets: Sequence[Sequence[int]],
    num_queries: int,
    *,
    instance_weights: Sequence[Sequence[Tensor]] | None = None,
    labels: Sequence[Sequence[Tensor]] | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    ignore_label: int | None = None,
    device: torch.device | str = "cpu",
    group: Group = None,
) -> StepTotals:
    """Count the instances of a whole training step, for gradient accumulation.

    Call it once per step, on every rank, before the first micro-batch, and give the result to `MaskCriterion` with
    every micro-batch: the gradients of the micro-batches then add up to that of the whole batch.

    Args:
        num_targets: for each micro-batch of this rank, the number of targets of each of its images
            (`MaskTargets.num_targets`, or `[len(t["labels"]) for t in targets]`).
        num_queries: Q, queries per image; an image with more targets has Q matched instances.
        instance_weights: for each micro-batch, the weights `[T]` of each of its images, where the criterion is given
            `instance_weights`. Default None.
        labels: for each micro-batch, the labels `[T]` of each of its images; needed along with `class_weights` or
            `ignore_label`.
        class_weights: `[C]`, those of the criterion, where it classifies by a softmax. Default None.
        ignore_label: that of the criterion, where it classifies by a softmax. Default None.
        device: where the sum over the ranks runs; a CUDA device for NCCL.
        group: the process group over whose ranks to sum; False: this rank alone. Default None: all ranks.

    Returns:
        The totals, divided by the number of ranks.

    Raises:
        MaskLossError: a negative number of targets, fewer than one query, weights or labels that do not fit the
            targets, or weights together with an image that has more targets than queries: which of its targets count
            is known only after the matching.

    Example:
        >>> step_totals([[3, 5], [0, 2]], num_queries=100)
        StepTotals(instances=10.0, queries=400.0, instance_weight=None, class_weight=None)
    """
    check_integer("num_queries", num_queries, 1, hint="it is Q of the logits")
    check_group(group)
    if not isinstance(num_targets, Sequence) or not all(isinstance(counts, Sequence) for counts in num_targets):
        raise Cause(
            "num_targets must list the micro-batches, and for each the number of targets of its images",
            f"got {describe(num_targets)}",
            "a step of a single batch is [targets.num_targets]",
        )
    counts = [count for micro_batch in num_targets for count in micro_batch]
    for count in counts:
        check_integer("a number of targets", count, 0, hint="count the masks of each image")
    by_class = class_weights is not None or ignore_label is not None
    if (labels is None) == by_class:
        raise Cause(
            "labels need class_weights or ignore_label, and these need labels",
            "one of them is None",
            "the weight of a target is that of its class",
        )
    if (instance_weights is not None or by_class) and max(counts, default=0) > num_queries:
        raise Cause(
            "with weights, no image may have more targets than queries",
            f"an image has {max(counts)} targets for {num_queries} queries",
            "which of them count is known only after the matching: leave totals out, or raise the number of queries",
        )
    target = as_device(device)
    found: list[float | Tensor] = [
        float(sum(min(count, num_queries) for count in counts)),
        float(num_queries * len(counts)),
    ]
    if instance_weights is not None:
        parts = _by_image("instance_weights", instance_weights, num_targets)
        found.append(_total([part.to(torch.float32) for part in parts], target))
    if labels is not None:
        parts = _by_image("labels", labels, num_targets)
        weight = None if class_weights is None else _inputs.class_weights(class_weights)
        found.append(_total([_class_weight(part, weight, ignore_label) for part in parts], target))
    means = mean_over_ranks(found, target, group)
    instance_weight = means[2] if instance_weights is not None else None
    return StepTotals(means[0], means[1], instance_weight, means[-1] if by_class else None)


def _by_image(name: str, given: Sequence[Sequence[Tensor]], num_targets: Sequence[Sequence[int]]) -> list[Tensor]:
    """List what is given for each image of each micro-batch, after checking that there is one entry for each target."""
    try:
        listed = [as_tensor(part) for micro_batch in given for part in micro_batch]
        fits = [[len(as_tensor(part)) for part in micro_batch] for micro_batch in given] == [
            list(counts) for counts in num_targets
        ]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fits = False
    if not fits or any(part.ndim != 1 for part in listed):
        raise Cause(
            f"{name} must hold a tensor [T] for each image of each micro-batch",
            f"got {describe(given)}",
            "one entry for each target, in the order of num_targets",
        )
    return listed


def _class_weight(labels: Tensor, weights: Tensor | None, ignore_label: int | None) -> Tensor:
    """Look up the weights of the classes of an image's targets: `[T]`, 0 where the class is unknown."""
    unknown = torch.zeros_like(labels, dtype=torch.bool) if ignore_label is None else labels == ignore_label
    labels = labels.masked_fill(unknown, 0)
    if weights is not None:
        check_labels(labels, len(weights))
    found = (~unknown).float() if weights is None else weights.to(labels.device)[labels.long()]
    return found.masked_fill(unknown, 0)


def _total(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return sum((part.sum().to(device) for part in parts), torch.zeros((), device=device))


def image_numbers(image_ids: Tensor | Sequence[int] | None, batch: int, device: torch.device) -> Tensor:
    """Number the images of this batch globally: int64 `[B]`. Default: consecutive over the ranks."""
    if image_ids is None:
        first = rank() * batch
        return torch.arange(first, first + batch, device=device)
    try:
        ids = as_tensor(image_ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = torch.empty(0, device="cpu")  # no integers at any rate
    if ids.shape != (batch,) or ids.dtype not in (torch.int64, torch.int32):
        raise Cause(
            "image_ids must hold one integer in [0, 2^32) for each image",
            f"got {describe(image_ids)} for {batch} image{'s' * (batch != 1)}",
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
    """Bound a divisor below by 1, without waiting for a device."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(float(count), 1.0)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
