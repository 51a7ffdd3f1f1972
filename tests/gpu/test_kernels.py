"""The Triton kernels against the reference: on a GPU, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1).

`test_interpreter.py` runs this file under the interpreter. Sizes are small because an interpreted program takes a good
part of a second; blocks are made smaller still in some cases, so that every loop runs more than once.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from maskloss.distributed import image_numbers
from maskloss.ops import reference
from maskloss.targets import MaskTargets
from support.accuracy import assert_no_worse
from support.kernel_cases import DEVICE, INTERPRETED, TOLERANCE, Case, Inputs, small_blocks

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")] + [pytest.mark.gpu] * (not INTERPRETED)

pytest.importorskip("triton")


# Each option once at least, in company with as many others as possible.
CASES = {
    "plain": Case(),
    "one plane twice": Case(rows=((0, 0, 1, 0), (0, 0, 1, 1)), sampling=(33, 99, 24)),
    "bfloat16, ignored pixels, windows": Case(torch.bfloat16, extra=True),
    "float16, soft float16": Case(torch.float16, targets="values float16", sizes=((7, 123),), sampling=(40, 120, 30)),
    "float64, focal": Case(torch.float64, focal=(-1.0, 1.5), targets="labels int64", sampling=(40, 120, 30)),
    "border, nearest, focal": Case(
        padding="border", target_mode="nearest", focal=(0.25, 2.0), targets="labels uint8", sampling=(7, 21, 5)
    ),
    "border, soft bfloat16": Case(padding="border", targets="values bfloat16", sampling=(64, 192, 48)),
    "no uncertain points, nearest, soft": Case(
        target_mode="nearest", targets="values float32", sampling=(20, 60, 0), extra=True
    ),
    "one point, one pixel": Case(sampling=(1, 3, 0), sizes=((1, 1),), frame=(1, 1), targets="labels int16"),
    "one candidate": Case(sampling=(1, 1, 1), sizes=((1, 7),), frame=(3, 1), focal=(0.6, 0.0)),
    "all uncertain, no oversampling": Case(sampling=(50, 50, 50), targets="labels int32", focal=(0.25, 3.0)),
    "given points": Case(given=True, sampling=(60, 180, 45), extra=True, padding="border"),
    "given points, nearest": Case(given=True, sampling=(60, 180, 45), target_mode="nearest", targets="values float64"),
    "two layers of different sizes": Case(
        sizes=((5, 6), (9, 4)), rows=((0, 1, 1, 0), (1, 0, 0, 2)), sampling=(30, 90, 22), focal=(-1.0, 1.0)
    ),
    "Dice soft, soft targets": Case(dice="soft", targets="values float32", sampling=(64, 192, 48), extra=True),
    "Dice semimetric, soft targets": Case(dice="semimetric", targets="values float16", sampling=(64, 192, 48)),
    "stratified": Case(sampling=(123, 371, 92, "stratified")),
    "stratified, uniform points alone, windows": Case(
        torch.bfloat16, sampling=(37, 111, 0, "stratified"), extra=True, sizes=((7, 21),)
    ),
    "stratified, one point": Case(sampling=(1, 1, 1, "stratified"), sizes=((3, 7),), frame=(3, 5), padding="border"),
    "two layers together": Case(torch.bfloat16, sizes=((5, 6), (5, 6)), rows=((1, 1, 1, 0), (1, 0, 0, 2))),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_follow_the_reference(gpu: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(CASES[name])
    if name in {"plain", "given points", "stratified"}:
        small_blocks(monkeypatch)
    found, plain = inputs.loss(gpu), inputs.loss(reference)
    exact = inputs.exact()
    wanted = exact.loss(reference)
    for mine, theirs, right in zip(found[:2], plain[:2], wanted[:2], strict=True):
        assert_no_worse(mine, theirs, right, TOLERANCE[mine.dtype], everywhere=True)
    assert torch.equal(found[2], plain[2])  # the same candidates are chosen
    if found[3].dtype == torch.uint8:
        assert torch.equal(found[3], plain[3])
    else:
        torch.testing.assert_close(found[3], plain[3])
    gradients = inputs.gradients(gpu, found), inputs.gradients(reference, plain), exact.gradients(reference, wanted)
    for mine, theirs, right in zip(*gradients, strict=True):
        assert mine.is_contiguous()
        assert_no_worse(mine, theirs, right, TOLERANCE[mine.dtype], everywhere=True)


STRATIFIED = ["stratified", "stratified, uniform points alone, windows", "stratified, one point"]


@pytest.mark.parametrize("name", ["plain", "bfloat16, ignored pixels, windows", "float64, focal", *STRATIFIED])
def test_points_are_those_of_the_reference(gpu: Any, name: str) -> None:
    inputs = Inputs(CASES[name])
    assert torch.equal(inputs.drawn(gpu), inputs.drawn(reference))


@pytest.mark.parametrize("name", ["plain", "bfloat16, ignored pixels, windows", "border, nearest, focal", *STRATIFIED])
def test_three_backends_give_the_same_points_and_losses(gpu: Any, name: str) -> None:
    from maskloss.ops import cpu

    on_device, on_host = Inputs(CASES[name]), Inputs(CASES[name])
    on_host.targets, on_host.image_ids = on_device.targets.to("cpu"), on_device.image_ids.cpu()
    on_host.logits, on_host.index = [layer.cpu() for layer in on_device.logits], on_device.index.cpu()
    points = [on_device.drawn(gpu).cpu(), on_device.drawn(reference).cpu(), on_host.drawn(cpu)]
    losses = [on_device.loss(gpu), on_device.loss(reference), on_host.loss(cpu)]
    for other in (1, 2):
        assert torch.equal(points[0], points[other])
        assert torch.equal(losses[0][2].cpu(), losses[other][2].cpu())  # the candidates that were chosen
        for mine, theirs in zip(losses[0][:2], losses[other][:2], strict=True):
            torch.testing.assert_close(mine.cpu(), theirs.cpu(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 37, 254, 255])
def test_ties_go_to_the_first_candidates(gpu: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    inputs = Inputs(Case(sampling=(255, 255, count), rows=((0, 1, 0, 0),)))
    inputs.logits = [layer.sign() * (layer.abs() > 1) for layer in inputs.logits]
    assert torch.equal(inputs.drawn(gpu), inputs.drawn(reference))


def test_scratch_memory_is_bounded(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskloss.ops.gpu import launch

    monkeypatch.setattr(launch, "SCRATCH_BYTES", 1)
    inputs = Inputs(Case(sizes=((5, 6), (5, 6)), rows=((0, 1, 1, 0), (0, 0, 0, 1), (1, 0, 0, 2)), sampling=(9, 27, 6)))
    assert torch.equal(inputs.drawn(gpu), inputs.drawn(reference))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_memory_of_gradients_is_bounded(
    gpu: Any, dtype: torch.dtype, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of one geometry, one of them without instances, that are cut into launches of their own."""
    from maskloss.ops.gpu import launch

    rows = ((0, 0, 0, 1), (0, 1, 1, 0), (0, 1, 1, 1), (2, 0, 1, 1), (3, 1, 0, 2))
    inputs = Inputs(Case(dtype, sizes=((5, 6),) * 4, rows=rows, sampling=(9, 27, 6)))
    saved = inputs.loss(gpu)
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 1)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = inputs.gradients(gpu, saved)
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, theirs in zip(found, inputs.gradients(reference, saved), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3 if dtype == torch.bfloat16 else 1e-6, rtol=2**-7)


def test_tensors_with_gaps(gpu: Any) -> None:
    """Kernels walk through pixels and image numbers one after another; callers may hold one column of many."""
    maps = torch.stack([torch.randint(4, (21, 30), dtype=torch.int32), torch.full((21, 30), 9)], dim=-1).to(DEVICE)
    targets = MaskTargets.from_label_map(maps[..., 0], [1, 2, 3], allow_missing=True)
    soft = MaskTargets.from_masks(torch.rand(3, 21, 30, 2)[..., 1].to(DEVICE), soft=True)
    for made in (targets, soft):
        assert made.data.is_contiguous()
    assert torch.equal(targets.dense(), maps[..., 0] == torch.arange(1, 4, device=DEVICE)[:, None, None])
    ids = image_numbers(torch.tensor([[7, 1], [2, 1]], device=DEVICE)[:, 0], 2, torch.device(DEVICE))
    assert ids.is_contiguous()
    assert ids.tolist() == [7, 2]


def test_a_seed_on_the_device(gpu: Any) -> None:
    inputs = Inputs(Case(sampling=(9, 27, 6)))
    expected = inputs.drawn(gpu)
    pointers = pytest.MonkeyPatch()
    from maskloss.ops.gpu import launch

    with pointers.context() as patch:
        patch.setattr(launch, "split_seed", lambda seed: (0, seed.to(DEVICE)))
        assert torch.equal(inputs.drawn(gpu), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_of_an_instance_that_weighs_nothing_does_not_show(gpu: Any, value: float) -> None:
    """With the gradients of both of its losses 0, an instance has none, whatever its logits are."""
    inputs = Inputs(Case(rows=((0, 0, 1, 0), (0, 1, 0, 0))))
    inputs.logits[0][0, 1] = value
    live = torch.tensor([0.0, 1.0], device=DEVICE)
    for ops in (gpu, reference):
        [grad] = inputs.gradients(ops, inputs.loss(ops), live=live)
        assert not grad[0].any()
        assert grad[1, 0].isfinite().all()
        assert grad[1, 0].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_logit_that_is_not_finite_shows(gpu: Any, value: float) -> None:
    inputs = Inputs(Case(sampling=(60, 180, 45), sizes=((9, 9),)))
    inputs.logits[0][0, 1, 4, 4] = value
    found, plain = inputs.loss(gpu), inputs.loss(reference)
    assert torch.equal(found[2], plain[2])
    for mine, theirs in zip(found[:2], plain[:2], strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert not found[0][0].isfinite()
    assert found[0][1].isfinite()
    mine, theirs = inputs.gradients(gpu, found)[0], inputs.gradients(reference, plain)[0]
    torch.testing.assert_close(mine, theirs, equal_nan=True, atol=1e-6, rtol=1e-5)
    assert mine[0, 1].isnan().any()
    assert mine[1].isfinite().all()


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_points_at_the_very_edge_of_pixels(gpu: Any, padding: str) -> None:
    """A pixel and its fraction are those that float64 gives, also where float32 rounds up to the next pixel."""
    maps = torch.randn(1, 1, 1000, device=DEVICE)
    whole = torch.arange(0, 1000, 9, dtype=torch.float64) + 0.5
    x = torch.cat([whole / 1000 + shift for shift in (0, 2**-30, -(2**-30), -(2**-24), 2**-24, -(2**-26))]).float()
    points = torch.stack([x, torch.full_like(x, 0.5)], dim=-1)[None].to(DEVICE)
    index = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for mode in ("bilinear", "nearest"):
        found, plain = (ops.point_sample(maps, index, points, mode, padding) for ops in (gpu, reference))
        assert torch.equal(found, plain)


def test_given_points_outside_the_map_and_nan(gpu: Any) -> None:
    inputs = Inputs(Case(given=True, sampling=(5, 15, 3), rows=((0, 0, 0, 0),)))
    inputs.points = torch.tensor([[[1e30, 0.5], [-1e30, 2.0], [0.5, 0.5], [1.0, 1.0], [-3.0, 0.2]]], device=DEVICE)
    mine, theirs = inputs.loss(gpu), inputs.loss(reference)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    maps, index = torch.randn(1, 5, 6, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    points = torch.tensor([[[float("inf"), 0.5], [-float("inf"), 0.1], [0.5, float("inf")]]], device=DEVICE)
    for mode, padding in itertools.product(("bilinear", "nearest"), ("zeros", "border")):
        found, plain = (ops.point_sample(maps, index, points, mode, padding) for ops in (gpu, reference))
        torch.testing.assert_close(found, plain, equal_nan=True)
    inputs.points[0, 0] = float("nan")
    found = inputs.loss(gpu)
    assert found[0].isnan().all()
    assert inputs.gradients(gpu, found)[0].shape == inputs.logits[0].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_gradients_are_as_good(gpu: Any, dtype: torch.dtype) -> None:
    rows = ((0, 0, 1, 0), (0, 0, 1, 1), (0, 1, 0, 2))
    inputs = Inputs(Case(dtype, rows=rows, sampling=(40, 120, 30)))
    saved = inputs.loss(gpu)
    plain, exact = inputs.gradients(reference, saved), inputs.exact()
    wanted = exact.gradients(reference, exact.loss(reference))
    torch.use_deterministic_algorithms(True)
    try:
        found = inputs.gradients(gpu, saved)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_no_worse(found[0], plain[0], wanted[0], TOLERANCE[dtype], everywhere=True)


def test_layers_that_need_no_gradient(gpu: Any) -> None:
    rows = ((0, 0, 1, 0), (1, 0, 1, 1), (2, 1, 0, 2))
    inputs = Inputs(Case(sizes=((4, 5),) * 3, rows=rows, sampling=(10, 30, 7)))
    saved = inputs.loss(gpu)
    found, plain = (inputs.gradients(ops, saved, [True, False, True]) for ops in (gpu, reference))
    assert found[1].numel() == 0
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_more_instances_than_planes(gpu: Any) -> None:
    rows = tuple((0, image, 0, image) for image in (0, 1, 1, 0, 1))
    inputs = Inputs(Case(torch.bfloat16, rows=rows, sampling=(6, 18, 4)))
    inputs.logits = [layer[:, :1] for layer in inputs.logits]
    saved = inputs.loss(gpu)
    found, plain = inputs.gradients(gpu, saved)[0], inputs.gradients(reference, saved)[0]
    torch.testing.assert_close(found, plain, atol=1e-3, rtol=2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_instances(gpu: Any, dtype: torch.dtype) -> None:
    inputs = Inputs(Case(dtype, rows=()))
    found = inputs.loss(gpu)
    assert [list(part.shape) for part in found] == [list(part.shape) for part in inputs.loss(reference)]
    assert not inputs.gradients(gpu, found)[0].any()
    assert inputs.drawn(gpu).shape == (0, 123, 2)


MATCHING = {
    "plain": Case(),
    "bfloat16, ignored pixels, windows": Case(torch.bfloat16, extra=True, sizes=((7, 123), (7, 123))),
    "focal, border, nearest": Case(focal=(0.25, 2.0), padding="border", target_mode="nearest", sizes=((1, 7),)),
    "float64, focal without alpha, two sizes": Case(torch.float64, focal=(-1.0, 1.5), sizes=((5, 6), (9, 4))),
    "float16, labels": Case(torch.float16, targets="labels uint8"),
    "soft": Case(targets="values float32", extra=True),
    "Dice soft, soft targets": Case(dice="soft", targets="values float32", extra=True),
    "Dice semimetric, soft targets": Case(dice="semimetric", targets="values float32", extra=True),
    "stratified": Case(sampling=(1, 1, 0, "stratified"), extra=True),
}


@pytest.mark.parametrize("name", MATCHING)
def test_matching_costs_follow_the_reference(gpu: Any, name: str) -> None:
    inputs = Inputs(MATCHING[name])
    num_points = 600 if name == "plain" else 61  # enough for two parts, or less than two steps
    exact = inputs.exact()
    for mine, theirs, right in zip(
        inputs.costs(gpu, num_points),
        inputs.costs(reference, num_points),
        exact.costs(reference, num_points),
        strict=True,
    ):
        assert_no_worse(mine, theirs, right, max(TOLERANCE[mine.dtype], 0 if INTERPRETED else 1e-6), everywhere=True)


def test_matching_costs_of_one_point_and_many_queries(gpu: Any) -> None:
    inputs = Inputs(Case(sizes=((4, 4),)))
    inputs.logits = [torch.randn(2, 35, 4, 4, device=DEVICE)]
    for mine, theirs in zip(inputs.costs(gpu, 1), inputs.costs(reference, 1), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_matching_costs_of_more_targets_than_a_tile(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskloss.ops.gpu import cost

    monkeypatch.setattr(cost, "tile_of", lambda *_: cost.Tile(16, 16, 32, 4))
    inputs = Inputs(Case(sizes=((4, 4),)))
    masks = [torch.rand(19, 12, 17) > 0.5, torch.rand(0, 12, 17) > 0.5]
    inputs.targets = MaskTargets.from_masks(masks).to(DEVICE)
    for mine, theirs in zip(inputs.costs(gpu, 50), inputs.costs(reference, 50), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        assert not mine[:, 1].any()


def test_matching_costs_without_targets(gpu: Any) -> None:
    inputs = Inputs(Case())
    inputs.targets = MaskTargets.from_masks([torch.zeros(0, 4, 4, dtype=torch.bool)] * 2).to(DEVICE)
    assert [cost.shape for cost in inputs.costs(gpu, 50)] == [(1, 2, 2, 0)] * 2


def test_matching_costs_that_are_not_finite(gpu: Any) -> None:
    inputs = Inputs(Case(sizes=((4, 4),)))
    inputs.logits[0][0, 1] = float("nan")
    for mine, theirs in zip(inputs.costs(gpu, 50), inputs.costs(reference, 50), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_point_sampling(gpu: Any, mode: str, padding: str, dtype: torch.dtype) -> None:
    maps = torch.randn(5, 3, 8).transpose(1, 2)[:, ::2].to(dtype).to(DEVICE)
    index = torch.tensor([4, 0, 4], device=DEVICE)
    points = (torch.rand(3, 70, 2, dtype=torch.float64) * 1.6 - 0.3).to(DEVICE)
    points = points if dtype == torch.bfloat16 else points.float()
    found, plain = (ops.point_sample(maps, index, points, mode, padding) for ops in (gpu, reference))
    assert torch.equal(found, plain)
    back, wanted = (ops.point_sample_backward(plain, maps, index, points, mode, padding) for ops in (gpu, reference))
    torch.testing.assert_close(back, wanted, atol=1e-5, rtol=2 * torch.finfo(dtype).eps)


def test_point_sampling_deterministic_and_empty(gpu: Any) -> None:
    maps, index = torch.randn(2, 3, 3, device=DEVICE), torch.tensor([1, 1], device=DEVICE)
    points = torch.rand(2, 9, 2, device=DEVICE)
    grad = torch.randn(2, 9, device=DEVICE)
    plain = reference.point_sample_backward(grad, maps, index, points, "bilinear", "zeros")
    torch.use_deterministic_algorithms(True)
    try:
        found = gpu.point_sample_backward(grad, maps, index, points, "bilinear", "zeros")
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, plain)
    assert gpu.point_sample(maps, index[:0], points[:0], "bilinear", "zeros").shape == (0, 9)
    assert not gpu.point_sample_backward(grad[:0], maps, index[:0], points[:0], "bilinear", "zeros").any()
