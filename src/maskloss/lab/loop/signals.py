"""Signals that end a run after the step that is being taken."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from maskloss.lab.data.scenes import STOP_SIGNALS

# Seconds after which a second Ctrl-C is meant.
AGAIN = 1.0


class Signals:
    """What a run was told by signals.

    Attributes:
        number: of the signal that came; 0: none has come.
    """

    def __init__(self) -> None:
        self.number = 0

    @contextlib.contextmanager
    def heeded(self, note: Callable[[str], None]) -> Iterator[None]:
        """Let a signal end the run after the step that is being taken; Ctrl-C a second time ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asked = 0.0

        def stop(number: int, _: FrameType | None) -> None:
            nonlocal asked
            if self.number:
                # A terminal that closes and torchrun send a signal twice within a moment.
                if number == signal.SIGINT and time.monotonic() - asked > AGAIN:
                    raise KeyboardInterrupt
                return
            self.number, asked = number, time.monotonic()
            if number != signal.SIGINT:
                _leave_dead_terminal()
            note("Stopping after this step (Ctrl-C again: at once)")

        # What a run was told to ignore, as by nohup, stays ignored.
        heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _leave_dead_terminal() -> None:
    """Write to nowhere if the terminal has gone: a run must not fail at a line before it has its checkpoint."""
    for handle in (1, 2):
        if not _takes_writes(handle):
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)


def _takes_writes(handle: int) -> bool:
    try:
        os.write(handle, b"")
    except OSError:
        return False
    return True
