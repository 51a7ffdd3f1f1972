"""What stands between a call and the values of its tensors: devices, tracers, lazy tensors, transforms of `torch.func`.

Targets are packed by code that looks at values, outside of any transform: no gradient flows to them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from maskloss.errors import Cause, describe

P = ParamSpec("P")
R = TypeVar("R")

# Integer types without arithmetic in torch, and what holds their values.
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def on_host(tensor: Tensor) -> bool:
    """Whether tensor values can be inspected without a device sync, and without a constant or a break in a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _traced()


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Convert to a tensor: a tensor stays on its device, anything else goes to the CPU, whatever the default device."""
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    return torch.as_tensor(value, dtype=dtype, device="cpu")


def plain(value: Any) -> Any:
    """Convert what NumPy makes an array of numbers to a tensor; of anything else make nothing.

    Tensors stay where they are, and a list of them is stacked.
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, Tensor) for each in value):
        same = len({(each.shape, each.dtype, each.device) for each in value}) == 1
        return torch.stack(list(value)) if same else value
    if value is not None and not isinstance(value, (Tensor, str, bytes)):
        try:
            value = _from_numpy(np.asarray(value), value)
        except ValueError:  # lists of different lengths
            return value
    return value.to(_WIDER[value.dtype]) if isinstance(value, Tensor) and value.dtype in _WIDER else value


def _from_numpy(array: Any, value: Any) -> Any:
    """Convert an array of numbers without a copy where its type and strides allow it; return `value` for any other."""
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        return value
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # A tensor cannot have negative strides.
    return torch.from_numpy(array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy())


def listed(value: Any) -> Any:
    """List the numbers of an array, or of a tensor that has some; leave anything else as it is."""
    plain_tensor = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type != "meta"
    return value.tolist() if plain_tensor or isinstance(value, (np.ndarray, np.generic)) else value


def as_device(device: Any) -> torch.device:
    """Convert a device's name or number."""
    try:
        if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"got {describe(device)}")
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        cause = str(error).partition("\n")[0]
    raise Cause(
        "the device must be one that PyTorch knows", cause, '"cuda" or "cpu", for instance; there is no dtype to change'
    )


def _traced() -> bool:
    """Whether `make_fx` records operations. Whoever calls it has imported its module."""
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return module is not None and module.get_proxy_mode() is not None


def is_lazy(tensor: Tensor) -> bool:
    """Whether memory does not hold the values: a negation is only noted, or that all elements are zero."""
    return tensor.is_neg() or tensor._is_zerotensor()


def materialized(tensor: Tensor) -> Tensor:
    """Write the values of a lazy tensor to memory."""
    return tensor.clone() if is_lazy(tensor) else tensor


def savable(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd can save: what `torch.inference_mode` made, targets for instance, is copied."""
    return tensor.clone() if not torch.compiler.is_compiling() and tensor.is_inference() else tensor


def active() -> bool:
    """Whether a transform of `torch.func` is being applied."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._functorch.maybe_current_level() is not None)


def watched() -> bool:
    """Whether a mode of the dispatcher, such as one that counts operations, wants to see every operation."""
    return bool(torch._C._len_torch_dispatch_stack())


def nested() -> bool:
    """Whether one transform is being applied inside of another."""
    return active() and torch._C._functorch.current_level() > 1


def is_mapped(tensors: Sequence[Tensor]) -> bool:
    """Whether `torch.vmap` maps over one of some tensors."""
    return any(torch._C._functorch.is_batchedtensor(tensor) for tensor in tensors)


def mapped() -> Cause:
    """Make the error of a loss that is mapped over."""
    return Cause(
        "torch.vmap over losses is not supported",
        "vmap, jacrev, jacfwd or hessian is applied to the loss",
        "losses of many instances are a batch, [N, h, w], and per_instance has the loss of each",
    )


def outside(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that packs masks on the values of its tensors, outside of all transforms.

    `torch.jit.trace` would keep the masks of its example as constants.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling() and torch._C._is_tracing():
            raise Cause(
                "masks cannot be packed under torch.jit.trace",
                "the traced function would use these masks for every input",
                "torch.compile and torch.export trace the packing too; or pack outside, with MaskTargets.from_masks",
            )
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
