"""The time that the parts of a step take: data, model, matching, loss and the optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PARTS = ("data", "model", "matching", "loss", "optimizer")


class Clock:
    """Adds up the time of each part of the steps in which it is `running`; otherwise it costs nothing."""

    def __init__(self) -> None:
        self.running = False
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._loss_done: float | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a block; what is measured inside of it counts for that part only."""
        if not self.running:
            yield
            return
        begun = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            taken = self._now() - begun
            self.seconds[name] += taken - self._inner.pop()
            if self._inner:
                self._inner[-1] += taken

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Measure every call of a method of one object."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        # On the object, not on its class: other objects are none of this clock's business.
        setattr(owner, method, timed)

    def mark_backward(self, logits: Tensor) -> None:
        """Note when the backward pass reaches the logits: before that it was the loss's, after that the model's."""
        if self.running and logits.requires_grad:
            logits.register_hook(self._reached)

    def _reached(self, _: Tensor) -> None:
        if self._loss_done is None:
            self._loss_done = self._now()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Measure a backward pass, divided among loss and model."""
        if not self.running:
            yield
            return
        begun, self._loss_done = self._now(), None
        yield
        end = self._now()
        turned = end if self._loss_done is None else self._loss_done
        self.seconds["loss"] += turned - begun
        self.seconds["model"] += end - turned

    def shares(self) -> dict[str, float]:
        """Return the share of each part, in a fixed order."""
        total = sum(self.seconds.values())
        return {name: self.seconds[name] / total for name in PARTS} if total else {}

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        elif torch.backends.mps.is_available():
            torch.mps.synchronize()
        return time.perf_counter()
