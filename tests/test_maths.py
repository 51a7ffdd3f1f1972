"""The loss against `grid_sample`, torch's cross-entropy and the Dice formula in float64, on every backend."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskloss import MaskLoss, MaskTargets, PointSampling, functional
from support import oracle
from support.examples import number

SIZES = st.one_of(st.integers(1, 12), st.sampled_from([1, 7, 32, 63, 64, 123, 300]), st.integers(1, 300))
SCALES = st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e4])
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}
# What one rounding to the type can change, for the gradient that is written in it.
STORED = {torch.float32: 0.0, torch.float64: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Case(NamedTuple):
    """One draw: sizes, contents and options."""

    count: int
    size: tuple[int, int]
    target_size: tuple[int, int]
    num_points: int
    scale: float
    soft: bool
    seed: int

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(self.count, *self.size, generator=generator, dtype=torch.float64) * self.scale
        if self.scale == 1e4:
            logits = logits.clamp(-1e4, 1e4)
        if dtype == torch.float16:
            logits = logits.clamp(-6e4, 6e4)
        masks = torch.rand(self.count, *self.target_size, generator=generator)
        return logits.to(dtype), masks if self.soft else masks > 0.6, generator


CASES = st.builds(
    Case,
    count=st.integers(0, 3),
    size=st.tuples(SIZES, SIZES),
    target_size=st.tuples(SIZES, SIZES),
    num_points=st.integers(1, 200),
    scale=SCALES,
    soft=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
SAMPLINGS = st.builds(
    PointSampling,
    num_points=st.integers(1, 200),
    oversample_ratio=st.one_of(st.just(1.0), st.floats(1.0, 4.0)),
    importance_ratio=st.one_of(st.sampled_from([0.0, 0.75, 1.0]), st.floats(0.0, 1.0)),
)
QUIET = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large)


def agree(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Fail unless |actual - expected| <= bound everywhere."""
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"error {error.max().item():.3g}, allowed {torch.as_tensor(bound).max():.3g}"


def compare(case: Case, dtype: torch.dtype, points: Tensor, loss: MaskLoss, seed: int | None = None) -> None:
    """Compare losses and gradient at points; given to the loss, or drawn by it from `seed`."""
    logits, masks, _ = case.tensors(dtype)
    logits.requires_grad_()
    out = loss(logits, masks, points=points if seed is None else None, seed=seed)
    options = loss.options
    expected = oracle.instance_losses(
        logits,
        masks,
        points,
        padding_mode=options.padding_mode,
        target_mode=options.target_mode,
        focal_alpha=options.focal_alpha,
        focal_gamma=options.focal_gamma,
        weights=(loss.ce_weight, loss.dice_weight),
    )
    # Sampling and cross-entropy are linear in the logits where these are large: their size is the unit of the error.
    unit = EXACT[torch.float64 if dtype == torch.float64 else torch.float32]
    unit *= max(1.0, float(logits.detach().abs().max()) if logits.numel() else 1.0)
    agree(out.per_instance.ce, expected.ce, unit)
    agree(out.per_instance.dice, expected.dice, unit)
    count = max(case.count, 1)
    agree(out.ce, expected.ce.sum() / count, unit)
    agree(out.total, (loss.ce_weight * expected.ce + loss.dice_weight * expected.dice).sum() / count, 10 * unit)
    out.total.backward()
    assert logits.grad is not None and logits.grad.dtype == dtype
    grad = expected.grad / count
    # Contributions to a pixel cancel: what rounds is their size, on average the whole gradient spread over the map.
    spread = (loss.ce_weight + loss.dice_weight) / (count * case.size[0] * case.size[1])
    largest = grad.abs().amax((1, 2), keepdim=True).clamp(min=spread) if case.count else torch.zeros(0, 1, 1)
    agree(logits.grad, grad, 10 * unit * largest + STORED[dtype] * grad.abs() + 1e-7 * (dtype == torch.float16))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dtype", "examples"), [(torch.float32, 600), (torch.float64, 150), (torch.bfloat16, 100), (torch.float16, 100)]
)
def test_given_points(backend: str, dtype: torch.dtype, examples: int) -> None:
    loss = MaskLoss(backend=backend)

    @settings(max_examples=number(examples), suppress_health_check=QUIET)
    @example(Case(1, (1, 1), (1, 1), 1, 1e4, False, 0), 1.0)
    @example(Case(2, (300, 1), (1, 299), 3, 1.0, True, 1), 1.5)
    @example(Case(0, (5, 5), (9, 9), 4, 1.0, False, 2), 1.0)
    @given(CASES, st.sampled_from([1.0, 1.0, 1.2, 4.0]))
    def check(case: Case, spread: float) -> None:
        _, _, generator = case.tensors(dtype)
        points = (torch.rand(case.count, case.num_points, 2, generator=generator) - 0.5) * spread + 0.5
        # Some on the border itself.
        points[:, ::5] = points[:, ::5].round().clamp(0, 1)
        compare(case, dtype, points, loss)

    check()


@pytest.mark.thorough
@pytest.mark.parametrize(("dtype", "examples"), [(torch.float32, 400), (torch.float64, 60), (torch.bfloat16, 60)])
def test_drawn_points(backend: str, dtype: torch.dtype, examples: int) -> None:
    @settings(max_examples=number(examples), suppress_health_check=QUIET)
    @example(Case(2, (1, 1), (3, 3), 1, 1.0, False, 0), PointSampling(1, 1.0, 1.0))
    @example(Case(1, (17, 9), (3, 3), 1, 0.0, False, 0), PointSampling(100, 3.0, 1.0))
    @given(CASES, SAMPLINGS)
    def check(case: Case, sampling: PointSampling) -> None:
        logits, _, _ = case.tensors(dtype)
        points = functional.uncertain_points(logits, sampling=sampling, seed=case.seed, backend=backend)
        compare(case, dtype, points, MaskLoss(sampling=sampling, backend=backend), seed=case.seed)

    check()


@pytest.mark.thorough
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize("target_mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("focal", [(None, None), (0.25, 2.0), (None, 1.5), (0.7, 0.0)])
def test_options(backend: str, padding_mode: str, target_mode: str, focal: tuple[float | None, float | None]) -> None:
    loss = MaskLoss(
        padding_mode=padding_mode,
        target_mode=target_mode,
        focal_alpha=focal[0],
        focal_gamma=focal[1],
        ce_weight=2.0,
        dice_weight=3.0,
        backend=backend,
    )

    @settings(max_examples=number(30), suppress_health_check=QUIET)
    @given(CASES.filter(lambda case: case.scale <= 10))
    def check(case: Case) -> None:
        _, _, generator = case.tensors(torch.float32)
        points = torch.rand(case.count, case.num_points, 2, generator=generator) * 1.1 - 0.05
        compare(case, torch.float32, points, loss)

    check()


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_point_sample(backend: str, mode: str, padding_mode: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for height, width in [(1, 1), (1, 7), (123, 5), (64, 64)]:
        maps = torch.randn(3, height, width, generator=generator, dtype=dtype, requires_grad=True)
        points = torch.rand(3, 50, 2, generator=generator) * 1.4 - 0.2
        points[:, :6] = torch.tensor([[0, 0], [1, 1], [0.5, 0.5], [0, 1], [-9, 0.3], [0.3, 1e9]])
        values = functional.point_sample(maps, points, mode=mode, padding_mode=padding_mode, backend=backend)
        leaf = maps.detach().double().requires_grad_()
        expected = oracle.read(leaf, points, mode, padding_mode)
        agree(values, expected.detach(), 5 * EXACT[dtype])
        upstream = torch.randn(values.shape, generator=generator, dtype=dtype)
        values.backward(upstream)
        expected.backward(upstream.double())
        assert maps.grad is not None and leaf.grad is not None
        agree(maps.grad, leaf.grad, 50 * EXACT[dtype])


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(5)
    maps = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    points = torch.rand(2, 6, 2, dtype=torch.float64, generator=generator)
    masks = torch.rand(2, 7, 9, generator=generator) > 0.5
    z = torch.randn(3, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    t = torch.rand(3, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.rand(3, 8, dtype=torch.float64, generator=generator).round()
    check = torch.autograd.gradcheck
    for padding_mode in ("zeros", "border"):
        assert check(
            lambda m, p=padding_mode: functional.point_sample(m, points, padding_mode=p, backend="reference"), maps
        )
    assert check(lambda a, b: functional.mask_bce(a, b, w), (z, t))
    assert check(lambda a, b: functional.mask_dice(a, b, w), (z, t))
    assert check(lambda a, b: functional.mask_focal(a, b, w), (z, t))
    assert check(lambda a, b: functional.pairwise_mask_cost(a, b, w[0]), (z, t))
    assert check(functional.uncertainty, z)
    assert check(lambda a: functional.class_cost(a, torch.tensor([0, 3])), z)
    for gamma in (None, 2.0, 0.5):
        loss = MaskLoss(focal_gamma=gamma, backend="reference")
        assert check(lambda m, f=loss: f(m, masks, points=points).total, maps)


def test_pairwise_costs_are_the_losses_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(6)
    z = torch.randn(4, 30, dtype=torch.float64, generator=generator) * 3
    t = torch.rand(5, 30, dtype=torch.float64, generator=generator)
    w = (torch.rand(30, generator=generator) > 0.3).double()
    cost = functional.pairwise_mask_cost(z, t, w)
    for query in range(4):
        for target in range(5):
            torch.testing.assert_close(cost.ce[query, target], functional.mask_bce(z[query], t[target], w))
            torch.testing.assert_close(cost.dice[query, target], functional.mask_dice(z[query], t[target], w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_strided_logits_are_read_in_place(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(2, 9, 11, 6, generator=generator).to(dtype)
    views = [
        base.permute(0, 3, 1, 2),
        base[:, ::2].permute(0, 3, 2, 1),
        base[:1].expand(2, 9, 11, 6).permute(0, 3, 1, 2),
    ]
    targets = MaskTargets.from_masks([torch.rand(3, 20, 30, generator=generator) > 0.5 for _ in range(2)])
    pairs = [(torch.tensor([0, 5, 2]), torch.tensor([2, 1, 0])), (torch.tensor([4]), torch.tensor([1]))]
    loss = MaskLoss(sampling=PointSampling(64), backend=backend)
    for view in views:
        strided, plain = view.detach().requires_grad_(), view.detach().contiguous().requires_grad_()
        results = [loss(logits, targets, pairs, seed=1) for logits in (strided, plain)]
        for out in results:
            out.total.backward()
        assert torch.equal(results[0].total, results[1].total)
        assert strided.grad is not None and plain.grad is not None
        assert torch.equal(strided.grad, plain.grad)


def test_several_instances_on_one_plane(backend: str) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(1, 3, 12, 10, generator=generator, requires_grad=True)
    masks = torch.rand(4, 24, 20, generator=generator) > 0.5
    points = torch.rand(4, 40, 2, generator=generator)
    pairs = [(torch.tensor([1, 1, 0, 1]), torch.tensor([3, 0, 2, 1]))]
    out = MaskLoss(backend=backend)(logits, [masks], pairs, points=points)
    out.total.backward()
    expected = oracle.instance_losses(logits[0, pairs[0][0]], masks[pairs[0][1]], points, weights=(5.0, 5.0))
    grad = torch.zeros(3, 12, 10, dtype=torch.float64).index_add_(0, pairs[0][0], expected.grad) / 4
    agree(out.per_instance.ce, expected.ce, 1e-6)
    assert logits.grad is not None
    agree(logits.grad[0], grad, 1e-6)
    assert bool((logits.grad[0, 2] == 0).all())


def test_gradient_flows_to_the_logits_alone(backend: str) -> None:
    logits = torch.randn(1, 8, 8, requires_grad=True)
    soft = torch.rand(1, 8, 8, requires_grad=True)
    points = torch.rand(1, 9, 2, requires_grad=True)
    MaskLoss(backend=backend)(logits, soft, points=points).total.backward()
    assert logits.grad is not None and soft.grad is None and points.grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_logit_shows(backend: str, value: float) -> None:
    for target in (False, True):
        logits = torch.randn(2, 16, 16)
        logits[1, 5:8, 5:8] = value
        logits.requires_grad_()
        masks = torch.full((2, 32, 32), target)
        out = MaskLoss(sampling=PointSampling(400), backend=backend)(logits, masks, seed=0)
        out.total.backward()
        assert logits.grad is not None
        assert not out.total.isfinite() and bool(out.per_instance.ce[0].isfinite())
        assert not logits.grad[1].isfinite().all() and bool(logits.grad[0].isfinite().all())


def test_nan_points_touch_nothing_out_of_bounds(backend: str) -> None:
    points = torch.tensor([[[float("nan"), 0.5], [float("inf"), 0.5], [0.5, -float("inf")], [1e30, -1e30], [0.5, 0.5]]])
    logits = torch.randn(1, 6, 6, requires_grad=True)
    out = MaskLoss(backend=backend)(logits, torch.ones(1, 9, 9, dtype=torch.bool), points=points)
    out.total.backward()
    assert logits.grad is not None and logits.grad.shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("matched", [3, 30])
def test_a_large_gradient_is_zero_wherever_nothing_was_matched(dtype: torch.dtype, matched: int) -> None:
    """Few matched planes and many are written to different kinds of memory."""
    logits = torch.randn(1, 40, 256, 257).to(dtype)
    masks = torch.rand(matched, 64, 64) > 0.5
    pairs = [(torch.randperm(40)[:matched], torch.arange(matched))]
    grads = []
    for backend in ("cpu", "reference"):
        leaf = logits.clone().requires_grad_()
        MaskLoss(sampling=PointSampling(500), backend=backend)(leaf, [masks], pairs, seed=3).total.backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7)
    rest = torch.ones(40, dtype=torch.bool).scatter_(0, pairs[0][0], False)
    assert bool((grads[0][0, rest] == 0).all())
    grads[0].mul_(2.0)  # as a gradient scaler does
