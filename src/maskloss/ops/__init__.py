"""The operations: their `torch.library` schemas, shape functions, derivatives, and the choice of a backend.

Nothing else in the package names `torch.library` or a backend. Arguments arrive checked; `reference.py` documents
them. Every operation is one node for autograd, `torch.compile` and the profiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from maskloss.ops import assignment
from maskloss.ops.backends import BACKENDS, choose_backend, load
from maskloss.ops.reference import accumulation_dtype

__all__ = [
    "BACKENDS",
    "assign",
    "choose_backend",
    "count_matches",
    "mask_loss",
    "match_cost",
    "point_sample",
    "uncertain_points",
    "widest",
]


# The compiler's own CUDA graphs must leave out what waits for the device or reads a seed on the host: a graph would
# read it once and draw the same points ever after. Older releases of PyTorch cannot leave an operation out.
_NOT_CAPTURED: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def widest(num_targets: Sequence[int]) -> int:
    """Return the largest number of targets; an expression where numbers are symbols, so that one graph serves many."""
    return reduce(torch.sym_max, num_targets, 0)


def count_matches(num_targets: Sequence[int], num_queries: int) -> int:
    """Return the number of matched instances of a layer: min(T, Q) of each image; of symbols again an expression."""
    return sum(torch.sym_min(count, num_queries) for count in num_targets)


@torch.library.custom_op("maskloss::point_sample", mutates_args=())
def point_sample(maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str, backend: str) -> Tensor:
    """Read maps `[M, h, w]`, chosen by index `[N]`, at points `[N, P, 2]`: `[N, P]`, gradient to the maps."""
    result: Tensor = load(backend).point_sample(maps, index, points, mode, padding)
    return result


@point_sample.register_fake
def _(maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str, backend: str) -> Tensor:
    return maps.new_empty(points.shape[:2], dtype=accumulation_dtype(maps.dtype))


@torch.library.custom_op("maskloss::point_sample_backward", mutates_args=())
def _point_sample_backward(
    grad: Tensor, maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str, backend: str
) -> Tensor:
    result: Tensor = load(backend).point_sample_backward(grad, maps, index, points, mode, padding)
    return result


@_point_sample_backward.register_fake
def _(grad: Tensor, maps: Tensor, index: Tensor, points: Tensor, mode: str, padding: str, backend: str) -> Tensor:
    return torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)


def _point_sample_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _point_sample_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _point_sample_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options), *[None] * 5


point_sample.register_autograd(_point_sample_derivative, setup_context=_point_sample_setup)


@torch.library.custom_op("maskloss::uncertain_points", mutates_args=(), **_NOT_CAPTURED)
def uncertain_points(
    logits: Sequence[Tensor],
    index: Tensor,
    layer_sizes: Sequence[int],
    windows: Tensor,
    image_ids: Tensor,
    seed: Tensor,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    padding: str,
    backend: str,
) -> Tensor:
    """Draw the points of instances: float32 `[N, P, 2]`, the uncertain ones first. No gradient."""
    result: Tensor = load(backend).uncertain_points(
        logits,
        index,
        layer_sizes,
        windows,
        image_ids,
        seed,
        num_points,
        num_candidates,
        num_uncertain,
        padding,
    )
    return result


@uncertain_points.register_fake
def _(
    logits: Sequence[Tensor], index: Tensor, layer_sizes: Any, windows: Tensor, image_ids: Any, seed: Any,
    num_points: int, num_candidates: int, num_uncertain: int, padding: str, backend: str,
) -> Tensor:  # fmt: skip
    return windows.new_empty(index.shape[0], num_points, 2)


@torch.library.custom_op("maskloss::match_cost", mutates_args=(), **_NOT_CAPTURED)
def match_cost(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    encoding: str,
    num_targets: Sequence[int],
    image_ids: Tensor,
    seed: Tensor,
    num_points: int,
    padding: str,
    target_mode: str,
    focal_alpha: float,
    focal_gamma: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Compute both mask terms of the matching cost, `[L, B, Q, T_max]` each. No gradient."""
    ce, dice = load(backend).match_cost(
        logits,
        targets,
        encoding,
        num_targets,
        image_ids,
        seed,
        num_points,
        padding,
        target_mode,
        focal_alpha,
        focal_gamma,
    )
    return ce, dice


@match_cost.register_fake
def _(
    logits: Sequence[Tensor], targets: Any, encoding: str, num_targets: Sequence[int], image_ids: Any, seed: Any,
    num_points: int, padding: str, target_mode: str, focal_alpha: float, focal_gamma: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (len(logits), *logits[0].shape[:2], widest(num_targets))
    dtype = accumulation_dtype(logits[0].dtype)
    return logits[0].new_empty(shape, dtype=dtype), logits[0].new_empty(shape, dtype=dtype)


@torch.library.custom_op("maskloss::assign", mutates_args=(), **_NOT_CAPTURED)
def _assign(cost: Tensor, labels: Tensor, num_targets: Sequence[int], num_classes: int) -> Tensor:
    return assignment.assign(cost, labels, num_targets, num_classes)


@_assign.register_fake
def _(cost: Tensor, labels: Tensor, num_targets: Sequence[int], num_classes: int) -> Tensor:
    layers, batch, queries = cost.shape[:3]
    matched = layers * count_matches(num_targets, queries)
    return cost.new_empty(4 * matched + layers * batch * queries, dtype=torch.int64)


def assign(cost: Tensor, labels: Tensor, num_targets: Sequence[int], num_classes: int) -> tuple[Tensor, Tensor]:
    """Solve the assignments of all layers and images; the one place that waits for the device.

    Returns:
        The matches, int64 `[N, 4]`, and the class that each query should have, int64 `[L, B, Q]`.
    """
    answer = _assign(cost, labels, num_targets, num_classes)
    wanted = cost.shape[0] * cost.shape[1] * cost.shape[2]
    index, classes = answer.split([answer.shape[0] - wanted, wanted])
    return index.view(-1, 4), classes.view(cost.shape[:3])


@torch.library.custom_op("maskloss::mask_loss", mutates_args=(), **_NOT_CAPTURED)
def mask_loss(
    logits: Sequence[Tensor],
    index: Tensor,
    layer_sizes: Sequence[int],
    targets: Sequence[Tensor],
    encoding: str,
    image_ids: Tensor,
    seed: Tensor,
    points: Tensor | None,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    padding: str,
    target_mode: str,
    focal_alpha: float,
    focal_gamma: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute cross-entropy and Dice `[N]` at sampled points; the last two results are for the backward pass."""
    ce, dice, chosen, corners = load(backend).mask_loss(
        logits,
        index,
        layer_sizes,
        targets,
        encoding,
        image_ids,
        seed,
        points,
        num_points,
        num_candidates,
        num_uncertain,
        padding,
        target_mode,
        focal_alpha,
        focal_gamma,
    )
    return ce, dice, chosen, corners


@mask_loss.register_fake
def _(
    logits: Sequence[Tensor], index: Tensor, layer_sizes: Any, targets: Any, encoding: str, image_ids: Any, seed: Any,
    points: Tensor | None, num_points: int, num_candidates: int, num_uncertain: int, padding: str, target_mode: str,
    focal_alpha: float, focal_gamma: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    count, dtype = index.shape[0], accumulation_dtype(logits[0].dtype)
    width = (num_candidates + 7) // 8 if points is None and num_uncertain else 0
    return (
        logits[0].new_empty(count, dtype=dtype),
        logits[0].new_empty(count, dtype=dtype),
        logits[0].new_empty(count, width, dtype=torch.uint8),
        logits[0].new_empty(count, num_points, dtype=dtype if encoding == "values" else torch.uint8),
    )


@torch.library.custom_op("maskloss::mask_loss_backward", mutates_args=(), **_NOT_CAPTURED)
def _mask_loss_backward(
    grad_ce: Tensor,
    grad_dice: Tensor,
    chosen: Tensor,
    corners: Tensor,
    needs_grad: Sequence[bool],
    logits: Sequence[Tensor],
    index: Tensor,
    layer_sizes: Sequence[int],
    targets: Sequence[Tensor],
    encoding: str,
    image_ids: Tensor,
    seed: Tensor,
    points: Tensor | None,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    padding: str,
    target_mode: str,
    focal_alpha: float,
    focal_gamma: float,
    backend: str,
) -> list[Tensor]:
    grads: list[Tensor] = load(backend).mask_loss_backward(
        grad_ce,
        grad_dice,
        chosen,
        corners,
        needs_grad,
        logits,
        index,
        layer_sizes,
        targets,
        encoding,
        image_ids,
        seed,
        points,
        num_points,
        num_candidates,
        num_uncertain,
        padding,
        target_mode,
        focal_alpha,
        focal_gamma,
    )
    return grads


@_mask_loss_backward.register_fake
def _(
    grad_ce: Any, grad_dice: Any, chosen: Any, corners: Any, needs_grad: Sequence[bool], logits: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    return [
        torch.empty(layer.shape if need else 0, dtype=layer.dtype, device=layer.device)
        for layer, need in zip(logits, needs_grad, strict=True)
    ]


def _mask_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, index, layer_sizes, targets, encoding, image_ids, seed, points, *options = inputs
    chosen, corners = output[2:]
    ctx.mark_non_differentiable(chosen, corners)
    # The outputs that only the backward pass reads get no gradient tensors of zeros made for them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(chosen, corners, index, image_ids, seed, points, *targets, *logits)
    ctx.num_target_tensors = len(targets)
    ctx.layer_sizes, ctx.encoding, ctx.options = layer_sizes, encoding, options


def _mask_loss_derivative(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None, *_: Any) -> tuple[Any, ...]:
    chosen, corners, index, image_ids, seed, points, *rest = ctx.saved_tensors
    targets, logits = rest[: ctx.num_target_tensors], rest[ctx.num_target_tensors :]
    needs_grad = [bool(need) for need in ctx.needs_input_grad[0]]
    if grad_ce is None or grad_dice is None:
        zero = torch.zeros(index.shape[0], dtype=accumulation_dtype(logits[0].dtype), device=index.device)
        grad_ce, grad_dice = (zero if grad is None else grad for grad in (grad_ce, grad_dice))
    grads = _mask_loss_backward(
        grad_ce.contiguous(),
        grad_dice.contiguous(),
        chosen,
        corners,
        needs_grad,
        logits,
        index,
        ctx.layer_sizes,
        targets,
        ctx.encoding,
        image_ids,
        seed,
        points,
        *ctx.options,
    )
    kept = [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
    return kept, None, None, [None] * len(targets), *[None] * 12


mask_loss.register_autograd(_mask_loss_derivative, setup_context=_mask_loss_setup)
