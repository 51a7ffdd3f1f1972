"""What the operations read of targets: their values, ignored regions, windows, whatever the encoding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from maskloss import HungarianMatcher, MaskLoss, MaskTargets, PointSampling
from maskloss.step import Step
from support import oracle
from support.encodings_of_masks import WAYS, every_way, parts_of, some_masks

# ------------------------------------------------------------------------------------------------- what operations read


def read(targets: MaskTargets, points: Tensor, backend: str, padding_mode: str = "border") -> Tensor:
    """Target values `[T_all, P]` at points `[P, 2]`, from the loss alone: bce(1, t) = softplus(1) - t."""
    loss = MaskLoss(backend=backend, padding_mode=padding_mode)
    logits = torch.ones(len(targets), 1, 3, 5, dtype=torch.float64)
    each = [torch.arange(count).repeat_interleave(len(points)) for count in targets.num_targets]
    pairs = [(torch.zeros_like(numbers), numbers) for numbers in each]
    one_by_one = points.repeat(targets.num_masks, 1)[:, None]
    ce = loss(logits, targets, pairs, points=one_by_one).per_instance.ce
    return (softplus(torch.ones((), dtype=torch.float64)) - ce).view(targets.num_masks, len(points))


@every_way
@pytest.mark.parametrize("canvas", [None, (20, 24)])
def test_values_are_those_of_the_dense_masks(
    backend: str, make: Callable[..., MaskTargets], canvas: tuple[int, int] | None
) -> None:
    _, masks = parts_of(13, 17)
    _, more = parts_of(5, 9)
    targets = MaskTargets.cat([
        make(masks, canvas=canvas),
        make(masks[:0], canvas=canvas),
        make(more, canvas=canvas),
    ])  # fmt: skip
    points = torch.rand(50, 2)
    found = read(targets, points, backend)
    expected = [oracle.read(targets.dense(i), points.expand(n, -1, -1), padding_mode="border")
                for i, n in enumerate(targets.num_targets) if n]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)
    # With zeros beyond the border the ones in the logits fade out there.
    inner = 0.25 + 0.5 * points
    torch.testing.assert_close(
        read(targets, inner, backend, "zeros"), read(targets, inner, backend), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("canvas", [None, (24, 32)])
def test_a_perfect_prediction_of_the_canvas_has_no_loss(backend: str, canvas: tuple[int, int] | None) -> None:
    masks = torch.zeros(2, 16, 24, dtype=torch.bool)
    masks[0, 4:12, 4:20], masks[1, 0:8, 8:24] = True, True
    targets = MaskTargets.from_masks(masks, canvas=canvas)
    frame = targets.dense()
    y, x = (torch.arange(side) + 0.5 for side in frame.shape[1:])
    centres = torch.stack(torch.meshgrid(x / len(x), y / len(y), indexing="xy"), -1).view(1, -1, 2).expand(2, -1, -1)
    out = MaskLoss(backend=backend)(frame * 80.0 - 40.0, targets, points=centres)
    assert float(out.ce) < 1e-6
    assert float(out.dice) < 1e-6


@pytest.mark.parametrize("oversampled", [True, False])
@pytest.mark.parametrize("target_mode", ["bilinear", "nearest"])
def test_every_encoding_has_the_same_loss_bit_for_bit(backend: str, target_mode: str, oversampled: bool) -> None:
    masks = [parts_of(31, 45, 3)[1], torch.zeros(0, 8, 8, dtype=torch.bool), parts_of(64, 20, 4)[1]]
    sampling = PointSampling(num_points=300, importance_ratio=0.75 if oversampled else 0.0)
    loss = MaskLoss(sampling=sampling, target_mode=target_mode, backend=backend)
    matcher = HungarianMatcher(num_points=200, target_mode=target_mode, backend=backend)
    labels = [{"labels": torch.zeros(len(image), dtype=torch.int64)} for image in masks]
    logits = torch.randn(3, 6, 12, 15)
    results = {}
    for way, make in WAYS.items():
        parts = [make(image) for image in masks]
        entries = [{"masks": part, **label} for part, label in zip(parts, labels, strict=True)]
        matches = matcher(torch.zeros(3, 6, 2), logits, entries, seed=4)
        leaf = logits.clone().requires_grad_()
        out = loss(leaf, MaskTargets.cat(parts), matches, seed=3)
        out.total.backward()
        results[way] = (matches.index, *out.per_instance, leaf.grad)
    expected = results.pop("masks")
    assert bool(expected[-1].any())
    for way, found in results.items():
        for left, right in zip(found, expected, strict=True):
            assert torch.equal(left, right), way


# ------------------------------------------------------------------------------------------------------ ignored regions


def half_ignored(make: Callable[..., MaskTargets] = MaskTargets.from_masks) -> tuple[Tensor, MaskTargets, Tensor]:
    """Masks `[4, 16, 24]`, their targets with columns from 12 on ignored, and two sets of logits `[4, 16, 24]`.

    The logits differ only where no point that counts can reach: from column 13 on.
    """
    _, masks = parts_of(16, 24)
    ignore = torch.zeros(16, 24, dtype=torch.bool)
    ignore[:, 12:] = True
    logits = torch.randn(4, 16, 24)
    changed = logits.clone()
    changed[:, :, 13:] += 5 * torch.randn(4, 16, 11)
    return masks, make(masks, ignore=ignore), torch.stack([logits, changed])


@every_way
def test_logits_in_an_ignored_region_change_nothing(backend: str, make: Callable[..., MaskTargets]) -> None:
    _, targets, logits = half_ignored(make)
    loss = MaskLoss(sampling=PointSampling(num_points=400, importance_ratio=0.0), backend=backend)
    leaves = [each.clone().requires_grad_() for each in logits]
    first, second = (loss(leaf, targets, seed=1) for leaf in leaves)
    (first.total + second.total).backward()
    assert torch.equal(first.per_instance.ce, second.per_instance.ce)
    assert torch.equal(first.per_instance.dice, second.per_instance.dice)
    grads = [leaf.grad for leaf in leaves]
    assert torch.equal(grads[0], grads[1])
    assert bool(grads[0][:, :, :12].any())
    assert not bool(grads[0][:, :, 13:].any())


def test_ignored_points_have_weight_zero(backend: str) -> None:
    masks, targets, (logits, _) = half_ignored()
    points = torch.rand(4, 100, 2)
    out = MaskLoss(backend=backend)(logits, targets, points=points).per_instance
    for n in range(4):
        kept = points[n : n + 1, points[n, :, 0] < 0.5]
        expected = oracle.instance_losses(logits[n : n + 1], masks[n : n + 1], kept)
        torch.testing.assert_close(out.ce[n].double(), expected.ce[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.dice[n].double(), expected.dice[0], rtol=1e-5, atol=1e-6)


def test_the_matching_leaves_ignored_points_out(backend: str) -> None:
    _, targets, logits = half_ignored()
    matcher = HungarianMatcher(num_points=300, backend=backend)
    labels, zero = torch.zeros(4, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    classes, ids = torch.zeros(1, 1, 4, 2), torch.zeros(1, dtype=torch.int64)
    first, second = (matcher.costs(classes, [each[None]], Step(targets, labels, ids, zero)) for each in logits)
    assert torch.equal(first, second)
    everywhere = MaskTargets.from_masks(targets.dense())
    third = matcher.costs(classes, [logits[:1]], Step(everywhere, labels, ids, zero))
    assert not torch.allclose(first, third)


def test_everything_ignored(backend: str) -> None:
    masks = some_masks(9, 9, 3)
    targets = MaskTargets.from_masks(masks, ignore=torch.ones(9, 9, dtype=torch.uint8))
    logits = torch.randn(3, 9, 9, requires_grad=True)
    out = MaskLoss(sampling=PointSampling(50), backend=backend)(logits, targets, seed=0)
    out.total.backward()
    assert out.total.item() == 0
    assert not bool(logits.grad.any())


def test_ignored_regions_belong_to_their_image(backend: str) -> None:
    """Images with and without a region, of different sizes and on canvases, joined and on their own."""
    ignore = torch.rand(7, 11) > 0.5
    parts = [
        MaskTargets.from_masks(some_masks(8, 8, 2)),
        MaskTargets.from_masks(some_masks(7, 11, 3), ignore=ignore, canvas=(12, 12)),
        MaskTargets.from_label_map(torch.zeros(5, 5, dtype=torch.int32), [], ignore=torch.ones(5, 5, dtype=torch.bool)),
        MaskTargets.from_masks(some_masks(6, 30, 1), ignore=torch.rand(6, 30) > 0.5),
    ]
    logits = torch.randn(4, 5, 10, 10)
    pairs = [(torch.arange(part.num_masks), torch.arange(part.num_masks)) for part in parts]
    loss = MaskLoss(sampling=PointSampling(200), backend=backend)
    joined = loss(logits, MaskTargets.cat(parts), pairs, seed=2).per_instance
    alone = [
        loss(logits[i : i + 1], part, pairs[i : i + 1], seed=2, image_ids=[i]).per_instance
        for i, part in enumerate(parts)
    ]
    assert torch.equal(joined.ce, torch.cat([each.ce for each in alone]))
    assert torch.equal(joined.dice, torch.cat([each.dice for each in alone]))
    regions = MaskTargets.cat(parts)
    assert "ignore regions" in repr(regions)


# -------------------------------------------------------------------------------------------------------------- windows


def around(valid: tuple[int, int, int, int], size: tuple[int, int], inside: Tensor) -> Tensor:
    """Logits `[H, W]` that are NaN wherever no point of the window can reach."""
    top, left, rows, columns = valid
    logits = torch.full(size, float("nan"))
    reach = (slice(max(top - 1, 0), top + rows + 1), slice(max(left - 1, 0), left + columns + 1))
    logits[reach] = inside[reach]
    return logits


@pytest.mark.parametrize("valid", [(0, 0, 10, 12), (3, 4, 9, 7), (15, 29, 1, 1), (0, 5, 16, 1), (6, 8, 10, 22)])
@pytest.mark.parametrize("importance_ratio", [0.0, 0.75, 1.0])
def test_all_points_lie_in_the_window(backend: str, valid: tuple[int, int, int, int], importance_ratio: float) -> None:
    size = (16, 30)
    masks = some_masks(*size, 2)
    targets = MaskTargets.from_masks(masks, valid=valid)
    assert "valid windows" in repr(targets)
    inside = torch.randn(size)
    logits = around(valid, size, inside).expand(2, -1, -1)
    sampling = PointSampling(num_points=500, importance_ratio=importance_ratio)
    loss = MaskLoss(sampling=sampling, padding_mode="border", backend=backend)
    assert loss(logits, targets, seed=0).total.isfinite()
    matcher = HungarianMatcher(num_points=500, padding_mode="border", backend=backend)
    entry = {"masks": targets, "labels": torch.zeros(2, dtype=torch.int64)}
    assert len(matcher(torch.zeros(1, 2, 2), logits[None], [entry], seed=0)) == 2
    step = Step(targets, entry["labels"], torch.zeros(1).long(), torch.tensor(0))
    costs = matcher.costs(torch.zeros(1, 1, 2, 2), [logits[None]], step)
    assert bool(costs.isfinite().all())
    # Every corner of the window is reached: a NaN there shows.
    top, left, rows, columns = valid
    for y in {top, top + rows - 1}:
        for x in {left, left + columns - 1}:
            spoilt = logits.clone()
            spoilt[:, y, x] = float("nan")
            assert not loss(spoilt, targets, seed=0).total.isfinite()


def test_windows_belong_to_their_image(backend: str) -> None:
    windows = [(0, 0, 8, 20), None, (8, 10, 8, 10)]
    masks = some_masks(16, 20, 1)
    parts = [MaskTargets.from_masks(masks, valid=valid) for valid in windows]
    inside = torch.randn(16, 20)
    logits = torch.stack([inside if valid is None else around(valid, (16, 20), inside) for valid in windows])[:, None]
    pairs = [(torch.zeros(1).long(), torch.zeros(1).long())] * 3
    loss = MaskLoss(sampling=PointSampling(300), padding_mode="border", backend=backend)
    assert loss(logits, MaskTargets.cat(parts), pairs, seed=0).total.isfinite()
    assert not loss(logits, MaskTargets.cat(parts[::-1]), pairs, seed=0).total.isfinite()
