"""The library's error, and how its message is built.

Deep code raises a short `Cause`. The public call in which it happened (marked with `reported`) turns it into one
readable error that names the operation and the shapes that it was given; of public calls inside each other, the one
that the user made:

    MaskLoss: mask_logits and masks must pair up
      mask_logits [12, 64, 64] float32, masks [11, 256, 256] bool
      cause: 12 predictions but 11 targets
      hint: give one target mask for each prediction
"""

from __future__ import annotations

import functools
import importlib
import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

# Values that come from a file may be deep, and hold the same list many times.
_NESTED = reprlib.Repr()
_NESTED.maxlevel, _NESTED.maxlist, _NESTED.maxtuple, _NESTED.maxset = 3, 30, 30, 30

P = ParamSpec("P")
R = TypeVar("R")


class MaskLossError(ValueError):
    """Input that `maskloss` cannot work with; the message says which, why, and what to do."""

    parts: tuple[str, str, str] | None = None


class Cause(MaskLossError):
    """What is wrong, said where it is found; `reported` adds the operation and its inputs.

    Args:
        rule: what must hold, as one clause.
        cause: what was found instead.
        hint: what the caller can do about it.
    """

    def __init__(self, rule: str, cause: str, hint: str) -> None:
        super().__init__(f"{rule}\n  cause: {cause}\n  hint: {hint}")
        self.parts = (rule, cause, hint)


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed; the message names the extra."""


def describe(value: object, depth: int = 3) -> str:
    """Name shape, dtype and, off the CPU, device of a tensor or an array; shorten everything else to one line.

    Mappings and sequences are looked into `depth` levels deep: one may contain itself.
    """
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            return f"nested tensor {str(value.dtype).removeprefix('torch.')}"
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        kind = "" if value.layout is torch.strided else f" {str(value.layout).removeprefix('torch.')}"
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}{kind}{where}"
    if isinstance(value, np.ndarray):
        return f"numpy {list(value.shape)} {value.dtype}"
    if isinstance(value, Mapping):
        shown = list(value.items())[:4] if depth else ()
        return "{" + ", ".join(f"{_shown(key)}: {describe(item, depth - 1)}" for key, item in shown) + "}"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if not value:
            return "empty"
        if not isinstance(value[0], (int, float)):
            return f"{len(value)} x {describe(value[0], depth - 1) if depth else '...'}"
    return _shown(value)


def _shown(value: object) -> str:
    """Return the `repr` of a value on one line; of what can be nested, only so much as is shown."""
    try:
        text = " ".join((_NESTED.repr(value) if isinstance(value, (list, tuple, set)) else repr(value)).split())
    except ValueError:
        # Python writes no integer of more than 4,300 digits.
        text = f"{type(value).__name__} of many digits"
    return text if len(text) <= 80 else text[:77] + "..."


def check_layout(name: str, value: object) -> None:
    """Raise if a tensor has no strides, as sparse and nested ones. Anything else passes."""
    if isinstance(value, torch.Tensor) and (value.is_nested or value.layout is not torch.strided):
        raise Cause(
            f"{name} must be an ordinary tensor with strides",
            f"got {describe(value)}",
            f"{name}.to_dense() converts a sparse tensor, torch.nested.to_padded_tensor a nested one",
        )


def check_device(name: str, device: torch.device, wanted: torch.device) -> None:
    """Raise if a tensor is not where the logits are."""
    if device != wanted:
        raise Cause(
            f"{name} must be on the device of the logits",
            f"{name} on {device}, logits on {wanted}",
            f"{name}.to({str(wanted)!r}, non_blocking=True), before the step",
        )


def reported(operation: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a public call: a `Cause` raised inside it becomes an error that names `operation` and its inputs.

    If a marked call inside this one fails, report the error under the outer name: users never called
    the inner one.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except MaskLossError as error:
                parts = error.parts
                if parts is None:
                    raise
                told = MaskLossError(_message(operation, parts, _inputs(function, args, kwargs)))
            told.parts = parts
            raise told from None

        return call

    return decorate


def _inputs(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    extra = bound.pop("kwargs", {})
    given = {**bound, **extra}
    return ", ".join(
        f"{name} {describe(value)}"
        for name, value in given.items()
        if name not in {"self", "cls"} and value is not None
    )


def _message(operation: str, parts: tuple[str, str, str], inputs: str) -> str:
    rule, cause, hint = parts
    lines = [f"{operation}: {rule}"]
    if inputs:
        lines.append(f"  {inputs}")
    return "\n".join([*lines, f"  cause: {cause}", f"  hint: {hint}"])


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional extra.

    Args:
        module: dotted name of the module.
        extra: name of the extra of `maskloss` that installs it.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the module is not installed. An error *inside* an installed module is passed on as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise MissingExtraError(
            f"maskloss: this needs the package that provides {top!r}, which is not installed\n"
            f"  hint: pip install 'maskloss[{extra}]'"
        ) from None
