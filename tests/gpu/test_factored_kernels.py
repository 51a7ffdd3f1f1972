"""The Triton kernels of masks as factors against the reference: see `test_kernels`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maskloss._abi import IMAGE, LAYER, QUERY, Draw, Factors, Gradients, Instances, Job
from maskloss.ops import factored, reference
from support.accuracy import assert_no_worse
from support.batches import group
from support.kernel_cases import DEVICE, INTERPRETED, TOLERANCE, Case, Inputs

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")] + [pytest.mark.gpu] * (not INTERPRETED)

pytest.importorskip("triton")

# Rows (layer, image, query, target); a plane of its own for each.
ROWS = ((0, 0, 1, 1), (0, 1, 0, 0), (2, 1, 0, 2))
CASES = {
    "plain": Case(rows=ROWS, sampling=(40, 120, 30)),
    "bfloat16, ignored pixels, windows": Case(torch.bfloat16, rows=ROWS, extra=True, sampling=(40, 120, 30)),
    "float16, soft, border": Case(
        torch.float16, rows=ROWS[1:], targets="values float32", padding="border", sampling=(20, 60, 15)
    ),
    "float64, focal, labels, nearest": Case(
        torch.float64,
        rows=ROWS[1:],
        targets="labels int32",
        target_mode="nearest",
        focal=(0.25, 2.0),
        sampling=(20, 60, 15),
    ),
    "given points": Case(rows=ROWS, given=True, sampling=(30, 90, 20)),
    "no uncertain points": Case(rows=ROWS[:1], sampling=(20, 60, 0)),
}


class Planes:
    """Instances that have a plane each."""

    def __init__(self, case: Case) -> None:
        self.inputs = inputs = Inputs(case)
        self.rows, self.depth = inputs.index.clone(), 3
        count = len(self.rows)
        self.rows[:, QUERY] = torch.arange(count, device=DEVICE)
        self.planes = (torch.randn(count, 13, 9, device=DEVICE) * 3).to(case.dtype)
        sizes = [int((self.rows[:, LAYER] == layer).sum()) for layer in range(self.depth)]
        self.index, self.sizes = self.rows, sizes
        draw = Draw(inputs.image_ids, inputs.seed, *case.sampling)
        self.job = Job(group(inputs.targets), draw, case.term(), inputs.points)

    def instances(self, planes: Tensor) -> Instances:
        return Instances([planes[None].expand(2, *planes.shape)] * self.depth, self.rows, self.sizes)

    def expected(self, planes: Tensor, points: Tensor | None, grads: Gradients) -> tuple[Any, Tensor]:
        """What `mask_loss` of the reference returns, and the gradient of each plane."""
        instances, job = self.instances(planes), self.job._replace(points=points)
        found = reference.mask_loss(instances, job)
        exact = Gradients(*(grad.to(found[0].dtype) for grad in grads))
        dense = reference.mask_loss_backward(exact, found[2], instances, job, [True] * self.depth)
        picked = torch.stack(dense)[self.rows[:, LAYER], self.rows[:, IMAGE], self.rows[:, QUERY]]
        return found, picked


# Fixed point does not depend on the options.
FIXED = ("plain", "bfloat16, ignored pixels, windows")


@pytest.mark.parametrize(
    ("name", "deterministic"), [(name, False) for name in CASES] + [(name, True) for name in FIXED]
)
def test_planes_are_overwritten_with_their_gradients(gpu: Any, name: str, deterministic: bool) -> None:
    case = CASES[name]
    work = Planes(case)
    ce, dice, kept = gpu.mask_loss(work.instances(work.planes), work.job, keep=True)
    grads = Gradients(torch.linspace(0.5, 1.5, len(ce), dtype=ce.dtype, device=DEVICE), torch.ones_like(ce) * 2)
    points = work.job.points
    if points is None:
        instances = work.instances(work.planes)
        points = reference.uncertain_points(instances, work.job.draw, work.inputs.targets.windows, case.padding)
    plain, wanted = work.expected(work.planes, work.job.points, grads)
    exact, right = work.expected(work.planes.double(), points, grads)
    for mine, theirs, true in zip((ce, dice), plain[:2], exact[:2], strict=True):
        assert_no_worse(mine, theirs, true, TOLERANCE[mine.dtype], everywhere=True)
    assert torch.equal(kept.chosen, plain[2].chosen)
    at_points = reference.point_sample(work.planes, work.rows[:, QUERY], points, "bilinear", case.padding)
    torch.testing.assert_close(kept.logits, at_points, atol=1e-5, rtol=1e-5)
    # The planes of logits are gone by then.
    planes = torch.full_like(work.planes, float("nan"))
    torch.use_deterministic_algorithms(deterministic)
    try:
        gpu.plane_gradients(grads, kept, work.instances(planes), work.job)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_no_worse(planes, wanted, right, TOLERANCE[planes.dtype], everywhere=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_memory_of_planes_is_bounded(
    gpu: Any, dtype: torch.dtype, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each instance has launches of its own then; its plane is still found by its number."""
    from maskloss.ops.gpu import launch

    work = Planes(Case(dtype, rows=ROWS, sampling=(9, 27, 6)))
    grads = Gradients(*(torch.ones(3, device=DEVICE) for _ in range(2)))
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 1)
    _, _, kept = gpu.mask_loss(work.instances(work.planes), work.job, keep=True)
    planes = torch.empty_like(work.planes)
    torch.use_deterministic_algorithms(deterministic)
    try:
        gpu.plane_gradients(grads, kept, work.instances(planes), work.job)
    finally:
        torch.use_deterministic_algorithms(False)
    _, wanted = work.expected(work.planes, None, grads)
    torch.testing.assert_close(planes, wanted, atol=1e-3 if dtype == torch.bfloat16 else 1e-6, rtol=2**-7)


def test_a_plane_that_is_not_finite_spoils_no_other(gpu: Any) -> None:
    work = Planes(Case(rows=ROWS[:2], sampling=(20, 60, 15)))
    work.planes[0, 5, 5] = float("inf")
    ce, _, kept = gpu.mask_loss(work.instances(work.planes), work.job, keep=True)
    planes = torch.empty_like(work.planes)
    gpu.plane_gradients(Gradients(ce * 0 + 1, ce * 0 + 1), kept, work.instances(planes), work.job)
    assert not ce[0].isfinite()
    assert ce[1].isfinite()
    assert planes[0].isnan().any()
    assert planes[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_features_and_costs_at_the_points(gpu: Any, dtype: torch.dtype, padding: str) -> None:
    """Sampling first and matching then costs what it does at once; 19 channels and 70 points are two blocks each."""
    inputs = Inputs(Case(dtype, padding=padding, extra=True))
    maps = torch.randn(2, 11, 19, 7, device=DEVICE).to(dtype).permute(0, 2, 1, 3)  # rows of channels: strided
    term = inputs.case.term()
    job = Job(group(inputs.targets), Draw(inputs.image_ids, inputs.seed, 70), term)
    arguments = (inputs.targets.num_targets, job)
    plan = gpu.match_plan(*arguments, [maps])
    sampled = gpu.sample_features(plan, maps, term)
    assert sampled.dtype == dtype
    costs, at_once = gpu.row_costs(plan, sampled, term), gpu.match_cost([maps], *arguments)
    tolerance = max(TOLERANCE[dtype], 1e-6)
    for mine, theirs in zip(costs, at_once, strict=True):
        torch.testing.assert_close(mine, theirs[0], atol=tolerance, rtol=tolerance)
    order = plan.points[torch.arange(2)[:, None], plan.order].repeat_interleave(19, 0)
    flat = reference.point_sample(maps.flatten(0, 1), torch.arange(38, device=DEVICE), order, "bilinear", padding)
    torch.testing.assert_close(sampled.float(), flat.view(2, 19, 70).float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factored_operations_follow_the_reference(gpu: Any, dtype: torch.dtype) -> None:
    """Two layers share their features, a third has its own; parts of one plane."""
    inputs = Inputs(Case(dtype, rows=((0, 0, 1, 1), (0, 1, 0, 0), (1, 1, 0, 2), (2, 0, 1, 0)), sampling=(20, 60, 15)))
    embeddings = [torch.randn(2, 2, 5, device=DEVICE).to(dtype) for _ in range(3)]
    biases = [torch.randn(2, 2, device=DEVICE).to(dtype) for _ in range(3)]
    features = [torch.randn(2, 5, 13, 9, device=DEVICE).to(dtype) for _ in range(2)]
    factors = Factors(embeddings, biases, features, [0, 0, 1], 1)
    counts, sizes = [1, 1, 0, 1, 1, 0], [2, 1, 1]
    draw = Draw(inputs.image_ids, inputs.seed, *inputs.case.sampling)
    job = Job(group(inputs.targets), draw, inputs.case.term())
    ce, dice, kept = factored.mask_loss(gpu, factors, inputs.index, counts, job)
    grads = Gradients(torch.ones_like(ce), torch.ones_like(ce) * 2)
    found = factored.mask_loss_backward(gpu, grads, kept, factors, inputs.index, counts, job, [True] * 4)
    matching = job._replace(draw=Draw(inputs.image_ids, inputs.seed, 20))
    costs = factored.match_cost(gpu, factors, inputs.targets.num_targets, matching)

    leaves = [each.double().requires_grad_() for each in (*embeddings, *biases, *features)]
    by_row, by_bias, by_pixel = leaves[:3], leaves[3:6], leaves[6:]
    logits = [
        torch.einsum("bqd,bdhw->bqhw", row, by_pixel[which]) + bias[..., None, None]
        for row, bias, which in zip(by_row, by_bias, (0, 0, 1), strict=True)
    ]
    maps = [each.detach().to(dtype) for each in logits]
    instances = Instances(maps, inputs.index, sizes)
    *terms, saved = reference.mask_loss(instances, job)
    gradient = reference.mask_loss_backward(grads, saved, instances, job, [True] * 3)
    wanted = torch.autograd.grad(logits, leaves, [each.double() for each in gradient])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for mine, theirs in zip((ce, dice), terms, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    for mine, theirs in zip(found, (torch.stack(wanted[:3]), torch.stack(wanted[3:6]), *wanted[6:]), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=10 * tolerance, rtol=tolerance)
    plain = reference.match_cost(maps, inputs.targets.num_targets, matching)
    for mine, theirs in zip(costs, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2 * tolerance, rtol=tolerance)
