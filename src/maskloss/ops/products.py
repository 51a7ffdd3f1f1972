"""The operations on mask logits that are products, and the derivative of their loss (see `factored`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskloss._abi import Factors, Gradients, Job, Saved, accumulation_dtype, grouped
from maskloss.ops import factored
from maskloss.ops.dispatch import load
from maskloss.ops.schemas import (
    DRAW,
    FACTORS,
    GRADIENTS,
    JOB,
    LOSSES,
    MATCHED,
    NOT_CAPTURED,
    SAVED,
    TARGETS,
    TERM,
    new_costs,
    operation,
)
from maskloss.ops.transformed import Derivative, kept, set_up


def _products_as_they_are(factors: Factors) -> torch.autocast:
    """Switch autocast off: it must not round operands whose dtype was chosen on purpose."""
    return torch.autocast(factors.features[0].device.type, enabled=False)


@operation(
    "factored_match_cost",
    f"{FACTORS}, SymInt[] num_targets, {TARGETS}, {DRAW}, {TERM}, str backend",
    "(Tensor, Tensor)",
    **NOT_CAPTURED,
)
def _factored_match_cost(*args: Any) -> tuple[Tensor, Tensor]:
    factors, num_targets, *flat, backend = grouped(args, Factors)
    with _products_as_they_are(factors):
        return factored.match_cost(load(backend), factors, num_targets, Job.of(flat))


@_factored_match_cost.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    factors, num_targets, *_ = grouped(args, Factors)
    embeddings = factors.embeddings
    return new_costs(factors.features[0], len(embeddings), embeddings[0].shape[:2], num_targets)


def factored_match_cost(factors: Factors, num_targets: Sequence[int], job: Job, backend: str) -> tuple[Tensor, Tensor]:
    """Compute what `match_cost` does, for logits as factors. No gradient."""
    ce, dice = _factored_match_cost(*factors, num_targets, *job.flat[:-1], backend)
    return ce, dice


@operation("factored_mask_loss", f"{FACTORS}, {MATCHED}, {JOB}, str backend", LOSSES, **NOT_CAPTURED)
def _factored_mask_loss(*args: Any) -> tuple[Tensor, ...]:
    factors, index, counts, *flat, backend = grouped(args, Factors)
    with _products_as_they_are(factors):
        ce, dice, saved = factored.mask_loss(load(backend), factors, index, counts, Job.of(flat))
    return ce, dice, *saved


@_factored_mask_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    factors, index, _, *flat, _ = grouped(args, Factors)
    dtype = accumulation_dtype(factors.features[0].dtype)
    ce, dice, saved = Job.of(flat).new_losses(index.shape[0], dtype, index.device, keep=True)
    return ce, dice, *saved


@operation(
    "factored_mask_loss_backward",
    f"{GRADIENTS}, {SAVED}, {FACTORS}, {MATCHED}, {JOB}, bool[] needs_grad, str backend",
    "Tensor[]",
    **NOT_CAPTURED,
)
def _factored_mask_loss_backward(*args: Any) -> list[Tensor]:
    grads, saved, factors, index, counts, *flat, needs_grad, backend = grouped(args, Gradients, Saved, Factors)
    inputs = (grads, saved, factors, index, counts, Job.of(flat), needs_grad)
    with _products_as_they_are(factors):
        return factored.mask_loss_backward(load(backend), *inputs)


@_factored_mask_loss_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    _, _, factors, *_ = grouped(args, Gradients, Saved, Factors)
    like, needs_grad = factors.features[0], args[-2]
    shapes = [
        (len(layers), *layers[0].shape) if layers else (0,) for layers in (factors.embeddings, factors.biases)
    ] + [tuple(each.shape) for each in factors.features]
    return [like.new_empty(shape if need else 0) for shape, need in zip(shapes, needs_grad, strict=True)]


def _factored_derivative(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *inputs, backend = kept(ctx, grad_ce, grad_dice)
    factors = tuple(grouped(inputs, Gradients, Saved, Factors))[2]
    needs = [
        [bool(need) for need in which] if each else []
        for which, each in zip(ctx.needs_input_grad[:3], factors[:3], strict=True)
    ]
    wanted = [any(needs[0]), any(needs[1]), *needs[2]]
    by_row, by_bias, *by_pixel = _factored_mask_loss_backward(*inputs, wanted, backend)
    found = [
        [grad[layer] if need else None for layer, need in enumerate(each)]
        for grad, each in zip((by_row, by_bias), needs[:2], strict=True)
    ]
    found.append([grad if need else None for grad, need in zip(by_pixel, needs[2], strict=True)])
    return *found, *[None] * (len(ctx.kinds) - len(found))


_factored_mask_loss.register_autograd(_factored_derivative, setup_context=set_up)
_differentiable_factored_mask_loss = Derivative(_factored_mask_loss, set_up, _factored_derivative)


def factored_mask_loss(
    factors: Factors, index: Tensor, counts: Sequence[int], job: Job, backend: str
) -> tuple[Tensor, Tensor]:
    """Compute what `mask_loss` does, for logits as factors; gradients to all of them.

    `index` `[N, INDEX_COLUMNS]` is sorted by layer and image; `counts` `[L * B]` says how many rows each of these has.
    """
    ce, dice, *_ = _differentiable_factored_mask_loss(*factors, index, counts, *job.flat, backend)
    return ce, dice
