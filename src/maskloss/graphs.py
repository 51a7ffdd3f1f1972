"""The criterion in a CUDA graph: targets of a fixed size, whatever an image holds, and the capture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from maskloss import _abi
from maskloss._numbers import check_integer
from maskloss.criterion import MaskCriterion
from maskloss.distributed import StepTotals
from maskloss.errors import Cause, reported
from maskloss.layers import Layer
from maskloss.matcher import check_costs, check_predictions
from maskloss.options import TargetRules
from maskloss.outputs import CriterionOutput
from maskloss.step import Step, check_whole
from maskloss.targets import MaskTargets
from maskloss.targets.collate import Batch, Entries, collate

__all__ = ["Captured", "PaddedTargets", "bucket", "capture", "pad_targets", "padded_loss"]

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class PaddedTargets:
    """Targets of a batch, filled up to sizes that do not depend on it (see `pad_targets`).

    Attributes:
        masks: with T masks in every image; those that were added are empty.
        labels: int64 `[B * T]`; -1 where there is no target.
        counts: int64 `[B]`, the targets that each image really has.
    """

    masks: MaskTargets
    labels: Tensor
    counts: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a graph reads."""
        return (*self.masks.tensors, self.labels, self.counts)

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> PaddedTargets:
        """Copy to a device."""
        moved = (each.to(device, non_blocking=non_blocking) for each in (self.labels, self.counts))
        return PaddedTargets(self.masks.to(device, non_blocking=non_blocking), *moved)

    @reported("PaddedTargets.copy_")
    def copy_(self, other: PaddedTargets) -> PaddedTargets:
        """Take over the targets of another batch, in place: a graph that was captured with these reads them next.

        Args:
            other: padded to the same sizes, on any device.

        Returns:
            These targets.

        Raises:
            MaskLossError: other sizes, or another encoding.
        """
        mine, theirs = ([(tuple(t.shape), t.dtype) for t in each.tensors] for each in (self, other))
        if (self.masks.encoding, mine) != (other.masks.encoding, theirs):
            raise Cause(
                "targets of a graph must have the sizes and the encoding that it was captured with",
                f"got {other.masks}, padded to {theirs}; captured were {self.masks}, {mine}",
                "pad_targets with the same numbers, or a graph for each bucket",
            )
        for old, new in zip(self.tensors, other.tensors, strict=True):
            old.copy_(new, non_blocking=True)
        return self


@reported("bucket")
def bucket(count: int, sizes: Sequence[int] = (8, 16, 32, 64, 128, 256, 512, 1024)) -> int:
    """Return the smallest of some sizes that holds `count` targets.

    Args:
        count: the largest number of targets of an image.
        sizes: the buckets, growing. Default: powers of two.

    Returns:
        One of the sizes.

    Raises:
        MaskLossError: none is large enough.

    Example:
        >>> bucket(7), bucket(20), bucket(20, (25, 100))
        (8, 32, 25)
    """
    for size in sizes:
        if count <= size:
            return size
    raise Cause("one of the buckets must hold all targets", f"{count} targets in {list(sizes)}", "add a larger one")


@reported("pad_targets")
def pad_targets(
    targets: Entries | Mapping[str, Any], size: int, *, data_size: int, ignore_size: int = 0
) -> PaddedTargets:
    """Fill the targets of a batch up to `size` in each image.

    What is added is empty, matched last and weighs nothing: `padded_loss` of padded targets is the loss of the targets.
    Points are those of the unpadded ones, as they are drawn by the number of a target within its image.

    Args:
        targets: as `MaskCriterion` takes them. Padding looks at sizes, so they are best still on the host.
        size: T, the targets of each image, at least as many as any image has (see `bucket`).
        data_size: elements of `MaskTargets.data` of the batch, which is filled up with zeros.
        ignore_size: bytes of `MaskTargets.ignore`, filled up in the same way. Default 0: no ignore regions.

    Returns:
        The padded targets, on the device of the targets.

    Raises:
        MaskLossError: more targets or data than that, clips, or targets without a mask.

    Example:
        >>> masks = torch.zeros(2, 16, 16, dtype=torch.bool)
        >>> masks[:, 4:8, 4:8] = True
        >>> padded = pad_targets([{"masks": masks, "labels": torch.tensor([3, 1])}], 4, data_size=64)
        >>> padded.labels, padded.counts, [list(each.shape) for each in padded.masks.tensors[:3]]
        (tensor([ 3,  1, -1, -1]), tensor([2]), [[64], [4, 10], [1, 11]])
    """
    masks, labels, has_mask, annotated = collate(targets)
    check_whole(annotated)
    for name, value in (("size", size), ("data_size", data_size), ("ignore_size", ignore_size)):
        check_integer(name, value, 0, hint="a number that all batches stay below")
    if masks.present is not None or has_mask is not None:
        got = f"{masks}{'' if has_mask is None else ', some without a mask'}"
        raise Cause("padded targets must be images, and have masks", f"got {got}", "train others without a graph")
    largest = max(masks.num_targets, default=0)
    for name, found, room in (
        ("targets of an image", largest, size),
        ("elements of data", masks.data.numel(), data_size),
        ("bytes of ignore regions", masks.ignore.numel(), ignore_size),
    ):
        if found > room:
            raise Cause(f"the {name} must fit into the padded size", f"{found} into {room}", "take a larger bucket")
    device, batch, counts = masks.device, len(masks), masks.num_targets
    # Where each target goes; all others are masks without a pixel, in the frame of their image.
    places = [image * size + target for image, count in enumerate(counts) for target in range(count)]
    rows = torch.tensor(places, dtype=torch.int64).to(device)
    frames = masks.images[:, [_abi.IMAGE_H, _abi.IMAGE_W]].repeat_interleave(size, 0)
    table = masks.table.new_zeros(batch * size, masks.table.shape[1])
    table[:, [_abi.FRAME_H, _abi.FRAME_W]] = frames
    table[rows] = masks.table
    images = masks.images.clone()
    images[:, _abi.COUNT] = size
    images[:, _abi.FIRST] = torch.arange(batch, device=device) * size
    padded = replace(
        masks,
        data=_filled(masks.data, data_size),
        table=table,
        images=images,
        ignore=_filled(masks.ignore, ignore_size),
        num_targets=(size,) * batch,
    )
    all_labels = labels.new_full((batch * size,), -1)
    all_labels[rows] = labels
    return PaddedTargets(padded, all_labels, torch.tensor(counts, dtype=torch.int64).to(device))


def _filled(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values.new_zeros(size - values.numel())])


@reported("padded_loss")
def padded_loss(
    criterion: MaskCriterion,
    class_logits: Tensor | Sequence[Tensor],
    mask_logits: Layer | Sequence[Layer],
    targets: PaddedTargets,
    *,
    extra_costs: Tensor | None = None,
    image_ids: Tensor | None = None,
    seed: Tensor | int | None = None,
) -> CriterionOutput:
    """Compute what `criterion` computes of the targets before they were padded.

    Nothing waits for the device, and no size depends on how many targets there really are, so the call can be captured
    in a CUDA graph. A padded target is matched where nothing else is left, to a query that learns "no object", and its
    mask terms have weight 0. N and the number of unmatched queries are counted on the device.

    Args:
        criterion: without `class_weights`, `ignore_value`, `ignore_label` and `drop_empty`.
        class_logits: see `MaskCriterion`.
        mask_logits: see `MaskCriterion`.
        targets: padded, on the device of the logits.
        extra_costs: more terms of the matching cost, `[L, B, Q, T]`, with their weights. Default None.
        image_ids: see `MaskCriterion`; a tensor on the device in a graph.
        seed: of the points; in a graph an int64 tensor on the device, filled anew before each replay.

    Returns:
        As `criterion` returns it. The sums over instances are those of the targets before padding up to the order of
        summation; per_instance and matches list the padded ones too. Counted is this rank alone.

    Raises:
        MaskLossError: a criterion with these options, or what `MaskCriterion` raises.
    """
    if criterion.class_weights is not None or criterion.rules != TargetRules():
        raise Cause(
            "a criterion of padded targets must have no class_weights, and no rules for targets",
            f"class_weights={criterion.class_weights}, {criterion.rules}",
            "what they count is not known before the matching",
        )
    softmax = criterion.classification == "softmax"
    stacked, logits = check_predictions(class_logits, mask_logits, no_object=softmax)
    real = targets.labels >= 0
    labels = torch.where(real, targets.labels, criterion.num_classes)
    given, allowed = Batch(targets.masks, labels), TargetRules(no_object_label="allow")
    step = Step.begin(given, [*logits, stacked], allowed, image_ids=image_ids, seed=seed, group=False)
    batch, queries = stacked.shape[1:3]
    check_costs(criterion.matcher, extra_costs)
    # Not a number: a pair that is taken only where no other is left.
    last = torch.where(real, 0.0, float("nan")).view(1, batch, 1, -1).to(stacked.dtype)
    costs = last.expand(*stacked.shape[:3], -1) if extra_costs is None else extra_costs + last
    matches = criterion.matcher.match(stacked, logits, step, costs)
    groups = criterion.matcher.groups_now
    instances = targets.counts.clamp(max=queries // groups).sum().to(stacked.dtype)
    # The classes are those that the matching has found.
    known = {"masks": targets.masks, "labels": torch.where(real, targets.labels, 0)}
    return criterion(  # type: ignore[no-any-return]
        stacked.unbind(0),
        logits,
        known,
        matches=matches,
        instance_weights=real.to(stacked.dtype),
        totals=StepTotals(instances, batch * queries, instance_weight=instances),
        image_ids=step.image_ids,
        seed=step.seed,
        group=False,
    )


@dataclass(frozen=True)
class Captured(Generic[R]):
    """A CUDA graph, and what the function that was captured has returned: every replay writes into that.

    Attributes:
        graph: the graph.
        result: its tensors hold the results of the last replay.
    """

    graph: Any
    result: R

    def replay(self) -> R:
        """Run it once more on what its inputs hold now; waits for nothing."""
        self.graph.replay()
        return self.result


@reported("capture")
def capture(step: Callable[[], R], *, warmup: int = 3) -> Captured[R]:
    """Capture a function of static tensors in a CUDA graph.

    Args:
        step: called without arguments; reads tensors that stay where they are, and neither waits nor copies. Gradients
            are best taken with `torch.autograd.grad`, so that they are among the results.
        warmup: calls before the capture, on a stream of their own, in which kernels are compiled and memory is found.

    Returns:
        The graph and the function's result.

    Raises:
        MaskLossError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise Cause("a CUDA graph needs a CUDA device", "PyTorch finds none", "call the function itself")
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return Captured(graph, result)
