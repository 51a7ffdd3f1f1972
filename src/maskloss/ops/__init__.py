"""The operations: their `torch.library` schemas, shape functions, derivatives, and the choice of a backend.

Nothing outside of this folder names `torch.library` or a backend. A call passes groups of arguments (see `abi`),
checked; the dispatcher needs them flat, and the backends get the groups again. `maskloss.ops.reference` documents what
is computed. Every operation is one node for autograd, `torch.compile` and the profiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskloss._abi import (
    INDEX_COLUMNS,
    Draw,
    Factors,
    Instances,
    Job,
    Reduction,
    Targets,
    Term,
    accumulation_dtype,
    count_matches,
    grouped,
    matched_counts,
    widest,
)
from maskloss._tracing import savable
from maskloss.errors import Cause
from maskloss.ops import assignment, clips
from maskloss.ops.dense import mask_loss
from maskloss.ops.dispatch import (
    BACKENDS,
    check_backend,
    choose_backend,
    has_host_kernels,
    load,
)
from maskloss.ops.products import factored_mask_loss, factored_match_cost
from maskloss.ops.schemas import DRAW, INSTANCES, NOT_CAPTURED, SAMPLE, TARGETS, TERM, new_costs, operation
from maskloss.ops.transformed import Derivative
from maskloss.ops.volumes import volume_cost, volume_loss

__all__ = [
    "ASSIGNMENTS", "BACKENDS", "WIDEST_ON_DEVICE", "Draw", "Factors", "Instances", "Job", "Reduction", "Targets",
    "Term", "assign", "box_costs", "check_backend", "choose_backend", "count_matches",
    "factored_mask_loss", "factored_match_cost", "has_host_kernels", "mask_loss", "match_cost", "matched_counts",
    "pack_masks", "point_sample", "quality_sums", "uncertain_points", "volume_cost", "volume_loss", "widest",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- packing


def pack_masks(images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Any, int]]]:
    """Pack dense masks on the host, each cut to its box, where `has_host_kernels`.

    Not a registered operation: the output size depends on the data, so it cannot be traced.

    Args:
        images: CPU tensors `[T, H, W]`, bool or uint8.

    Returns:
        The bytes of all boxes, uint8 `[n]`; for each image where its masks lie in its part, int64 `[T, 6]`, and how
        many bytes that part has.
    """
    packed: tuple[Tensor, list[tuple[Any, int]]] = load("cpu").pack_masks(images)
    return packed


def box_costs(boxes: Tensor, targets: Tensor, l1_weight: float, giou_weight: float) -> Tensor:
    """Compute the boxes' part of the matching cost, `[..., B, Q, T]`, on the host, where `has_host_kernels`.

    Not a registered operation: what traces or transforms the matching gets the formula of `integrations`.

    Args:
        boxes: `[..., B, Q, 4]`.
        targets: `[B, T, 4]`, of the same type.
        l1_weight: of the sum of absolute differences.
        giou_weight: of -GIoU.
    """
    costs: Tensor = load("cpu").box_costs(boxes, targets, l1_weight, giou_weight)
    return costs


def quality_sums(
    logits: Tensor, rows: Tensor, labels: Tensor, quality: Tensor, *, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum RF-DETR's classification over the classes of each query, with derivatives, where `has_host_kernels`."""
    sums, found = load("cpu").quality_sums(logits, rows, labels, quality, slopes=slopes)
    return sums, found


# ------------------------------------------------------------------------------------------------------ point sampling


@operation("point_sample", f"{SAMPLE}, str backend", "Tensor")
def _point_sample(*args: Any) -> Tensor:
    *inputs, backend = args
    result: Tensor = load(backend).point_sample(*inputs)
    return result


@_point_sample.register_fake
def _(maps: Tensor, _index: Tensor, points: Tensor, *_: str) -> Tensor:
    return maps.new_empty(points.shape[:2], dtype=accumulation_dtype(maps.dtype))


@operation("point_sample_backward", f"Tensor grad, {SAMPLE}, str backend", "Tensor")
def _point_sample_backward(*args: Any) -> Tensor:
    *inputs, backend = args
    result: Tensor = load(backend).point_sample_backward(*inputs)
    return result


@_point_sample_backward.register_fake
def _(_grad: Tensor, maps: Tensor, *_: Any) -> Tensor:
    return torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)


def _point_sample_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (its name is given)
    ctx.save_for_backward(*map(savable, inputs[:3]))
    ctx.options = inputs[3:]


def _point_sample_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _point_sample_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options), *[None] * 5


_point_sample.register_autograd(_point_sample_derivative, setup_context=_point_sample_setup)
_differentiable_point_sample = Derivative(_point_sample, _point_sample_setup, _point_sample_derivative)


def point_sample(maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str, backend: str) -> Tensor:
    """Read maps `[M, h, w]`, chosen by index `[N]`, at points `[N, P, 2]`: `[N, P]`, gradient to the maps."""
    result: Tensor = _differentiable_point_sample(maps, index, points, mode, padding, backend)
    return result


# -------------------------------------------------------------------------------------------------------------- points


@operation(
    "uncertain_points", f"{INSTANCES}, {DRAW}, Tensor windows, str padding, str backend", "Tensor", **NOT_CAPTURED
)
def _uncertain_points(*args: Any) -> Tensor:
    *inputs, backend = grouped(args, Instances, Draw)
    result: Tensor = load(backend).uncertain_points(*inputs)
    return result


@_uncertain_points.register_fake
def _(*args: Any) -> Tensor:
    instances, draw, windows, *_ = grouped(args, Instances, Draw)
    result: Tensor = windows.new_empty(instances.rows.shape[0], draw.num_points, 2)
    return result


def uncertain_points(instances: Instances, draw: Draw, windows: Tensor, padding: str, backend: str) -> Tensor:
    """Draw the points of instances: float32 `[N, P, 2]`, the uncertain ones first. No gradient."""
    result: Tensor = _uncertain_points(*instances, *draw, windows, padding, backend)
    return result


# ------------------------------------------------------------------------------------------------------------ matching


@operation(
    "match_cost",
    f"Tensor[] logits, SymInt[] num_targets, {TARGETS}, {DRAW}, {TERM}, str backend",
    "(Tensor, Tensor)",
    **NOT_CAPTURED,
)
def _match_cost(logits: Sequence[Tensor], num_targets: Sequence[int], *args: Any) -> tuple[Tensor, Tensor]:
    *flat, backend = args
    if logits[0].ndim == 5:
        return clips.match_cost(load(backend), logits, num_targets, Job.of(flat))
    ce, dice = load(backend).match_cost(logits, num_targets, Job.of(flat))
    return ce, dice


@_match_cost.register_fake
def _(logits: Sequence[Tensor], num_targets: Sequence[int], *_: Any) -> tuple[Tensor, Tensor]:
    return new_costs(logits[0], len(logits), logits[0].shape[:2], num_targets)


def match_cost(logits: Sequence[Tensor], num_targets: Sequence[int], job: Job, backend: str) -> tuple[Tensor, Tensor]:
    """Compute both mask terms of the matching cost, `[L, B, Q, T_max]` each, at uniform points. No gradient.

    Logits are `[B, Q, h, w]`; or those of clips, `[B, Q, T, h, w]`, with targets as planes.
    """
    ce, dice = _match_cost(logits, num_targets, *job.flat[:-1], backend)
    return ce, dice


ASSIGNMENTS = ("auto", "host", "device")
# The longer side of the largest problem that is solved on a device; a program's registers hold no more.
WIDEST_ON_DEVICE = 1024
_ASSIGN = "Tensor cost, Tensor labels, Tensor images, SymInt[] num_targets, SymInt num_classes, SymInt groups"


@operation("assign", _ASSIGN, "Tensor", **NOT_CAPTURED)
def _assign(
    cost: Tensor, labels: Tensor, _images: Tensor, num_targets: Sequence[int], num_classes: int, groups: int
) -> Tensor:
    solve = load("cpu").assign if has_host_kernels() else assignment.solve_with_scipy
    return assignment.assign(cost, labels, num_targets, num_classes, groups, solve)


@operation("assign_on_device", _ASSIGN, "Tensor")
def _assign_on_device(
    cost: Tensor, labels: Tensor, images: Tensor, num_targets: Sequence[int], num_classes: int, groups: int
) -> Tensor:
    known = ((labels >= 0) & (labels < num_classes)).all()
    torch._assert_async(known, f"maskloss: labels must lie in [0, {num_classes})")
    answer: Tensor = load("gpu").assign(cost, labels, images, num_targets, num_classes, groups)
    return answer


def _assign_shape(
    cost: Tensor, _labels: Tensor, _images: Tensor, num_targets: Sequence[int], _num_classes: int, groups: int
) -> Tensor:
    layers, batch, queries = cost.shape[:3]
    matched = layers * groups * count_matches(num_targets, queries // groups)
    return cost.new_empty(INDEX_COLUMNS * matched + layers * batch * queries, dtype=torch.int64)


_assign.register_fake(_assign_shape)
_assign_on_device.register_fake(_assign_shape)


def assign(
    cost: Tensor,
    labels: Tensor,
    images: Tensor,
    num_targets: Sequence[int],
    num_classes: int,
    *,
    groups: int = 1,
    where: str = "auto",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Match queries to targets at the lowest total cost, for every layer, image and group of queries on its own.

    Args:
        cost: `[L, B, Q, T_max]`; columns beyond an image's number of targets are not read. A cost that is not finite
            (or beyond `LARGEST_COST`) is a pair that is taken only where no other is left.
        labels: int64 `[T_all]`, the class of each target, or `[0]`.
        images: `MaskTargets.images`.
        num_targets: targets of each image.
        num_classes: labels must lie in [0, num_classes). On the host that raises; on a device it is an assertion, after
            which CUDA takes no more work.
        groups: G, which divides Q: that many groups of consecutive queries.
        where: one of `ASSIGNMENTS`. "host" is the one place that waits for a device, "device" waits for nothing. "auto"
            takes the device where the GPU backend runs and no side is above `WIDEST_ON_DEVICE`.
        backend: as requested of the operations.

    Returns:
        The matches, int64 `[N, 4]`, rows (layer, image, query, target) sorted by layer, image and query; and the class
        that each query should have, int64 `[L, B, Q]`, `num_classes` for a query without a target.

    Raises:
        Cause: "device" is asked for where it cannot be had.
    """
    longest = torch.sym_max(cost.shape[2] // groups, widest(num_targets))
    fits = where != "host" and choose_backend(cost.device, backend) == "gpu" and longest <= WIDEST_ON_DEVICE
    if where == "device" and not fits:
        raise Cause(
            f"assignment='device' needs the GPU backend and at most {WIDEST_ON_DEVICE} queries and targets",
            f"{cost.shape[2] // groups} queries and up to {widest(num_targets)} targets on {cost.device}",
            "leave assignment out, or take 'host'",
        )
    solve = _assign_on_device if fits else _assign
    answer = solve(cost, labels, images, num_targets, num_classes, groups)
    wanted = cost.shape[0] * cost.shape[1] * cost.shape[2]
    index, classes = answer.split([answer.shape[0] - wanted, wanted])
    return index.view(-1, INDEX_COLUMNS), classes.view(cost.shape[:3])
