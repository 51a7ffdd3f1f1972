# mypy: allow-untyped-defs
"""Running a Numba kernel on several threads.

Kernels release the GIL and take their work from a shared counter, so any threads will do; results cannot depend on
their number, because one work item is always computed by one thread, in a fixed order. They are PyTorch's own OpenMP
threads where these can be had (see `openmp`), and a pool of sleeping Python threads elsewhere: on other systems
than Linux, in a PyTorch without OpenMP, and in forked children. Never Numba's, whose threads spin as OpenMP's do: two
pools that spin fight over the cores.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit, types
from numba.core import cgutils, event
from numba.extending import intrinsic

from . import openmp

# A scratch array is kept for the next call up to this size; larger ones (planes of many megapixels) are
# given back, so that one unusual batch does not stay in memory.
_KEEP_BYTES = 64 << 20

Dtypes = tuple[type[np.floating[Any]], type[np.floating[Any]]]
Sizes = tuple[int, int, int]

_lock = threading.Lock()
_compile_lock = threading.RLock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_compiled: set[tuple[int | str, ...]] = set()
_hinted = False
# Work spaces that no thread is using: last in, first out, for what a core has in its cache.
_spaces: list[dict[str, np.ndarray[Any, Any]]] = []


def _after_fork() -> None:
    # A child owns none of the parent's threads, and a lock may have been copied while another thread held it.
    global _lock, _compile_lock, _pool, _pool_size
    _lock = threading.Lock()
    _compile_lock = threading.RLock()
    _pool = None
    _pool_size = 0


os.register_at_fork(after_in_child=_after_fork)


# ------------------------------------------------------------------------------------------------- compilation


def _source_digest() -> bytes:
    here = Path(__file__).parent
    files = [here.parents[1] / "_abi.py", here.parents[1] / "points.py", *sorted(here.glob("*.py"))]
    return sha256(b"".join(path.read_bytes() for path in files)).digest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile an entry point: no GIL, NumPy's division (no exceptions in loops), cached on disk where that is possible.

    Numba notices a change of the file of the entry point only, so the cache of each kernel is stamped with all files
    of this folder and with `_abi.py` and `points.py`, whose numbers are compiled in. Without a writable cache directory
    the kernel is compiled in every process.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
        compiled._cache._cache_file._source_stamp = _source_digest()
    except (RuntimeError, AttributeError):
        # RuntimeError: no directory is writable; AttributeError: a Numba without that private field, where a cache
        # could serve code of another version.
        compiled = njit(**options)(function)
    return compiled


def helper(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that only kernels call."""

    def compile_later(function: Callable[..., Any]) -> Any:
        return njit(error_model="numpy", **options)(function)

    return compile_later


class _Hint(event.Listener):  # type: ignore[misc]
    """Says once per process that a compilation (not a load from the cache) has begun."""

    def on_start(self, event: Any) -> None:
        global _hinted
        if not _hinted:
            _hinted = True
            sys.stderr.write("maskloss: compiling CPU kernels, once per machine (about 20 s)\n")
            sys.stderr.flush()

    def on_end(self, event: Any) -> None:
        pass


def _prepare(function: Any, dtypes: Dtypes, scratch: Sizes, args: tuple[Any, ...]) -> None:
    """Compile `function` or load it from the cache, by a call without work."""
    key = (id(function), *(np.dtype(dtype).char for dtype in dtypes))
    if key in _compiled:
        return
    hint = event.install_listener("numba:compile", _Hint())
    with _compile_lock, hint, _scratch(dtypes, scratch) as arrays, _interruptible():
        function(np.zeros(1, np.int64), 0, *arrays, *args)
        _compiled.add(key)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let a Ctrl-C during a compilation through: inside of LLVM's callbacks Python would drop the exception."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    heard = False

    def note(number: int, frame: Any) -> None:
        nonlocal heard
        heard = True
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------------------- threads


@contextmanager
def _scratch(dtypes: Dtypes, sizes: Sizes) -> Iterator[list[np.ndarray[Any, Any]]]:
    """A work space for one thread: an array of `dtypes[0]`, one of `dtypes[1]`, one of int32, of `sizes` elements."""
    try:
        space = _spaces.pop()
    except IndexError:
        space = {}
    arrays = []
    kinds: tuple[type[np.generic], ...] = (*dtypes, np.int32)
    for name, kind, size in zip(("values", "points", "integers"), kinds, sizes, strict=True):
        attribute = f"{name}_{np.dtype(kind).char}"
        array = space.get(attribute)
        if array is None or array.size < size:
            array = np.empty(size, kind)
            if array.nbytes <= _KEEP_BYTES:
                space[attribute] = array
        arrays.append(array[:size])
    try:
        yield arrays
    finally:
        _spaces.append(space)


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool = ThreadPoolExecutor(size, thread_name_prefix="maskloss")
            _pool_size = size
        return _pool


def launch(
    function: Any, items: int, dtypes: Dtypes, scratch: Sizes, args: tuple[Any, ...], alone: bool = False
) -> None:
    """Run `function(counter, items, values, points, integers, *args)` on `torch.get_num_threads()` threads.

    Every thread takes item numbers from `counter` until none is left; the calling thread is one of them.

    Args:
        function: a kernel (see `kernel`).
        items: number of work items; nothing happens (and nothing is compiled) for 0.
        dtypes: element types of the first two scratch arrays, for values and for coordinates of points.
        scratch: sizes of the three scratch arrays, in elements.
        args: what the kernel takes after its scratch arrays.
        alone: run on the calling thread only, for work that is done before others could help.
    """
    if items == 0:
        return
    _prepare(function, dtypes, scratch, args)
    counter = np.zeros(1, np.int64)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with _scratch(dtypes, scratch) as arrays:
                function(counter, items, *arrays, *args)
        except BaseException as error:  # noqa: BLE001 (a Ctrl-C too reaches the caller, and not the code of OpenMP)
            errors.append(error)

    threads = 1 if alone else torch.get_num_threads()
    if threads == 1 or items == 1:
        work()
    elif openmp.available():
        # A whole team, however few the items: OpenMP would end the threads that are left out, and start them again.
        openmp.run(work, threads)
    else:
        _run_on_pool(work, min(threads, items))
    if errors:
        raise errors[0]


def _run_on_pool(work: Callable[[], None], threads: int) -> None:
    pool = _executor(threads - 1)
    futures = [pool.submit(work) for _ in range(threads - 1)]
    work()
    # When the pool serves another caller, this thread may have done everything before a helper was free.
    for future in [future for future in futures if not future.cancel()]:
        future.result()


# --------------------------------------------------------------------------------------------------- intrinsics


@intrinsic
def take(typingctx: Any, counter: Any) -> Any:
    """The next item number: an atomic `counter[0] += 1` that returns the value before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


# So many work items must be left for a thread to take its next one early: otherwise another could be left with none.
_PLENTY = 64


@helper()
def take_early(counter, items):
    """The item that this thread will work on next, so that its memory can be asked for; -1 where few are left."""
    return take(counter) if counter[0] + _PLENTY < items else -1


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


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
    """Ask for the cache line at an address, for reading; nothing waits for it, and it never faults."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        hint = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        builder.call(hint, [builder.inttoptr(args[0], cgutils.voidptr_t), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(address), codegen


@intrinsic
def call_madvise(typingctx: Any, function: Any, address: Any, size: Any, advice: Any) -> Any:
    """`madvise(address, size, advice)` of the C library, whose own address is `function`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        kind = ir.FunctionType(word, [cgutils.voidptr_t, ir.IntType(64), word])
        where = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(where, [builder.inttoptr(args[1], cgutils.voidptr_t), args[2], args[3]])

    return types.int32(types.int64, types.int64, types.int64, types.int32), codegen


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


@helper(forceinline=True)
def at(address, size, dtype):
    """The memory at `address` as an array of `size` elements.

    Tensors reach the kernels as addresses: one kernel then serves all element types, strides and numbers of layers, and
    is compiled once.
    """
    return carray(_pointer(address), size, dtype)
