"""The operations on volumes, and on clips whose points are drawn over all frames: loss, its derivative, matching cost.

Logits are `[B, Q, d, h, w]`; targets are stored slice by slice (see `Stack`). The reference backend defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from maskloss._abi import Instances, Job, Reduction, Stack
from maskloss.ops.dense import loss_of, register
from maskloss.ops.dispatch import load
from maskloss.ops.schemas import JOB, NOT_CAPTURED, new_costs, operation

_STACK = "SymInt frames, bool linear"


def _module(backend: str) -> Any:
    return load(f"{backend}.volumes")


_VOLUMES = register("volume_loss", f"{JOB}, {_STACK}", _module, lambda flat: (Job.of(flat[:-2]), Stack(*flat[-2:])))


def volume_loss(
    instances: Instances, job: Job, stack: Stack, backend: str, reduction: Reduction | None = None
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and Dice `[N]` of volumes, at points that are drawn in them; gradient to the logits.

    `reduction` is how the losses will be summed, if that is known, as in `mask_loss`.
    """
    return loss_of(_VOLUMES, instances, (*job.flat, *stack), backend, reduction)


@operation(
    "volume_cost",
    f"Tensor[] logits, SymInt[] num_targets, {JOB}, {_STACK}, str backend",
    "(Tensor, Tensor)",
    **NOT_CAPTURED,
)
def _volume_cost(logits: Sequence[Tensor], num_targets: Sequence[int], *args: Any) -> tuple[Tensor, Tensor]:
    *flat, frames, linear, backend = args
    ce, dice = _module(backend).volume_cost(logits, num_targets, Job.of(flat), Stack(frames, linear))
    return ce, dice


@_volume_cost.register_fake
def _(logits: Sequence[Tensor], num_targets: Sequence[int], *_: Any) -> tuple[Tensor, Tensor]:
    return new_costs(logits[0], len(logits), logits[0].shape[:2], num_targets)


def volume_cost(
    logits: Sequence[Tensor], num_targets: Sequence[int], job: Job, stack: Stack, backend: str
) -> tuple[Tensor, Tensor]:
    """Compute both mask terms of the matching cost of volumes, `[L, B, Q, T_max]`, at uniform points. No gradient."""
    detached = [layer.detach() for layer in logits]
    ce, dice = _volume_cost(detached, num_targets, *job.flat, *stack, backend)
    return ce, dice
