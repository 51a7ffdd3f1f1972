"""What `torch.func` makes of a tensor: how to see through its wrappers, and what to refuse.

Targets are packed by code that looks at values, outside of any transform: no gradient flows to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from maskloss.errors import Cause

P = ParamSpec("P")
R = TypeVar("R")


def active() -> bool:
    """Tell whether a transform of `torch.func` is being applied."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._functorch.maybe_current_level() is not None)


def watched() -> bool:
    """Tell whether a mode of the dispatcher, such as one that counts operations, wants to see every operation."""
    return bool(torch._C._len_torch_dispatch_stack())


def nested() -> bool:
    """Tell whether one transform is being applied inside of another."""
    return active() and torch._C._functorch.current_level() > 1


def is_mapped(tensors: Sequence[Tensor]) -> bool:
    """Tell whether `torch.vmap` maps over one of some tensors."""
    return any(torch._C._functorch.is_batchedtensor(tensor) for tensor in tensors)


def mapped() -> Cause:
    """Say that a loss cannot be mapped over."""
    return Cause(
        "losses must not be mapped over by torch.vmap",
        "vmap, jacrev, jacfwd or hessian is applied to the loss",
        "losses of many instances are a batch, [N, h, w], and per_instance has the loss of each",
    )


def outside(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function on the values of its tensors, outside of all transforms."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not active():
            return function(*args, **kwargs)
        plain_args, plain_kwargs = _unwrapped(args), _unwrapped(kwargs)
        with _no_transforms():
            return function(*plain_args, **plain_kwargs)

    return call


def _no_transforms() -> AbstractContextManager[Any]:
    disable: AbstractContextManager[Any] = torch._C._DisableFuncTorch() if active() else nullcontext()
    return disable


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        functorch = torch._C._functorch
        while functorch.is_functorch_wrapped_tensor(value):
            if is_mapped([value]):
                raise mapped()
            value = functorch.get_unwrapped(value)
        return value
    if isinstance(value, dict):
        return {key: _unwrapped(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_unwrapped, value))
    return value
