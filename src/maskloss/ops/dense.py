"""The operations of losses of dense logits, and their derivatives."""

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
from maskloss.ops.transformed import Derivative, keep, kept, set_up


class Loss(NamedTuple):
    """A loss of instances of dense logits, whose gradient may come early."""

    name: str  # of the operation, and of the backend's function
    module: Callable[[str], Any]  # where a backend has its functions: this one, and those that end as below
    regroup: Callable[[Sequence[Any]], tuple[Any, ...]]  # turns the flat inputs after the instances into what they take
    operation: Any  # the loss, with its derivative
    backward: Any  # the operation of its derivative

    def function(self, backend: str, ending: str) -> Any:
        """Return the backend's function of the name with this ending."""
        return getattr(self.module(backend), self.name + ending)


def register(
    name: str, inputs: str, module: Callable[[str], Any], regroup: Callable[[Sequence[Any]], tuple[Any, ...]]
) -> Loss:
    """Register a loss and its derivative as operations; `inputs` is the schema of what follows the instances."""

    @operation(name, f"{INSTANCES}, {inputs}, str backend", LOSSES, **NOT_CAPTURED)
    def forward(*args: Any) -> tuple[Tensor, ...]:
        instances, *flat, backend = grouped(args, Instances)
        ce, dice, saved = getattr(module(backend), name)(instances, *regroup(flat))
        return ce, dice, *saved

    @forward.register_fake
    def _(*args: Any) -> tuple[Tensor, ...]:
        instances, *flat, _ = grouped(args, Instances)
        job, rows = regroup(flat)[0], instances.rows
        ce, dice, saved = job.new_losses(rows.shape[0], instances.accumulation_dtype, rows.device, keep=False)
        return ce, dice, *saved

    @operation(
        f"{name}_backward",
        f"{GRADIENTS}, {SAVED}, {INSTANCES}, {inputs}, bool[] needs_grad, str backend",
        "Tensor[]",
        **NOT_CAPTURED,
    )
    def backward(*args: Any) -> list[Tensor]:
        grads, saved, instances, *flat, needs_grad, backend = grouped(args, Gradients, Saved, Instances)
        compute = getattr(module(backend), f"{name}_backward")
        found: list[Tensor] = compute(grads, saved, instances, *regroup(flat), needs_grad)
        return found

    @backward.register_fake
    def _(*args: Any) -> list[Tensor]:
        _, _, instances, *_, needs_grad, _ = grouped(args, Gradients, Saved, Instances)
        return [
            torch.empty(layer.shape if need else 0, dtype=layer.dtype, device=layer.device)
            for layer, need in zip(instances.logits, needs_grad, strict=True)
        ]

    def derivative(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needs_grad = [bool(need) for need in ctx.needs_input_grad[0]]
        *given, backend = kept(ctx, grad_ce, grad_dice)
        grads = backward(*given, needs_grad, backend)
        wanted = [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
        return wanted, *[None] * (len(ctx.kinds) - 1)

    forward.register_autograd(derivative, setup_context=set_up)
    return Loss(name, module, regroup, Derivative(forward, set_up, derivative), backward)


# ------------------------------------------------------------------------------------------- gradients that come early

# Computing the gradient while the plane is still in cache halves its cost. It only needs the gradients of the
# per-instance losses, and the caller nearly always knows those in advance: it tells how it will sum the losses. The
# backward pass compares the expected gradients with the real ones.


class _Ahead(torch.autograd.Function):
    """A loss that also computes the gradients, for losses that will be summed as expected.

    Not a registered operation: passing through the dispatcher takes as long as some of the kernels. It runs only on
    plain tensors (see `_pays_ahead`), which do not need dispatcher features.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Loss, expected: Gradients, inputs: tuple[Any, ...], backend: str, *logits: Tensor
    ) -> Any:
        flat = (list(logits), *inputs)
        needs_grad = [bool(need) for need in ctx.needs_input_grad[4:]]
        instances, *rest = grouped(flat, Instances)
        ce, dice, saved, ahead = loss.function(backend, "_ahead")(expected, instances, *loss.regroup(rest), needs_grad)
        keep(ctx, saved, (*flat, backend))
        # Not among the saved tensors: the first backward pass takes the gradients, and may change them.
        ctx.loss, ctx.expected, ctx.ahead, ctx.computed = loss, expected, ahead, needs_grad
        return ce, dice

    @staticmethod
    def backward(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None) -> Any:
        found, ctx.ahead = ctx.ahead, None
        needs_grad = [bool(need) for need in ctx.needs_input_grad[4:]]
        *inputs, backend = kept(ctx, grad_ce, grad_dice)
        # If a graph of the gradient is wanted, the operation raises: it cannot be differentiated twice.
        if found is None or torch.is_grad_enabled():
            found = ctx.loss.backward(*inputs, needs_grad, backend)
        else:
            grads, saved, instances, *rest = grouped(inputs, Gradients, Saved, Instances)
            settle = ctx.loss.function(backend, "_settle")
            settle(found, ctx.expected, grads, saved, instances, *ctx.loss.regroup(rest), ctx.computed)
        return *[None] * 4, *(grad if need else None for grad, need in zip(found, needs_grad, strict=True))


_MASKS = register("mask_loss", JOB, load, lambda flat: (Job.of(flat),))


def mask_loss(
    instances: Instances, job: Job, backend: str, reduction: Reduction | None = None
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and Dice `[N]` at the caller's points, or at points that are drawn; gradient to logits.

    `reduction` is how the losses will be summed, if that is known; a wrong hint costs time, not correctness.
    """
    return loss_of(_MASKS, instances, job.flat, backend, reduction)


def loss_of(
    loss: Loss, instances: Instances, inputs: tuple[Any, ...], backend: str, reduction: Reduction | None
) -> tuple[Tensor, Tensor]:
    """Compute a loss of instances, and its gradient ahead where that pays; `inputs` are flat."""
    flat = (*instances, *inputs)
    if reduction is not None and _pays_ahead(instances, flat, backend):
        logits, *rest = flat
        expected = reduction.gradients(instances)
        ce, dice = _Ahead.apply(loss, expected, tuple(rest), backend, *logits)  # type: ignore[no-untyped-call]
    else:
        ce, dice, *_ = loss.operation(*flat, backend)
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
