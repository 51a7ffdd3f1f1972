"""The library's error, and how its message is built.

Deep code raises a short `Cause`. The public call in which it happened (marked with `reported`) turns it into one
readable error that names the operation and the shapes that it was given. If public calls are nested, it names the
outermost one, which the user made:

    MaskLoss: mask_logits and masks must pair up
      mask_logits [12, 64, 64] float32, masks [11, 256, 256] bool
      cause: 12 predictions but 11 targets
      hint: give one target mask for each prediction
"""

from __future__ import annotations

import difflib
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
T = TypeVar("T")


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


class MaskLossTypeError(MaskLossError, TypeError):
    """A call with arguments that it does not take."""


class Unexpected(Exception):
    """A keyword that is no option of a group; `reported` makes a `MaskLossTypeError` of it.

    Args:
        name: the keyword.
        options: the options of the group.
    """

    def __init__(self, name: str, options: Sequence[str]) -> None:
        super().__init__(f"got an unexpected keyword argument {name!r}")
        self.options = tuple(options)


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
    """Return the `repr` of a value on one line; of what can be nested, only the part that is shown."""
    try:
        text = " ".join((_NESTED.repr(value) if isinstance(value, (list, tuple, set)) else repr(value)).split())
    except ValueError:
        # Python writes no integer of more than 4,300 digits.
        text = f"{type(value).__name__} of many digits"
    return text if len(text) <= 80 else text[:77] + "..."


def check_layout(name: str, value: object) -> None:
    """Raise if a tensor has no strides: if it is sparse or nested. Anything else passes."""
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


def reported(operation: str, names: Mapping[str, str] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a public call: a `Cause` raised inside it becomes an error that names `operation` and its inputs.

    If a nested marked call fails, the error is reported under the outer name: users never called the inner one.
    Arguments that the call does not take are reported in the same way, as a `MaskLossTypeError`.

    Args:
        operation: the name of the call.
        names: what this call's users call the arguments that the library's checks name.
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
                for inner, outer in (names or {}).items():
                    parts = tuple(part.replace(inner, outer) for part in parts)  # type: ignore[assignment]
                kind = type(error) if isinstance(error, MaskLossTypeError) else MaskLossError
                told = kind(_message(operation, parts, _inputs(function, args, kwargs)))
            except (TypeError, Unexpected) as error:
                parts = _misuse(function, args, kwargs, error)
                if parts is None:
                    raise
                told = MaskLossTypeError(_message(operation, parts, ""))
            told.parts = parts
            raise told from None

        return call

    return decorate


def reported_init(kind: type[T]) -> type[T]:
    """Mark the constructor of a class as `reported` marks a call; for those that a dataclass writes."""
    kind.__init__ = reported(kind.__name__)(kind.__init__)  # type: ignore[method-assign]
    return kind


# What people guess from other code bases, and the arguments here that mean it. The first that a call takes is named.
_GUESSES = {
    "num_points": ("sampling=PointSampling(num_points=...)",),
    "oversample_ratio": ("sampling=PointSampling(oversample_ratio=...)",),
    "importance_ratio": ("importance_sample_ratio", "sampling=PointSampling(importance_ratio=...)"),
    "importance_sample_ratio": ("sampling=PointSampling(importance_ratio=...)", "importance_ratio"),
    "layout": ("sampling=PointSampling(layout=...)",),
    "num_labels": ("num_classes",),
    "class_queries_logits": ("class_logits",),
    "pred_logits": ("class_logits",),
    "masks_queries_logits": ("mask_logits",),
    "pred_masks": ("mask_logits",),
    "logits": ("mask_logits", "class_logits"),
    "mask_labels": ('targets=[{"masks": ..., "labels": ...}]', "masks"),
    "class_labels": ('targets=[{"masks": ..., "labels": ...}]',),
    "labels": ('targets=[{"masks": ..., "labels": ...}]',),
    "target": ("targets", "masks"),
    "indices": ("matches",),
    "eos_coef": ("no_object_weight",),
    "contrast_temperature": ("extra_loss",),
    "weight": ("class_weights", "instance_weights"),
    "mask_weight": ("ce_weight",),
    "bce_weight": ("ce_weight", "mask_weight"),
    "ce_weight": ("mask_weight",),
    "cost_class": ("class_weight",),
    "cost_mask": ("mask_weight", "ce_weight"),
    "cost_dice": ("dice_weight",),
    "alpha": ("focal_alpha", "importance_ratio"),
    "gamma": ("focal_gamma",),
    "num_boxes": ("num_instances", "totals"),
    "num_masks": ("num_instances", "totals"),
    "target_sizes": ("size",),
    "sampling": ("num_points",),
    "ignore_index": ("ignore_value",),
    "num_select": ("max_instances",),
}


def _misuse(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception
) -> tuple[str, str, str] | None:
    """Rule, cause and hint for arguments that a call does not take; None if the error came from elsewhere."""
    signature, name = inspect.signature(function), None
    taken = [each for each in signature.parameters if each not in {"self", "cls", "kwargs"}]
    if isinstance(error, Unexpected):
        taken += error.options
        name = next(each for each in kwargs if each not in taken)
    else:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as misfit:
            error = misfit
            name = next((each for each in kwargs if each not in signature.parameters), None)
        else:
            return None
    meant = None
    if name is not None:
        known = _GUESSES.get(name, difflib.get_close_matches(name, taken, 1))
        meant = next((each for each in known if each.partition("=")[0] in taken), None)
    hint = f"it takes {', '.join(taken)}" if meant is None else f"use {meant if '=' in meant else meant + '='}"
    return "the arguments must be those of this call", str(error), hint


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
