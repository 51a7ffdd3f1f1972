"""Running a function on sleeping Python threads, where PyTorch's own cannot be had.

Not by `concurrent.futures`: an exception of a signal's handler can leave the locks of its threads in disorder, and the
next call waits for ever. All that is shared here is changed by single calls of C, between which handlers may run.
"""

from __future__ import annotations

import _thread
import os
from collections.abc import Callable
from itertools import repeat
from queue import SimpleQueue
from typing import NoReturn

_tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
_threads: list[int] = []


def _after_fork() -> None:
    # A child owns none of the parent's threads, and the queue may have been copied in the middle of a change.
    global _tasks, _threads
    _tasks = SimpleQueue()
    _threads = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(function: Callable[[], None], threads: int) -> list[BaseException]:
    """Call `function` on `threads` threads, the calling one included; return what they raised."""
    errors: list[BaseException] = []
    asked: list[None] = []
    done: list[None] = []
    signs: SimpleQueue[None] = SimpleQueue()

    def guarded() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 (returned)
            errors.append(error)
        finally:
            done.append(None)
            signs.put(None)

    try:
        while len(_threads) < threads - 1:
            _threads.append(_thread.start_new_thread(_serve, (_tasks,)))
        asked.extend(map(_tasks.put, repeat(guarded, threads - 1)))
        function()
    except BaseException as error:  # noqa: BLE001 (returned)
        errors.append(error)
    # The memory that the threads write to is the caller's, so they are awaited whatever happens.
    while len(done) < len(asked):
        try:
            signs.get()
        except BaseException as error:  # noqa: BLE001, PERF203 (returned)
            errors.append(error)
    return errors


def _serve(tasks: SimpleQueue[Callable[[], None]]) -> NoReturn:
    while True:
        tasks.get()()
