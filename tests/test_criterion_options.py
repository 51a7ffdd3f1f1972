"""What `MaskCriterion` offers beyond the formulas of Mask2Former: kinds of classes, weights, given matches, costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.testing import assert_close

from maskloss import (
    CriterionOutput,
    HungarianMatcher,
    MaskCriterion,
    MaskLoss,
    MaskTargets,
    Matches,
    StepTotals,
    step_totals,
)
from maskloss.errors import MaskLossError
from maskloss.integrations import detr, maskdino
from support.steps import CLASSES, FEW, QUERIES, criterion, entries, gradients, predictions

WEIGHTS = [0.5, 3.0, 0.0]
FITTING = (3, 0, 4)


def wanted(out: CriterionOutput, targets: list[dict[str, Any]], layer: int) -> Tensor:
    """The class of each query `[B, Q]`, from the pairs."""
    classes = torch.full((len(targets), QUERIES), CLASSES)
    for image, (queries, numbers) in enumerate(out.matches.pairs(layer)):
        classes[image, queries] = targets[image]["labels"][numbers]
    return classes


# ------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_focal_classes_are_the_formula(backend: str, class_weights: list[float] | None) -> None:
    """The sum over queries and classes of the sigmoid focal loss, by the number of instances; and its gradient."""
    targets, (classes, masks) = entries(), predictions()
    classes = [layer.detach()[..., :CLASSES].clone().requires_grad_() for layer in classes]
    out = criterion(backend, classification="focal", class_weights=class_weights)(classes, masks, targets, seed=1)
    for layer, logits in enumerate(classes):
        z = logits.detach().double().requires_grad_()
        hot = one_hot(wanted(out, targets, layer), CLASSES + 1)[..., :-1].double()
        p = z.sigmoid()
        miss = torch.where(hot > 0, 1 - p, p)
        balance = torch.where(hot > 0, 0.25, 0.75) * torch.tensor(class_weights or [1.0] * CLASSES)
        expected = (balance * miss**2 * binary_cross_entropy_with_logits(z, hot, reduction="none")).sum() / (3 + 5)
        assert_close(out.loss_class[layer].double(), expected.detach(), rtol=1e-5, atol=1e-6)
        [grad] = torch.autograd.grad(out.loss_class[layer], logits, retain_graph=True)
        assert_close(grad.double(), *torch.autograd.grad(expected, z), rtol=1e-4, atol=1e-6)


def test_focal_classes_match_by_their_own_cost() -> None:
    """The default matcher classifies as the criterion does; without masks' weight it decides alone."""
    classes = torch.full((1, 3, 2), -4.0)
    classes[0, 2, 1] = 4.0
    masks = torch.zeros(1, 3, 4, 4)
    target = [{"masks": torch.ones(1, 4, 4, dtype=torch.bool), "labels": torch.tensor([1])}]
    module = MaskCriterion(2, classification="focal", sampling=FEW)
    assert module.matcher.classification == "focal"
    assert module(classes, masks, target, seed=0).matches.pairs() == [(torch.tensor([2]), torch.tensor([0]))]


@pytest.mark.parametrize("given", [WEIGHTS, tuple(WEIGHTS), torch.tensor(WEIGHTS), torch.tensor(WEIGHTS).double()])
def test_class_weights_are_those_of_cross_entropy(given: Any) -> None:
    """torch's own weighted mean over all queries of a layer, "no object" among the weights; and its gradient."""
    targets, (classes, masks) = entries(), predictions()
    out = criterion("reference", class_weights=given, no_object_weight=0.3)(classes, masks, targets, seed=1)
    for layer, logits in enumerate(classes):
        leaf = logits.detach().requires_grad_()
        weights = torch.tensor([*WEIGHTS, 0.3])
        expected = cross_entropy(leaf.flatten(0, 1), wanted(out, targets, layer).flatten(), weights)
        assert_close(out.loss_class[layer], expected.detach())
        [grad] = torch.autograd.grad(out.loss_class[layer], logits, retain_graph=True)
        assert_close(grad, *torch.autograd.grad(expected, leaf))


def test_class_weights_are_a_copy_and_stay_exact() -> None:
    targets, (classes, masks) = entries(), predictions()
    weights = torch.tensor([0.1, 0.7, 0.3])
    module = criterion("reference", class_weights=weights)
    before = module(classes, masks, targets, seed=1).loss_class
    weights.zero_()
    after = module.half()(classes, masks, targets, seed=1).loss_class
    assert torch.equal(before, after)
    assert "class_weights=[0.1, 0.7, 0.3]" in repr(module)


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_both_criteria_have_one_classification(classification: str) -> None:
    """`MaskCriterion` and the criterion with DETR's convention agree where they count alike."""
    targets, (classes, masks) = entries(FITTING), predictions()
    if classification == "focal":
        classes = [layer[..., :CLASSES] for layer in classes]
    own = criterion("reference", classification=classification)
    outputs = {"pred_logits": classes[0], "pred_masks": masks[0]}
    matches = own(classes[0], masks[0], targets, seed=0).matches.pairs()
    theirs = detr.SetCriterion(
        CLASSES, lambda *_: matches, {}, 0.1, ["labels"], FEW.num_points, classification=classification
    )
    found = theirs(outputs, targets)["loss_ce"]
    assert_close(found, own(classes[0], masks[0], targets, matches=matches).loss_class[0])


# ------------------------------------------------------------------------------------------------------- given matches

PAIRS = [([0, 3, 1], [2, 0, 1]), ([], []), ([4, 2], [0, 6])]


def as_tensors(pairs: Any) -> Any:
    return [tuple(torch.tensor(side, dtype=torch.int64) for side in pair) for pair in pairs]


@pytest.mark.parametrize("form", ["pairs", "lists", "Matches", "a list with one layer"])
def test_matches_of_one_layer_hold_for_all(form: str, backend: str) -> None:
    targets, (classes, masks) = entries(), predictions()
    pairs = as_tensors(PAIRS)
    matches = Matches.from_pairs(pairs, num_queries=QUERIES, num_targets=(3, 0, 7))
    given = {"pairs": pairs, "lists": PAIRS, "Matches": matches, "a list with one layer": [pairs]}[form]
    module = criterion(backend)
    out = module(classes, masks, targets, matches=given, seed=2)
    for layer in range(len(masks)):
        found = out.matches.pairs(layer)
        assert [tuple(map(Tensor.tolist, pair)) for pair in found] == [tuple(map(list, pair)) for pair in PAIRS]
    alone = MaskLoss(sampling=FEW, backend=backend)(masks[0], [each["masks"] for each in targets], pairs, seed=2)
    assert_close(out.loss_mask[0], alone.ce)
    assert_close(out.loss_dice[0], alone.dice)


def test_each_layer_can_have_matches_of_its_own(backend: str) -> None:
    """Layers with different numbers of pairs are each divided by their own."""
    targets, (classes, masks) = entries(), predictions()
    layers = [as_tensors(PAIRS), as_tensors([([1], [0]), ([], []), ([], [])])]
    module = criterion(backend)
    together = module(classes, masks, targets, matches=layers, seed=2)
    assert together.matches.layer_sizes == (5, 1)
    for layer in range(2):
        alone = module(classes[layer], masks[layer], targets, matches=layers[layer], seed=2)
        assert_close(together.loss_class[layer], alone.loss_class[0])
        if layer == 0:  # the points of others depend on the layer's number
            assert_close(together.loss_mask[layer], alone.loss_mask[0])
    first, last = (losses.sum() for losses in together.per_instance.ce.split([5, 1]))
    assert_close(together.loss_mask, torch.stack([first / 5, last]))


def test_matches_of_a_step_can_be_given_back(backend: str) -> None:
    targets, (classes, masks) = entries(), predictions()
    module = criterion(backend)
    out = module(classes, masks, targets, seed=2)
    again = module(classes, masks, targets, matches=out.matches, seed=2)
    assert_close(again.total, out.total)
    listed = module(classes, masks, targets, matches=[out.matches.pairs(layer) for layer in range(2)], seed=2)
    assert_close(listed.total, out.total)


def test_several_queries_may_share_a_target() -> None:
    targets, (classes, masks) = entries((1,)), predictions(1)
    out = criterion("reference")(classes, masks, targets, matches=[([0, 2], [0, 0])], seed=0)
    assert out.matches.layer_sizes == (2, 2)
    assert (out.loss_mask > 0).all()


def test_extra_costs_decide_the_matching(backend: str) -> None:
    targets, (classes, masks) = entries((2,)), predictions(1)
    costs = torch.zeros(2, QUERIES, 2)
    costs[:, 3, 0] = costs[:, 1, 1] = -1000.0
    out = criterion(backend)(classes, masks, targets, extra_costs=[costs], seed=0)
    assert all(out.matches.pairs(layer)[0][0].tolist() == [1, 3] for layer in range(2))
    assert all(out.matches.pairs(layer)[0][1].tolist() == [1, 0] for layer in range(2))


# --------------------------------------------------------------------------------------------------- instances' weights


def test_weights_of_instances_are_a_weighted_mean(backend: str) -> None:
    targets, (classes, masks) = entries(FITTING), predictions()
    weights = [torch.tensor([0.5, 2.0, 0.0]), torch.empty(0), torch.tensor([1.0, 1.5, 3.0, 0.25])]
    module = criterion(backend)
    plain = module(classes, masks, targets, seed=2)
    out = module(classes, masks, targets, instance_weights=weights, seed=2)
    assert torch.equal(out.loss_class, plain.loss_class)
    assert torch.equal(out.per_instance.ce, plain.per_instance.ce)
    _, image, _, target = plain.matches.index.unbind(1)
    w = torch.stack([weights[i][t] for i, t in zip(image.tolist(), target.tolist(), strict=True)]).view(2, -1)
    for mine, losses in ((out.loss_mask, plain.per_instance.ce), (out.loss_dice, plain.per_instance.dice)):
        assert_close(mine, (w * losses.view(2, -1)).sum(1) / w.sum(1))
    joined = module(classes, masks, targets, instance_weights=torch.cat(weights), seed=2)
    assert torch.equal(joined.total, out.total)


def test_an_instance_of_weight_two_counts_as_two(backend: str) -> None:
    """Of pairs with given points: twice the same pair, or once with weight 2."""
    logits, masks, points = torch.randn(2, 6, 6), torch.rand(2, 9, 9) > 0.5, torch.rand(2, 30, 2)
    loss = MaskLoss(backend=backend)
    double = torch.tensor([0, 1, 1])
    once = loss(logits, masks, points=points, instance_weights=torch.tensor([1.0, 2.0]))
    twice = loss(logits[double], masks[double], points=points[double])
    assert_close(once.total, twice.total)


@pytest.mark.parametrize("keep", [torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, 1.0])])
def test_nothing_comes_through_from_an_instance_of_weight_zero(backend: str, keep: Tensor) -> None:
    """Neither the NaN of its logits nor that of the loss, in the value or in the gradient; the others are exact."""
    logits = torch.randn(3, 6, 6)
    logits[1] = float("nan")
    logits.requires_grad_()
    masks = torch.rand(3, 9, 9) > 0.5
    loss = MaskLoss(sampling=FEW, backend=backend)
    out = loss(logits, masks, instance_weights=keep, seed=1)
    [grad] = torch.autograd.grad(out.total, logits)
    finite = torch.where(logits.detach().isnan(), torch.zeros(()), logits.detach()).requires_grad_()
    expected = loss(finite, masks, instance_weights=keep, seed=1)
    assert torch.equal(out.total, expected.total)
    assert torch.equal(grad, *torch.autograd.grad(expected.total, finite))
    assert not bool(grad[1].any())
    assert bool(grad[0].any())
    assert out.per_instance.ce[1].isnan(), "the terms of each instance are as they are"


def test_a_non_finite_logit_of_an_instance_that_counts_shows(backend: str) -> None:
    """The counterpart: with a weight, it is in the value and in the gradient."""
    logits = torch.full((2, 6, 6), float("nan"), requires_grad=True)
    weights = torch.tensor([0.5, 0.0])
    out = MaskLoss(sampling=FEW, backend=backend)(logits, torch.rand(2, 9, 9) > 0.5, instance_weights=weights)
    [grad] = torch.autograd.grad(out.total, logits)
    assert out.total.isnan()
    assert bool(grad[0].isnan().any())
    assert not bool(grad[1].any())


def test_all_weights_zero_is_an_exact_zero(backend: str) -> None:
    targets, (classes, masks) = entries((2,)), predictions(1)
    out = criterion(backend)(classes, masks, targets, instance_weights=[torch.zeros(2, dtype=torch.bool)], seed=0)
    assert not bool(out.loss_mask.any() | out.loss_dice.any())
    out.total.backward()
    assert all(not bool(layer.grad.any()) for layer in masks)


# --------------------------------------------------------------------------------------------------------- their totals


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_accumulation_with_weights_is_exact(classification: str) -> None:
    """Two micro-batches with the step's totals have the gradient of the whole batch."""
    targets, (classes, masks) = entries(FITTING), predictions()
    if classification == "focal":
        classes = [layer.detach()[..., :CLASSES].clone().requires_grad_() for layer in classes]
    weights = [torch.rand(len(each["labels"])) for each in targets]
    module = criterion("reference", classification=classification, class_weights=WEIGHTS)
    whole = module(classes, masks, targets, instance_weights=weights, seed=3)
    labels = [[each["labels"] for each in targets[part]] for part in (slice(0, 1), slice(1, 3))]
    softmax = {"labels": labels, "class_weights": WEIGHTS} if classification == "softmax" else {}
    totals = step_totals([[3], [0, 4]], QUERIES, instance_weights=[weights[:1], weights[1:]], **softmax)
    parts = [
        module(
            [layer[part] for layer in classes],
            [layer[part] for layer in masks],
            targets[part],
            instance_weights=weights[part],
            totals=totals,
            image_ids=list(range(3))[part],
            seed=3,
        )
        for part in (slice(0, 1), slice(1, 3))
    ]
    assert_close(sum(part.total for part in parts), whole.total)
    for found, expected in zip(
        torch.autograd.grad(sum(part.total for part in parts), [*classes, *masks]),
        gradients(whole, classes, masks),
        strict=True,
    ):
        assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_totals_of_tensors_are_checked_where_they_can_be_seen() -> None:
    targets, (classes, masks) = entries(FITTING), predictions()
    module = criterion("reference")
    for wrong in (torch.tensor(-1.0), torch.tensor(float("nan")), torch.tensor([1.0, 2.0]), torch.tensor(True)):
        with pytest.raises(MaskLossError, match=r"totals\.instances must be"):
            module(classes, masks, targets, totals=StepTotals(wrong, 15.0))
        with pytest.raises(MaskLossError, match="num_instances must be"):
            MaskLoss(sampling=FEW)(masks[0][0, :3], targets[0]["masks"], num_instances=wrong)
    fine = module(classes, masks, targets, totals=StepTotals(torch.tensor(7.0), torch.tensor(15)), seed=0)
    assert_close(fine.total, module(classes, masks, targets, seed=0).total)


# ------------------------------------------------------------------------------------------------------------- the dict


def test_the_weighted_dict_adds_up_to_the_total(backend: str) -> None:
    targets, (classes, masks) = entries(), predictions()
    weights = {"class_weight": 1.5, "mask_weight": 4.0, "dice_weight": 0.25}
    out = criterion(backend, **weights)(classes, masks, targets, seed=0)
    plain, weighted = out.as_dict(), out.as_dict(weighted=True)
    names = ["loss_class", "loss_mask", "loss_dice"]
    assert list(plain) == list(weighted) == [*names, *(f"{name}_0" for name in names)]
    assert_close(sum(weighted.values()), out.total, rtol=1e-6, atol=0)
    for name, value in plain.items():
        assert_close(weighted[name], weights[f"{name.split('_')[1]}_weight"] * value)


# ---------------------------------------------------------------------------------------------------------- they refuse


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("classification must be one of softmax, focal", {"classification": "sigmoid"}),
        ("classification must be one of softmax, focal", {"classification": None}),
        ("no_object_weight belongs to", {"classification": "focal", "no_object_weight": 0.2}),
        ("class_weights must be 3 finite numbers", {"class_weights": [1.0, 2.0]}),
        ("class_weights must be 3 finite numbers", {"class_weights": [1.0, 2.0, -1.0]}),
        ("class_weights must be 3 finite numbers", {"class_weights": torch.full((3,), float("nan"))}),
        ("class_weights must be 3 finite numbers", {"class_weights": "abc"}),
        ("class_weights must be 3 finite numbers", {"class_weights": torch.ones(3, dtype=torch.complex64)}),
        ("matcher must be a maskloss.HungarianMatcher", {"matcher": 3}),
        ("matcher must be a maskloss.HungarianMatcher", {"matcher": SimpleNamespace(rules=None)}),
        ("must have the same classification", {"matcher": HungarianMatcher(classification="focal")}),
        ("focal_gamma must be a finite number", {"focal_gamma": "2"}),
        ("focal_alpha must be a finite number in", {"focal_gamma": 2.0, "focal_alpha": True}),
        ("class_weight must be a finite number", {"class_weight": None}),
    ],
)
def test_options_that_are_refused(text: str, options: dict[str, Any]) -> None:
    with pytest.raises(MaskLossError, match=text):
        MaskCriterion(CLASSES, **options)


def test_a_criterion_takes_no_matcher_whose_forward_it_would_pass_over() -> None:
    class Own(HungarianMatcher):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Both(Own):
        def match(self, *args: Any) -> Any:
            return super().match(*args)

    with pytest.raises(MaskLossError, match=r"Own overrides forward and not match(.|\n)*override match or costs"):
        MaskCriterion(CLASSES, matcher=Own())
    assert isinstance(MaskCriterion(CLASSES, matcher=Both()).matcher, Both)


SHORT = [as_tensors(PAIRS)] * 3


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("matches or extra_costs, not both", {"matches": PAIRS, "extra_costs": []}),
        ("matches of 3 layers for 2 layers", {"matches": SHORT}),
        ("matches for every image", {"matches": PAIRS[:2]}),
        ("a query can have one target only", {"matches": [([0, 0], [1, 2]), ([], []), ([], [])]}),
        (r"must lie in \[0, 5\)", {"matches": [([9], [0]), ([], []), ([], [])]}),
        ("must be those of these predictions", {"matches": Matches(torch.empty(0, 4).long(), (0,), 9, (3, 0, 7))}),
        ("matches must be Matches", {"matches": 3}),
        ("extra_costs must have one entry per image", {"extra_costs": 3}),
        ("extra_costs must have one entry per image", {"extra_costs": [torch.zeros(QUERIES, 3)]}),
        ("float tensor .T. for each image", {"instance_weights": [torch.ones(3)]}),
        ("instance_weights must be bool or float", {"instance_weights": [torch.ones(n).long() for n in (3, 0, 7)]}),
        ("bool or float tensor .N.", {"instance_weights": torch.ones(9)}),
        ("finite and at least 0", {"instance_weights": torch.full((10,), -1.0)}),
        ("finite and at least 0", {"instance_weights": [torch.full((n,), float("inf")) for n in (3, 0, 7)]}),
        ("totals.instance_weight belongs to", {"totals": StepTotals(1.0, 1.0), "instance_weights": torch.ones(10)}),
        ("totals.class_weight belongs to", {"totals": StepTotals(1.0, 1.0, class_weight=1.0)}),
        ("totals.queries must be", {"totals": StepTotals(1.0, "2")}),
        (
            "the same number of matches in every layer",
            {"totals": StepTotals(1.0, 1.0), "matches": [PAIRS, [([], [])] * 3]},
        ),
    ],
)
def test_calls_that_are_refused(text: str, options: dict[str, Any]) -> None:
    targets, (classes, masks) = entries(), predictions()
    with pytest.raises(MaskLossError, match=text):
        criterion("reference")(classes, masks, targets, **options)


def test_labels_are_checked_with_given_matches() -> None:
    _, (classes, masks) = entries(), predictions(1)
    targets = [{"masks": torch.ones(1, 5, 5), "labels": torch.tensor([CLASSES])}]
    with pytest.raises(MaskLossError, match=r"labels must lie in \[0, 3\)"):
        criterion("reference")(classes, masks, targets, matches=[([0], [0])])


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("labels need class_weights", {"class_weights": WEIGHTS}),
        ("more targets than queries", {"instance_weights": [[torch.ones(9)]]}),
    ],
)
def test_totals_that_cannot_be_known(text: str, options: dict[str, Any]) -> None:
    with pytest.raises(MaskLossError, match=text):
        step_totals([[9]], QUERIES, **options)
    with pytest.raises(MaskLossError, match="for each image of each micro-batch"):
        step_totals([[2]], QUERIES, instance_weights=[[torch.ones(3)]])


def test_the_dict_convention_keeps_its_own_names() -> None:
    """MaskDINO's criterion has the classes of `MaskCriterion(classification="focal")`, under its own names."""
    targets, (classes, masks) = entries(FITTING), predictions()
    matcher = maskdino.HungarianMatcher(num_points=20)
    module = maskdino.SetCriterion(CLASSES, matcher, {}, 0.1, ["labels"], 20)
    found = module({"pred_logits": classes[0][..., :CLASSES], "pred_masks": masks[0]}, targets)
    assert list(found) == ["loss_ce"]


def test_soft_masks_and_their_binary_form_agree() -> None:
    """What the documentation advises for float masks on a device: `soft=False` packs them, the loss is the same."""
    targets, (classes, masks) = entries(FITTING), predictions()
    floats = [{**each, "masks": MaskTargets.from_masks(each["masks"].float(), soft=True)} for each in targets]
    packed = [{**each, "masks": MaskTargets.from_masks(each["masks"].float(), soft=False)} for each in targets]
    module = criterion("reference")
    assert packed[0]["masks"].encoding == "bits"
    assert_close(
        module(classes, masks, floats, seed=0).total, module(classes, masks, packed, seed=0).total, rtol=1e-6, atol=0
    )
