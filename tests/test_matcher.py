"""The Hungarian matching: costs as in the formula, the cheapest matches of all, non-finite pairs last."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.testing import assert_close

from maskloss import (
    HungarianMatcher,
    functional,
)
from maskloss._abi import TARGET, Draw
from maskloss.ops.reference.sampling import match_points
from support import oracle
from support.steps import CLASSES, COUNTS, QUERIES, costs, criterion, entries, gradients, predictions


def cheapest(cost: Tensor) -> float:
    """The lowest cost of all assignments of `[Q, T]`, by trying every one."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.T
    queries, targets = cost.shape
    columns = torch.arange(targets)
    return min(
        (float(cost[list(rows), columns].sum()) for rows in itertools.permutations(range(queries), targets)),
        default=0.0,
    )


@pytest.mark.parametrize("counts", [(3, 0, 7), (5, 1, 4), (0, 0, 2)])
def test_matches_are_the_cheapest_of_all(backend: str, counts: tuple[int, ...]) -> None:
    targets, (classes, masks) = entries(counts), predictions()
    matcher = HungarianMatcher(num_points=40, backend=backend)
    matches = matcher(classes, masks, targets, seed=6)
    cost = costs(matcher, classes, masks, targets, 6).double()
    for layer, image in itertools.product(range(2), range(len(counts))):
        queries, numbers = matches.pairs(layer)[image]
        assert len(queries) == min(QUERIES, counts[image])
        assert len(set(queries.tolist())) == len(set(numbers.tolist())) == len(queries)
        found = float(cost[layer, image, queries, numbers].sum())
        assert found == pytest.approx(cheapest(cost[layer, image, :, : counts[image]]), rel=1e-6, abs=1e-6)


def test_classes_of_the_queries(backend: str) -> None:
    """Each matched query should have its target's class, the others that after the last one."""
    targets, (classes, masks) = entries(), predictions()
    matches = HungarianMatcher(num_points=40, backend=backend)(classes, masks, targets, seed=6)
    wanted = torch.full((2, len(COUNTS), QUERIES), CLASSES)
    for layer in range(2):
        for image, (queries, numbers) in enumerate(matches.pairs(layer)):
            wanted[layer, image, queries] = targets[image]["labels"][numbers]
    assert matches.classes is not None
    assert torch.equal(matches.classes, wanted)
    assert matches.to("meta").classes.device.type == "meta"


@pytest.mark.parametrize("focal", [{}, {"focal_alpha": 0.3, "focal_gamma": 1.5}])
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_costs_are_the_formula_at_shared_points(backend: str, focal: dict[str, float], padding_mode: str) -> None:
    targets, (classes, masks) = entries(), predictions()
    options = {"padding_mode": padding_mode, **focal}
    matcher = HungarianMatcher(
        class_weight=1.5, mask_weight=4, dice_weight=3, num_points=50, backend=backend, **options
    )
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(len(targets), 1)
    points = match_points(windows, Draw(torch.arange(len(targets)), torch.tensor(8), 50))
    matches = matcher(classes, masks, targets, seed=8)
    cost = costs(matcher, classes, masks, targets, 8).double()
    for layer, image in itertools.product(range(2), (0, 2)):
        count, size = COUNTS[image], (len(targets[image]["masks"]), -1, -1)
        z = oracle.read(masks[layer][image].detach(), points[image].expand(QUERIES, -1, -1), padding_mode=padding_mode)
        t = oracle.read(targets[image]["masks"], points[image].expand(*size), padding_mode=padding_mode)
        z, t = z[:, None], t[None].expand(QUERIES, -1, -1)
        s = z.sigmoid()
        ce = oracle.cross_entropy(z.expand_as(t), torch.ones_like(t), *(focal.values() or (None, None)))
        off = oracle.cross_entropy(z.expand_as(t), torch.zeros_like(t), *(focal.values() or (None, None)))
        expected = 4 * (ce * t + off * (1 - t)).mean(-1)
        expected += 3 * (1 - (2 * (s * t).sum(-1) + 1) / (s.sum(-1) + t.sum(-1) + 1))
        expected += 1.5 * functional.class_cost(classes[layer][image].detach().double(), targets[image]["labels"])
        assert_close(cost[layer, image, :, :count], expected, rtol=1e-5, atol=1e-5)
        queries, numbers = linear_sum_assignment(expected)
        found = matches.pairs(layer)[image]
        assert found[0].tolist() == queries.tolist()
        assert found[1].tolist() == numbers.tolist()


def test_given_matcher_is_used(backend: str) -> None:
    targets, (classes, masks) = entries(), predictions()
    by_class = HungarianMatcher(class_weight=1, mask_weight=0, dice_weight=0, num_points=1, backend=backend)
    module = criterion(backend, matcher=by_class)
    assert module.matcher is by_class
    out = module(classes, masks, targets, seed=1)
    for layer in range(2):
        cost = functional.class_cost(classes[layer][2].detach(), targets[2]["labels"])
        queries, numbers = out.matches.pairs(layer)[2]
        assert float(cost[queries, numbers].sum()) == pytest.approx(cheapest(cost), rel=1e-6)


# ---------------------------------------------------------------------------------------------------- non-finite logits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_mask_logits(backend: str, value: float) -> None:
    """The loss shows them and the assignment does not fail; the other images are matched as ever."""
    targets, (classes, masks) = entries((3, 4, 6)), predictions()
    module = criterion(backend)
    clean = module(classes, masks, targets, seed=5)
    broken = [layer.detach().clone().requires_grad_() for layer in masks]
    with torch.no_grad():
        broken[1][0] = value
    out = module(classes, broken, targets, seed=5)
    assert not out.total.isfinite()
    assert out.loss_mask[0].isfinite()
    assert not out.loss_mask[1].isfinite()
    for layer, image in itertools.product(range(2), range(3)):
        left, right = out.matches.pairs(layer)[image], clean.matches.pairs(layer)[image]
        if (layer, image) != (1, 0):
            assert torch.equal(left[0], right[0])
            assert torch.equal(left[1], right[1])
        assert sorted(left[1].tolist()) == sorted(right[1].tolist())
    grads = gradients(out, broken)
    assert not bool(grads[1][0].isfinite().all())
    assert bool(grads[0].isfinite().all())
    assert bool(grads[1][1:].isfinite().all())


def test_a_broken_query_is_matched_last(backend: str) -> None:
    targets, (classes, masks) = entries((3, 5, 0)), predictions()
    with torch.no_grad():
        for logits in masks:
            logits[:, 2] = float("nan")
    out = criterion(backend)(classes, masks, targets, seed=5)
    for layer in range(2):
        pairs = out.matches.pairs(layer)
        assert 2 not in pairs[0][0].tolist()
        assert sorted(pairs[1][0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_class_logits(backend: str, value: float) -> None:
    targets, (classes, masks) = entries((3, 4, 6)), predictions()
    with torch.no_grad():
        classes[0][1] = value
    out = criterion(backend)(classes, masks, targets, seed=5)
    assert not out.total.isfinite()
    assert out.matches.layer_sizes == (12, 12)
    assert bool(torch.stack([out.loss_class[1], *out.loss_mask]).isfinite().all())


def test_a_target_of_an_unknown_class_costs_its_mask_alone(backend: str) -> None:
    """One query and two targets: it lies on the second, and has no probability for the class of the first."""
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4], masks[1, 4:] = True, True
    logits, classes = torch.where(masks[1], 9.0, -9.0)[None, None], torch.tensor([[[-100.0, 0.0, 0.0]]])
    matcher = HungarianMatcher(class_weight=1000.0, ignore_label=255, num_points=64, backend=backend)
    matches = matcher(classes, logits, [{"masks": masks, "labels": torch.tensor([0, 255])}], seed=1)
    assert matches.index[:, TARGET].tolist() == [1]
