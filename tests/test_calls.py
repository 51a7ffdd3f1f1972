"""Calls that people make: void pixels, unknown classes, targets without masks, shapes and types as they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskloss import (
    HungarianMatcher,
    MaskCriterion,
    MaskFactors,
    MaskLoss,
    MaskLossError,
    MaskTargets,
    PointSampling,
    StepTotals,
    find_instances,
    step,
    step_totals,
)
from maskloss.integrations import detr, maskdino
from maskloss.integrations.layerwise import LayerMasks
from maskloss.targets import dense, label_maps, mask_targets
from support import tiny
from support.steps import CLASSES, QUERIES, criterion, entries, gradients, predictions

FEW = PointSampling(num_points=64)
BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.2, 0.3]])


def one_image(count: int = 3) -> list[dict[str, Any]]:
    return [entry | {"boxes": BOXES[:count]} for entry in entries((count,))]


def layers(images: int = 1, depth: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    return predictions(images, sizes=[(9, 12), (16, 16)][:depth])


# ---------------------------------------------------------------------------------------------------------- void pixels


def void_masks() -> tuple[Tensor, Tensor]:
    """Masks of an image, and its void pixels, which are the same in all masks."""
    void = torch.zeros(20, 26, dtype=torch.bool)
    void[:, 15:] = True
    return torch.rand(3, 20, 26) > 0.5, void


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_void_pixels_weigh_nothing(backend: str, dtype: torch.dtype) -> None:
    masks, void = void_masks()
    given = masks.to(dtype).masked_fill(void, 255)
    expected = MaskTargets.from_masks(masks & ~void, ignore=void)
    targets = MaskTargets.from_masks(given, ignore_value=255)
    assert torch.equal(targets.dense(), masks & ~void)
    logits = torch.randn(3, 10, 13)
    found, wanted = (MaskLoss(backend=backend)(logits, each, seed=1) for each in (targets, expected))
    assert torch.equal(found.total, wanted.total)
    classes, queries = layers(depth=1)
    entry = {"labels": torch.tensor([0, 1, 2])}
    out = criterion(backend, ignore_value=255)(classes, queries, [entry | {"masks": given}], seed=2)
    assert torch.equal(out.total, criterion(backend)(classes, queries, [entry | {"masks": expected}], seed=2).total)


def test_regions_of_images_of_different_sizes_and_of_the_caller() -> None:
    images = [torch.zeros(2, 6, 8).long(), torch.ones(1, 9, 5).long(), torch.zeros(0, 4, 4).long()]
    images[0][0, :, 3], images[1][0, 2] = 255, 255
    together = MaskTargets.from_masks(images, ignore_value=255)
    apart = MaskTargets.cat([MaskTargets.from_masks(image, ignore_value=255) for image in images])
    assert torch.equal(together.ignore, apart.ignore)
    assert torch.equal(together.images, apart.images)
    own = torch.zeros(6, 8, dtype=torch.bool)
    own[5] = True
    both = MaskTargets.from_masks(images[0], ignore_value=255, ignore=own)
    union = MaskTargets.from_masks(torch.zeros(2, 6, 8).bool(), ignore=own | (images[0][0] == 255))
    assert torch.equal(both.ignore, union.ignore)


def test_void_pixels_of_a_label_map() -> None:
    labels = torch.tensor([[0, 7, 255], [7, 9, 255]], dtype=torch.uint8)
    targets = MaskTargets.from_label_map(labels, ignore_value=255)
    assert targets.num_targets == (2,)
    assert torch.equal(targets.dense(), torch.stack([labels == 7, labels == 9]))
    assert torch.equal(targets.ignore, MaskTargets.from_masks(labels[None] == 7, ignore=labels == 255).ignore)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_other_values_name_the_option(dtype: torch.dtype) -> None:
    masks = torch.tensor([[[0, 1, 200]]]).to(dtype)
    with pytest.raises(MaskLossError, match="ignore_value=255"):
        MaskTargets.from_masks(masks)
    with pytest.raises(MaskLossError, match="ignore_value=255"):
        MaskTargets.from_masks(masks.float())


def test_floats_that_nobody_has_looked_at_are_no_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, where a look would wait for it: a value beyond [0, 1] makes the loss NaN."""
    unseen(monkeypatch)
    masks = torch.ones(1, 8, 8)
    loss = MaskLoss(sampling=FEW, backend="reference")
    assert loss(torch.zeros(1, 8, 8), MaskTargets.from_masks(masks), seed=0).total.isfinite()
    targets = MaskTargets.from_masks(masks.masked_fill(torch.arange(8) > 3, 255))
    assert loss(torch.zeros(1, 8, 8), targets, seed=0).total.isnan()


def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: nobody looks at values."""
    for module in (dense, mask_targets, label_maps):
        monkeypatch.setattr(module, "on_host", lambda _: False, raising=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_what_is_packed_unseen_is_asserted(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the device, which nobody waits for; it can only be told by its message."""
    unseen(monkeypatch)
    masks = torch.tensor([[[0, 1, 255]]]).to(dtype)
    with pytest.raises(RuntimeError, match="ignore_value=255"):
        MaskTargets.from_masks(masks, soft=False)
    found = MaskTargets.from_masks(masks, soft=False, ignore_value=255)
    assert found.dense().tolist() == [[[False, True, False]]]
    assert MaskTargets.from_masks(masks.clamp(max=1), soft=False).dense().tolist() == [[[False, True, True]]]


@pytest.mark.parametrize("dtype", [torch.uint8, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_void_pixels_of_compiled_code(dtype: torch.dtype) -> None:
    masks, void = void_masks()
    given, logits = masks.to(dtype).masked_fill(void, 255), torch.zeros(3, 10, 13)
    loss = MaskLoss(sampling=FEW, backend="reference")

    def step(masks: Tensor, value: int | None) -> Tensor:
        return loss(logits, MaskTargets.from_masks(masks, ignore_value=value), seed=0).total

    compiled: Any = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(given, 255), step(given, 255))
    if dtype == torch.uint8:
        with pytest.raises(RuntimeError, match="ignore_value=255"):
            compiled(given, None)
    else:
        assert compiled(given, None).isnan()


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.uint8, -1), (torch.uint8, 300), (torch.int8, 255), (torch.bool, 255)]
)
def test_a_value_that_a_type_cannot_hold_is_nowhere(dtype: torch.dtype, value: int) -> None:
    """A comparison would wrap it around: 300 is 44 in eight bits, and -1 is 255."""
    masks = torch.tensor([[[0, 1, 1]]]).to(dtype)
    targets = MaskTargets.from_masks(masks, ignore_value=value)
    assert targets.dense().tolist() == [[[False, True, True]]]
    assert not targets.ignore.any()
    if dtype != torch.bool:
        wrapped = torch.full((1, 1, 3), value % 256 if dtype == torch.uint8 else -1).to(dtype)
        with pytest.raises(MaskLossError, match="ignore_value=255"):
            MaskTargets.from_masks(wrapped, ignore_value=value)
        assert not MaskTargets.from_label_map(wrapped[0], [0], ignore_value=value, allow_missing=True).ignore.any()


def test_packed_masks_must_know_their_void_pixels() -> None:
    classes, masks = layers(depth=1)
    entry = one_image()[0]
    module = criterion("reference", ignore_value=255)
    for packed in (MaskTargets.from_masks(entry["masks"]), MaskTargets.from_label_map(torch.ones(20, 26).long(), [1])):
        label = entry["labels"][: packed.num_masks]
        for targets in ([{"masks": packed, "labels": label}], {"masks": packed, "labels": [label]}):
            with pytest.raises(MaskLossError, match="packed already must have an ignore region"):
                module(classes, masks, targets)
    with pytest.raises(MaskLossError, match="packed already must have an ignore region"):
        set_criterion(ignore_value=255)(outputs_of(), [entry | {"masks": MaskTargets.from_masks(entry["masks"])}])
    known = entry | {"masks": MaskTargets.from_masks(entry["masks"].byte(), ignore_value=255)}
    assert torch.equal(module(classes, masks, [known], seed=1).total, module(classes, masks, [entry], seed=1).total)


@pytest.mark.parametrize("make", [HungarianMatcher, detr.HungarianMatcher, maskdino.HungarianMatcher])
def test_a_matcher_alone_takes_what_annotations_lack(make: Any) -> None:
    """What lies below void pixels or a missing mask does not matter, and neither does an unknown label."""
    masks, void = void_masks()
    masks[2] = False
    classes, queries = layers(depth=1)
    classes = [classes[0][..., : CLASSES + (make is not maskdino.HungarianMatcher)]]

    def pairs(fill: int, label: int, value: int) -> list[Any]:
        entry = {"masks": masks.long().masked_fill(void, value), "labels": torch.tensor([0, label, 2])}
        matcher = make(num_points=64, ignore_value=value, ignore_label=label, drop_empty=bool(fill))
        torch.manual_seed(1)
        if make is HungarianMatcher:
            return list(matcher(classes, queries, [entry]).pairs())
        return list(matcher({"pred_logits": classes[0], "pred_masks": queries[0]}, [entry]))

    first, second, third = pairs(1, 255, 255), pairs(1, -1, 7), pairs(0, -1, 7)
    assert all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert len(third[0][0]) == 3
    with pytest.raises(MaskLossError, match="drop_empty must be True or False"):
        make(drop_empty=1)
    with pytest.raises(MaskLossError, match="ignore_label"):
        make(ignore_labels=1)


def test_void_pixels_weigh_nothing_in_the_matching(backend: str) -> None:
    masks, void = void_masks()
    classes, queries = layers(depth=1)
    labels, matcher = torch.tensor([0, 1, 2]), HungarianMatcher(num_points=64, backend=backend, ignore_value=255)
    given = [{"masks": masks.byte().masked_fill(void, 255), "labels": labels}]
    expected = [{"masks": MaskTargets.from_masks(masks, ignore=void), "labels": labels}]
    found, wanted = (matcher(classes, queries, each, seed=3) for each in (given, expected))
    assert torch.equal(found.index, wanted.index)


def test_matcher_and_criterion_agree() -> None:
    matcher = HungarianMatcher(ignore_label=255, drop_empty=True)
    MaskCriterion(2, matcher=matcher, ignore_label=255, drop_empty=True)
    with pytest.raises(MaskLossError, match="matcher and criterion must have the same ignore_label"):
        MaskCriterion(2, matcher=matcher, drop_empty=True)
    with pytest.raises(MaskLossError, match="matcher and criterion must have the same drop_empty"):
        detr.SetCriterion(2, detr.HungarianMatcher(drop_empty=True), {}, 0.1, ["labels"])


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("classification", ["softmax", "focal"])
@pytest.mark.parametrize("unknown", [255, -1])
def test_a_target_of_an_unknown_class(backend: str, classification: str, unknown: int) -> None:
    """It is matched by its mask, which is learned; its query has no classification."""
    classes, masks = layers()
    if classification == "focal":
        classes = [layer[..., :-1].detach().requires_grad_() for layer in classes]
    targets = one_image()
    hidden = [targets[0] | {"labels": targets[0]["labels"].clone()}]
    hidden[0]["labels"][1] = unknown
    options: dict[str, Any] = {"classification": classification, "ignore_label": unknown}
    out = criterion(backend, **options)(classes, masks, hidden, seed=1)
    by_class = torch.autograd.grad(out.loss_class.sum(), classes, retain_graph=True)
    of_masks = gradients(out, masks)
    for layer, (pair,) in enumerate(out.matches.pairs(layer) for layer in range(2)):
        query = pair[0][pair[1] == 1]
        assert not by_class[layer][0, query].any()
        assert by_class[layer][0].any()
        assert of_masks[layer][0, query].any()
    # Whatever its label would have been, it plays no part.
    for label in range(CLASSES):
        hidden[0]["labels"][1] = label
        shown = criterion(backend, classification=classification)(classes, masks, hidden, seed=1, matches=out.matches)
        assert torch.equal(shown.loss_mask, out.loss_mask)
        assert not torch.equal(shown.loss_class, out.loss_class)
    if classification == "softmax":
        layer, query = 0, out.matches.pairs(0)[0][0]
        kept = torch.ones(QUERIES, dtype=torch.bool)
        kept[query[out.matches.pairs(0)[0][1] == 1]] = False
        wanted = torch.full((QUERIES,), CLASSES)
        wanted[query] = targets[0]["labels"][out.matches.pairs(0)[0][1]]
        weight = torch.tensor([1.0] * CLASSES + [0.1])
        expected = torch.nn.functional.cross_entropy(classes[layer][0][kept], wanted[kept], weight)
        torch.testing.assert_close(out.loss_class[0], expected)


def test_totals_of_unknown_classes_add_up() -> None:
    classes, masks = layers(images=2)
    targets = entries((3, 2))
    targets[1]["labels"][0] = 255
    module = criterion("reference", ignore_label=255)
    whole = module(classes, masks, targets, seed=3)
    labels = [[entry["labels"]] for entry in targets]
    totals = step_totals([[3], [2]], QUERIES, labels=labels, ignore_label=255)
    assert float(totals.class_weight or 0) == 4.0
    parts = [
        module(
            [c[i : i + 1] for c in classes],
            [m[i : i + 1] for m in masks],
            targets[i : i + 1],
            totals=totals,
            image_ids=[i],
            seed=3,
        ).total
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole.total)


def outputs_of(package: Any = detr) -> dict[str, Any]:
    classes, masks = layers()
    size = CLASSES + (package is detr)
    each = [
        {"pred_logits": c[..., :size].detach(), "pred_masks": m.detach(), "pred_boxes": torch.rand(1, QUERIES, 4)}
        for c, m in zip(classes, masks, strict=True)
    ]
    return each[-1] | {"aux_outputs": each[:-1]}


def set_criterion(package: Any = detr, losses: tuple[str, ...] = ("labels", "masks", "boxes"), **options: Any) -> Any:
    matcher = package.HungarianMatcher(num_points=64, cost_box=1.0, cost_giou=1.0)
    return package.SetCriterion(CLASSES, matcher, {}, 0.1, list(losses), 64, **options)


@pytest.mark.parametrize("form", [Tensor.clone, Tensor.tolist, Tensor.numpy])
def test_labels_that_count_from_one_are_told(form: Any) -> None:
    targets = one_image()
    targets[0]["labels"][0] = CLASSES
    with pytest.warns(UserWarning, match="If labels count from 1, subtract 1"):
        set_criterion()(outputs_of(), [targets[0] | {"labels": form(targets[0]["labels"])}])
    set_criterion(no_object_label="allow")(outputs_of(), targets)
    with pytest.raises(MaskLossError, match=r"labels must lie in \[0, 3\)[\s\S]*subtract 1"):
        set_criterion(no_object_label="error")(outputs_of(), targets)
    with pytest.raises(MaskLossError, match="no_object_label must be one of warn, allow, error"):
        set_criterion(no_object_label="no")


# ----------------------------------------------------------------------------------------------- targets without masks


@pytest.mark.parametrize("collated", [False, True])
def test_a_target_without_a_mask(backend: str, collated: bool) -> None:
    """Its mask is not read, in matching and loss; its class is learned."""
    classes, masks = layers()
    has = torch.tensor([True, False, True])

    def step(other: Tensor) -> Any:
        entry = one_image()[0]
        entry["masks"][1] = other
        entry["has_mask"] = has
        given: Any = [entry]
        if collated:
            given = {"masks": MaskTargets.from_masks(entry["masks"]), "labels": [entry["labels"]], "has_mask": [has]}
        return criterion(backend)(classes, masks, given, seed=1)

    torch.manual_seed(3)
    first = step(torch.zeros(20, 26, dtype=torch.bool))
    torch.manual_seed(3)
    second = step(torch.ones(20, 26, dtype=torch.bool))
    assert torch.equal(first.matches.index, second.matches.index)
    assert torch.equal(first.total, second.total)
    rows = first.matches.index[:, 3]
    kept = first.per_instance.ce[rows != 1].view(2, -1)
    torch.testing.assert_close(first.loss_mask, kept.mean(1))


def test_empty_masks_count_as_none_if_asked(backend: str) -> None:
    classes, masks = layers()
    entry = one_image()[0]
    entry["masks"][1] = False
    dropped = criterion(backend, drop_empty=True)(classes, masks, [entry], seed=1)
    told = criterion(backend)(classes, masks, [entry | {"has_mask": torch.tensor([True, False, True])}], seed=1)
    assert torch.equal(dropped.total, told.total)
    assert not torch.equal(dropped.total, criterion(backend)(classes, masks, [entry], seed=1).total)


def test_totals_name_the_option_that_needs_a_weight() -> None:
    classes, masks = layers()
    totals, entry = StepTotals(3.0, 5.0), one_image()[0]
    told = entry | {"has_mask": torch.tensor([True, False, True])}
    for options, given, text in (
        ({}, told, 'totals.instance_weight belongs to "has_mask"'),
        ({"drop_empty": True}, entry, "totals.instance_weight belongs to drop_empty"),
        ({"ignore_label": 255}, entry, "totals.class_weight belongs to ignore_label"),
    ):
        with pytest.raises(MaskLossError, match=text):
            criterion("reference", **options)(classes, masks, [given], totals=totals)


def test_totals_with_weights_hold_for_a_micro_batch_without() -> None:
    """Where all targets have a mask, each weighs 1: the parts add up to the step."""
    classes, masks = layers(images=2)
    targets = entries((3, 2))
    targets[0]["has_mask"] = torch.tensor([True, False, True])
    module = criterion("reference")
    whole = module(classes, masks, targets, seed=3)
    weights = [[torch.tensor([1.0, 0.0, 1.0])], [torch.ones(2)]]
    totals = step_totals([[3], [2]], QUERIES, instance_weights=weights)
    parts = [
        module(
            [c[i : i + 1] for c in classes],
            [m[i : i + 1] for m in masks],
            [entry],
            image_ids=[i],
            seed=3,
            totals=totals,
        )
        for i, entry in enumerate(targets)
    ]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)


def test_has_mask_of_a_collated_batch_is_one_for_each_image() -> None:
    classes, masks = layers()
    entry = one_image()[0]
    targets = {"masks": MaskTargets.from_masks(entry["masks"]), "labels": [entry["labels"]]}
    with pytest.raises(MaskLossError, match="has_mask of a collated batch must be a list"):
        criterion("reference")(classes, masks, targets | {"has_mask": False})


def test_a_label_of_zero_on_a_matcher_is_seen() -> None:
    for name in ("ignore_label", "ignore_value"):
        matcher = HungarianMatcher(**{name: 0})
        with pytest.raises(MaskLossError, match=f"must have the same {name}"):
            MaskCriterion(CLASSES, matcher=matcher)
        MaskCriterion(CLASSES, matcher=matcher, **{name: 0})


@pytest.mark.parametrize("form", ["bits", "values", "label map", "label map, not searched", "not cropped"])
def test_which_masks_are_inhabited(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.zeros(4, 5, 11)
    masks[1, 2, 3], masks[3, 4, 10] = 0.5, 1.0
    empty = torch.zeros(1, 3, 3)
    if form == "not cropped" or form.endswith("not searched"):
        unseen(monkeypatch)
    if form.startswith("label map"):
        one, other = torch.tensor([[0, 7], [9, 0]]), torch.tensor([[3, 7, 3]])
        ids = [[7, 3, 9, 7], [8, 3, 9]]
        found = MaskTargets.from_label_map([one, other], ids, allow_missing=True)
        assert found.inhabited().tolist() == [True, False, True, True, False, True, False]
        assert found.select([[1], [2, 1]]).inhabited().tolist() == [False, False, True]
        assert found.select([[], []]).inhabited().tolist() == []
        return
    given = [masks, empty, masks[:0]] if form == "values" else [masks > 0, empty > 0, masks[:0] > 0]
    assert MaskTargets.from_masks(given).inhabited().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("package", [detr, maskdino])
def test_boxes_alone(package: Any) -> None:
    """An image with boxes and no masks: matched by class and box, without mask terms; divisors count all targets."""
    torch.manual_seed(0)
    outputs, targets = outputs_of(package), one_image()
    del targets[0]["masks"]
    losses = set_criterion(package)(outputs, targets)
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    assert losses["loss_bbox"] > 0
    assert losses["loss_ce"] > 0
    classes, masks = layers()
    out = criterion("reference")(classes, masks, targets, extra_costs=[torch.rand(2, QUERIES, 3)])
    assert out.loss_mask.tolist() == out.loss_dice.tolist() == [0.0, 0.0]
    assert len(out.matches) == 6


def test_layerwise_losses_know_what_is_missing() -> None:
    """`LayerMasks`: void pixels and missing masks as in the criterion, its divisor is the caller's."""
    logits, (masks, void) = torch.randn(1, QUERIES, 10, 13), void_masks()
    pairs = [(torch.tensor([4, 0, 2]), torch.arange(3))]

    def terms(entry: dict[str, Any], **options: Any) -> list[float]:
        torch.manual_seed(1)
        found = LayerMasks(sampling=FEW, backend="reference", **options)({"pred_masks": logits}, [entry], pairs, 3.0)
        return [value.item() for value in found.values()]

    given = {"masks": masks.byte().masked_fill(void, 255)}
    wanted = terms({"masks": MaskTargets.from_masks(masks & ~void, ignore=void)})
    assert terms(given, ignore_value=255) == wanted
    with pytest.raises(MaskLossError, match="ignore_value=255"):
        terms(given)
    bare = masks.clone()
    bare[1] = False
    without = terms({"masks": masks, "has_mask": torch.tensor([True, False, True])})
    assert terms({"masks": bare}, drop_empty=True) == without
    only = terms({"masks": masks, "has_mask": torch.tensor([False, True, False])})
    assert [a + b for a, b in zip(without, only, strict=True)] == pytest.approx(terms({"masks": masks}))


@pytest.mark.parametrize("labels", [MaskFactors(torch.zeros(1, 4, 2), torch.zeros(1, 2, 6, 6)), 3, None])
def test_labels_that_are_none(labels: Any) -> None:
    """Factors have dimensions, and no length."""
    targets = [{"masks": torch.zeros(1, 6, 6), "labels": labels}]
    with pytest.raises(MaskLossError, match="labels"):
        MaskCriterion(CLASSES)([torch.zeros(1, 4, CLASSES + 1)], [torch.zeros(1, 4, 6, 6)], targets)


def test_boxes_must_pair_up_and_may_be_missing_without_targets() -> None:
    outputs, entry = outputs_of(), one_image()[0]
    with pytest.raises(MaskLossError, match=r'"boxes" \[T, 4\][\s\S]*has 3 targets and boxes \[1, 4\]'):
        set_criterion()(outputs, [entry | {"boxes": BOXES[:1]}])
    nothing = {"masks": None, "labels": None}
    results = [set_criterion()(outputs, [nothing | more]) for more in ({}, {"boxes": torch.zeros(0)}, {"boxes": None})]
    assert all(result["loss_bbox"] == 0 for result in results)
    arrays = {name: value.numpy() for name, value in entry.items()}
    torch.manual_seed(1)
    found = set_criterion()(outputs, [arrays])
    torch.manual_seed(1)
    for name, value in set_criterion()(outputs, [entry]).items():
        assert torch.equal(found[name], value), name


def test_a_drop_in_divides_by_all_targets() -> None:
    outputs, entry = outputs_of(), one_image()[0]
    halves = [entry | {"has_mask": torch.tensor(flags)} for flags in ([True, False, False], [False, True, True])]
    pairs = [(torch.tensor([4, 0, 2]), torch.arange(3))]
    sums = []
    for given in ([entry], [halves[0]], [halves[1]]):
        module = detr.SetCriterion(CLASSES, lambda *_: pairs, {}, 0.1, ["masks"], 64)
        torch.manual_seed(1)
        sums.append(module(outputs, given)["loss_mask"])
    torch.testing.assert_close(sums[1] + sums[2], sums[0])


# --------------------------------------------------------------------------------------- layers, shapes, empties, NumPy


def test_layers_without_masks_have_no_mask_terms() -> None:
    outputs, targets = outputs_of(), one_image()
    whole = set_criterion()
    torch.manual_seed(4)
    expected = whole(outputs, targets)
    bare = outputs | {"aux_outputs": [{k: v for k, v in outputs["aux_outputs"][0].items() if k != "pred_masks"}]}
    torch.manual_seed(4)
    found = whole(bare, targets)
    assert set(expected) - set(found) == {"loss_mask_0", "loss_dice_0"}
    for name in ("loss_ce", "loss_mask", "loss_dice", "loss_bbox", "loss_giou"):
        assert torch.equal(found[name], expected[name]), name
    # Without masks, the layer is matched by class and box.
    by_class = detr.HungarianMatcher(num_points=64, cost_mask=0.0, cost_dice=0.0, cost_box=1.0, cost_giou=1.0)
    alone = detr.SetCriterion(CLASSES, by_class, {}, 0.1, ["labels", "boxes"], 64)
    only = alone(outputs["aux_outputs"][0], targets)
    for name, value in only.items():
        torch.testing.assert_close(found[f"{name}_0"], value)
    with pytest.raises(MaskLossError, match=r'must have "pred_masks"\n.*\n  cause: those of the final layer have'):
        whole({k: v for k, v in outputs.items() if k != "pred_masks"}, targets)
    del bare["aux_outputs"][0]["pred_logits"]
    with pytest.raises(
        MaskLossError, match=r'must have "pred_logits"[\s\S]*entry 0 of the other layers has pred_boxes'
    ):
        whole(bare, targets)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_layer_without_masks_in_a_criterion(backend: str, missing: int) -> None:
    """Its classes are matched and learned, its mask terms are left out; the other layers are as without it."""
    classes, masks = predictions(2, sizes=[(9, 12), (16, 7), (8, 8)])
    targets = entries((3, 2))
    targets[0]["has_mask"] = torch.tensor([True, False, True])
    given = [None if layer == missing else each for layer, each in enumerate(masks)]
    module = criterion(backend)
    whole = module(classes, masks, targets, seed=1)
    out = module(classes, given, targets, seed=1, unlabeled=[torch.zeros(20, 26, dtype=torch.bool), None])
    others = [layer for layer in range(3) if layer != missing]
    names = set(whole.as_dict()) - set(out.as_dict())
    assert names == ({"loss_mask_0", "loss_dice_0"} if missing == 0 else {"loss_mask", "loss_dice"})
    rest = module([classes[layer] for layer in others], [masks[layer] for layer in others], targets, seed=1)
    for term in ("loss_class", "loss_mask", "loss_dice"):
        torch.testing.assert_close(getattr(out, term)[others], getattr(rest, term))
    assert out.loss_mask[missing] == out.loss_dice[missing] == 0
    torch.testing.assert_close(torch.stack([*out.as_dict(weighted=True).values()]).sum(), out.total)
    by_class = HungarianMatcher(mask_weight=0.0, dice_weight=0.0, num_points=60, backend=backend)
    alone = by_class(classes[missing], masks[missing], targets)
    for one, other in zip(out.matches.pairs(missing), alone.pairs(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    torch.autograd.grad(out.total, [*classes, *(each for each in given if each is not None)])
    with pytest.raises(MaskLossError, match=r"mask_logits must be a tensor"):
        module(classes, [None] * 3, targets)


def test_masks_and_logits_with_a_channel(backend: str) -> None:
    logits, masks = torch.randn(3, 8, 8), torch.rand(3, 12, 12) > 0.5
    loss = MaskLoss(sampling=FEW, backend=backend)
    expected = loss(logits, masks, seed=1).total
    assert torch.equal(loss(logits[:, None], masks[:, None], seed=1).total, expected)
    assert torch.equal(loss(logits[:, None], masks.numpy(), seed=1).total, expected)
    assert torch.equal(loss(logits, MaskTargets.from_masks(masks[:, None]), seed=1).total, expected)


def test_pairs_are_counted_over_a_group_of_processes() -> None:
    with pytest.raises(MaskLossError, match="group must be a process group"):
        MaskLoss(sampling=FEW)(torch.zeros(1, 8, 8), torch.ones(1, 8, 8), group="all")  # type: ignore[arg-type]


def test_the_best_of_several_candidates_counts(backend: str) -> None:
    torch.manual_seed(2)
    logits = torch.randn(3, 4, 9, 9, requires_grad=True)
    masks = torch.rand(3, 12, 12) > 0.5
    loss = MaskLoss(sampling=FEW, backend=backend)
    out = loss(logits, masks, best_of=True, seed=1)
    single = [loss(logits[:, m], masks, seed=1).per_instance for m in range(4)]
    each = torch.stack([5 * term.ce + 5 * term.dice for term in single], dim=1)
    assert out.best is not None
    assert torch.equal(out.best, each.argmin(1))
    torch.testing.assert_close(out.total, each.min(1).values.mean())
    (grad,) = torch.autograd.grad(out.total, logits)
    touched = grad.flatten(2).any(2)
    assert touched.sum().item() == 3
    assert all(touched[n, out.best[n]] for n in range(3))
    weights = torch.tensor([1.0, 0.0, 3.0])
    weighted = loss(logits, masks, best_of=True, instance_weights=weights, seed=1).total
    with pytest.raises(MaskLossError, match="instance_weights must be an ordinary tensor"):
        loss(logits, masks, best_of=True, instance_weights=weights.to_sparse(), seed=1)
    torch.testing.assert_close(weighted, (each.min(1).values * weights).sum() / 4)
    for wrong in ({"best_of": 1}, {"best_of": True, "matches": [(torch.tensor([0]), torch.tensor([0]))]}):
        with pytest.raises(MaskLossError, match="best_of"):
            loss(logits, masks, **wrong)
    with pytest.raises(MaskLossError, match=r"best_of needs mask_logits \[N, M, h, w\]"):
        loss(logits[:, 0], masks, best_of=True)


EMPTY: dict[str, dict[str, Any]] = {
    "as documented": {"masks": torch.zeros(0, 20, 26, dtype=torch.bool), "labels": torch.zeros(0, dtype=torch.int64)},
    "float": {"masks": torch.zeros(0, 20, 26), "labels": torch.zeros(0)},
    "flat": {"masks": torch.tensor([]), "labels": torch.tensor([])},
    "no size": {"masks": torch.zeros(0, 0, 0), "labels": torch.zeros(0, 1)},
    "None": {"masks": None, "labels": None},
    "arrays": {"masks": np.zeros((0, 20, 26)), "labels": np.array([])},
    "lists": {"masks": np.array([]), "labels": []},
}


@pytest.mark.parametrize("form", EMPTY)
def test_images_without_targets_as_mappers_leave_them(form: str) -> None:
    classes, masks = layers(images=2)
    full = one_image()[0]
    expected = criterion("reference")(classes, masks, [full, EMPTY["as documented"]], seed=1)
    for order in (False, True):
        targets = [EMPTY[form], full] if order else [full, EMPTY[form]]
        flip = [[layer.flip(0) for layer in each] if order else each for each in (classes, masks)]
        found = criterion("reference")(*flip, targets, seed=1, image_ids=[1, 0] if order else [0, 1])
        torch.testing.assert_close(found.total, expected.total)
    outputs = {"pred_logits": classes[-1].detach(), "pred_masks": masks[-1].detach()}
    module = set_criterion(losses=("labels", "masks"))
    module.matcher = detr.HungarianMatcher(num_points=64)
    results = []
    for entry in (EMPTY["as documented"], EMPTY[form]):
        torch.manual_seed(1)
        results.append(module(outputs, [full, entry]))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_arrays_wherever_targets_are_made(backend: str) -> None:
    classes, masks = layers()
    entry = one_image()[0]
    arrays = {"masks": entry["masks"].numpy(), "labels": entry["labels"].numpy()}
    expected = criterion(backend)(classes, masks, [entry], seed=1).total
    assert torch.equal(criterion(backend)(classes, masks, [arrays], seed=1).total, expected)
    lists = arrays | {"labels": entry["labels"].tolist()}
    assert torch.equal(criterion(backend)(classes, masks, [lists], seed=1).total, expected)
    labels = np.array([[0, 300], [500, 300]], dtype=np.uint16)
    assert MaskTargets.from_label_map(labels).num_targets == (2,)
    assert MaskTargets.from_label_map([labels, labels[::-1, ::-1]]).num_targets == (2, 2)
    big = MaskTargets.from_label_map(labels.astype(">u2"), np.array([500, 300]))
    assert torch.equal(big.dense(), torch.tensor([[[False, False], [True, False]], [[False, True], [False, True]]]))


def test_arrays_in_every_constructor() -> None:
    masks = np.array([[[0, 1, 1], [1, 0, 1]]], dtype=np.uint16)
    expected = MaskTargets.from_masks(torch.from_numpy(masks.astype(bool)))
    for given in (masks, masks.astype(">f4"), masks[:, ::-1][:, ::-1], [masks.tolist()], np.uint64(masks)):
        assert torch.equal(MaskTargets.from_masks(given).dense(), expected.dense())
    region, size = np.array([[1, 0, 0], [0, 0, 0]], dtype=bool), np.array([4, 5])
    frame: dict[str, Any] = {"ignore": region, "canvas": size, "valid": np.array([0, 0, 2, 3])}
    tensors = {"ignore": torch.from_numpy(region), "canvas": (4, 5), "valid": (0, 0, 2, 3)}
    packed = np.packbits(masks.astype(bool), axis=-1, bitorder="little")
    for make in (
        lambda options: MaskTargets.from_masks(masks, **options),
        lambda options: MaskTargets.from_packed(packed, 3, **options),
        lambda options: MaskTargets.from_label_map(masks[0], np.array([1]), **options),
    ):
        found, wanted = make(frame), make(tensors)
        assert all(torch.equal(a, b) for a, b in zip(found.tensors, wanted.tensors, strict=True))
    listed = {"masks": [torch.zeros(20, 26), torch.ones(20, 26)], "labels": np.array([0, 1], dtype=np.uint16)}
    classes, queries = layers(depth=1)
    stacked = {"masks": torch.stack(listed["masks"]), "labels": torch.tensor([0, 1])}  # type: ignore[arg-type]
    first, second = (criterion("reference")(classes, queries, [each], seed=1).total for each in (listed, stacked))
    assert torch.equal(first, second)


def test_clips_without_targets() -> None:
    """Frames `[N, T, H, W]`: empty ones as mappers leave them."""
    clip = torch.rand(2, 3, 6, 8) > 0.5
    expected = MaskTargets.from_masks([clip, clip[:0]])
    for nothing in (None, torch.zeros(0), np.zeros(0)):
        found = MaskTargets.from_masks([clip.numpy(), nothing])
        assert found.num_targets == expected.num_targets
        assert torch.equal(found.dense(), expected.dense())
    labels = torch.tensor([[[0, 4]], [[9, 4]]], dtype=torch.uint8)
    assert MaskTargets.from_label_map(labels, canvas=(2, 3)).num_targets == (2,)


def test_a_label_map_without_ids_leaves_the_background_out() -> None:
    labels = torch.tensor([[0, 4], [9, 4]])
    assert torch.equal(MaskTargets.from_label_map(labels).dense(), torch.stack([labels == 4, labels == 9]))
    classes, masks = layers(depth=1)
    entry = {"masks": labels, "labels": torch.tensor([0, 1])}
    given = criterion("reference")(classes, masks, [entry | {"ids": [4, 9]}], seed=1).total
    assert torch.equal(criterion("reference")(classes, masks, [entry], seed=1).total, given)


def test_coco_annotations_and_arrays() -> None:
    pytest.importorskip("pycocotools")
    polygon = [1.0, 1.0, 8.0, 1.0, 8.0, 6.0]
    expected = MaskTargets.from_coco([[polygon]], 10, 12).dense()
    annotation = {"id": 3, "segmentation": [polygon], "iscrowd": 0}
    for given in ([annotation], [[np.array(polygon)]], [np.array([polygon])], [[np.reshape(polygon, (3, 2))]]):
        assert torch.equal(MaskTargets.from_coco(given, 10, 12).dense(), expected)
    counts = {"size": np.array([10, 12]), "counts": np.array([20, 30, 70])}
    plain = {"size": [10, 12], "counts": [20, 30, 70]}
    found, wanted = (MaskTargets.from_coco([each], 10, 12).dense() for each in (counts, plain))
    assert torch.equal(found, wanted)


def test_ids_of_video_code_beside_dense_masks() -> None:
    outputs, targets = outputs_of(), one_image()
    results = []
    for more in ({}, {"ids": torch.tensor([5, -1, 7])}):
        torch.manual_seed(1)
        results.append(set_criterion()(outputs, [targets[0] | more]))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_stacked_layers_are_told_to_be_listed() -> None:
    classes, masks = predictions(1, sizes=[(8, 8)] * 2)
    with pytest.raises(MaskLossError, match=r"list\(mask_logits\)"):
        criterion("reference")(torch.stack(classes), torch.stack(masks), one_image())
    with pytest.raises(MaskLossError, match=r"list\(class_logits\)"):
        criterion("reference")(torch.stack(classes), masks[:1], one_image())
    with pytest.raises(MaskLossError, match=r"list\(\.\.\.\) takes stacked ones apart"):
        criterion("reference")(classes, torch.stack(masks), one_image())


def test_terms_by_their_names() -> None:
    classes, masks = layers()
    out = criterion("reference")(classes, masks, one_image(), seed=1)
    assert torch.equal(out["loss_mask"], out.loss_mask[-1])
    assert torch.equal(out["loss_dice_0"], out.loss_dice[0])
    assert torch.equal(out[0], out.total)
    assert torch.equal(out["total"], out.total)
    with pytest.raises(KeyError, match="the terms are total, loss_class, loss_mask, loss_dice, loss_class_0"):
        out["loss_ce"]
    single = MaskLoss(sampling=FEW, backend="reference")(torch.zeros(1, 4, 4), torch.ones(1, 4, 4), seed=0)
    assert torch.equal(single["ce"], single.ce)
    total, *_ = single
    assert torch.equal(total, single["total"])
    with pytest.raises(KeyError, match="the terms are total, ce, dice"):
        single["loss_mask"]


@pytest.mark.parametrize("options", [{"drop_empty": 1}, {"ignore_label": "x"}, {"ignore_value": 0.5}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(MaskLossError, match=next(iter(options))):
        MaskCriterion(2, **options)
    with pytest.raises(MaskLossError, match=next(iter(options))):
        set_criterion(**options)


@pytest.mark.parametrize(
    ("edit", "hint"),
    [
        ({"labels": torch.tensor([0.0, 1.0, 2.0])}, r"labels\.long\(\) converts"),
        ({"labels": torch.eye(3)}, r"labels\.argmax\(1\)"),
        ({"labels": torch.zeros(3, 1, dtype=torch.int64)}, r"labels\[:, 0\]"),
        ({"labels": torch.tensor([0, -1, 2])}, "ignore_label=-1 if the class"),
        ({"masks": torch.ones(1, 9, 9)}, '"has_mask" \\[T\\] says which'),
        ({"masks": None, "boxes": torch.rand(3, 4), "has_mask": torch.eye(3)[0] > 0}, "give \\[T, H, W\\]; a target"),
        ({"masks": None, "boxes": torch.rand(3, 4), "labels": torch.tensor(1)}, "give one class for each mask"),
        ({"masks": torch.tensor([[-1, 2], [1, 0]])}, "ignore_value=-1 for void"),
    ],
)
def test_what_is_wrong_with_a_target_is_said(edit: dict[str, Any], hint: str) -> None:
    classes, masks = layers()
    with pytest.raises(MaskLossError, match=hint):
        criterion("reference")(classes, masks, [one_image()[0] | edit])


def test_predictions_of_another_kind_name_what_takes_them() -> None:
    classes, _ = layers()
    factors = {"spatial_features": torch.randn(1, 4, 9, 12), "query_features": torch.randn(1, QUERIES, 4)}
    with pytest.raises(MaskLossError, match=r"MaskFactors\.from_dict takes it"):
        criterion("reference")(classes[0], factors, one_image())
    with pytest.raises(MaskLossError, match="no masks if another has some"):
        criterion("reference")(classes, [None, None], one_image())
    with pytest.raises(MaskLossError, match="takes those of one layer"):
        find_instances([classes[0]], [torch.randn(1, QUERIES, 9, 12)])  # type: ignore[arg-type]
    with pytest.raises(MaskLossError, match="only other layers may come without masks"):
        set_criterion()({"pred_logits": classes[0]}, one_image())
    for wrong in ({"matcher": HungarianMatcher()}, {"matcher": None}, {"weight_dict": None}):
        given = {"matcher": len, "weight_dict": {}} | wrong
        with pytest.raises(MaskLossError, match=f"{next(iter(wrong))} must be"):
            detr.SetCriterion(CLASSES, eos_coef=np.float32(0.1), losses=["labels"], **given)


def test_no_masks_at_all_may_be_said_without_boxes() -> None:
    classes, masks = layers()
    target = one_image()[0]
    none = torch.zeros(3, dtype=torch.bool)
    found, wanted = (
        criterion("reference")(classes, masks, [target | each], seed=1).total
        for each in ({"masks": None, "has_mask": False}, {"has_mask": none})
    )
    assert torch.equal(found, wanted)


# -------------------------------------------------------------------------------------------------------- Transformers

FAMILIES = ("mask2former", "eomt", "rf_detr")


def trained(family: str, change: Any, **options: Any) -> dict[str, Tensor]:
    """The terms of a patched model; `change` edits labels and masks of the first image."""
    transformers = pytest.importorskip("maskloss.integrations.transformers")
    pytest.importorskip("transformers.models.rf_detr")
    masks = tiny.blobs()
    batch = tiny.batch_for(family, masks)
    labels = batch["labels"][0]["class_labels"] if family == "rf_detr" else batch["class_labels"][0]
    change(labels, masks[0])
    torch.manual_seed(0)
    model = tiny.build(family)
    with transformers.patch(model, backend="reference", **options), step(seed=5):
        loss, terms = tiny.run(model, family, batch)
    assert loss.isfinite()
    return terms


def void(_: Tensor, masks: Tensor) -> None:
    masks[:, :, 20:] = 255


def equal(one: dict[str, Tensor], other: dict[str, Tensor], part: str = "") -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one if part in name)


@pytest.mark.parametrize("family", [*FAMILIES, "videomt"])
def test_void_pixels_in_a_patched_model(family: str) -> None:
    """What lies below does not matter; without the option it is an error."""
    first = trained(family, void, ignore_value=255)

    def other(labels: Tensor, masks: Tensor) -> None:
        masks[:, :, 20:] = 7

    assert equal(first, trained(family, other, ignore_value=7))
    with pytest.raises(MaskLossError, match="ignore_value=255"):
        trained(family, void)


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_classes_in_a_patched_model(family: str) -> None:
    def hidden(labels: Tensor, masks: Tensor) -> None:
        labels[0] = 255

    found = trained(family, hidden, ignore_label=255)
    for label in range(tiny.CLASSES):
        shown = trained(family, lambda labels, _, label=label: labels.__setitem__(0, label))
        assert not equal(found, shown, "loss_ce" if family == "rf_detr" else "cross_entropy")
    with pytest.raises(MaskLossError, match="labels must lie in"):
        trained(family, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_masks_in_a_patched_model(family: str) -> None:
    def emptied(labels: Tensor, masks: Tensor) -> None:
        masks[0] = 0

    kept, dropped = trained(family, emptied), trained(family, emptied, drop_empty=True)
    assert not equal(kept, dropped, "mask")
    assert equal(kept, dropped, "cardinality")


def test_what_a_patched_subclass_computes_itself_cannot_be_told() -> None:
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    from maskloss.integrations.transformers import patch

    class Own(modeling.Mask2FormerLoss):  # type: ignore[misc,name-defined]
        def loss_labels(self, *args: Any) -> Any:
            return super().loss_labels(*args)

    model = tiny.build("mask2former")
    model.criterion = Own(model.config, model.criterion.weight_dict)
    with pytest.raises(MaskLossError, match="ignore_label needs the classification to be computed here"):
        patch(model, ignore_label=255)
    batch = tiny.batch_for("mask2former", tiny.blobs())
    batch["mask_labels"][0][0] = 0
    terms = []
    for dropped in (False, True):
        with patch(model, drop_empty=dropped, backend="reference"), step(seed=5):
            terms.append(tiny.run(model, "mask2former", batch)[1])
    assert not equal(*terms, "loss_mask")


@pytest.mark.parametrize("family", ["mask2former", "eomt"])
def test_labels_that_count_from_one_in_a_patched_model(family: str) -> None:
    def last(labels: Tensor, masks: Tensor) -> None:
        labels[0] = tiny.CLASSES

    with pytest.warns(UserWarning, match="If labels count from 1, subtract 1"):
        told = trained(family, last)
    assert equal(told, trained(family, last, no_object_label="allow"))
    with pytest.raises(MaskLossError, match=r"labels must lie in \[0, 3\)"):
        trained(family, last, no_object_label="error")
    with pytest.raises(MaskLossError, match="no_object_label must be one of"):
        trained(family, last, no_object_label=True)
