"""Volumes, and clips as a whole, on CUDA and ROCm tensors: the kernels of planes, whose points have a third coordinate.

A slice is a plane, so a point reads its slice, or two of them, as a point of an image reads its plane.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maskloss._abi import Gradients, Instances, Job, Saved, Stack

from . import cost, loss


def volume_loss(instances: Instances, job: Job, stack: Stack) -> tuple[Tensor, Tensor, Saved]:
    """Cross-entropy `[N]`, Dice `[N]`, and what the backward pass needs."""
    return loss.mask_loss(instances, job, stack)


def volume_loss_backward(
    grads: Gradients, saved: Saved, instances: Instances, job: Job, stack: Stack, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """Dense gradients of the logits; an empty tensor for each layer that needs none."""
    return loss.mask_loss_backward(grads, saved, instances, job, needs_grad, stack)


def volume_cost(logits: Sequence[Tensor], num_targets: Sequence[int], job: Job, stack: Stack) -> tuple[Tensor, Tensor]:
    """Both mask terms of the matching cost, `[L, B, Q, T_max]`, at P uniform points of each volume."""
    return cost.match_cost(logits, num_targets, job, stack)
