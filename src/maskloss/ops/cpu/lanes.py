"""Vectors of values, for the intrinsics that compute several at a time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.errors import RequireLiteralValue

# How many 32-bit values intrinsics take at a time; LLVM cuts such vectors where the machine has none so long.
LANES = 16

WORD = ir.IntType(32)


def words(count: int) -> Any:
    """The type of a vector of 32-bit integers."""
    return ir.VectorType(WORD, count)


def constant(vector: Any, value: float) -> Any:
    """A vector that has the same number everywhere."""
    return ir.Constant(vector, [value] * vector.count)


def check_literals(**arguments: Any) -> None:
    """Have Numba compile an intrinsic anew for each value of these arguments."""
    for name, argument in arguments.items():
        if not isinstance(argument, types.IntegerLiteral):
            raise RequireLiteralValue(name)


class Code:
    """What the code of an intrinsic is written with: Numba's context, a builder, and the values of the arguments."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder, self.signature, self.args = context, builder, signature, args

    def place(self, which: int, first: Any = None) -> Any:
        """The address of an element of an array that is an argument; by default of the first one."""
        array = self.context.make_array(self.signature.args[which])(self.context, self.builder, self.args[which])
        return array.data if first is None else self.builder.gep(array.data, [first])

    def load(self, place: Any, vector: Any) -> Any:
        """Read a vector from an address."""
        return self.builder.load(self.builder.bitcast(place, vector.as_pointer()), align=_alignment(vector))

    def store(self, value: Any, place: Any) -> None:
        """Write a vector to an address."""
        pointer = self.builder.bitcast(place, value.type.as_pointer())
        self.builder.store(value, pointer, align=_alignment(value.type))

    def everywhere(self, value: Any, vector: Any) -> Any:
        """A vector that has the same value everywhere."""
        single = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, WORD(0))
        return self.builder.shuffle_vector(single, single, constant(words(vector.count), 0))

    def shuffle(self, one: Any, other: Any, *lanes: int) -> Any:
        """Pick lanes of two vectors, those of the second one numbered after those of the first."""
        return self.builder.shuffle_vector(one, other, ir.Constant(words(len(lanes)), list(lanes)))

    def nothing(self) -> Any:
        """What an intrinsic without a result returns."""
        return self.context.get_dummy_value()


def _alignment(vector: Any) -> int:
    """How a vector is aligned in memory: as one of its elements."""
    return 8 if isinstance(vector.element, ir.DoubleType) else 4
