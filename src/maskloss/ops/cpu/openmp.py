"""Running a function on the OpenMP threads that PyTorch has already.

OpenMP threads keep spinning for some milliseconds after a parallel region, in the hope of another one. A second pool of
threads would have to share the cores with them, which can make a small step twice as slow. Lent to the kernels, they
spin for us.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch

# void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags): libgomp's entry point of
# a parallel region, which libomp and libiomp5 offer as well.
_REGION = "GOMP_parallel"
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_numbers = count(1)
_tasks: dict[int, tuple[Callable[[], None], list[BaseException]]] = {}
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def available() -> bool:
    """Whether this process can lend PyTorch's OpenMP threads.

    It can on Linux, where PyTorch computes with OpenMP, unless it is a forked child: OpenMP's threads do not survive a
    fork, and a region would wait for them for ever.
    """
    return not _forked and _region() is not None


def run(function: Callable[[], None], threads: int) -> list[BaseException]:
    """Call `function` once on each thread of a team that includes the calling thread.

    Args:
        function: called without arguments. A team may turn out smaller than asked for, down to the calling thread, so
            the work must not depend on its size.
        threads: size of the team. A size that changes from call to call makes OpenMP end and start threads.

    Returns:
        Every exception that was raised in the team, also by the handler of a signal. (The main thread runs handlers
        between any two steps of Python, those of `_enter` among them. Nothing could catch an exception there, and
        ctypes would only print it; this is done by a hook, which is replaced here.)
    """
    region = _region()
    assert region is not None
    number = next(_numbers)
    errors: list[BaseException] = []
    hook = sys.unraisablehook

    def keep(lost: sys.UnraisableHookArgs) -> None:
        ours = lost.object is _call or repr(_call) in (lost.err_msg or "")
        if ours and lost.exc_value is not None:
            errors.append(lost.exc_value)
        else:
            hook(lost)

    # Handlers run on the main thread alone, and hooks that several threads replace could outlive their regions.
    main = threading.current_thread() is threading.main_thread()
    _tasks[number] = function, errors
    try:
        if main:
            sys.unraisablehook = keep
        region(_enter, number, threads, 0)
    except BaseException as error:  # noqa: BLE001 (returned)
        errors.append(error)
    finally:
        if main:
            sys.unraisablehook = hook
        del _tasks[number]
    return errors


def _call(number: int) -> None:
    function, errors = _tasks[number]
    try:
        function()
    except BaseException as error:  # noqa: BLE001 (returned by `run`)
        errors.append(error)


_enter = _BODY(_call)


@cache
def _region() -> Any:
    """Find the entry point of the OpenMP that PyTorch itself is bound to; None where there is none to share.

    The order is that of the dynamic linker: what is visible to all (a preloaded libiomp5, for one) comes first, then
    what PyTorch's own library depends on.
    """
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        return None
    own = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for library in (None, str(own) if own.exists() else None):
        region = getattr(ctypes.CDLL(library), _REGION, None)
        if region is not None:
            region.argtypes = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            region.restype = None
            return region
    return None
