"""The operation of the loss of dense logits, and its derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from maskloss._abi import (
    Draw,
    Gradients,
    Instances,
    Reduction,
    Saved,
    Targets,
    Term,
    accumulation_dtype,
    grouped,
    num_bytes,
)
from maskloss._tracing import active, is_lazy, materialized, savable, watched
from maskloss.ops.dispatch import load
from maskloss.ops.schemas import LOSS, NOT_CAPTURED, operation
from maskloss.ops.transformed import Derivative


@operation("mask_loss", f"{LOSS}, str backend", "(Tensor, Tensor, Tensor, Tensor)", **NOT_CAPTURED)
def _mask_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, backend = grouped(args, Instances, Targets, Draw, Term)
    ce, dice, chosen, soft = load(backend).mask_loss(*inputs)
    return ce, dice, chosen, soft


@_mask_loss.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _shapes_of_losses(*args[:-1])


def _shapes_of_losses(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    instances, targets, draw, _, points = grouped(args, Instances, Targets, Draw, Term)
    count, like, dtype = instances.rows.shape[0], instances.logits[0], instances.accumulation_dtype
    width = num_bytes(draw.num_candidates) if points is None and draw.num_uncertain else 0
    return (
        like.new_empty(count, dtype=dtype),
        like.new_empty(count, dtype=dtype),
        like.new_empty(count, width, dtype=torch.uint8),
        like.new_empty(count, draw.num_points if targets.encoding == "values" else 0, dtype=dtype),
    )


def _shapes_of_gradients(logits: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty(layer.shape if need else 0, dtype=layer.dtype, device=layer.device)
        for layer, need in zip(logits, needs_grad, strict=True)
    ]


@operation(
    "mask_loss_backward",
    f"Tensor grad_ce, Tensor grad_dice, Tensor chosen, Tensor soft, {LOSS}, bool[] needs_grad, str backend",
    "Tensor[]",
    **NOT_CAPTURED,
)
def _mask_loss_backward(*args: Any) -> list[Tensor]:
    *inputs, backend = grouped(args, Gradients, Saved, Instances, Targets, Draw, Term)
    grads: list[Tensor] = load(backend).mask_loss_backward(*inputs)
    return grads


@_mask_loss_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    instances = Instances(*args[4:7])
    return _shapes_of_gradients(instances.logits, args[-2])


def _mask_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    _keep(ctx, inputs, output[2:])


def _keep(ctx: Any, inputs: tuple[Any, ...], saved: Sequence[Tensor]) -> None:
    """Save what the backward pass needs: the inputs of the operation, and what it chose and read."""
    logits, *rest, backend = inputs
    # Do not materialize zero gradients for unused losses or for outputs that only the backward pass reads.
    ctx.set_materialize_grads(False)
    tensors = [value for value in rest if isinstance(value, Tensor)]
    ctx.save_for_backward(*map(savable, (*saved, *logits, *tensors)))
    ctx.num_layers, ctx.backend = len(logits), backend
    ctx.options = [None if isinstance(value, Tensor) else (value,) for value in rest]


def _saved_inputs(ctx: Any) -> tuple[Any, ...]:
    """Return what the forward pass chose and read, and its inputs."""
    chosen, soft, *saved = ctx.saved_tensors
    logits, tensors = saved[: ctx.num_layers], iter(saved[ctx.num_layers :])
    return chosen, soft, logits, *(next(tensors) if option is None else option[0] for option in ctx.options)


def _whole(logits: Sequence[Tensor], rows: Tensor, *grads: Tensor | None) -> list[Tensor]:
    """Gradients of both losses in one piece, zeros for one that was not used."""
    zero = torch.zeros(rows.shape[0], dtype=accumulation_dtype(logits[0].dtype), device=rows.device)
    return [zero if grad is None else materialized(grad).contiguous() for grad in grads]


def _mask_loss_derivative(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None, *_: Any) -> tuple[Any, ...]:
    needs_grad = [bool(need) for need in ctx.needs_input_grad[0]]
    chosen, soft, *inputs = _saved_inputs(ctx)
    given = _whole(inputs[0], chosen, grad_ce, grad_dice)
    grads = _mask_loss_backward(*given, chosen, soft, *inputs, needs_grad, ctx.backend)
    kept = [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
    return kept, *[None] * len(ctx.options), None


_mask_loss.register_autograd(_mask_loss_derivative, setup_context=_mask_loss_setup)
_differentiable_mask_loss = Derivative(_mask_loss, _mask_loss_setup, _mask_loss_derivative)


# ------------------------------------------------------------------------------------------- gradients that come early

# Computing the gradient while the plane is still in cache halves its cost. It only needs the gradients of the
# per-instance losses, and the caller nearly always knows those in advance: it tells how it will sum the losses. The
# backward pass compares the expected gradients with the real ones.


class _Ahead(torch.autograd.Function):
    """`_mask_loss` that also computes the gradients, for losses that will be summed as expected.

    Not a registered operation: passing through the dispatcher takes as long as some of the kernels. It runs only on
    plain tensors (see `_pays_ahead`), which do not need dispatcher features.
    """

    @staticmethod
    def forward(ctx: Any, expected: Gradients, inputs: tuple[Any, ...], backend: str, *logits: Tensor) -> Any:
        flat = (list(logits), *inputs)
        needs_grad = [bool(need) for need in ctx.needs_input_grad[3:]]
        groups = grouped(flat, Instances, Targets, Draw, Term)
        ce, dice, *saved, ahead = load(backend).mask_loss_ahead(expected, *groups, needs_grad)
        _keep(ctx, (*flat, backend), saved)
        # Not among the saved tensors: the first backward pass takes the gradients, and may change them.
        ctx.expected, ctx.ahead, ctx.computed = expected, ahead, needs_grad
        return ce, dice

    @staticmethod
    def backward(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None) -> Any:
        found, ctx.ahead = ctx.ahead, None
        needs_grad = [bool(need) for need in ctx.needs_input_grad[3:]]
        chosen, soft, *inputs = _saved_inputs(ctx)
        given = _whole(inputs[0], chosen, grad_ce, grad_dice)
        # If a graph of the gradient is wanted, the operation raises: it cannot be differentiated twice.
        if found is None or torch.is_grad_enabled():
            found = _mask_loss_backward(*given, chosen, soft, *inputs, needs_grad, ctx.backend)
        else:
            groups = grouped((*given, chosen, soft, *inputs), Gradients, Saved, Instances, Targets, Draw, Term)
            load(ctx.backend).mask_loss_settle(found, ctx.expected, *groups, ctx.computed)
        return None, None, None, *(grad if need else None for grad, need in zip(found, needs_grad, strict=True))


def mask_loss(
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    backend: str,
    reduction: Reduction | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and Dice `[N]` at the caller's points, or at points that are drawn; gradient to logits.

    Args:
        instances: of all layers.
        targets: of the batch.
        draw: how points are drawn.
        term: how logits and targets are read.
        points: the caller's, or None.
        backend: which one.
        reduction: how the losses will be summed, if that is known; a wrong hint costs time, not correctness.
    """
    flat = (*instances, *targets, *draw, *term, points)
    if reduction is not None and _pays_ahead(instances, flat, backend):
        logits, *inputs = flat
        ce, dice = _Ahead.apply(reduction.gradients(instances), tuple(inputs), backend, *logits)  # type: ignore[no-untyped-call]
    else:
        ce, dice, _, _ = _differentiable_mask_loss(*flat, backend)
    return ce, dice


def _pays_ahead(instances: Instances, arguments: Sequence[Any], backend: str) -> bool:
    """Whether the forward pass should compute the gradient.

    Half precision would be rounded before it is scaled, and the scaling of mixed precision is there to prevent that.
    Tensors of other classes, lazy ones, and modes that watch or replace operations need the dispatcher.
    """
    logits = instances.logits
    return (
        backend == "cpu"
        and not torch.compiler.is_compiling()  # first: a compiler cannot follow the other questions
        and torch.is_grad_enabled()
        and any(layer.requires_grad for layer in logits)
        and all(type(layer) in (Tensor, Parameter) for layer in logits)
        and not any(is_lazy(each) for each in (*logits, *arguments[1:]) if isinstance(each, Tensor))
        and logits[0].dtype == instances.accumulation_dtype
        and not active()
        and not watched()
    )
