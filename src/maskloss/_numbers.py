"""Checks of single numbers: of a number's type, finite, in range."""

from __future__ import annotations

import math
import operator
import sys
from numbers import Real
from typing import Any

from maskloss.errors import Cause, describe


def is_number(value: Any) -> bool:
    """Whether something is a finite real number, and not a truth value."""
    # Comparisons, which torch.compile follows for numbers that change from call to call, as it does not `isfinite`.
    most = sys.float_info.max
    return not isinstance(value, bool) and isinstance(value, Real) and value <= most and not value < -most


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, hint: str) -> float:
    """Raise if something is no finite number in [least, most]."""
    if not is_number(value) or not least <= value <= most:
        raise Cause(f"{name} must be a finite number{_limits(least, most)}", f"{name}={value!r}", hint)
    return float(value)


def check_integer(name: str, value: Any, least: int, most: float = math.inf, *, hint: str) -> int:
    """Raise if something is no integer in [least, most]; NumPy's are integers too."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    # 64 bits at most, for what is computed with it.
    if number is None or not least <= number <= min(most, 2**63 - 1):
        shown = describe(value) if isinstance(value, int) else repr(value)
        raise Cause(f"{name} must be an integer{_limits(least, most)}", f"{name}={shown}", hint)
    return number


def _limits(least: float, most: float) -> str:
    if least > -math.inf and most < math.inf:
        return f" in [{least:g}, {most:g}]"
    return f", at least {least:g}" if least > -math.inf else ""
