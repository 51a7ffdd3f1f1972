"""The Triton kernels with clips against the reference: see `test_kernels`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskloss import MaskTargets
from maskloss._abi import NO_FOCAL, Draw, Factors, Gradients, Instances, Job, Stack, Term
from maskloss.ops import clips, factored, reference
from maskloss.ops.reference import volumes
from maskloss.targets.clips import planes
from support.batches import group
from support.kernel_cases import DEVICE, INTERPRETED, Case, small_blocks

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


# --------------------------------------------------------------------------------------- whole clips, and volumes

CLIP, VOLUME, SLICES = False, True, 5


class Stacked:
    """The tensors of a case of volumes (linear) or of whole clips, which have the frames of their targets."""

    def __init__(self, case: Case, linear: bool) -> None:
        self.case, self.stack, self.counts = case, Stack(SLICES, linear), (2, 3)
        images = [self._masks(count) for count in self.counts]
        kind, _, dtype = case.targets.partition(" ")
        valid = (1, 2, case.frame[0] - 2, case.frame[1] - 5) if case.extra else None
        void = torch.rand(SLICES, *case.frame) > 0.7 if case.extra else None
        if kind == "labels":
            maps = [(masks * torch.arange(1, len(masks) + 1)[:, None, None, None]).amax(0) for masks in images]
            ids = [range(1, count + 1) for count in self.counts]
            self.targets = MaskTargets.from_label_map([each.to(getattr(torch, dtype)) for each in maps], ids)
        else:
            soft = kind == "values"
            some = [masks * torch.rand(masks.shape) if soft else masks for masks in images]
            self.targets = MaskTargets.from_masks(
                [each.to(getattr(torch, dtype or "bool")) for each in some], soft=soft, valid=valid, ignore=void
            )
        self.targets = self.targets.to(DEVICE)
        depth = 3 if linear else SLICES
        self.logits = [self._logits(depth, *size) for size in case.sizes]
        rows = torch.tensor(case.rows, device=DEVICE)
        sizes = [sum(row[0] == layer for row in case.rows) for layer in range(len(case.sizes))]
        self.instances = Instances(self.logits, rows, sizes)
        points = None
        if case.given:
            points = torch.rand(len(rows), 3, case.sampling[0]).transpose(1, 2) * 1.4 - 0.2
            points[0, 0], points[-1, 1, 2], points[0, 2, 0], points[-1, 3, 2] = 1.0, -50.0, 0.0, float("inf")
            points = points.to(DEVICE)
        ids = torch.tensor([7, 2**32 + 3], device=DEVICE)
        draw = Draw(ids, torch.tensor(-(2**61) + 987654321), *case.sampling)
        self.job = Job(group(self.targets), draw, case.term(), points)

    def _masks(self, count: int) -> torch.Tensor:
        """Some are absent from the first and the last slices."""
        masks = torch.zeros(count, SLICES, *self.case.frame, dtype=torch.bool)
        masks[0, 1:4, self.case.frame[0] // 3 :] = True
        masks[1:] = torch.rand(masks[1:].shape) > 0.5
        return masks

    def _logits(self, *size: int) -> torch.Tensor:
        """Strided in every dimension, and larger than what is read of it."""
        depth, height, width = size
        whole = torch.randn(3, width, 2, depth, height, 2) * 3
        return whole.to(self.case.dtype).to(DEVICE).permute(2, 0, 3, 4, 1, 5)[..., 0][:, :2]

    def loss(self, backend: Any) -> Any:
        return backend.volume_loss(self.instances, self.job, self.stack)

    def gradients(self, backend: Any, saved: Any) -> list[torch.Tensor]:
        weights = torch.linspace(0.5, 1.5, len(self.case.rows), dtype=self.instances.accumulation_dtype, device=DEVICE)
        needs_grad, grads = [True] * len(self.logits), Gradients(weights, 2 - weights)
        return backend.volume_loss_backward(grads, saved, self.instances, self.job, self.stack, needs_grad)

    def costs(self, backend: Any) -> Any:
        points = self.job.draw._replace(num_points=70)
        job = self.job._replace(draw=points, points=None)
        return backend.volume_cost(self.logits, self.counts, job, self.stack)


TWICE = ((0, 1, 0, 2), (0, 1, 0, 1))
WHOLE = {
    "clip": (CLIP, Case(sizes=((9, 7),), sampling=(61, 183, 45), rows=TWICE)),
    "volume, bfloat16, stratified, windows, void": (
        VOLUME,
        Case(torch.bfloat16, sizes=((9, 7),), sampling=(61, 183, 45, "stratified"), extra=True),
    ),
    "clip, two layers together, soft, stratified, void": (
        CLIP,
        Case(
            sizes=((5, 6), (5, 6)), rows=((1, 1, 1, 0), (1, 0, 0, 1)), targets="values float16",
            sampling=(61, 183, 45, "stratified"), dice="soft", extra=True,
        ),
    ),
    "clip, border, nearest, labels": (
        CLIP, Case(padding="border", target_mode="nearest", targets="labels uint8", sampling=(50, 50, 50)),
    ),
    "clip, float16, one pixel": (CLIP, Case(torch.float16, sizes=((1, 1),), frame=(1, 1), sampling=(1, 3, 0))),
    "clip, given points": (CLIP, Case(given=True, sampling=(60, 180, 45), padding="border")),
    "volume, two sizes, labels": (
        VOLUME,
        Case(sizes=((5, 6), (9, 4)), rows=((0, 1, 1, 0), (1, 0, 0, 1)), targets="labels int32", sampling=(30, 90, 22)),
    ),
    "volume, float64, border, focal": (
        VOLUME, Case(torch.float64, padding="border", focal=(0.25, 1.5), sampling=(40, 120, 30, "stratified")),
    ),
    "volume, nearest, semimetric": (
        VOLUME, Case(target_mode="nearest", targets="values float32", dice="semimetric", sampling=(20, 60, 0)),
    ),
    "volume, border, nearest": (VOLUME, Case(padding="border", target_mode="nearest", sampling=(7, 21, 5))),
    "volume, given points": (VOLUME, Case(given=True, sampling=(60, 180, 45), targets="labels int64")),
}  # fmt: skip
# The first two have all kernels, and the rest is for `make slow`.
SOME = [pytest.param(name, marks=[pytest.mark.slow] * (number > 1)) for number, name in enumerate(WHOLE)]
CLOSE = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-11},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 1e-3, "rtol": 2**-7},
    torch.float16: {"atol": 1e-3, "rtol": 2**-9},
}


def assert_alike(found: Any, expected: Any) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE[mine.dtype], equal_nan=True)


@pytest.mark.parametrize("name", SOME)
def test_whole_clips_and_volumes_follow_the_reference(gpu: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same candidates are chosen, of logits that are the same to the last bit."""
    from maskloss.ops.gpu import volumes as kernels

    linear, case = WHOLE[name]
    inputs = Stacked(case, linear)
    if name == "volume, two sizes, labels":
        small_blocks(monkeypatch)
    found, plain = inputs.loss(kernels), inputs.loss(volumes)
    assert torch.equal(found[2].chosen, plain[2].chosen)
    assert_alike((*found[:2], found[2].soft), (*plain[:2], plain[2].soft))
    gradients = inputs.gradients(kernels, found[2])
    assert all(each.is_contiguous() for each in gradients)
    assert_alike(gradients, inputs.gradients(volumes, plain[2]))
    assert_alike(inputs.costs(kernels), inputs.costs(volumes))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", [CLIP, VOLUME], ids=["clip", "volume"])
def test_deterministic_gradients_of_stacks_in_parts(
    gpu: Any, linear: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maskloss.ops.gpu import launch
    from maskloss.ops.gpu import volumes as kernels

    inputs = Stacked(Case(dtype, sizes=((5, 6),) * 2, rows=(*TWICE, (1, 0, 1, 1)), sampling=(20, 60, 15)), linear)
    saved = inputs.loss(kernels)[2]
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 1)
    torch.use_deterministic_algorithms(True)
    try:
        found = inputs.gradients(kernels, saved)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_alike(found, inputs.gradients(volumes, saved))


@pytest.mark.slow
@pytest.mark.parametrize("linear", [CLIP, VOLUME], ids=["clip", "volume"])
def test_stacks_that_are_not_finite_or_empty(gpu: Any, linear: bool) -> None:
    from maskloss.ops.gpu import volumes as kernels

    inputs = Stacked(Case(sizes=((5, 6),), rows=((0, 0, 1, 0), (0, 1, 0, 1)), sampling=(30, 90, 22)), linear)
    inputs.logits[0][0, 1, 1] = float("nan")
    found, plain = inputs.loss(kernels), inputs.loss(volumes)
    assert torch.equal(found[2].chosen, plain[2].chosen)
    assert found[0].isfinite().tolist() == [False, True]
    assert_alike(inputs.gradients(kernels, found[2]), inputs.gradients(volumes, plain[2]))
    nothing = inputs.instances._replace(rows=inputs.instances.rows[:0], layer_sizes=[0])
    ce, dice, saved = kernels.volume_loss(nothing, inputs.job, inputs.stack)
    assert ce.shape == dice.shape == (0,)
    [grad] = kernels.volume_loss_backward(Gradients(ce, dice), saved, nothing, inputs.job, inputs.stack, [True])
    assert not grad.any()
    inputs.targets = MaskTargets.from_masks([torch.zeros(0, SLICES, 4, 4)] * 2).to(DEVICE)
    inputs.job, inputs.counts = inputs.job._replace(targets=group(inputs.targets)), (0, 0)
    assert [cost.shape for cost in inputs.costs(kernels)] == [(1, 2, 2, 0)] * 2
