"""Vectors of values, for the intrinsics that compute several at a time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

# How many 32-bit values intrinsics take at a time; LLVM cuts such vectors where the machine has none so long.
LANES = 16


def splat(builder: Any, value: Any, vector: Any) -> Any:
    """A vector that has the same value everywhere, for intrinsics."""
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(single, single, lanes)


def alignment(vector: Any) -> int:
    """How a vector of floats is aligned in memory: as one of them."""
    return 4 if isinstance(vector.element, ir.FloatType) else 8
