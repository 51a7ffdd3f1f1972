"""Groups of queries: each is matched to all targets on its own, and instances are counted over all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maskloss import HungarianMatcher, MaskCriterion, MaskLossError, PointSampling, StepTotals

GROUPS, EACH, CLASSES = 3, 6, 4
SAMPLING = PointSampling(num_points=64)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    queries = GROUPS * EACH
    masks = torch.rand(5, 24, 20) > 0.6
    targets = [
        {"masks": masks, "labels": torch.tensor([0, 1, 1, 3, 2])},
        {"masks": masks[:0], "labels": torch.empty(0, dtype=torch.int64)},
    ]
    return torch.randn(2, queries, CLASSES + 1), torch.randn(2, queries, 12, 10), targets


def slices() -> list[slice]:
    return [slice(group * EACH, (group + 1) * EACH) for group in range(GROUPS)]


def test_each_group_has_the_matches_that_it_has_alone(batch: Any, backend: str) -> None:
    classes, masks, targets = batch
    together = HungarianMatcher(groups=GROUPS, num_points=64, backend=backend)(classes, masks, targets, seed=3)
    alone = HungarianMatcher(num_points=64, backend=backend)
    assert together.layer_sizes == (GROUPS * 5,)
    assert together.counts == (GROUPS * 5, 0)
    for image, (queries, found) in enumerate(together.pairs()):
        expected = [
            (query + part.start, target)
            for part in slices()
            for query, target in zip(
                *alone(classes[:, part], masks[:, part], targets, seed=3).pairs()[image], strict=True
            )
        ]
        assert list(zip(queries.tolist(), found.tolist(), strict=True)) == [(int(a), int(b)) for a, b in expected]


def test_losses_are_means_over_the_groups(batch: Any, backend: str) -> None:
    """Sums over the groups, divided by the instances of all of them; so with the gradients."""
    classes, masks, targets = batch
    classes, masks = classes.requires_grad_(), masks.requires_grad_()
    options: dict[str, Any] = {"sampling": SAMPLING, "backend": backend}
    together = MaskCriterion(CLASSES, groups=GROUPS, **options)(classes, masks, targets, seed=3)
    alone = [MaskCriterion(CLASSES, **options)(classes[:, each], masks[:, each], targets, seed=3) for each in slices()]
    for name in ("loss_class", "loss_mask", "loss_dice"):
        mean = torch.stack([getattr(out, name) for out in alone]).mean(0)
        assert torch.allclose(getattr(together, name), mean, rtol=1e-5)
    found = torch.autograd.grad(together.total, (classes, masks), retain_graph=True)
    expected = torch.autograd.grad(torch.stack([out.total for out in alone]).mean(), (classes, masks))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found, expected, strict=True))


def test_totals_count_targets_once_for_every_group(batch: Any) -> None:
    classes, masks, targets = batch
    criterion = MaskCriterion(CLASSES, groups=GROUPS, sampling=SAMPLING)
    plain = criterion(classes, masks, targets, seed=3)
    told = criterion(classes, masks, targets, seed=3, totals=StepTotals(instances=5, queries=2 * GROUPS * EACH))
    assert torch.allclose(plain.total, told.total)
    half = criterion(classes, masks, targets, seed=3, totals=StepTotals(instances=10, queries=4 * GROUPS * EACH))
    assert torch.allclose(plain.total, 2 * half.total)


def test_after_eval_there_is_one_group(batch: Any) -> None:
    classes, masks, targets = batch
    matcher = HungarianMatcher(groups=GROUPS, num_points=64).eval()
    assert len(matcher(classes, masks, targets)) == 5
    assert len(matcher.train()(classes, masks, targets)) == GROUPS * 5


def test_what_does_not_fit_is_rejected(batch: Any) -> None:
    classes, masks, targets = batch
    with pytest.raises(MaskLossError, match=r"multiple of groups(.|\n)*18 queries in 4 groups"):
        HungarianMatcher(groups=4)(classes, masks, targets)
    with pytest.raises(MaskLossError, match="groups"):
        HungarianMatcher(groups=0)
    with pytest.raises(MaskLossError, match="assignment must be one of"):
        HungarianMatcher(assignment="gpu")
    with pytest.raises(MaskLossError, match="the matcher has 1, the criterion 3"):
        MaskCriterion(CLASSES, groups=3, matcher=HungarianMatcher())
    with pytest.raises(MaskLossError, match="assignment='device' needs the GPU backend"):
        HungarianMatcher(assignment="device")(classes, masks, targets)
    criterion = MaskCriterion(CLASSES, groups=GROUPS, class_weights=[1, 1, 1, 2], sampling=SAMPLING)
    with pytest.raises(MaskLossError, match="totals cannot weigh classes"):
        criterion(classes, masks, targets, totals=StepTotals(5, 36, class_weight=6.0))
    few = classes[:, : 4 * GROUPS], masks[:, : 4 * GROUPS]
    assert MaskCriterion(CLASSES, groups=GROUPS, sampling=SAMPLING)(*few, targets).total.isfinite()
    with pytest.raises(MaskLossError, match="5 targets for 4 queries in each of 3 groups"):
        MaskCriterion(CLASSES, groups=GROUPS, sampling=SAMPLING)(*few, targets, totals=StepTotals(5, 24))


def test_groups_and_solver_are_shown() -> None:
    assert "groups=13, assignment='auto'" in repr(MaskCriterion(CLASSES, groups=13))
