"""Clocks and memory meters, for the CPU and for CUDA."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc/self")
# Calls a function and notes how long a stage of the step took.
Timed = Callable[[str, Callable[..., Any]], Callable[..., Any]]


def wrap(timed: Timed, owner: Any, name: str, stage: str) -> None:
    """Time a function of an object, a class or a module as a stage."""
    setattr(owner, name, timed(stage, getattr(owner, name)))


@contextmanager
def spied(
    owner: Any, name: str, what: Callable[[tuple[Any, ...], Any], Any] = lambda _, result: result
) -> Iterator[list[Any]]:
    """Collect what a method of a class returns, or is given: `what` of its arguments and its result."""
    found: list[Any] = []
    inner = vars(owner)[name]

    def spy(*arguments: Any, **options: Any) -> Any:
        result = inner(*arguments, **options)
        found.append(what(arguments, result))
        return result

    setattr(owner, name, spy)
    try:
        yield found
    finally:
        setattr(owner, name, inner)


class Clock:
    """Marks moments of a step; on CUDA the moments are events in the stream, and only reading them waits."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Note that this moment has come."""
        if not self.cuda:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def spans(self) -> list[float]:
        """Return the seconds between each moment and the next, and forget them."""
        marks, self.marks = self.marks, []
        pairs = list(pairwise(marks))
        if not self.cuda:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


class StageClock:
    """Sums up the time of named stages; what a stage spends in another stage counts for that one only.

    On CUDA each stage waits for the device, so the stages add up to more than an undisturbed step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.last = 0.0

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, made to note the time that it takes."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Count the time within the block for `stage`."""
        self._turn()
        self.open.append(stage)
        try:
            yield
        finally:
            self._turn()
            self.open.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds of each stage, and start again from 0."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _turn(self) -> None:
        """Count the time since the last turn for the stage that was running."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.last
        self.last = now


class PeakMemory:
    """How far memory rises above what it was when `start` was called.

    On CUDA this is the allocator's peak, exact to the byte. On Linux it is the peak resident set of the process, which
    the kernel keeps, to a few hundred kilobytes, and resets on request; unused memory is given back to the system
    before, so that a rise cannot hide in it. Elsewhere nothing is measured, and `why_not` says so.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.base = 0
        self.why_not: str | None = None
        if not self.cuda and not _has_peak():
            self.why_not = f"peak memory of a CPU step is read from /proc, which {sys.platform} does not offer"

    def start(self) -> None:
        """Take what is in use now as the base, and forget the peak so far."""
        self.base = 0
        self.base = self.current() or 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self.why_not is None:
            (_PROC / "clear_refs").write_text("5")

    def current(self) -> int | None:
        """Return the bytes in use now above the base, after giving back what is unused; None if not measured."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated() - self.base
        if self.why_not is not None:
            return None
        _trim()
        return _status("VmRSS") - self.base

    def peak(self) -> int | None:
        """Return the bytes of the peak above the base; None where it cannot be measured."""
        if self.why_not is not None:
            return None
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.base
        return max(_status("VmHWM") - self.base, 0)


@cache
def _has_peak() -> bool:
    if not (_PROC / "clear_refs").exists():
        return False
    try:
        (_PROC / "clear_refs").write_text("5")
        _status("VmHWM")
    except (OSError, KeyError):  # a container may deny it, and some kernels do without the peak
        return False
    return True


def _status(key: str) -> int:
    """Read bytes from /proc/self/status."""
    lines = (line.partition(":") for line in (_PROC / "status").read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines if name.startswith("Vm")}[key]


def _trim() -> None:
    """Ask the C library to give unused memory back, if it is one that can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
