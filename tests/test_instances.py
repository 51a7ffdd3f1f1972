"""Instances from logits, against the formula on whole dense tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from maskloss import MaskCriterion, MaskFactors, MaskLossError, find_instances


def logits(batch=2, queries=6, classes=4, size=(7, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = 6 * torch.randn(batch, queries, 3, 3, generator=generator)
    masks = interpolate(coarse, size, mode="bilinear")
    return 2 * torch.randn(batch, queries, classes, generator=generator), masks


def plain(class_logits, mask_logits, size, canvas, *, focal=False, every=False, quality=True, most=100):
    """Score, label, query and mask of all instances of one image, best first."""
    probability = class_logits.sigmoid() if focal else class_logits.softmax(-1)[:, :-1]
    whole = interpolate(mask_logits[None], canvas, mode="bilinear")[0][:, : size[0], : size[1]]
    pairs = []
    for query, row in enumerate(probability):
        labels = range(len(row)) if every else [int(row.argmax())]
        pairs += [(float(row[label]), query, label) for label in labels]
    pairs = sorted(pairs, key=lambda each: -each[0])[:most]
    found = []
    for score, query, label in pairs:
        mask = whole[query] > 0
        if mask.any():
            share = float(whole[query].sigmoid()[mask].mean()) if quality else 1.0
            found.append((score * share, label, query, mask))
    return sorted(found, key=lambda each: -each[0])


@pytest.mark.parametrize(
    ("options", "means"),
    [
        ({}, {}),
        ({"classification": "focal"}, {"focal": True}),
        ({"classes": "all"}, {"every": True}),
        ({"classes": "all", "classification": "focal", "max_instances": 7}, {"every": True, "focal": True, "most": 7}),
        ({"mask_quality": False, "max_instances": 3}, {"quality": False, "most": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("size", "canvas"), [((7, 9), None), ((23, 17), None), ((5, 6), (11, 8)), ((1, 1), (1, 507)), ((64, 33), (64, 64))]
)
def test_against_dense_tensors(options, means, size, canvas):
    classes, masks = logits()
    found = find_instances(classes, masks, size=size, canvas=canvas, threshold=0, **options)
    for image, each in enumerate(found):
        expected = plain(classes[image], masks[image], size, canvas or size, **means)
        assert each.size == size and len(each) == len(expected)
        assert each.scores.tolist() == pytest.approx([score for score, *_ in expected], abs=1e-6)
        assert each.labels.tolist() == [label for _, label, *_ in expected]
        assert each.queries.tolist() == [query for *_, query, _ in expected]
        dense = each.dense()
        assert dense.shape == (len(expected), *size) and dense.dtype == torch.bool
        assert all(torch.equal(mask, wanted) for mask, (*_, wanted) in zip(dense, expected, strict=True))


def test_many_pixels_are_enlarged_a_few_masks_at_a_time(monkeypatch):
    from maskloss import instances

    classes, masks = logits()
    whole = find_instances(classes, masks, size=(30, 40), threshold=0)
    monkeypatch.setattr(instances, "_AT_ONCE", 1300)
    for one, other in zip(whole, find_instances(classes, masks, size=(30, 40), threshold=0), strict=True):
        assert torch.equal(one.dense(), other.dense()) and torch.equal(one.queries, other.queries)
        torch.testing.assert_close(one.scores, other.scores)


def test_every_image_has_its_own_size():
    classes, masks = logits()
    sizes, canvases = [(20, 30), (40, 10)], torch.tensor([[30, 30], [40, 40]])
    found = find_instances(classes, masks, size=sizes, canvas=canvases, threshold=0)
    for image, (size, canvas) in enumerate(zip(sizes, canvases.tolist(), strict=True)):
        [alone] = find_instances(classes[image, None], masks[image, None], size=size, canvas=canvas, threshold=0)
        assert found[image].size == size and torch.equal(found[image].dense(), alone.dense())


def test_factors_are_their_product():
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(2, 6, 5, generator=generator)
    features = torch.randn(2, 5, 7, 9, generator=generator)
    classes, _ = logits()
    for bias in (None, -0.5, torch.linspace(-1, 1, 6)):
        factors = MaskFactors(embeddings, features, bias)
        dense = find_instances(classes, factors.dense(), size=(14, 18), threshold=0)
        for one, other in zip(find_instances(classes, factors, size=(14, 18), threshold=0), dense, strict=True):
            torch.testing.assert_close(one.scores, other.scores)
            assert torch.equal(one.queries, other.queries)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_summed_in_float32(dtype):
    classes, masks = (each.to(dtype) for each in logits())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = find_instances(classes, masks, size=(20, 20), threshold=0)
    expected = find_instances(classes.to(wide), masks.to(wide), size=(20, 20), threshold=0)
    for one, other in zip(found, expected, strict=True):
        assert one.scores.dtype == wide and torch.equal(one.scores, other.scores)
        assert torch.equal(one.dense(), other.dense())


def test_low_scores_are_kept_where_asked():
    classes, masks = logits()
    every = find_instances(classes, masks, threshold=0)
    for threshold in (0.3, 0.5):
        for one, some in zip(every, find_instances(classes, masks, threshold=threshold), strict=True):
            kept = one.select(one.scores >= threshold)
            assert 0 < len(some) < len(one)
            assert torch.equal(kept.scores, some.scores) and torch.equal(kept.dense(), some.dense())


def blocks(*boxes, scores):
    """Logits of queries with box masks `(top, left, bottom, right)` on 8 x 8 pixels."""
    masks = torch.full((1, len(boxes), 8, 8), -20.0)
    for query, (top, left, bottom, right) in enumerate(boxes):
        masks[0, query, top:bottom, left:right] = 20
    return torch.tensor(scores).logit().view(1, -1, 1), masks


def test_overlaps_go_to_the_best_and_what_is_mostly_covered_goes():
    # The third is covered by 3 of 4 rows, the fourth by 1 of 4.
    boxes = [(0, 0, 4, 4), (4, 4, 8, 8), (1, 0, 5, 4), (3, 0, 7, 4), (0, 6, 0, 6)]
    classes, masks = blocks(*boxes, scores=[0.9, 0.5, 0.8, 0.6, 0.7])
    [kept] = find_instances(classes, masks, classification="focal", threshold=0)
    assert kept.queries.tolist() == [0, 2, 3, 1]
    assert kept.boxes().tolist() == [[0, 0, 4, 4], [0, 1, 4, 5], [0, 3, 4, 7], [4, 4, 8, 8]]
    [found] = find_instances(classes, masks, classification="focal", threshold=0, overlaps="resolve")
    assert found.queries.tolist() == [0, 3, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.6, 0.5], abs=1e-4)
    dense = found.dense()
    assert dense.sum(0).max() == 1 and dense.flatten(1).sum(1).tolist() == [16, 12, 16]
    # Numbers of a label map are places: the second one is hidden.
    assert sorted(kept.label_map().unique().tolist()) == [0, 1, 3, 4]
    labels = found.label_map()
    assert labels.dtype == torch.int32
    assert all(torch.equal(labels == place, mask) for place, mask in enumerate(dense, start=1))
    assert torch.equal(labels > 0, kept.label_map() > 0)


def test_run_lengths_and_crops_are_the_masks():
    codec = pytest.importorskip("pycocotools.mask")
    classes, masks = logits()
    [found, _] = find_instances(classes, masks, size=(31, 21), threshold=0)
    dense = found.dense().numpy()
    for run, mask, (top, left, crop) in zip(found.rle(), dense, found.crops(), strict=True):
        assert isinstance(run["counts"], str) and np.array_equal(codec.decode(run), mask)
        whole = np.zeros_like(mask)
        whole[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        assert np.array_equal(whole, mask)
        assert all(edge.any() for edge in (crop[0], crop[-1], crop[:, 0], crop[:, -1]))


def test_nothing_is_found():
    classes, masks = logits()
    for some in (-masks.abs() - 1, masks[:, :0]):
        for each in find_instances(classes[:, : some.shape[1]], some, size=(5, 4), threshold=0, overlaps="resolve"):
            assert len(each) == 0 and each.dense().shape == (0, 5, 4) and each.boxes().shape == (0, 4)
            assert each.rle() == [] and not each.label_map().any() and each.label_map().shape == (5, 4)
    assert find_instances(classes[:0], masks[:0]) == []


def test_what_was_found_can_be_trained_on():
    """Pseudo labels: packed they give the loss that they give as dense masks."""
    classes, masks = logits()
    found = find_instances(classes, masks, size=(28, 36), threshold=0.2)
    packed = [{"masks": each.masks, "labels": each.labels} for each in found]
    dense = [{"masks": each.dense(), "labels": each.labels} for each in found]
    assert all(len(each) for each in found)
    criterion = MaskCriterion(3)
    assert torch.equal(criterion(classes, masks, packed, seed=0).total, criterion(classes, masks, dense, seed=0).total)


def test_no_gradient_and_no_change():
    classes, masks = (each.requires_grad_() for each in logits())
    before = masks.detach().clone()
    [found, _] = find_instances(classes, masks)
    assert not found.scores.requires_grad and torch.equal(masks.detach(), before)


CLASSES, MASKS = logits()
WRONG = {
    "queries": (
        CLASSES[:, :3],
        MASKS,
        {},
        r"B and Q of the mask logits\n.*\n  cause: got \[2, 3, 4\] float32, B and Q",
    ),
    "no class": (CLASSES[..., :1], MASKS, {}, "C \\+ 1"),
    "one image": (CLASSES[0], MASKS[0], {}, "mask_logits must be"),
    "nan": (CLASSES.log(), MASKS, {}, "class_logits must be finite"),
    "nan masks": (CLASSES, MASKS.log(), {"threshold": 0}, "mask_logits must be finite"),
    "threshold": (CLASSES, MASKS, {"threshold": 50}, "threshold must be a finite number in"),
    "most": (CLASSES, MASKS, {"max_instances": 0}, "max_instances must be an integer"),
    "size": (CLASSES, MASKS, {"size": 30}, "size must be \\(height, width\\)"),
    "sizes": (CLASSES, MASKS, {"size": [(3, 4)] * 3}, "for 2 images"),
    "no pixels": (CLASSES, MASKS, {"size": (0, 4)}, "size must be an integer, at least 1"),
    "canvas": (CLASSES, MASKS, {"size": (30, 40), "canvas": (30, 30)}, "canvas must hold the image"),
    "choice": (CLASSES, MASKS, {"overlaps": "drop"}, "overlaps must be one of keep, resolve"),
    "classification": (CLASSES, MASKS, {"classification": "sigmoid"}, "one of softmax, focal"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    classes, masks, options, message = WRONG[case]
    with pytest.raises(MaskLossError, match=message) as raised:
        find_instances(classes, masks, **options)
    assert str(raised.value).startswith("find_instances: ")


def test_names_that_people_guess():
    with pytest.raises(MaskLossError, match="use class_logits="):
        find_instances(pred_logits=CLASSES, mask_logits=MASKS)


@pytest.mark.gpu
def test_on_a_device():
    classes, masks = logits()
    for one, other in zip(
        find_instances(classes.cuda(), masks.cuda(), size=(20, 30), threshold=0),
        find_instances(classes, masks, size=(20, 30), threshold=0),
        strict=True,
    ):
        assert one.masks.device.type == one.label_map().device.type == "cuda"
        torch.testing.assert_close(one.to("cpu").scores, other.scores)
        assert torch.equal(one.dense().cpu(), other.dense()) and torch.equal(one.boxes().cpu(), other.boxes())
