"""How many examples of a property are tried."""

from __future__ import annotations

from hypothesis import settings


def number(thorough: int) -> int:
    """`thorough` of them in `make slow`, a fifth of that in `make test` (the profiles of `conftest.py`)."""
    return max(1, thorough * settings().max_examples // 500)
