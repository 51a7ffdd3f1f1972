"""The Triton kernels with clips against the reference: see `test_kernels`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskloss import MaskTargets
from maskloss._abi import NO_FOCAL, Draw, Factors, Gradients, Instances, Job, Term
from maskloss.ops import clips, factored, reference
from maskloss.targets.clips import planes
from support.batches import group
from support.kernel_cases import DEVICE, INTERPRETED

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")] + [pytest.mark.gpu] * (not INTERPRETED)

pytest.importorskip("triton")

FRAMES, COUNTS = 2, (2, 0, 1)


def targets() -> MaskTargets:
    masks = [torch.rand(count, FRAMES, 11, 14, device=DEVICE) > 0.6 for count in COUNTS]
    ignore = torch.rand(FRAMES, 11, 14, device=DEVICE) > 0.7
    return MaskTargets.from_masks(masks, soft=False, valid=(1, 2, 9, 10), ignore=ignore)


def draw(*numbers: int) -> Draw:
    return Draw(torch.tensor([4, 5, 9], device=DEVICE), torch.tensor(3, device=DEVICE), *numbers)


@pytest.mark.parametrize("focal", [NO_FOCAL, (0.25, 2.0)], ids=["plain", "focal"])
def test_costs_over_all_frames(gpu: Any, focal: tuple[float, float]) -> None:
    logits = [torch.randn(3, 3, FRAMES, *size, device=DEVICE) * 3 for size in ((7, 9), (12, 5))]
    job = Job(group(planes(targets())), draw(40), Term("zeros", "bilinear", *focal))
    found, wanted = (clips.match_cost(backend, logits, COUNTS, job) for backend in (gpu, reference))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_factors_of_clips(gpu: Any) -> None:
    """Losses and gradients of masks as products; the planes of one instance exist at a time."""
    rows = torch.tensor([[0, 0, 2, 1], [0, 0, 0, 0], [0, 2, 1, 0]], device=DEVICE).repeat_interleave(FRAMES, 0)
    rows[:, 2:] = rows[:, 2:] * FRAMES + torch.arange(FRAMES, device=DEVICE).repeat(3)[:, None]
    embeddings, biases = torch.randn(3, 3, 5, device=DEVICE), torch.randn(3, 3, device=DEVICE)
    features = torch.randn(3, 5, FRAMES, 8, 6, device=DEVICE)
    factors = Factors([embeddings], [biases], [features], [0], 1)
    job = Job(group(planes(targets())), draw(20, 60, 15), Term())
    matching = job._replace(draw=draw(20))
    counts = [2 * FRAMES, 0, FRAMES]
    ce, dice, kept = factored.mask_loss(gpu, factors, rows, counts, job)
    grads = Gradients(torch.linspace(1, 2, 6, device=DEVICE), torch.linspace(2, 1, 6, device=DEVICE))
    found = factored.mask_loss_backward(gpu, grads, kept, factors, rows, counts, job, needs_grad=[True] * 3)
    costs = factored.match_cost(gpu, factors, COUNTS, matching)

    leaves = [each.clone().requires_grad_() for each in (embeddings, biases, features)]
    dense = torch.einsum("bqd,bdthw->bqthw", leaves[0], leaves[2]) + leaves[1][..., None, None, None]
    instances = Instances([dense.detach().flatten(1, 2)], rows, [6])
    *terms, saved = reference.mask_loss(instances, job)
    [gradient] = reference.mask_loss_backward(grads, saved, instances, job, [True])
    wanted = torch.autograd.grad(dense, leaves, gradient.view(dense.shape))
    expected = clips.match_cost(reference, [dense.detach()], COUNTS, matching)
    for mine, theirs in zip((ce, dice, *costs), (*terms, *expected), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(found, (wanted[0][None], wanted[1][None], wanted[2]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)
