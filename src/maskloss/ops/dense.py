"""The operation of the loss of dense logits, and its derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from maskloss._abi import Gradients, Instances, Job, Reduction, Saved, grouped
from maskloss._tracing import active, is_lazy, watched
from maskloss.ops.dispatch import load
from maskloss.ops.schemas import GRADIENTS, INSTANCES, JOB, LOSSES, NOT_CAPTURED, SAVED, operation
from maskloss.ops.transformed import Derivative, keep, kept


@operation("mask_loss", f"{INSTANCES}, {JOB}, str backend", LOSSES, **NOT_CAPTURED)
def _mask_loss(*args: Any) -> tuple[Tensor, ...]:
    instances, *flat, backend = grouped(args, Instances)
    ce, dice, saved = load(backend).mask_loss(instances, Job.of(flat))
    return ce, dice, *saved


@_mask_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    instances, *flat, _ = grouped(args, Instances)
    rows = instances.rows
    ce, dice, saved = Job.of(flat).new_losses(rows.shape[0], instances.accumulation_dtype, rows.device, keep=False)
    return ce, dice, *saved


def shapes_of_gradients(logits: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Make empty gradients of the layers that need one."""
    return [
        torch.empty(layer.shape if need else 0, dtype=layer.dtype, device=layer.device)
        for layer, need in zip(logits, needs_grad, strict=True)
    ]


@operation(
    "mask_loss_backward",
    f"{GRADIENTS}, {SAVED}, {INSTANCES}, {JOB}, bool[] needs_grad, str backend",
    "Tensor[]",
    **NOT_CAPTURED,
)
def _mask_loss_backward(*args: Any) -> list[Tensor]:
    *groups, needs_grad, backend = args
    grads: list[Tensor] = load(backend).mask_loss_backward(*_grouped(groups), needs_grad)
    return grads


def _grouped(flat: Sequence[Any]) -> tuple[Gradients, Saved, Instances, Job]:
    """What backward passes take."""
    grads, saved, instances, *rest = grouped(flat, Gradients, Saved, Instances)
    return grads, saved, instances, Job.of(rest)


@_mask_loss_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    instances = _grouped(args[:-2])[2]
    return shapes_of_gradients(instances.logits, args[-2])


def _mask_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    keep(ctx, output[2:], inputs)


def _mask_loss_derivative(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None, *_: Any) -> tuple[Any, ...]:
    needs_grad = [bool(need) for need in ctx.needs_input_grad[0]]
    *inputs, backend = kept(ctx, grad_ce, grad_dice)
    grads = _mask_loss_backward(*inputs, needs_grad, backend)
    wanted = [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
    return wanted, *[None] * (len(ctx.kinds) - 1)


_mask_loss.register_autograd(_mask_loss_derivative, setup_context=_mask_loss_setup)
_differentiable_mask_loss = Derivative(_mask_loss, _mask_loss_setup, _mask_loss_derivative)


# ------------------------------------------------------------------------------------------- gradients that come early

# Computing the gradient while the plane is still in cache halves its cost. It only needs the gradients of the
# per-instance losses, and the caller nearly always knows those in advance: it tells how it will sum the losses. The
# backward pass compares the expected gradients with the real ones.


class Kind(NamedTuple):
    """A loss whose gradient may come early.

    Attributes:
        operation: the loss, with its derivative.
        backward: the operation of its derivative.
        functions: the backend's functions that compute the gradients ahead, and that settle them.
        regroup: turns the flat inputs after the instances into what these functions take.
    """

    operation: Any
    backward: Any
    functions: Callable[[str], tuple[Any, Any]]
    regroup: Callable[[Sequence[Any]], tuple[Any, ...]]


class _Ahead(torch.autograd.Function):
    """A loss that also computes the gradients, for losses that will be summed as expected.

    Not a registered operation: passing through the dispatcher takes as long as some of the kernels. It runs only on
    plain tensors (see `_pays_ahead`), which do not need dispatcher features.
    """

    @staticmethod
    def forward(
        ctx: Any, kind: Kind, expected: Gradients, inputs: tuple[Any, ...], backend: str, *logits: Tensor
    ) -> Any:
        flat = (list(logits), *inputs)
        needs_grad = [bool(need) for need in ctx.needs_input_grad[4:]]
        instances, *rest = grouped(flat, Instances)
        compute, _ = kind.functions(backend)
        ce, dice, saved, ahead = compute(expected, instances, *kind.regroup(rest), needs_grad)
        keep(ctx, saved, (*flat, backend))
        # Not among the saved tensors: the first backward pass takes the gradients, and may change them.
        ctx.kind, ctx.expected, ctx.ahead, ctx.computed = kind, expected, ahead, needs_grad
        return ce, dice

    @staticmethod
    def backward(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None) -> Any:
        found, ctx.ahead = ctx.ahead, None
        needs_grad = [bool(need) for need in ctx.needs_input_grad[4:]]
        *inputs, backend = kept(ctx, grad_ce, grad_dice)
        # If a graph of the gradient is wanted, the operation raises: it cannot be differentiated twice.
        if found is None or torch.is_grad_enabled():
            found = ctx.kind.backward(*inputs, needs_grad, backend)
        else:
            grads, saved, instances, *rest = grouped(inputs, Gradients, Saved, Instances)
            _, settle = ctx.kind.functions(backend)
            settle(found, ctx.expected, grads, saved, instances, *ctx.kind.regroup(rest), ctx.computed)
        return *[None] * 4, *(grad if need else None for grad, need in zip(found, needs_grad, strict=True))


_MASKS = Kind(
    _differentiable_mask_loss,
    _mask_loss_backward,
    lambda backend: (load(backend).mask_loss_ahead, load(backend).mask_loss_settle),
    lambda flat: (Job.of(flat),),
)


def mask_loss(
    instances: Instances, job: Job, backend: str, reduction: Reduction | None = None
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and Dice `[N]` at the caller's points, or at points that are drawn; gradient to logits.

    `reduction` is how the losses will be summed, if that is known; a wrong hint costs time, not correctness.
    """
    return loss_of(_MASKS, instances, job.flat, backend, reduction)


def loss_of(
    kind: Kind, instances: Instances, inputs: tuple[Any, ...], backend: str, reduction: Reduction | None
) -> tuple[Tensor, Tensor]:
    """Compute a loss of instances, and its gradient ahead where that pays; `inputs` are flat."""
    flat = (*instances, *inputs)
    if reduction is not None and _pays_ahead(instances, flat, backend):
        logits, *rest = flat
        expected = reduction.gradients(instances)
        ce, dice = _Ahead.apply(kind, expected, tuple(rest), backend, *logits)  # type: ignore[no-untyped-call]
    else:
        ce, dice, *_ = kind.operation(*flat, backend)
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
