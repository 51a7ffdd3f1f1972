"""Operations under the transforms of `torch.func`, for which the derivatives of `torch.library` are not enough.

The function that `register_autograd` makes has no `setup_context`, and transforms reject such functions. So the same
setup and backward are registered once more, as a `torch.autograd.Function` that has one. It cannot replace the first:
the operation itself would have no derivative, which `torch.export` and `opcheck` need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from maskloss._abi import Saved
from maskloss._tracing import active, is_mapped, mapped, materialized, nested, savable
from maskloss.errors import MaskLossError


def keep(ctx: Any, saved: Sequence[Tensor], inputs: Sequence[Any]) -> None:
    """Keep what a backward pass needs: what `Saved` has, and the inputs of an operation, also lists of tensors."""
    # Unused losses, and outputs that only the backward pass reads, need no gradients of zeros.
    ctx.set_materialize_grads(False)
    tensors = list(saved)
    for value in inputs:
        tensors += value if _is_list(value) else [value] if isinstance(value, Tensor) else []
    ctx.save_for_backward(*map(savable, tensors))
    ctx.kinds = [len(value) if _is_list(value) else None if isinstance(value, Tensor) else (value,) for value in inputs]


def set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Set up the backward pass of a loss, which returns both losses and what `Saved` has."""
    ctx.mark_non_differentiable(*output[2:])
    keep(ctx, output[2:], inputs)


def kept(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Return gradients of both losses in one piece, zeros for one that was not used, and what `keep` has kept."""
    tensors = iter(ctx.saved_tensors)
    saved = Saved(*islice(tensors, len(Saved._fields)))
    zero = torch.zeros(saved.logits.shape[:1], dtype=saved.logits.dtype, device=saved.logits.device)
    given = (zero if grad is None else materialized(grad).contiguous() for grad in grads)
    inputs = (
        kind[0] if isinstance(kind, tuple) else next(tensors) if kind is None else list(islice(tensors, kind))
        for kind in ctx.kinds
    )
    return *given, *saved, *inputs


@dataclass(frozen=True, eq=False)
class Derivative:
    """An operation of the dispatcher, and its derivative as `torch.library` takes it."""

    operation: Any  # takes the flat arguments of the schema
    setup: Callable[..., None]  # called with a context, the arguments and the outputs
    backward: Callable[..., Any]  # called with a context and the gradients of the outputs

    def __call__(self, *args: Any) -> Any:
        """Call the operation; under a transform, in a form that the transform knows."""
        if not active():
            return self.operation(*args)
        lengths = [len(each) if _is_list(each) else None for each in args]
        flat = [item for each in args for item in (each if _is_list(each) else [each])]
        if is_mapped([item for item in flat if isinstance(item, Tensor)]):
            raise mapped()
        return _Transformed.apply(self, lengths, *flat)  # type: ignore[no-untyped-call]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value)


def _regroup(flat: Sequence[Any], lengths: Sequence[int | None]) -> tuple[Any, ...]:
    items = iter(flat)
    return tuple(next(items) if length is None else list(islice(items, length)) for length in lengths)


class _Context:
    """The context of a function, with gradients that are needed grouped as the arguments are."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.needs_input_grad = _regroup(ctx.needs_input_grad[2:], ctx.list_lengths)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(derivative: Derivative, lengths: Sequence[int | None], *flat: Any) -> Any:
        return derivative.operation(*_regroup(flat, lengths))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.derivative, ctx.list_lengths, *flat = inputs
        ctx.derivative.setup(ctx, _regroup(flat, ctx.list_lengths), output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if is_mapped([grad for grad in grads if grad is not None]):
            raise MaskLossError(_NOT_MAPPED)
        if nested():
            raise MaskLossError(_ONCE)
        # A transform asks for a graph of the gradient, which nothing reads: there is no second transform.
        with torch.no_grad():
            found = ctx.derivative.backward(_Context(ctx), *grads)
        flat = [
            item
            for each, length in zip(found, ctx.list_lengths, strict=True)
            for item in ([each or None if isinstance(each, list) else each] if length is None else each)
        ]
        return None, None, *flat

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise MaskLossError(_BACKWARD_ONLY)

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise MaskLossError(_NOT_MAPPED)


_NOT_MAPPED = f"maskloss: {mapped()}"
_ONCE = (
    "maskloss: losses are differentiable once\n"
    "  cause: a gradient of a gradient was asked for\n"
    "  hint: take one torch.func.grad or vjp"
)
_BACKWARD_ONLY = (
    "maskloss: losses have no forward-mode derivative\n"
    "  cause: torch.func.jvp, jacfwd or hessian is applied to the loss\n"
    "  hint: torch.func.grad and torch.func.vjp work"
)
