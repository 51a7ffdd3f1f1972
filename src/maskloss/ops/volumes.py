"""The operations on volumes, and on clips whose points are drawn over all frames: loss, its derivative, matching cost.

Logits are `[B, Q, d, h, w]`; targets are stored slice by slice (see `Stack`). The reference backend defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from maskloss._abi import Gradients, Instances, Job, Reduction, Saved, Stack, accumulation_dtype, grouped, widest
from maskloss.errors import Cause
from maskloss.ops.dense import Kind, loss_of, shapes_of_gradients
from maskloss.ops.dispatch import load
from maskloss.ops.schemas import GRADIENTS, INSTANCES, JOB, LOSSES, NOT_CAPTURED, SAVED, operation
from maskloss.ops.transformed import Derivative, keep, kept

_STACK = "SymInt frames, bool linear"


def check_backend_of_volumes(backend: str) -> None:
    """Raise for the backend that has no kernels for volumes."""
    if backend == "gpu":
        raise Cause(
            "points of volumes, and of clips with unit='clip', are drawn by the backends 'reference' and 'cpu'",
            "the backend is 'gpu'",
            "backend='reference' runs on every device; unit='frame' on every backend",
        )


def _module(backend: str) -> Any:
    return load(f"{backend}.volumes")


@operation("volume_loss", f"{INSTANCES}, {JOB}, {_STACK}, str backend", LOSSES, **NOT_CAPTURED)
def _volume_loss(*args: Any) -> tuple[Tensor, ...]:
    instances, *flat, frames, linear, backend = grouped(args, Instances)
    ce, dice, saved = _module(backend).volume_loss(instances, Job.of(flat), Stack(frames, linear))
    return ce, dice, *saved


@_volume_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    instances, *flat, _, _, _ = grouped(args, Instances)
    rows = instances.rows
    ce, dice, saved = Job.of(flat).new_losses(rows.shape[0], instances.accumulation_dtype, rows.device, keep=False)
    return ce, dice, *saved


@operation(
    "volume_loss_backward",
    f"{GRADIENTS}, {SAVED}, {INSTANCES}, {JOB}, {_STACK}, bool[] needs_grad, str backend",
    "Tensor[]",
    **NOT_CAPTURED,
)
def _volume_loss_backward(*args: Any) -> list[Tensor]:
    grads, saved, instances, *flat, frames, linear, needs_grad, backend = grouped(args, Gradients, Saved, Instances)
    stack = Stack(frames, linear)
    found: list[Tensor] = _module(backend).volume_loss_backward(
        grads, saved, instances, Job.of(flat), stack, needs_grad
    )
    return found


@_volume_loss_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    _, _, instances, *_ = grouped(args, Gradients, Saved, Instances)
    return shapes_of_gradients(instances.logits, args[-2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    keep(ctx, output[2:], inputs)


def _derivative(ctx: Any, grad_ce: Tensor | None, grad_dice: Tensor | None, *_: Any) -> tuple[Any, ...]:
    needs_grad = [bool(need) for need in ctx.needs_input_grad[0]]
    *inputs, backend = kept(ctx, grad_ce, grad_dice)
    grads = _volume_loss_backward(*inputs, needs_grad, backend)
    wanted = [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
    return wanted, *[None] * (len(ctx.kinds) - 1)


_volume_loss.register_autograd(_derivative, setup_context=_setup)
_differentiable_volume_loss = Derivative(_volume_loss, _setup, _derivative)


_VOLUMES = Kind(
    _differentiable_volume_loss,
    _volume_loss_backward,
    lambda backend: (_module(backend).volume_loss_ahead, _module(backend).volume_loss_settle),
    lambda flat: (Job.of(flat[:-2]), Stack(*flat[-2:])),
)


def volume_loss(
    instances: Instances, job: Job, stack: Stack, backend: str, reduction: Reduction | None = None
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and Dice `[N]` of volumes, at points that are drawn in them; gradient to the logits.

    `reduction` is how the losses will be summed, if that is known, as in `mask_loss`.
    """
    return loss_of(_VOLUMES, instances, (*job.flat, *stack), backend, reduction)


@operation(
    "volume_cost",
    f"Tensor[] logits, SymInt[] num_targets, {JOB}, {_STACK}, str backend",
    "(Tensor, Tensor)",
    **NOT_CAPTURED,
)
def _volume_cost(logits: Sequence[Tensor], num_targets: Sequence[int], *args: Any) -> tuple[Tensor, Tensor]:
    *flat, frames, linear, backend = args
    ce, dice = _module(backend).volume_cost(logits, num_targets, Job.of(flat), Stack(frames, linear))
    return ce, dice


@_volume_cost.register_fake
def _(logits: Sequence[Tensor], num_targets: Sequence[int], *_: Any) -> tuple[Tensor, Tensor]:
    shape = (len(logits), *logits[0].shape[:2], widest(num_targets))
    dtype = accumulation_dtype(logits[0].dtype)
    return logits[0].new_empty(shape, dtype=dtype), logits[0].new_empty(shape, dtype=dtype)


def volume_cost(
    logits: Sequence[Tensor], num_targets: Sequence[int], job: Job, stack: Stack, backend: str
) -> tuple[Tensor, Tensor]:
    """Compute both mask terms of the matching cost of volumes, `[L, B, Q, T_max]`, at uniform points. No gradient."""
    detached = [layer.detach() for layer in logits]
    ce, dice = _volume_cost(detached, num_targets, *job.flat, *stack, backend)
    return ce, dice
