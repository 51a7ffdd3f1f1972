"""AP, mean IoU and the AP of microscopy against what a person can compute."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maskloss import MaskTargets
from maskloss.lab.data.scenes import Scene
from maskloss.lab.results.details import average_precision, rank
from maskloss.lab.results.evaluate import THRESHOLDS, _coco, judge, matching, summarize
from maskloss.lab.results.inference import Instance, Prediction
from support.examples import number

SIDE = 20


def block(top: int, left: int, height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def scene(instances, crowds=(), ignored=None) -> Scene:
    def packed(masks):
        stacked = torch.stack(masks) if masks else torch.zeros(0, SIDE, SIDE, dtype=torch.bool)
        return MaskTargets.from_masks(stacked)

    return Scene(
        image=torch.zeros(3, SIDE, SIDE),
        targets=packed([mask for mask, _ in instances]),
        labels=torch.tensor([label for _, label in instances], dtype=torch.int64),
        crowd=packed([mask for mask, _ in crowds]),
        crowd_labels=torch.tensor([label for _, label in crowds], dtype=torch.int64),
        ignored=ignored,
        name="",
    )


def found(*instances) -> Prediction:
    listed = [Instance(0, 0, mask.numpy(), label, score) for mask, label, score in instances]
    return Prediction(SIDE, SIDE, sorted(listed, key=lambda each: -each.score))


def score(scenes, predictions, names, maps=False):
    pairs = enumerate(zip(scenes, predictions, strict=True))
    return summarize([judge(number, *pair, len(names), maps) for number, pair in pairs], names, maps)


TOP, BOTTOM = block(0, 0, 10, 10), block(10, 10, 10, 10)


def test_the_truth_scores_one():
    scenes = [scene([(TOP, 0), (BOTTOM, 1)]), scene([(BOTTOM, 0)])]
    predictions = [found((TOP, 0, 0.9), (BOTTOM, 1, 0.8)), found((BOTTOM, 0, 0.7))]
    scores = score(scenes, predictions, ["a", "b"], maps=True)
    assert (scores.ap, scores.ap50, scores.ap75, scores.mean_iou) == pytest.approx((1, 1, 1, 1))
    assert [each.ap50 for each in scores.by_class.values()] == pytest.approx([1, 1])
    assert (scores.scenes, scores.instances) == (2, 3)
    assert set(scores.matching.values()) == {1.0} and len(scores.matching) == 10


def test_nothing_found_scores_zero():
    scores = score([scene([(TOP, 0)])], [found()], ["a"], maps=True)
    assert (scores.ap, scores.ap50, scores.mean_iou, scores.matching["0.50"]) == (0, 0, 0, 0)


def test_half_of_two_instances_is_half_of_the_recall_thresholds():
    """One of two found: precision 1 up to a recall of 0.5, so at 51 of COCO's 101 thresholds."""
    scores = score([scene([(TOP, 0), (BOTTOM, 0)])], [found((TOP, 0, 0.9))], ["a"])
    assert scores.ap50 == pytest.approx(51 / 101)


def test_a_false_alarm_above_the_hit_halves_precision():
    alarm = block(0, 12, 6, 6)
    scores = score([scene([(TOP, 0)])], [found((alarm, 0, 0.9), (TOP, 0, 0.8))], ["a"], maps=True)
    assert scores.ap50 == pytest.approx(0.5) and scores.matching["0.50"] == 0.5
    behind = score([scene([(TOP, 0)])], [found((TOP, 0, 0.9), (alarm, 0, 0.8))], ["a"])
    assert behind.ap50 == pytest.approx(1)


def test_iou_decides_at_which_thresholds_a_mask_counts():
    """An IoU of 0.72 counts at 0.50, 0.55, 0.60, 0.65 and 0.70, five of ten."""
    part = block(0, 0, 9, 8)
    scores = score([scene([(TOP, 0)])], [found((part, 0, 0.9))], ["a"], maps=True)
    assert (scores.ap50, scores.ap75) == pytest.approx((1, 0))
    assert scores.ap == pytest.approx(0.5)
    assert scores.mean_iou == pytest.approx(0.72)
    assert list(scores.matching.values()) == [1] * 5 + [0] * 5


def test_the_right_mask_with_the_wrong_class_counts_for_neither():
    scores = score([scene([(TOP, 0), (BOTTOM, 1)])], [found((TOP, 1, 0.9), (BOTTOM, 1, 0.8))], ["a", "b"])
    assert scores.by_class["a"].ap50 == 0 and scores.by_class["b"].ap50 == pytest.approx(0.5)
    # Class b: 100 pixels right of the 200 found; class a: none.
    assert scores.mean_iou == pytest.approx(0.25)


def test_a_class_that_does_not_occur_is_left_out():
    scores = score([scene([(TOP, 0)])], [found((TOP, 0, 0.9))], ["a", "b"])
    assert scores.ap50 == pytest.approx(1) and math.isnan(scores.by_class["b"].ap50)
    assert scores.as_dict()["by_class"]["b"] == {
        **dict.fromkeys(("ap", "ap50", "precision", "recall")),
        **dict.fromkeys(("images", "instances", "found"), 0),
    }


def test_ap_by_size():
    """All instances are smaller than 32 x 32 pixels."""
    scores = score([scene([(TOP, 0)])], [found((TOP, 0, 0.9))], ["a"])
    assert scores.ap_small == pytest.approx(1) and math.isnan(scores.ap_medium) and math.isnan(scores.ap_large)


def test_predictions_inside_a_crowd_are_not_counted():
    crowd, inside = block(10, 0, 10, 10), block(12, 2, 5, 5)
    predictions = [found((inside, 0, 0.9), (TOP, 0, 0.8))]
    assert score([scene([(TOP, 0)], [(crowd, 0)])], predictions, ["a"]).ap50 == pytest.approx(1)
    assert score([scene([(TOP, 0)])], predictions, ["a"]).ap50 == pytest.approx(0.5)


def test_mean_iou_takes_the_best_prediction_of_a_pixel_and_none_that_is_unsure():
    truth = [scene([(TOP, 0)])]

    def iou(*instances):
        return score(truth, [found(*instances)], ["a", "b"]).mean_iou

    assert iou((TOP, 0, 0.9), (TOP, 1, 0.8)) == 1
    assert iou((TOP, 1, 0.9), (TOP, 0, 0.8)) == 0
    assert iou((TOP, 0, 0.49)) == 0


def test_void_is_left_out_of_mean_iou():
    void = block(0, 10, 20, 10)
    prediction = [found((block(0, 0, 10, 20), 0, 0.9))]
    assert score([scene([(TOP, 0)], ignored=void)], prediction, ["a"]).mean_iou == 1
    assert score([scene([(TOP, 0)])], prediction, ["a"]).mean_iou == 0.5


def test_more_instances_than_coco_looks_at():
    """COCO takes the best 100 of an image; of 150 instances all have to count."""
    cells = [block(row, column, 1, 1) for row in range(10) for column in range(15)]
    scores = score([scene([(cell, 0) for cell in cells])], [found(*((cell, 0, 0.9) for cell in cells))], ["a"])
    assert scores.ap50 == pytest.approx(1)


def test_precision_and_recall_count_what_scores_half_at_least():
    """Of class a: one right of the two found, one of two instances; of b: what is found scores too little."""
    alarm = block(0, 12, 6, 6)
    scenes = [scene([(TOP, 0)]), scene([(BOTTOM, 0), (TOP, 1)])]
    predictions = [found((TOP, 0, 0.9), (alarm, 0, 0.5)), found((BOTTOM, 0, 0.49), (TOP, 1, 0.49))]
    first, second = score(scenes, predictions, ["a", "b"]).by_class.values()
    assert (first.precision, first.recall) == (0.5, 0.5)
    assert (first.images, first.instances, first.found) == (2, 2, 2)
    assert math.isnan(second.precision) and second.recall == 0 and second.ap50 == pytest.approx(1)
    assert (second.images, second.instances, second.found) == (1, 1, 0)


def test_what_is_taken_for_what():
    """A right one, one of the wrong class, a missed one, a false alarm, and two that do not count."""
    crowd, inside, alarm = block(10, 0, 10, 10), block(12, 2, 5, 5), block(0, 12, 6, 6)
    scenes = [scene([(TOP, 0)], [(crowd, 0)]), scene([(TOP, 0), (BOTTOM, 1)])]
    predictions = [
        found((TOP, 0, 0.9), (inside, 0, 0.8), (alarm, 1, 0.7)),
        found((TOP, 1, 0.9), (alarm, 0, 0.4), (BOTTOM, 1, 0.3)),
    ]
    scores = score(scenes, predictions, ["a", "b"])
    assert scores.confusion == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert scores.confused == [(1, "a", "b")]


def boxes_at_random(random, count):
    boxes = zip(
        *(random.integers(0, high, count) for high in (14, 14)), *random.integers(2, 6, (2, count)), strict=True
    )
    return [block(*map(int, box)) for box in boxes]


def random_scores(seed=0, images=12):
    random = np.random.default_rng(seed)
    scenes, predictions = [], []
    for _ in range(images):
        truth = [(mask, int(random.integers(2))) for mask in boxes_at_random(random, random.integers(0, 5))]
        # Some instances are found, moved a little, some of them twice, others are made up.
        some = [(mask.roll(int(random.integers(3)), 0), label) for mask, label in truth if random.random() < 0.7]
        some += [(mask, int(random.integers(2))) for mask in boxes_at_random(random, random.integers(0, 4))]
        crowds = [(mask, 0) for mask in boxes_at_random(random, random.integers(0, 2))]
        scenes.append(scene(truth, crowds))
        predictions.append(found(*((mask, label, float(random.random())) for mask, label in some)))
    judged = [judge(number, *pair, 2) for number, pair in enumerate(zip(scenes, predictions, strict=True))]
    return judged, summarize(judged, ["a", "b"])


@pytest.mark.parametrize("seed", range(4))
def test_ap50_of_resampled_images_is_that_of_pycocotools(seed):
    """On the images as they are, and on copies of some of them."""
    judged, scores = random_scores(seed)
    ranked = [rank(_coco(judged, ["a", "b"]), len(judged), label) for label in range(2)]
    ones = np.ones(len(judged), dtype=np.int64)
    assert [average_precision(each, ones) for each in ranked] == pytest.approx(
        [each.ap50 for each in scores.by_class.values()]
    )
    copies = np.random.default_rng(seed).integers(0, 3, len(judged))
    copied = [one for one, times in zip(judged, copies, strict=True) for _ in range(times)]
    again = summarize([one._replace(number=number) for number, one in enumerate(copied)], ["a", "b"])
    assert [average_precision(each, copies) for each in ranked] == pytest.approx(
        [each.ap50 for each in again.by_class.values()]
    )


def test_the_range_of_ap50_is_wider_with_fewer_images():
    _, few = random_scores(images=6)
    _, many = random_scores(images=60)
    for scores in (few, many):
        low, high = scores.ap50_range
        assert low < scores.ap50 < high
    assert few.ap50_range[1] - few.ap50_range[0] > many.ap50_range[1] - many.ap50_range[0]
    assert few.ap50_range == random_scores(images=6)[1].ap50_range
    assert all(map(math.isnan, score([scene([(TOP, 0)])], [found((TOP, 0, 0.9))], ["a"]).ap50_range))


def test_curves_are_those_of_coco():
    scores = score([scene([(TOP, 0), (BOTTOM, 0)])], [found((TOP, 0, 0.9))], ["a", "b"])
    assert scores.curves == {"a": pytest.approx([1.0] * 51 + [0.0] * 50)}
    assert "curves" in scores.as_dict(whole=True) and "curves" not in scores.as_dict()
    assert json.loads(json.dumps(scores.as_dict(whole=True)))["confusion"] == scores.confusion


def test_a_word_of_caution_where_scores_rest_on_few_images():
    assert score([scene([(TOP, 0)])] * 3, [found()] * 3, ["a"]).cautions == [
        "all scores rest on 3 images: others of the same kind may score quite differently"
    ]
    scenes = [scene([(TOP, 0)])] * 9 + [scene([(TOP, 0), (BOTTOM, 1)])] * 2
    assert score(scenes, [found()] * 11, ["a", "b", "c"]).cautions == [
        "AP may be chance for classes in fewer than 10 images: b (2)"
    ]
    assert score([scene([(TOP, 0)])] * 10, [found()] * 10, ["a", "b"]).cautions == []


# Label maps and what StarDist's `matching` counts on them at IoU 0.5, 0.7 and 0.9: true positives, false positives,
# false negatives. The IoU of the pairs is written beside each case.
STARDIST = {
    "equal": ([[1, 1, 2, 2]], [[2, 2, 1, 1]], [(2, 0, 0), (2, 0, 0), (2, 0, 0)]),
    "3 of 4 pixels: 0.75": ([[1, 1, 1, 1]], [[0, 3, 3, 3]], [(1, 0, 0), (1, 0, 0), (0, 1, 1)]),
    "two halves of one, each 0.5": ([[1, 1, 1, 1]], [[1, 1, 2, 2]], [(1, 1, 0), (0, 2, 1), (0, 2, 1)]),
    "one over two, each 0.5": ([[1, 1, 2, 2]], [[7, 7, 7, 7]], [(1, 0, 1), (0, 1, 2), (0, 1, 2)]),
    "nothing is there": ([[0, 0, 0, 0]], [[0, 1, 1, 0]], [(0, 1, 0)] * 3),
    "nothing is found": ([[4, 4, 0, 9]], [[0, 0, 0, 0]], [(0, 0, 2)] * 3),
    "both are empty": ([[0, 0]], [[0, 0]], [(0, 0, 0)] * 3),
    # Matching the best pair first (0.6 of pair 1, 5) would leave pair 2, 5 and 1, 6 without a partner at 0.5.
    "shifted: 5/7 and 0.5": ([[1, 1, 1, 1, 1, 1, 2, 2]], [[0, 5, 5, 5, 5, 5, 5, 6]], [(2, 0, 0), (1, 1, 1), (0, 2, 2)]),
}


@pytest.mark.parametrize("case", STARDIST)
def test_the_ap_of_microscopy(case):
    truth, prediction, expected = STARDIST[case]
    for threshold, counts in zip((0.5, 0.7, 0.9), expected, strict=True):
        assert matching(np.array(truth), np.array(prediction), threshold) == counts


@pytest.mark.thorough
@settings(max_examples=number(300))
@given(arrays(np.uint8, (4, 6), elements=st.integers(0, 4)), arrays(np.uint8, (4, 6), elements=st.integers(0, 4)))
def test_the_matching_is_the_largest_there_is(truth, prediction):
    """Against every one-to-one assignment of at most four instances to four."""
    from itertools import permutations

    ids, others = ([number for number in np.unique(each) if number] for each in (truth, prediction))
    for threshold in (0.2, 0.5, 0.8):
        padded = [*others, *[None] * len(ids)]
        best = 0
        for chosen in permutations(padded, len(ids)):
            pairs = [(a, b) for a, b in zip(ids, chosen, strict=True) if b is not None]
            overlaps = (
                ((truth == a) & (prediction == b)).sum() / ((truth == a) | (prediction == b)).sum() for a, b in pairs
            )
            best = max(best, sum(overlap >= threshold for overlap in overlaps))
        assert matching(truth, prediction, threshold) == (best, len(others) - best, len(ids) - best)


def test_thresholds_are_those_of_coco():
    assert THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
