"""Images that are annotated partly: regions and classes that nobody annotated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskloss import MaskCriterion, MaskFactors, MaskLossError, MaskTargets, PointSampling, StepTotals, step
from maskloss.graphs import pad_targets
from maskloss.integrations import detr, maskdino
from maskloss.integrations.layerwise import LayerMasks
from support import tiny
from support.steps import CLASSES, QUERIES, criterion, entries, predictions

SIZE = (20, 26)


def left() -> Tensor:
    region = torch.zeros(SIZE, dtype=torch.bool)
    region[:, :13] = True
    return region


def masks_at(*places: str) -> Tensor:
    """Logits `[1, Q, 20, 26]` of queries that predict the left or the right half, or all of the image."""
    region = left()
    where = {"left": region, "right": ~region, "all": region | True}
    return torch.stack([where[place] * 40.0 - 20 for place in places])[None]


def nothing_matched() -> dict[str, Any]:
    return {"masks": torch.zeros(0, *SIZE, dtype=torch.bool), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize("form", ["dense", "factors", "half"])
@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_less_is_taught_where_nobody_annotated(backend: str, classification: str, form: str) -> None:
    """By the share of the mask: nothing in the region, all outside, half of it for a mask that lies in both."""
    classes = torch.randn(1, 3, CLASSES + (classification == "softmax"), requires_grad=True)
    masks: Any = masks_at("left", "right", "all")
    if form == "factors":
        masks = MaskFactors(torch.eye(3)[None], masks)
    elif form == "half":
        masks = masks.half()
    module = criterion(backend, classification=classification, sampling=PointSampling(4096))
    plain = module(classes, masks, [nothing_matched()], seed=1)
    whole = torch.autograd.grad(plain.loss_class.sum(), classes)[0]
    out = module(classes, masks, [nothing_matched()], seed=1, unlabeled=[left()])
    grad = torch.autograd.grad(out.loss_class.sum(), classes)[0]
    # The mean is over what is taught: a softmax divides by 1.5 of 3 queries.
    share = torch.tensor([0.0, 1.0, 0.5]) * (2 if classification == "softmax" else 1)
    torch.testing.assert_close(grad, whole * share[:, None], rtol=0.05, atol=2e-3)
    assert torch.equal(out.loss_mask, plain.loss_mask)


def test_a_query_with_a_target_is_taught_all_the_same(backend: str) -> None:
    classes, masks = predictions(2, sizes=[(9, 12)] * 2)
    targets = entries((3, 2))
    everywhere = [torch.ones(SIZE, dtype=torch.bool)] * 2
    out = criterion(backend)(classes, masks, targets, seed=1, unlabeled=everywhere)
    for layer in range(2):
        found = [
            F.cross_entropy(classes[layer][i][q], targets[i]["labels"][t], reduction="sum")
            for i, (q, t) in enumerate(out.matches.pairs(layer))
        ]
        torch.testing.assert_close(out.loss_class[layer], sum(found) / 5)


def test_regions_lie_in_the_frames_and_arrays_are_taken(backend: str) -> None:
    """Without a region, and with one where there is nothing, nothing changes; a canvas moves nothing."""
    classes, masks = predictions(2, sizes=[(9, 12)])
    targets, module = entries((3, 2)), criterion(backend)
    plain = module(classes, masks, targets, seed=1)
    for nothing in ([None, None], [np.zeros(SIZE, dtype=bool), None]):
        out = module(classes, masks, targets, seed=1, unlabeled=nothing)
        torch.testing.assert_close(out.loss_class, plain.loss_class)
    with_canvas = [e | {"masks": MaskTargets.from_masks(e["masks"], canvas=(40, 52))} for e in targets]
    padded = torch.zeros(40, 52, dtype=torch.bool)
    padded[: SIZE[0], : SIZE[1]] = True
    one = module(classes, masks, with_canvas, seed=1, unlabeled=[padded, None]).loss_class
    assert not torch.equal(one, module(classes, masks, with_canvas, seed=1).loss_class)
    for entry in (with_canvas, targets):
        with pytest.raises(MaskLossError, match="must be of the size of the masks, or of their canvas"):
            module(classes, masks, entry, seed=1, unlabeled=[torch.ones(10, 13, dtype=torch.uint8), None])


@pytest.mark.parametrize("nothing", [None, torch.zeros(0), "boxes"])
def test_an_image_without_masks_has_a_region_of_its_own_size(backend: str, nothing: Any) -> None:
    classes, masks = torch.randn(1, 3, CLASSES + 1), masks_at("left", "right", "all")
    module = criterion(backend)
    entry: dict[str, Any] = nothing_matched() | {"masks": nothing}
    expected = nothing_matched()
    if nothing == "boxes":
        label = torch.tensor([1])
        entry = {"labels": label, "boxes": torch.rand(1, 4)}
        expected = {"labels": label, "masks": torch.zeros(1, *SIZE, dtype=torch.bool), "has_mask": False}
    found = module(classes, masks, [entry], seed=1, unlabeled=[left()]).loss_class
    torch.testing.assert_close(found, module(classes, masks, [expected], seed=1, unlabeled=[left()]).loss_class)
    assert not torch.equal(found, module(classes, masks, [entry], seed=1).loss_class)


def test_classes_that_nobody_annotated_are_no_errors_of_a_softmax() -> None:
    """A query without a target learns to be no object, or of such a class."""
    classes, masks = predictions(2, sizes=[(9, 12)])
    targets, listed = entries((1, 2)), [[0, 2], None]
    out = criterion("reference")(classes, masks, targets, seed=1, annotated_classes=listed)
    [logits], total, weight = classes, torch.zeros(()), 0.0
    for image, (queries, rows) in enumerate(out.matches.pairs()):
        matched = dict(zip(queries.tolist(), targets[image]["labels"][rows].tolist(), strict=True))
        for query in range(QUERIES):
            p = logits[image, query].softmax(-1)
            if query in matched:
                total, weight = total - p[matched[query]].log(), weight + 1.0
            else:
                allowed = p[3] + (p[1] if image == 0 else 0)
                total, weight = total - 0.1 * allowed.log(), weight + 0.1
    torch.testing.assert_close(out.loss_class[0], total / weight)
    everything = criterion("reference")(classes, masks, targets, seed=1, annotated_classes=[torch.arange(3), None])
    torch.testing.assert_close(
        everything.loss_class, criterion("reference")(classes, masks, targets, seed=1).loss_class
    )


def test_classes_that_nobody_annotated_are_left_out_of_a_focal_loss(backend: str) -> None:
    classes, masks = predictions(1, sizes=[(9, 12)])
    classes = [classes[0][..., :CLASSES].detach().requires_grad_()]
    targets = entries((2,))
    targets[0]["labels"] = torch.tensor([1, 0])
    out = criterion(backend, classification="focal")(classes, masks, targets, seed=1, annotated_classes=[[0]])
    [grad] = torch.autograd.grad(out.loss_class[0], classes)
    [(queries, rows)] = out.matches.pairs()
    taught = torch.zeros(QUERIES, CLASSES, dtype=torch.bool)
    taught[:, 0] = True
    # A target's own class is known, whatever was annotated.
    taught[queries, targets[0]["labels"][rows]] = True
    assert torch.equal(grad[0] != 0, taught)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"unlabeled": left()}, "unlabeled must have one region for each image"),
        ({"unlabeled": []}, "unlabeled must have one region for each image"),
        ({"unlabeled": [left().float()]}, r"an unlabeled region must be bool \[H, W\]"),
        ({"unlabeled": [left()[None]]}, r"an unlabeled region must be bool \[H, W\]"),
        ({"unlabeled": [left()], "totals": StepTotals(1.0, 1.0)}, "give totals or unlabeled"),
        ({"annotated_classes": 3}, "annotated_classes must have one entry for each image"),
        ({"annotated_classes": [3]}, r"numbers of classes in \[0, 3\)"),
        ({"annotated_classes": [[3]]}, r"numbers of classes in \[0, 3\)"),
        ({"annotated_classes": [[0.5]]}, r"numbers of classes in \[0, 3\)"),
        ({"annotated_classes": [[True]]}, r"numbers of classes in \[0, 3\)"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], text: str) -> None:
    classes, masks = predictions(1, sizes=[(9, 12)])
    with pytest.raises(MaskLossError, match=text):
        criterion("reference")(classes, masks, entries((2,)), **options)


def partial_targets() -> list[dict[str, Any]]:
    """Of images of different sizes: one partly annotated everywhere, one in two classes."""
    targets = entries((3, 2))
    targets[1]["masks"] = targets[1]["masks"][:, :12, :20]
    return [targets[0] | {"unlabeled": left()}, targets[1] | {"annotated_classes": {0, 2}}]


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_targets_may_say_it_themselves(classification: str) -> None:
    """In the criterion and in the drop-ins, which divide by the same numbers on one rank."""
    classes, masks = predictions(2, sizes=[(9, 12), (16, 16)])
    if classification == "focal":
        classes = [each[..., :CLASSES] for each in classes]
    targets = partial_targets()
    canvas = [{**each, "masks": MaskTargets.from_masks(each["masks"], canvas=SIZE)} for each in targets]
    plain = [{name: each[name] for name in ("masks", "labels")} for each in canvas]
    module = criterion("reference", classification=classification)
    wanted = module(classes, masks, plain, seed=1, unlabeled=[left(), None], annotated_classes=[None, [0, 2]])
    found = module(classes, masks, canvas, seed=1)
    assert torch.equal(found.total, wanted.total)
    assert not torch.equal(found.loss_class, module(classes, masks, plain, seed=1).loss_class)
    package: Any = detr if classification == "softmax" else maskdino
    matcher = package.HungarianMatcher(2.0, 5.0, 5.0, module.matcher.num_points)
    drop_in = package.SetCriterion(CLASSES, matcher, {}, 0.1, ["labels"], 64)
    outputs = [{"pred_logits": c, "pred_masks": m} for c, m in zip(classes, masks, strict=True)]
    with step(seed=1):
        losses = drop_in(outputs[1] | {"aux_outputs": outputs[:1]}, targets)
    torch.testing.assert_close(torch.stack([losses["loss_ce_0"], losses["loss_ce"]]), found.loss_class)
    with pytest.raises(MaskLossError, match="give unlabeled in the targets or in the call"):
        module(classes, masks, canvas, unlabeled=[left(), None])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_region_may_be_as_large_as_the_canvas_of_smaller_masks(device: str) -> None:
    """On any device: the canvas of dense masks follows from their sizes, and a region of another size is an error."""
    [classes], [masks] = predictions(2, sizes=[(9, 12)])
    targets = [{name: entry[name].to(device) for name in ("masks", "labels")} for entry in partial_targets()]
    targets[1]["masks"] = targets[1]["masks"].bool()
    outputs = {"pred_logits": classes.to(device), "pred_masks": masks.to(device)}
    module = detr.SetCriterion(CLASSES, detr.HungarianMatcher(num_points=64), {}, 0.1, ["labels"], 64).to(device)
    for size in (SIZE, (12, 20)):
        targets[1]["unlabeled"] = torch.ones(size, dtype=torch.bool, device=device)
        assert module(outputs, targets)["loss_ce"].device.type == device
    targets[1]["unlabeled"] = torch.ones(13, 20, dtype=torch.bool, device=device)
    with pytest.raises(MaskLossError, match="must be of the size of the masks, or of their canvas"):
        module(outputs, targets)


def test_what_computes_no_classes_says_so() -> None:
    _, [masks] = predictions(2, sizes=[(9, 12)])
    pairs = [(torch.tensor([0]), torch.tensor([0]))] * 2
    with pytest.raises(MaskLossError, match="where maskloss computes the classification"):
        LayerMasks(sampling=PointSampling(16))({"pred_masks": masks}, partial_targets(), pairs, 2.0)
    with step(unlabeled=[left(), None]), pytest.raises(MaskLossError, match="where maskloss computes the classi"):
        LayerMasks(sampling=PointSampling(16))({"pred_masks": masks}, entries((3, 2)), pairs, 2.0)
    with pytest.raises(MaskLossError, match="where maskloss computes the classification"):
        pad_targets(partial_targets(), 4, data_size=4096)


def test_a_patched_model_is_told_by_the_step() -> None:
    transformers = pytest.importorskip("maskloss.integrations.transformers")
    model: Any = tiny.mask2former()
    [classes], [masks] = predictions(2, sizes=[(9, 12)])
    targets = partial_targets()
    given = masks, classes, [each["masks"] for each in targets], [each["labels"] for each in targets]
    costs, weight = model.criterion.matcher, model.config.no_object_weight
    matcher = detr.HungarianMatcher(costs.cost_class, costs.cost_mask, costs.cost_dice, costs.num_points)
    with transformers.patch(model, backend="reference"), step(seed=5):
        with step(unlabeled=[left(), None], annotated_classes=[None, [0, 2]]):
            terms = model.criterion(*given)
        whole = model.criterion(*given)
        module = detr.SetCriterion(CLASSES, matcher, {}, weight, ["labels"], 64)
        losses = module({"pred_logits": classes, "pred_masks": masks}, targets)
    torch.testing.assert_close(terms["loss_cross_entropy"], losses["loss_ce"])
    assert not torch.equal(terms["loss_cross_entropy"], whole["loss_cross_entropy"])
    assert torch.equal(terms["loss_mask"], whole["loss_mask"])


def test_clips_have_no_regions() -> None:
    classes, masks = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, 8, 8)
    targets = [{"masks": torch.ones(1, 3, 8, 8), "labels": torch.tensor([0])}]
    with pytest.raises(MaskLossError, match="unlabeled regions belong to images"):
        MaskCriterion(2)(classes, masks, targets, unlabeled=[left()])


def test_nothing_is_waited_for() -> None:
    """On the meta device, where a look at a value is an error."""
    meta = torch.device("meta")
    classes = torch.empty(2, QUERIES, CLASSES + 1, device=meta, requires_grad=True)
    masks = torch.empty(2, QUERIES, 8, 8, device=meta, requires_grad=True)
    targets = {
        "masks": MaskTargets.from_masks([e["masks"] for e in entries((2, 1))]).to(meta),
        "labels": [torch.empty(2, dtype=torch.int64, device=meta), torch.empty(1, dtype=torch.int64, device=meta)],
    }
    out = MaskCriterion(CLASSES)(
        classes, masks, targets, seed=0, unlabeled=[left().to(meta), None], annotated_classes=[[0], None]
    )
    torch.autograd.grad(out.total, [classes, masks])
