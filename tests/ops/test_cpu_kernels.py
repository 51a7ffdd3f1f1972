"""The Numba kernels against the reference: same points, same choices, and no larger errors than its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskloss import HungarianMatcher, MaskLoss, MaskLossError, PointSampling, functional
from maskloss._abi import FRAME_H, FRAME_W, INDEX_COLUMNS, LEFT, TOP, Instances, Term
from maskloss.ops import cpu, dense, reference
from maskloss.ops.cpu import arguments, positions
from maskloss.ops.cpu.choose import threshold
from maskloss.ops.cpu.loss import scale_gradients
from maskloss.targets import MaskTargets
from support.accuracy import assert_no_worse
from support.batches import PLAIN, Batch, Sampling

OPTIONS = {
    "plain": PLAIN,
    "border": Term(padding="border"),
    "nearest": Term(target_mode="nearest"),
    "focal": Term(alpha=0.25, gamma=2.0),
    "focal without alpha": Term("border", "nearest", -1.0, 1.5),
    "focal with gamma 0": Term(alpha=0.75, gamma=0.0),
    "Dice soft": Term(dice="soft"),
    "Dice semimetric, focal": Term(alpha=0.25, gamma=2.0, dice="semimetric"),
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rectangles(count: int, height: int, width: int) -> Tensor:
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks[: max(1, count - 1)]:  # The last of several is empty.
        top, left = int(torch.randint(height, ())), int(torch.randint(width, ()))
        mask[top : top + height // 2 + 1, left : left + width // 2 + 1] = True
    return masks


def encode(encoding: str, height: int, width: int, counts: tuple[int, ...] = (3, 1, 4), **extra: Any) -> MaskTargets:
    if encoding == "bits":
        return MaskTargets.from_masks([rectangles(count, height, width) for count in counts], **extra)
    if encoding.startswith("values"):
        dtype = getattr(torch, encoding.removeprefix("values "))
        return MaskTargets.from_masks([torch.rand(c, height, width).to(dtype) for c in counts], soft=True, **extra)
    dtype = getattr(torch, encoding.removeprefix("labels "))
    maps = [
        MaskTargets.from_label_map(torch.randint(5, (height, width)).to(dtype), list(range(c)), **extra) for c in counts
    ]
    return MaskTargets.cat(maps)


def make(
    dtype: torch.dtype = torch.float32,
    plane: tuple[int, int] = (23, 31),
    frame: tuple[int, int] = (57, 91),
    encoding: str = "bits",
    **extra: Any,
) -> Batch:
    targets = encode(encoding, *frame, **extra)
    logits = [torch.randn(3, 5, *plane).to(dtype), torch.randn(3, 5, plane[0] + 2, plane[1]).to(dtype)]
    index = [
        (layer, image, int(query), target)
        for layer in range(2)
        for image, count in enumerate(targets.num_targets)
        for target, query in enumerate(torch.randperm(5)[:count])
    ]
    seed = torch.randint(-(2**63), 2**63 - 1, ())
    return Batch(logits, torch.tensor(index), [len(index) // 2] * 2, targets, torch.tensor([7, 0, 2**32 - 1]), seed)


def assert_as_good(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    tolerance = 1e-12 if exact.dtype == got.dtype == torch.float64 else 1e-6
    assert_no_worse(got, plain, exact, tolerance, everywhere=False)


def assert_matches(case: Batch, sampling: Sampling, options: Term = PLAIN, points: Any = None) -> None:
    """Loss, choices, soft targets, gradients and matching costs of both backends, on the points of the reference."""
    plain = case.loss(reference, sampling, options, points)
    at = case.points(reference, sampling, options.padding) if points is None else points
    exact = case.exact().loss(reference, sampling, options, at)
    got = case.loss(cpu, sampling, options, points)
    for k in (0, 1):
        assert_as_good(got[k], plain[k], exact[k])
    assert torch.equal(got[2], plain[2])
    torch.testing.assert_close(got[3], plain[3], rtol=0, atol=1e-6)
    exact_grads = case.exact().gradients(reference, exact, sampling, options, at)
    plain_grads = case.gradients(reference, plain, sampling, options, points)
    grads = case.gradients(cpu, got, sampling, options, points)
    early = case.early_gradients(cpu, got[0].dtype, sampling, options, points)
    for grad, early_grad, plain_grad, exact_grad in zip(grads, early, plain_grads, exact_grads, strict=True):
        assert_as_good(grad, plain_grad, exact_grad)
        assert_as_good(early_grad, plain_grad, exact_grad)
    if points is None:
        pairs = zip(
            case.costs(cpu, sampling[0], options, *sampling[3:]),
            case.costs(reference, sampling[0], options, *sampling[3:]),
            case.exact().costs(reference, sampling[0], options, *sampling[3:]),
            strict=True,
        )
        for cost, plain_cost, exact_cost in pairs:
            assert_as_good(cost, plain_cost, exact_cost)


SAMPLING = (123, 369, 92)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_loss_gradient_and_cost_match_the_reference(dtype: torch.dtype, name: str) -> None:
    assert_matches(make(dtype), SAMPLING, OPTIONS[name])


@pytest.mark.parametrize("name", ["plain", "nearest", "focal", "border"])
@pytest.mark.parametrize(
    "encoding",
    ["labels uint8", "labels int16", "labels int32", "labels int64", "values float32", "values bfloat16",
     "values float16", "values float64"],
)  # fmt: skip
def test_encodings(encoding: str, name: str) -> None:
    assert_matches(make(encoding=encoding), SAMPLING, OPTIONS[name])


def test_queries_with_several_targets() -> None:
    """Their instances share a plane, and so the memory of its gradient."""
    case = make()
    shared = case.index.clone()
    shared[:, 2] = 1
    assert_matches(case._replace(index=shared), SAMPLING)


@pytest.mark.parametrize("size", [1, 7, 123, 507])
def test_odd_sizes(size: int) -> None:
    assert_matches(make(plane=(size, 7), frame=(size, 1)), SAMPLING)
    assert_matches(make(plane=(1, size), frame=(123, size)), (size, 3 * size, 3 * size // 4))


@pytest.mark.parametrize(
    "sampling",
    [(1, 3, 0), (1, 3, 1), (40, 120, 0), (40, 120, 40), (40, 40, 30), (40, 40, 40), (5, 7, 5), (2048, 6144, 1536)]
    + [(*each, "stratified") for each in [(1, 3, 0), (1, 3, 1), (40, 121, 30), (41, 41, 41), (2049, 6151, 1536)]],
    ids=str,
)
def test_numbers_of_points(sampling: Sampling) -> None:
    assert_matches(make(), sampling)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_uncertain_points_are_bit_identical(dtype: torch.dtype, padding: str) -> None:
    for plane in ((64, 64), (123, 507)):
        case = make(dtype, plane)
        for sampling in ((3136, 9408, 2352), (3137, 9413, 2351, "stratified")):
            assert torch.equal(case.points(cpu, sampling, padding), case.points(reference, sampling, padding))


def test_ties_go_to_the_lower_index_and_non_finite_logits_come_first() -> None:
    case = make()
    flat = case._replace(logits=[layer.clamp(-0.1, 0.1) for layer in case.logits])
    constant = case._replace(logits=[torch.zeros_like(layer) for layer in case.logits])
    spoilt = case._replace(logits=[layer.masked_fill(layer > 1.5, float("inf")) for layer in case.logits])
    for each, sampling in itertools.product(
        (flat, constant, spoilt), ((2000, 6000, 1500), (2000, 6000, 1500, "stratified"))
    ):
        assert torch.equal(each.loss(cpu, sampling)[2], each.loss(reference, sampling)[2])


@pytest.mark.parametrize("n", [5, 5000, 37632])
def test_threshold_survives_a_misleading_sample(n: int) -> None:
    rng = np.random.default_rng(0)
    for values in (np.arange(n), np.arange(n)[::-1], np.zeros(n), rng.integers(0, 2**31 - 1, n), rng.integers(0, 9, n)):
        keys = np.ascontiguousarray(values, np.int32)
        padded = np.full(n + 16, 2**31 - 1, np.int32)
        padded[:n] = keys
        for rank in (1, n // 4, n // 2, n):
            expected = int(np.sort(keys)[max(rank, 1) - 1])
            key, below, equal = threshold(
                padded, n, max(rank, 1), np.empty(n + 16, np.int32), np.empty((n + 7) // 8, np.uint8)
            )
            assert (key, below, equal) == (expected, (keys < expected).sum(), (keys == expected).sum())


@pytest.mark.parametrize("name", ["plain", "nearest"])
def test_ignore_regions_and_windows(name: str) -> None:
    ignore = torch.rand(57, 91) < 0.3
    window = (3, 5, 41, 67)
    case = make(ignore=ignore, valid=window)
    assert_matches(case, (507, 1521, 380), OPTIONS[name])
    assert_matches(case, (507, 1521, 380, "stratified"), OPTIONS[name])
    soft = make(encoding="values float32", ignore=ignore)
    assert_matches(soft, SAMPLING, OPTIONS[name])
    assert soft.loss(cpu, SAMPLING)[3].eq(-1).any()
    assert_matches(make(ignore=torch.ones(57, 91, dtype=torch.bool)), SAMPLING, OPTIONS[name])


@pytest.mark.parametrize("name", ["plain", "border", "nearest"])
@pytest.mark.parametrize("encoding", ["bits", "labels uint8", "values float32"])
def test_frames_of_more_pixels_than_32_bits_count(encoding: str, name: str) -> None:
    case, (height, width) = make(encoding=encoding), (70_001, 70_003)
    table = case.targets.table
    table[:, TOP] += height - 57
    table[:, LEFT] += width - 91
    table[:, FRAME_H], table[:, FRAME_W] = height, width
    corner = torch.tensor([1 - 91 / width, 1 - 57 / height], dtype=torch.float64)
    points = 1 - torch.rand(len(case.index), 123, 2, dtype=torch.float64) * (1 - corner)
    assert_matches(case, (123, 0, 0), OPTIONS[name], points)
    assert case.loss(cpu, (123, 0, 0), OPTIONS[name], points)[1].unique().numel() > 2


def test_planes_of_more_pixels_than_32_bits_count_are_rejected() -> None:
    """Nothing is read or copied before: these take no memory."""
    planes = torch.zeros(1, 1, 1).expand(1, 2**16, 2**16)
    masks = torch.ones(1, 8, 8, dtype=torch.bool)
    targets = [{"masks": masks, "labels": torch.tensor([0])}]
    calls: list[Callable[[], object]] = [
        lambda: MaskLoss(backend="cpu")(planes, masks),
        lambda: MaskLoss(backend="cpu")(planes.detach().requires_grad_(), masks),
        lambda: HungarianMatcher(backend="cpu")(torch.zeros(1, 1, 2), planes[None], targets),
        lambda: functional.point_sample(planes, torch.rand(1, 3, 2), backend="cpu"),
        lambda: functional.uncertain_points(planes, backend="cpu"),
    ]
    for call in calls:
        with pytest.raises(MaskLossError, match=r"fewer than 2\*\*31 pixels\n(.*\n)*  cause: 65536 x 65536"):
            call()


def test_a_plane_of_more_than_two_to_the_31_elements_away() -> None:
    """This takes 4 GiB of addresses, and memory where the planes are."""
    masks = torch.rand(1, 61, 48) > 0.5
    planes = torch.empty_strided((1, 2, 61, 48), (0, 2**31, 48, 1), dtype=torch.bfloat16).normal_()
    planes[0, 1] += torch.where(masks[0], 8, -8)
    targets = [{"masks": masks, "labels": torch.tensor([0])}]
    matches = HungarianMatcher(backend="cpu")(torch.zeros(1, 2, 2), planes, targets)
    assert matches.index.tolist() == [[0, 0, 1, 0]]
    loss, found = MaskLoss(backend="cpu", sampling=PointSampling(num_points=500)), []
    for each in (planes, planes.contiguous()):
        logits = each.detach().requires_grad_()
        loss(logits, [masks], matches, seed=3).total.backward()
        assert logits.grad is not None
        found.append(logits.grad)
    assert found[0].count_nonzero() > 0
    assert torch.equal(*found)


def test_gradients_of_the_largest_volumes_are_scaled() -> None:
    """With the border of a plane's copy, these would have more than 2^31 voxels. Nothing is computed here."""
    large = torch.zeros(1).expand(1, 1, 1290, 1290, 1290)
    nothing = torch.empty(0, INDEX_COLUMNS, dtype=torch.int64)
    scale_gradients([large], 2.0, Instances([large], nothing, [0]), [True])


def test_frame_larger_than_the_mask() -> None:
    assert_matches(make(canvas=(64, 128), ignore=torch.rand(57, 91) < 0.2), SAMPLING, OPTIONS["border"])


def test_points_far_outside_lie_in_the_last_pixel_of_an_ignore_region() -> None:
    """Also where integers cannot count the pixels between."""
    ignore = torch.zeros(8, 9, dtype=torch.bool)
    ignore[-1, -1] = True
    targets, points = (
        MaskTargets.from_masks(torch.ones(1, 8, 9), ignore=ignore),
        torch.tensor([[[1e30] * 2, [0.3] * 2]]),
    )
    found = [MaskLoss(backend=each)(torch.ones(1, 5, 6), targets, points=points) for each in ("cpu", "reference")]
    torch.testing.assert_close(*(each.total for each in found))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "border", "nearest"])
def test_given_points(kind: torch.dtype, name: str) -> None:
    case = make()
    points = torch.rand(len(case.index), 77, 2).to(kind) * 1.2 - 0.1
    assert_matches(case, (77, 0, 0), OPTIONS[name], points)
    shared = points[:1].expand(len(case.index), -1, -1)
    assert_matches(case, (77, 0, 0), OPTIONS[name], shared)


@pytest.mark.parametrize("options", [PLAIN, Term(alpha=0.25, gamma=2.0)], ids=["plain", "focal"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_pixels_of_the_ignore_region_at_points_in_half_precision(kind: torch.dtype, options: Term) -> None:
    """x * 1021 has more digits than half precision: rounded there, it is another pixel."""
    case = make(frame=(509, 1021), ignore=torch.rand(509, 1021) < 0.5)
    points = torch.rand(len(case.index), 77, 2).to(kind)
    for ops in (reference, cpu):
        found, same = (case.loss(ops, (77, 0, 0), options, at) for at in (points, points.float()))
        assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
    assert_matches(case, (77, 0, 0), options, points)


@pytest.mark.parametrize("gamma", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_focal_gradient_of_perfect_predictions(dtype: torch.dtype, gamma: float) -> None:
    """miss^(gamma - 1) is infinite where a prediction is perfect; its factor, the loss, is 0."""
    case, term = make(dtype), Term("border", alpha=0.25, gamma=gamma)
    for layer, value in zip(case.logits, (20.0, 200.0), strict=True):
        layer[:] = torch.where(torch.rand(layer.shape) < 0.5, value, -value).to(dtype)
    assert_matches(case, SAMPLING, term)
    saved = case.loss(cpu, SAMPLING, term)
    assert all(grad.isfinite().all() for grad in case.gradients(cpu, saved, SAMPLING, term))


@pytest.mark.parametrize("name", ["plain", "border", "nearest"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e9])
def test_points_that_are_nowhere_touch_no_memory(bad: float, name: str) -> None:
    case = make()
    points = torch.rand(len(case.index), 50, 2)
    points[:, ::3, 0] = bad
    points[:, ::4, 1] = bad
    saved = case.loss(cpu, (50, 0, 0), OPTIONS[name], points)
    plain = case.loss(reference, (50, 0, 0), OPTIONS[name], points)
    torch.testing.assert_close(saved[0], plain[0], equal_nan=True)
    torch.testing.assert_close(saved[1], plain[1], equal_nan=True)
    grads = case.gradients(cpu, saved, (50, 0, 0), OPTIONS[name], points)
    assert all(grad.shape == layer.shape for grad, layer in zip(grads, case.logits, strict=True))
    ignoring = make(ignore=torch.rand(57, 91) < 0.3)
    assert ignoring.loss(cpu, (50, 0, 0), OPTIONS[name], points)[0].shape == (len(case.index),)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_show(bad: float) -> None:
    case = make()
    for layer in case.logits:
        layer[:, :, 4, 5] = bad
    saved = case.loss(cpu, (507, 1521, 380))
    assert not saved[0].isfinite().any()
    plain = case.loss(reference, (507, 1521, 380))
    assert torch.equal(saved[0].isnan(), plain[0].isnan())
    grads = case.gradients(cpu, saved, (507, 1521, 380))
    for layer, image, query, _ in case.index.tolist():
        assert not grads[layer][image, query].isfinite().all()
    costs = case.costs(cpu, 2000)[0]
    assert torch.equal(costs.isfinite(), case.costs(reference, 2000)[0].isfinite())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_and_expanded_logits_are_read_in_place(dtype: torch.dtype) -> None:
    case = make(dtype)
    layers = {
        "transposed": case.logits[0].transpose(2, 3).contiguous().transpose(2, 3),
        "channels last": case.logits[0].contiguous(memory_format=torch.channels_last),
        "sliced": torch.randn(3, 10, 46, 62).to(dtype)[:, ::2, ::2, ::2],
        "expanded": case.logits[0][:, :1].expand(-1, 5, -1, -1),
        "constant": torch.randn(()).to(dtype).expand(3, 5, 23, 31),
    }
    for strided in layers.values():
        views = case._replace(logits=[strided, case.logits[1]])
        copies = case._replace(logits=[strided.contiguous(), case.logits[1]])
        saved, plain = views.loss(cpu, SAMPLING), copies.loss(cpu, SAMPLING)
        assert all(torch.equal(a, b) for a, b in zip(saved, plain, strict=True))
        grads = zip(views.gradients(cpu, saved, SAMPLING), copies.gradients(cpu, plain, SAMPLING), strict=True)
        assert all(torch.equal(a, b) for a, b in grads)
        costs = zip(views.costs(cpu, 99), copies.costs(cpu, 99), strict=True)
        assert all(torch.equal(a, b) for a, b in costs)


def test_instances_of_one_plane_add_up() -> None:
    case = make()
    together = case.index.clone()
    together[:, 2] = 1
    assert_matches(case._replace(index=together), SAMPLING)


def test_layers_that_need_no_gradient() -> None:
    case = make()
    saved = case.loss(cpu, SAMPLING)
    both = case.gradients(cpu, saved, SAMPLING)
    for needs_grad in ([False, True], [True, False], [False, False]):
        some = case.gradients(cpu, saved, SAMPLING, needs_grad=needs_grad)
        for needed, grad, full in zip(needs_grad, some, both, strict=True):
            assert torch.equal(grad, full) if needed else grad.numel() == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("encoding", "values"), [("bits", 0), ("labels int32", 0), ("values float16", 123)])
def test_what_can_be_read_again_is_not_kept(backend: str, encoding: str, values: int) -> None:
    case = make(encoding=encoding)
    kept: list[Tensor] = []
    for layer in case.logits:
        layer.requires_grad_()
    inputs = (*case.logits, *case.targets.tensors, case.index, case.seed, case.image_ids)
    given = {tensor.data_ptr() for tensor in inputs}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dense.mask_loss(case.instances, case.job(SAMPLING), backend)
    assert sum(tensor.nbytes for tensor in kept) == len(case.index) * (47 + 4 * values)


def test_no_instances_and_no_targets() -> None:
    case = make(encoding="bits", counts=(0, 0, 0))
    case = case._replace(index=torch.zeros(0, INDEX_COLUMNS, dtype=torch.int64))
    saved = case.loss(cpu, SAMPLING)
    assert [list(part.shape) for part in saved] == [[0], [0], [0, 47], [0, 0], [0, 0]]
    assert case.points(cpu, SAMPLING).shape == (0, 123, 2)
    for grad, layer in zip(case.gradients(cpu, saved, SAMPLING), case.logits, strict=True):
        assert grad.shape == layer.shape
        assert not grad.any()
    assert [list(cost.shape) for cost in case.costs(cpu, 50)] == [[2, 3, 5, 0]] * 2
    assert_matches(make(counts=(0, 2, 0)), SAMPLING)


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(ignore=torch.rand(57, 91) < 0.3)
    before = (case.loss(cpu, SAMPLING), case.costs(cpu, 99), case.points(cpu, SAMPLING))
    empty = np.empty

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        array = empty(*args, **kwargs)
        array.view(np.uint8).fill(0xFF) if array.ndim == 1 else array.fill(-1 if array.dtype.kind == "i" else 255)
        return array

    monkeypatch.setattr(cpu.np, "empty", poisoned)
    after = (case.loss(cpu, SAMPLING), case.costs(cpu, 99), case.points(cpu, SAMPLING))
    for old, new in zip((*before[0], *before[1], before[2]), (*after[0], *after[1], after[2]), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_point_sample(dtype: torch.dtype, mode: str, padding: str) -> None:
    maps = torch.randn(4, 17, 29).to(dtype)
    index = torch.tensor([2, 0, 2, 3, 2])
    points = torch.rand(5, 601, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32) * 1.2 - 0.1
    points[:, 0] = float("nan")
    values = cpu.point_sample(maps, index, points, mode, padding)
    expected = reference.point_sample(maps, index, points, mode, padding)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    by_value = torch.randn(5, 601, dtype=values.dtype)
    points[:, 0] = 0.5
    grad = cpu.point_sample_backward(by_value, maps, index, points, mode, padding)
    exact = reference.point_sample_backward(by_value.double(), maps.double(), index, points, mode, padding)
    assert grad.dtype == dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=tolerance)
    assert not grad[1].any()


def test_point_sample_of_nothing() -> None:
    maps, none = torch.randn(2, 3, 3), torch.zeros(0, dtype=torch.int64)
    assert cpu.point_sample(maps, none, torch.rand(0, 5, 2), "bilinear", "zeros").shape == (0, 5)
    assert cpu.point_sample(maps, torch.tensor([1]), torch.rand(1, 0, 2), "bilinear", "zeros").shape == (1, 0)
    assert not cpu.point_sample_backward(torch.rand(0, 5), maps, none, torch.rand(0, 5, 2), "bilinear", "zeros").any()


def test_every_half_precision_number_is_converted_exactly() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        maps = values.reshape(1, 1, -1)
        # A map one pixel high, read in the middle of each pixel.
        x = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
        points = torch.stack([x, torch.full_like(x, 0.5)], dim=-1)[None]
        read = cpu.point_sample(maps, torch.tensor([0]), points, "nearest", "zeros")[0]
        torch.testing.assert_close(read, values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_rounded_half_to_even(dtype: torch.dtype) -> None:
    exact = torch.cat(
        [torch.randn(4096), torch.randn(4096) * 1e-6, torch.randn(4096) * 1e5, torch.linspace(1, 2, 4097)]
    )
    halfway = torch.arange(0x3F800000, 0x3F900000, 0x800, dtype=torch.int32).view(torch.float32)
    exact = torch.cat([exact, halfway, torch.tensor([0.0, float("inf"), -float("inf"), float("nan")])])
    maps = torch.zeros(1, 1, len(exact), dtype=dtype)
    x = (torch.arange(len(exact), dtype=torch.float64) + 0.5) / len(exact)
    points = torch.stack([x, torch.full_like(x, 0.5)], dim=-1)[None]
    grad = cpu.point_sample_backward(exact[None], maps, torch.tensor([0]), points, "nearest", "zeros")
    torch.testing.assert_close(grad[0, 0], exact.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_positions_as_integers_are_those_in_double_precision() -> None:
    bits = torch.randint(2**24, (2, 512), dtype=torch.int32).numpy()
    bits[:, :4] = [0, 1, 2**23, 2**24 - 1]
    for height, width in ((1, 1), (7, 123), (256, 507), (4096, 100_003)):
        places, others = np.empty((2, 512), np.int32)
        fx, fy, gx, gy = np.empty((4, 512), np.float32)
        positions.locate_bits(bits, 512, height, width, places, fx, fy)
        x, y = (bits.astype(np.float32) * np.float32(2**-24)).copy()
        positions.locate(x, y, 512, height, width, False, others, gx, gy)
        assert (places == others).all()
        assert (fx == gx).all()
        assert (fy == gy).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_zeros(dtype: torch.dtype) -> None:
    """They are in huge pages, of which they need no whole number."""
    found = arguments.zeros((7, 607, 613), dtype)
    assert found.shape == (7, 607, 613)
    assert found.dtype == dtype
    assert not found.any()


@pytest.mark.parametrize("advised", [True, False])
def test_gradients_in_pages_of_their_own(monkeypatch: pytest.MonkeyPatch, advised: bool) -> None:
    """Large and sparse: planes that begin within a page, the last one too, with and without the system's help."""
    if not advised:
        monkeypatch.setattr(arguments, "_madvise", lambda: 0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 40, 167, 173, generator=generator)
    assert arguments._own_pages(logits.shape, logits.dtype)
    targets = MaskTargets.from_masks(torch.rand(3, 100, 90, generator=generator) < 0.4)
    index = torch.tensor([[0, 0, query, target] for target, query in enumerate((0, 17, 39))])
    batch, sampling = Batch([logits], index, [3], targets, torch.tensor([0]), torch.tensor(5)), (200, 600, 150)
    found, expected = (
        batch.gradients(backend, batch.loss(backend, sampling), sampling)[0] for backend in (cpu, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert found[0, [0, 17, 39]].count_nonzero() > 300
    assert not found[0, [1, 16, 18, 38]].any()
