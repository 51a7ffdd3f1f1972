"""Kinds of costs for tests of the assignment: ordinary, tied, broken, huge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Costs = Callable[[np.random.Generator, tuple[int, ...]], Any]


def broken(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    cost = rng.standard_normal(shape)
    wrong = rng.random(shape)
    cost[wrong < 0.1], cost[wrong > 0.9], cost[(wrong > 0.5) & (wrong < 0.6)] = np.nan, np.inf, -np.inf
    return cost


def twins(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Every query twice, as where all queries start from the same embedding."""
    layers, batch, queries, targets = shape
    return np.repeat(rng.standard_normal((layers, batch, (queries + 1) // 2, targets)), 2, axis=2)[:, :, :queries]


KINDS: dict[str, Costs] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "few values": lambda rng, shape: rng.integers(0, 3, shape),
    "some equal": lambda rng, shape: rng.integers(0, 30, shape),
    "all equal": lambda _, shape: np.zeros(shape),
    "twins": twins,
    "broken": broken,
    "nothing finite": lambda _, shape: np.full(shape, np.nan),
    "huge": lambda rng, shape: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.1, 1e300, 1e289),
}
