"""The operations: their `torch.library` schemas, shape functions, derivatives, and the choice of a backend.

Nothing else in the package names `torch.library` or a backend. A call passes groups of arguments (see `abi`), checked;
the dispatcher needs them flat, and the backends get the groups again. `maskloss.ops.reference` documents what is
computed. Every operation is one node for autograd, `torch.compile` and the profiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from maskloss.ops import assignment, factored
from maskloss.ops.abi import (
    INDEX_COLUMNS,
    Draw,
    Factors,
    Gradients,
    Instances,
    Kept,
    Saved,
    Targets,
    Term,
    accumulation_dtype,
    grouped,
    num_bytes,
)
from maskloss.ops.dispatch import BACKENDS, check_backend, choose_backend, has_host_kernels, load
from maskloss.ops.transformed import Derivative

__all__ = [
    "BACKENDS",
    "Draw",
    "Factors",
    "Instances",
    "Targets",
    "Term",
    "assign",
    "check_backend",
    "choose_backend",
    "count_matches",
    "factored_mask_loss",
    "factored_match_cost",
    "has_host_kernels",
    "mask_loss",
    "match_cost",
    "matched_counts",
    "pack_masks",
    "point_sample",
    "uncertain_points",
    "widest",
]

# The groups, flat: their order is that of the fields.
_INSTANCES = "Tensor[] logits, Tensor rows, SymInt[] layer_sizes"
_TARGETS = "str encoding, Tensor data, Tensor table, Tensor images, Tensor windows, Tensor ignore"
_DRAW = "Tensor image_ids, Tensor seed, SymInt num_points, SymInt num_candidates, SymInt num_uncertain, str layout"
_TERM = "str padding, str target_mode, float focal_alpha, float focal_gamma"
_LOSS = f"{_INSTANCES}, {_TARGETS}, {_DRAW}, {_TERM}, Tensor? points"
_FACTORS = "Tensor[] embeddings, Tensor[] biases, Tensor[] features, int[] features_of, int scratch_bytes"
_FACTORED_LOSS = f"{_FACTORS}, Tensor index, SymInt[] counts, {_TARGETS}, {_DRAW}, {_TERM}, Tensor? points"
_SAMPLE = "Tensor maps, Tensor index, Tensor points, str mode, str padding"

# The compiler's own CUDA graphs must leave out what waits for the device or reads a seed on the host: a graph would
# read it once and draw the same points ever after. Older releases of PyTorch cannot leave an operation out.
_NOT_CAPTURED: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def _operation(name: str, arguments: str, result: str, **options: Any) -> Any:
    schema = f"({arguments}) -> {result}"
    return torch.library.custom_op(f"maskloss::{name}", mutates_args=(), schema=schema, **options)


def widest(num_targets: Sequence[int]) -> int:
    """Return the largest number of targets; an expression where numbers are symbols, so that one graph serves many."""
    return reduce(torch.sym_max, num_targets, 0)


def count_matches(num_targets: Sequence[int], num_queries: int) -> int:
    """Return the number of matched instances of a layer."""
    return sum(matched_counts(num_targets, num_queries))


def matched_counts(num_targets: Sequence[int], num_queries: int) -> tuple[int, ...]:
    """Return the number of matched instances of each image, min(T, Q); of symbols again an expression."""
    return tuple(torch.sym_min(count, num_queries) for count in num_targets)


# ------------------------------------------------------------------------------------------------------------- packing


def pack_masks(images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Any, int]]]:
    """Pack dense masks on the host, each cut to its box, where `has_host_kernels` says that there are kernels.

    No operation of `torch.library`: how much comes out depends on the values, which a graph does not know.

    Args:
        images: CPU tensors `[T, H, W]`, bool or uint8.

    Returns:
        The bytes of all boxes, uint8 `[n]`; for each image where its masks lie in its part, int64 `[T, 6]`, and how
        many bytes that part has.
    """
    packed: tuple[Tensor, list[tuple[Any, int]]] = load("cpu").pack_masks(images)
    return packed


# ------------------------------------------------------------------------------------------------------ point sampling


@_operation("point_sample", f"{_SAMPLE}, str backend", "Tensor")
def _point_sample(*args: Any) -> Tensor:
    *inputs, backend = args
    result: Tensor = load(backend).point_sample(*inputs)
    return result


@_point_sample.register_fake
def _(maps: Tensor, _index: Tensor, points: Tensor, *_: str) -> Tensor:
    return maps.new_empty(points.shape[:2], dtype=accumulation_dtype(maps.dtype))


@_operation("point_sample_backward", f"Tensor grad, {_SAMPLE}, str backend", "Tensor")
def _point_sample_backward(*args: Any) -> Tensor:
    *inputs, backend = args
    result: Tensor = load(backend).point_sample_backward(*inputs)
    return result


@_point_sample_backward.register_fake
def _(_grad: Tensor, maps: Tensor, *_: Any) -> Tensor:
    return torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)


def _point_sample_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (its name is given)
    ctx.save_for_backward(*inputs[:3])
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


@_operation(
    "uncertain_points", f"{_INSTANCES}, {_DRAW}, Tensor windows, str padding, str backend", "Tensor", **_NOT_CAPTURED
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


@_operation(
    "match_cost",
    f"Tensor[] logits, SymInt[] num_targets, {_TARGETS}, {_DRAW}, {_TERM}, str backend",
    "(Tensor, Tensor)",
    **_NOT_CAPTURED,
)
def _match_cost(logits: Sequence[Tensor], num_targets: Sequence[int], *args: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = grouped(args, Targets, Draw, Term)
    ce, dice = load(backend).match_cost(logits, num_targets, *inputs)
    return ce, dice


@_match_cost.register_fake
def _(logits: Sequence[Tensor], num_targets: Sequence[int], *_: Any) -> tuple[Tensor, Tensor]:
    shape = (len(logits), *logits[0].shape[:2], widest(num_targets))
    dtype = accumulation_dtype(logits[0].dtype)
    return logits[0].new_empty(shape, dtype=dtype), logits[0].new_empty(shape, dtype=dtype)


def match_cost(
    logits: Sequence[Tensor], num_targets: Sequence[int], targets: Targets, draw: Draw, term: Term, backend: str
) -> tuple[Tensor, Tensor]:
    """Compute both mask terms of the matching cost, `[L, B, Q, T_max]` each, at uniform points. No gradient."""
    ce, dice = _match_cost(logits, num_targets, *targets, *draw, *term, backend)
    return ce, dice


@_operation("assign", "Tensor cost, Tensor labels, SymInt[] num_targets, SymInt num_classes", "Tensor", **_NOT_CAPTURED)
def _assign(cost: Tensor, labels: Tensor, num_targets: Sequence[int], num_classes: int) -> Tensor:
    return assignment.assign(cost, labels, num_targets, num_classes)


@_assign.register_fake
def _(cost: Tensor, _labels: Tensor, num_targets: Sequence[int], _num_classes: int) -> Tensor:
    layers, batch, queries = cost.shape[:3]
    matched = layers * count_matches(num_targets, queries)
    return cost.new_empty(INDEX_COLUMNS * matched + layers * batch * queries, dtype=torch.int64)


def assign(cost: Tensor, labels: Tensor, num_targets: Sequence[int], num_classes: int) -> tuple[Tensor, Tensor]:
    """Solve the assignments of all layers and images; the one place that waits for the device.

    Returns:
        The matches, int64 `[N, 4]`, and the class that each query should have, int64 `[L, B, Q]`.
    """
    answer = _assign(cost, labels, num_targets, num_classes)
    wanted = cost.shape[0] * cost.shape[1] * cost.shape[2]
    index, classes = answer.split([answer.shape[0] - wanted, wanted])
    return index.view(-1, INDEX_COLUMNS), classes.view(cost.shape[:3])


# ------------------------------------------------------------------------------------------------------------ the loss


@_operation("mask_loss", f"{_LOSS}, str backend", "(Tensor, Tensor, Tensor, Tensor)", **_NOT_CAPTURED)
def _mask_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, backend = grouped(args, Instances, Targets, Draw, Term)
    ce, dice, chosen, corners = load(backend).mask_loss(*inputs)
    return ce, dice, chosen, corners


@_mask_loss.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    instances, targets, draw, _, points, _ = grouped(args, Instances, Targets, Draw, Term)
    count, like, dtype = instances.rows.shape[0], instances.logits[0], instances.accumulation_dtype
    width = num_bytes(draw.num_candidates) if points is None and draw.num_uncertain else 0
    return (
        like.new_empty(count, dtype=dtype),
        like.new_empty(count, dtype=dtype),
        like.new_empty(count, width, dtype=torch.uint8),
        like.new_empty(count, draw.num_points, dtype=dtype if targets.encoding == "values" else torch.uint8),
    )


@_operation(
    "mask_loss_backward",
    f"Tensor grad_ce, Tensor grad_dice, Tensor chosen, Tensor corners, {_LOSS}, bool[] needs_grad, str backend",
    "Tensor[]",
    **_NOT_CAPTURED,
)
def _mask_loss_backward(*args: Any) -> list[Tensor]:
    *inputs, backend = grouped(args, Gradients, Saved, Instances, Targets, Draw, Term)
    grads: list[Tensor] = load(backend).mask_loss_backward(*inputs)
    return grads


@_mask_loss_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    logits, needs_grad = args[4], args[-2]
    return [
        torch.empty(layer.shape if need else 0, dtype=layer.dtype, device=layer.device)
        for layer, need in zip(logits, needs_grad, strict=True)
    ]


def _mask_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, *rest, backend = inputs
    saved = output[2:]
    ctx.mark_non_differentiable(*saved)
    # The outputs that only the backward pass reads get no gradient tensors of zeros made for them.
    ctx.set_materialize_grads(False)
    tensors = [value for value in rest if isinstance(value, Tensor)]
    ctx.save_for_backward(*saved, *logits, *tensors)
    ctx.num_layers, ctx.backend = len(logits), backend
    ctx.options = [None if isinstance(value, Tensor) else (value,) for value in rest]


def _mask_loss_derivative(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None, *_: Any) -> tuple[Any, ...]:
    chosen, corners, *saved = ctx.saved_tensors
    logits, tensors = saved[: ctx.num_layers], iter(saved[ctx.num_layers :])
    rest = [next(tensors) if option is None else option[0] for option in ctx.options]
    needs_grad = [bool(need) for need in ctx.needs_input_grad[0]]
    if grad_ce is None or grad_dice is None:
        zero = torch.zeros(chosen.shape[0], dtype=accumulation_dtype(logits[0].dtype), device=chosen.device)
        grad_ce, grad_dice = (zero if grad is None else grad for grad in (grad_ce, grad_dice))
    given = (grad_ce.contiguous(), grad_dice.contiguous())
    grads = _mask_loss_backward(*given, chosen, corners, logits, *rest, needs_grad, ctx.backend)
    kept = [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
    return kept, *[None] * len(rest), None


_mask_loss.register_autograd(_mask_loss_derivative, setup_context=_mask_loss_setup)
_differentiable_mask_loss = Derivative(_mask_loss, _mask_loss_setup, _mask_loss_derivative)


def mask_loss(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and Dice `[N]` at the caller's points, or at points that are drawn; gradient to logits."""
    ce, dice, _, _ = _differentiable_mask_loss(*instances, *targets, *draw, *term, points, backend)
    return ce, dice


# -------------------------------------------------------------------------------------------------- masks as products


def _products_as_they_are(args: Sequence[Any]) -> torch.autocast:
    """Mixed precision around the call must not round what is in another dtype on purpose."""
    return torch.autocast(args[2][0].device.type, enabled=False)


@_operation(
    "factored_match_cost",
    f"{_FACTORS}, SymInt[] num_targets, {_TARGETS}, {_DRAW}, {_TERM}, str backend",
    "(Tensor, Tensor)",
    **_NOT_CAPTURED,
)
def _factored_match_cost(*args: Any) -> tuple[Tensor, Tensor]:
    factors, num_targets, *rest = grouped(args, Factors)
    *inputs, backend = grouped((*rest,), Targets, Draw, Term)
    with _products_as_they_are(args):
        return factored.match_cost(load(backend), factors, num_targets, *inputs)


@_factored_match_cost.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    factors, num_targets, *_ = grouped(args, Factors)
    like = factors.features[0]
    layers = [each for each, which in zip(factors.embeddings, factors.features_of, strict=True) if which >= 0]
    shape = (len(layers), *layers[0].shape[:2], widest(num_targets))
    dtype = accumulation_dtype(like.dtype)
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype)


def factored_match_cost(
    factors: Factors, num_targets: Sequence[int], targets: Targets, draw: Draw, term: Term, backend: str
) -> tuple[Tensor, Tensor]:
    """Compute what `match_cost` does, for the layers that are factored, in their order. No gradient."""
    ce, dice = _factored_match_cost(*factors, num_targets, *targets, *draw, *term, backend)
    return ce, dice


@_operation(
    "factored_mask_loss", f"{_FACTORED_LOSS}, str backend", "(Tensor, Tensor, Tensor, Tensor, Tensor)", **_NOT_CAPTURED
)
def _factored_mask_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    factors, index, counts, *rest = grouped(args, Factors)
    *inputs, backend = grouped(rest, Targets, Draw, Term)
    with _products_as_they_are(args):
        ce, dice, kept = factored.mask_loss(load(backend), factors, index, counts, *inputs)
    return ce, dice, *kept


@_factored_mask_loss.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    factors, index, _, *rest = grouped(args, Factors)
    targets, draw, _, points, _ = grouped(rest, Targets, Draw, Term)
    count, dtype = index.shape[0], accumulation_dtype(factors.features[0].dtype)
    width = num_bytes(draw.num_candidates) if points is None and draw.num_uncertain else 0
    shapes: list[tuple[Any, torch.dtype]] = [((count,), dtype), ((count,), dtype), ((count, width), torch.uint8)]
    shapes.append(((count, draw.num_points), dtype if targets.encoding == "values" else torch.uint8))
    shapes.append(((count, draw.num_points), dtype))
    ce, dice, chosen, corners, logits = (index.new_empty(shape, dtype=kind) for shape, kind in shapes)
    return ce, dice, chosen, corners, logits


@_operation(
    "factored_mask_loss_backward",
    f"Tensor grad_ce, Tensor grad_dice, Tensor chosen, Tensor corners, Tensor logits, {_FACTORED_LOSS}, "
    "bool[] needs_grad, str backend",
    "Tensor[]",
    **_NOT_CAPTURED,
)
def _factored_mask_loss_backward(*args: Any) -> list[Tensor]:
    grads, kept, factors, index, counts, *rest = grouped(args, Gradients, Kept, Factors)
    targets, draw, term, points, needs_grad, backend = grouped(rest, Targets, Draw, Term)
    inputs = (targets, draw, term, points)
    with _products_as_they_are(factors):
        return factored.mask_loss_backward(
            load(backend), grads, kept, factors, index, counts, *inputs, needs_grad=needs_grad
        )


@_factored_mask_loss_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    _, _, factors, *_ = grouped(args, Gradients, Kept, Factors)
    like, needs_grad = factors.features[0], args[-2]
    shapes = [
        (len(layers), *next((layer.shape for layer in layers if layer.ndim > 1), ()))
        for layers in (factors.embeddings, factors.biases)
    ] + [tuple(each.shape) for each in factors.features]
    return [like.new_empty(shape if need else 0) for shape, need in zip(shapes, needs_grad, strict=True)]


def _factored_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *lists, features_of, scratch_bytes = inputs[: len(Factors._fields)]
    *rest, ctx.backend = inputs[len(Factors._fields) :]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.lengths = [len(each) for each in lists]
    tensors = [value for value in rest if isinstance(value, Tensor)]
    ctx.save_for_backward(*output[2:], *(tensor for each in lists for tensor in each), *tensors)
    ctx.facts = features_of, scratch_bytes
    ctx.options = [None if isinstance(value, Tensor) else (value,) for value in rest]


def _factored_derivative(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    kept = Kept(*(next(saved) for _ in Kept._fields))
    lists = [[next(saved) for _ in range(length)] for length in ctx.lengths]
    rest = [next(saved) if option is None else option[0] for option in ctx.options]
    needs = [[bool(need) for need in ctx.needs_input_grad[which]] if each else [] for which, each in enumerate(lists)]
    zero = kept.logits.new_zeros(kept.logits.shape[0])
    given = [zero if grad is None else grad.contiguous() for grad in (grad_ce, grad_dice)]
    wanted = [any(needs[0]), any(needs[1]), *needs[2]]
    by_row, by_bias, *by_pixel = _factored_mask_loss_backward(
        *given, *kept, *lists, *ctx.facts, *rest, wanted, ctx.backend
    )
    filled = [[layer.ndim > 1 for layer in layers] for layers in lists[:2]]
    found = [
        [grad[layer] if need and real else None for layer, (need, real) in enumerate(zip(each, there, strict=True))]
        for grad, each, there in zip((by_row, by_bias), needs[:2], filled, strict=True)
    ]
    found.append([grad if need else None for grad, need in zip(by_pixel, needs[2], strict=True)])
    return *found, None, None, *[None] * len(rest), None


_factored_mask_loss.register_autograd(_factored_derivative, setup_context=_factored_setup)
_differentiable_factored_mask_loss = Derivative(_factored_mask_loss, _factored_setup, _factored_derivative)


def factored_mask_loss(
    factors: Factors,
    index: Tensor,
    counts: Sequence[int],
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Compute what `mask_loss` does, for rows of the index whose layers are factored; gradients to all factors.

    Args:
        factors: of all layers.
        index: int64 `[N, INDEX_COLUMNS]`, sorted by layer and image.
        counts: how many rows each layer and image has, `[L * B]`.
        targets: of the batch.
        draw: see `mask_loss`; likewise the others.
        term: how logits and targets are read.
        points: the caller's, or None.
        backend: one that has kernels.
    """
    ce, dice, *_ = _differentiable_factored_mask_loss(*factors, index, counts, *targets, *draw, *term, points, backend)
    return ce, dice
