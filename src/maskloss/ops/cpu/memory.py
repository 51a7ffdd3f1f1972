# mypy: allow-untyped-defs
"""Memory as the kernels see it: addresses as arrays, and what is asked of the processor and the system about them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from .compile import helper

# Bytes of a line of the caches.
LINE = 64


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@helper(forceinline=True)
def at(address, size, dtype):
    """The memory at `address` as an array of `size` elements.

    Tensors reach the kernels as addresses: one kernel then serves all element types, strides and numbers of layers, and
    is compiled once.
    """
    return carray(_pointer(address), size, dtype)


@intrinsic
def bare(typingctx: Any, array: Any) -> Any:
    """The same array without an owner.

    Numba counts references to the owner of an array, atomically, at every slice and every call. Two threads that do
    this with the same table wait for each other each time. Who launches a kernel keeps its arrays alive.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, args[0])
        for owner in ("meminfo", "parent"):
            setattr(view, owner, getattr(view, owner).type(None))
        return view._getvalue()

    return array(array), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address, for reading; nothing waits for it, and it never faults.

    It comes to the second-level cache, which can wait for more lines at a time than the first.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        hint = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        builder.call(hint, [builder.inttoptr(args[0], cgutils.voidptr_t), word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(address), codegen


@intrinsic
def _need(typingctx: Any, value: Any) -> Any:
    """Have LLVM believe that a number is needed, and with it what it is computed from."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(8 * context.get_abi_sizeof(args[0].type))
        kind = ir.FunctionType(ir.VoidType(), [word])
        builder.asm(kind, "", "r", [builder.bitcast(args[0], word)], side_effect=True)
        return context.get_dummy_value()

    return types.void(value), codegen


@helper()
def fetch(array, first, stop):
    """Bring elements of an array into the caches, as fast as memory gives them in order, for reads in any other order.

    One in each line is read: of this many prefetches in a row, a processor drops most.
    """
    seen = array.dtype.type(0)
    for i in range(first, stop, LINE // array.itemsize):
        seen += array[i]
    _need(seen)


@intrinsic
def call_madvise(typingctx: Any, function: Any, address: Any, size: Any, advice: Any) -> Any:
    """`madvise(address, size, advice)` of the C library, whose own address is `function`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        kind = ir.FunctionType(word, [cgutils.voidptr_t, ir.IntType(64), word])
        where = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(where, [builder.inttoptr(args[1], cgutils.voidptr_t), args[2], args[3]])

    return types.int32(types.int64, types.int64, types.int64, types.int32), codegen
