"""Checks of single numbers: of a number's type, finite, in range."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

from maskloss.errors import Cause


def is_number(value: Any) -> bool:
    """Tell whether something is a finite real number, and not a truth value."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, hint: str) -> float:
    """Refuse anything but a finite number in [least, most]."""
    if not is_number(value) or not least <= value <= most:
        raise Cause(f"{name} must be a finite number{_limits(least, most)}", f"{name}={value!r}", hint)
    return float(value)


def check_integer(name: str, value: Any, least: int, most: float = math.inf, *, hint: str) -> int:
    """Refuse anything but an integer in [least, most]; NumPy's are integers too."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise Cause(f"{name} must be an integer{_limits(least, most)}", f"{name}={value!r}", hint)
    return number


def _limits(least: float, most: float) -> str:
    if least > -math.inf and most < math.inf:
        return f" in [{least:g}, {most:g}]"
    return f", at least {least:g}" if least > -math.inf else ""
