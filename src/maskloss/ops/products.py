"""The operations on mask logits that are products, and the derivative of their loss (see `factored`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskloss._abi import (
    Draw,
    Factors,
    Gradients,
    Kept,
    Targets,
    Term,
    accumulation_dtype,
    grouped,
    num_bytes,
    widest,
)
from maskloss._tracing import savable
from maskloss.ops import factored
from maskloss.ops.dispatch import load
from maskloss.ops.schemas import DRAW, FACTORED_LOSS, FACTORS, NOT_CAPTURED, TARGETS, TERM, operation
from maskloss.ops.transformed import Derivative


def _products_as_they_are(args: Sequence[Any]) -> torch.autocast:
    """Switch autocast off: it must not round operands whose dtype was chosen on purpose."""
    return torch.autocast(args[2][0].device.type, enabled=False)


@operation(
    "factored_match_cost",
    f"{FACTORS}, SymInt[] num_targets, {TARGETS}, {DRAW}, {TERM}, str backend",
    "(Tensor, Tensor)",
    **NOT_CAPTURED,
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
    shape = (len(factors.embeddings), *factors.embeddings[0].shape[:2], widest(num_targets))
    dtype = accumulation_dtype(like.dtype)
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype)


def factored_match_cost(
    factors: Factors, num_targets: Sequence[int], targets: Targets, draw: Draw, term: Term, backend: str
) -> tuple[Tensor, Tensor]:
    """Compute what `match_cost` does, for logits as factors. No gradient."""
    ce, dice = _factored_match_cost(*factors, num_targets, *targets, *draw, *term, backend)
    return ce, dice


@operation(
    "factored_mask_loss", f"{FACTORED_LOSS}, str backend", "(Tensor, Tensor, Tensor, Tensor, Tensor)", **NOT_CAPTURED
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
    shapes.append(((count, draw.num_points if targets.encoding == "values" else 0), dtype))
    shapes.append(((count, draw.num_points), dtype))
    ce, dice, chosen, soft, logits = (index.new_empty(shape, dtype=kind) for shape, kind in shapes)
    return ce, dice, chosen, soft, logits


@operation(
    "factored_mask_loss_backward",
    f"Tensor grad_ce, Tensor grad_dice, Tensor chosen, Tensor soft, Tensor logits, {FACTORED_LOSS}, "
    "bool[] needs_grad, str backend",
    "Tensor[]",
    **NOT_CAPTURED,
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
        (len(layers), *layers[0].shape) if layers else (0,) for layers in (factors.embeddings, factors.biases)
    ] + [tuple(each.shape) for each in factors.features]
    return [like.new_empty(shape if need else 0) for shape, need in zip(shapes, needs_grad, strict=True)]


def _factored_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *lists, features_of, scratch_bytes = inputs[: len(Factors._fields)]
    *rest, ctx.backend = inputs[len(Factors._fields) :]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.lengths = [len(each) for each in lists]
    tensors = [value for value in rest if isinstance(value, Tensor)]
    ctx.save_for_backward(*map(savable, (*output[2:], *(tensor for each in lists for tensor in each), *tensors)))
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
    found = [
        [grad[layer] if need else None for layer, need in enumerate(each)]
        for grad, each in zip((by_row, by_bias), needs[:2], strict=True)
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
    """Compute what `mask_loss` does, for logits as factors; gradients to all of them.

    Args:
        factors: of all layers.
        index: int64 `[N, INDEX_COLUMNS]`, sorted by layer and image.
        counts: how many rows each layer and image has, `[L * B]`.
        targets: of the batch.
        draw: see `mask_loss`, as for the others.
        term: how logits and targets are read.
        points: the caller's, or None.
        backend: one that has kernels.
    """
    ce, dice, *_ = _differentiable_factored_mask_loss(*factors, index, counts, *targets, *draw, *term, points, backend)
    return ce, dice
