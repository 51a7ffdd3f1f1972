"""Checks of single numbers: of a number's type, finite, in range; and of flags."""

from __future__ import annotations

import math
import operator
import sys
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from maskloss.errors import Cause, describe

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_float(value: object) -> TypeGuard[Tensor]:
    """Whether something is a tensor of floats; PyTorch stores those of 8 bits and computes nothing with them."""
    return isinstance(value, Tensor) and value.dtype in FLOATS


def is_number(value: Any) -> bool:
    """Whether something is a finite real number, and not a truth value."""
    # Comparisons, which torch.compile follows for numbers that change from call to call, as it does not `isfinite`.
    if isinstance(value, np.floating):
        value = float(value)  # the comparison would be in its own precision, in which `most` is infinite
    most = sys.float_info.max
    return not isinstance(value, bool) and isinstance(value, Real) and value <= most and not value < -most


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, hint: str) -> float:
    """Raise if something is no finite number in [least, most]."""
    if not is_number(value) or not least <= value <= most:
        raise Cause(f"{name} must be a finite number{_limits(least, most)}", f"{name}={describe(value)}", hint)
    return float(value)


def check_integer(name: str, value: Any, least: int, most: float = math.inf, *, hint: str) -> int:
    """Raise if something is no integer in [least, most]; NumPy's are integers too."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # a tensor without data raises the latter
        number = None
    # 64 bits at most, for what is computed with it.
    if number is None or not least <= number <= min(most, 2**63 - 1):
        raise Cause(f"{name} must be an integer{_limits(least, most)}", f"{name}={describe(value)}", hint)
    return number


def label_cause(num_classes: int, found: str, worst: int) -> Cause:
    """Say that labels lie outside the classes."""
    hint = "subtract 1 from those that count from 1"
    if worst != num_classes:
        hint = f"ignore_label={worst} if the class of such a target is unknown"
    return Cause(f"labels must lie in [0, {num_classes})", found, f"labels start at 0: {hint}")


def _limits(least: float, most: float) -> str:
    if least > -math.inf and most < math.inf:
        return f" in [{least:g}, {most:g}]"
    return f", at least {least:g}" if least > -math.inf else ""


def check_flags(**flags: object) -> None:
    """Raise if an option is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise Cause(f"{name} must be True or False", f"{name}={describe(value)}", "False is the default")
