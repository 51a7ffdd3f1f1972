"""The matcher's class cost for sigmoids, and costs that are passed in."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from maskloss import HungarianMatcher, MaskCriterion, MaskLossError, functional
from maskloss.step import Step
from maskloss.targets.collate import collate


def inputs(
    layers: int = 1, classes: int = 3
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    class_logits = [torch.randn(2, 5, classes, generator=generator) for _ in range(layers)]
    mask_logits = [torch.randn(2, 5, 8, 8, generator=generator) for _ in range(layers)]
    masks = [torch.rand(count, 20, 30, generator=generator) > 0.5 for count in (3, 1)]
    targets = [{"masks": m, "labels": torch.arange(len(m)) % 2} for m in masks]
    return class_logits, mask_logits, targets


def test_focal_class_cost_equals_its_formula() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64)
    cost = functional.focal_class_cost(logits, torch.tensor([2, 0]), alpha=0.3, gamma=1.5)
    for query in range(4):
        for column, label in enumerate((2, 0)):
            p = 1 / (1 + math.exp(-logits[query, label].item()))
            positive = 0.3 * (1 - p) ** 1.5 * -math.log(p + 1e-8)
            negative = 0.7 * p**1.5 * -math.log(1 - p + 1e-8)
            assert cost[query, column].item() == pytest.approx(positive - negative)


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_layers_are_computed_a_few_at_a_time(classification: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classes, masks, targets = inputs(layers=3)
    module = HungarianMatcher(num_points=64, classification=classification)
    given = torch.stack(classes), masks, Step.begin(collate(targets), masks, seed=3)
    together = module.costs(*given)
    for pairs in (1, 70):
        monkeypatch.setattr("maskloss.matcher._AT_A_TIME", pairs)
        torch.testing.assert_close(module.costs(*given), together)


def test_extra_costs_are_added(backend: str) -> None:
    class_logits, mask_logits, targets = inputs(layers=2)
    wanted = [[(0, 4), (1, 3), (2, 2)], [(0, 0)]]
    extra = []
    for pairs in wanted:
        cost = torch.full((2, 5, len(pairs)), 100.0)
        for target, query in pairs:
            cost[0, query, target] = cost[1, (query + 1) % 5, target] = 0
        extra.append(cost)
    alone: dict[str, Any] = {"class_weight": 0, "mask_weight": 0, "dice_weight": 0}
    for weights in ({}, alone):
        matcher = HungarianMatcher(num_points=64, backend=backend, **weights)
        matches = matcher(class_logits, mask_logits, targets, extra_costs=extra)
        for layer in (0, 1):
            found = [sorted(zip(t.tolist(), q.tolist(), strict=True)) for q, t in matches.pairs(layer)]
            assert found == [[(t, (q + layer) % 5) for t, q in pairs] for pairs in wanted]


def test_costs_of_one_layer_need_no_layer_dimension() -> None:
    class_logits, mask_logits, targets = inputs()
    cost = torch.full((5, 3), 100.0)
    cost[[4, 3, 2], [0, 1, 2]] = 0
    matches = HungarianMatcher(num_points=64)(class_logits, mask_logits, targets, extra_costs=[cost, torch.zeros(5, 1)])
    assert matches.pairs()[0][0].tolist() == [2, 3, 4]


def test_sigmoid_classes_have_no_no_object(backend: str) -> None:
    class_logits, mask_logits, targets = inputs(classes=2)
    with torch.no_grad():
        class_logits[0][:] = -20
        class_logits[0][0, [1, 2, 4], [0, 1, 0]] = class_logits[0][1, 3, 0] = 20
    matcher = HungarianMatcher(class_weight=1000.0, num_points=64, classification="focal", backend=backend)
    pairs = matcher(class_logits, mask_logits, targets).pairs()
    assert sorted(pairs[0][0].tolist()) == [1, 2, 4]
    assert pairs[1][0].tolist() == [3]
    # One class is enough, since none of them is "no object".
    one = [target | {"labels": torch.zeros_like(target["labels"])} for target in targets]
    assert len(matcher([class_logits[0][..., :1]], mask_logits, one)) == 4


ERRORS = {
    "classification must be one of softmax, focal": lambda *_: HungarianMatcher(classification="margin"),
    "matcher and criterion must have the same classification": lambda *_: MaskCriterion(
        2, matcher=HungarianMatcher(classification="focal")
    ),
    "extra_costs must have one entry per image": lambda *given: HungarianMatcher()(*given, extra_costs=[]),
    "extra_costs must be [Q, T] for each image": lambda *given: HungarianMatcher()(
        *given, extra_costs=[torch.zeros(5, 3), torch.zeros(5, 2)]
    ),
    "labels must lie in [0, 1)": lambda classes, masks, targets: HungarianMatcher(classification="focal")(
        [classes[0][..., :1]], masks, targets
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_is_wrong(message: str) -> None:
    with pytest.raises(MaskLossError, match=re.escape(message)):
        ERRORS[message](*inputs())


def test_candidates_are_not_counted_where_none_are_drawn() -> None:
    """Stratified points are 2^20 at most, and so are the candidates of a loss, three for each point."""
    assert HungarianMatcher(num_points=1 << 20, layout="stratified").num_points == 1 << 20
