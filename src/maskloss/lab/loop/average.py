"""An average of the weights over the last steps, which is steadier than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """An exponential moving average of a model's weights and buffers, from a point where it is equal to them.

        average <- d average + (1 - d) weights,    d = min(decay, (1 + n) / (10 + n)) after step n

    At the beginning, when the weights move most, it covers about the last tenth of all steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        # By themselves: tied weights have two names.
        own = {id(each): each for each in network.state_dict(keep_vars=True).values() if each.is_floating_point()}
        self._own: list[Tensor] = list(own.values())
        self._held = [each.detach().clone() for each in self._own]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._held, [each.detach() for each in self._own], 1 - decay)

    def swap(self) -> None:
        """Let average and weights change places."""
        for own, held in zip(self._own, self._held, strict=True):
            own.data, held.data = held.data, own.data

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the model have the average for its weights until the block ends."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
