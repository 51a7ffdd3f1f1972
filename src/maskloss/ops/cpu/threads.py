# mypy: allow-untyped-defs
"""Running a Numba kernel on several threads.

Kernels release the GIL and take their work from a shared counter, so any threads will do; results cannot depend on
their number, because one work item is always computed by one thread, in a fixed order. They are PyTorch's own OpenMP
threads where these can be had (see `openmp`), and sleeping Python threads elsewhere (see `pool`): on other systems than
Linux, in a PyTorch without OpenMP, and in forked children. Never Numba's, whose threads spin as OpenMP's do: two pools
that spin fight over the cores.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from . import openmp, pool
from .compile import helper, prepare
from .scratch import Dtypes, Sizes, scratch

# As long as it takes to look at this many pixels of masks, one thread is faster than waking the others.
FEW_PIXELS = 1 << 22


def launch(
    function: Any, items: int, dtypes: Dtypes, sizes: Sizes, args: tuple[Any, ...], pixels: int | None = None
) -> None:
    """Run `function(counter, items, values, points, integers, *args)` on `torch.get_num_threads()` threads.

    Every thread takes item numbers from `counter` until none is left; the calling thread is one of them.

    Args:
        function: a kernel (see `kernel`).
        items: number of work items; nothing happens (and nothing is compiled) for 0.
        dtypes: element types of the first two scratch arrays, for values and for coordinates of points.
        sizes: of the three scratch arrays, in elements.
        args: what the kernel takes after its scratch arrays.
        pixels: how many pixels of masks could be looked at in the same time. Few: the calling thread works alone, as
            it is done before others could help. Default: many.

    Raises:
        BaseException: what a thread raised, or a signal's handler meanwhile, once no thread is working any more.
    """
    if items == 0:
        return
    prepare(function, dtypes, sizes, args)
    counter = np.zeros(1, np.int64)

    def work() -> None:
        with scratch(dtypes, sizes) as arrays:
            function(counter, items, *arrays, *args)

    threads = 1 if pixels is not None and pixels <= FEW_PIXELS else torch.get_num_threads()
    if threads == 1 or items == 1:
        work()
    elif openmp.available():
        # A whole team, however few the items: OpenMP would end the threads that are left out, and start them again.
        _raise_all(openmp.run(work, threads))
    else:
        _raise_all(pool.run(work, min(threads, items)))


def _raise_all(errors: list[BaseException]) -> None:
    """Raise the last of some exceptions, with the others as its context; what is to end the program comes last."""
    ordered = sorted(errors, key=lambda error: not isinstance(error, Exception))
    for earlier, error in pairwise(ordered):
        error.__context__ = error.__context__ or earlier
    if ordered:
        raise ordered[-1]


@intrinsic
def take(typingctx: Any, counter: Any) -> Any:
    """The next item number: an atomic `counter[0] += 1` that returns the value before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


# A thread takes its next work item early only if this many are left: otherwise another could be left with none.
_PLENTY = 64


@helper()
def take_early(counter, items):
    """The item that this thread will work on next, so that its memory can be asked for; -1 where few are left."""
    return take(counter) if counter[0] + _PLENTY < items else -1
