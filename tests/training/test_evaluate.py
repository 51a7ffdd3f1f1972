"""AP and mean IoU against what a person can compute."""

from __future__ import annotations

import math

import pytest
import torch

from maskloss import MaskTargets
from maskloss.training.data import Scene
from maskloss.training.evaluate import Prediction, decode, evaluate, mean_iou
from maskloss.training.model import Output

SIDE = 20


def block(top: int, left: int, height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def scene(instances, crowds=()) -> Scene:
    def packed(masks):
        stacked = torch.stack(masks) if masks else torch.zeros(0, SIDE, SIDE, dtype=torch.bool)
        return MaskTargets.from_masks(stacked)

    return Scene(
        image=torch.zeros(3, 16, 16),
        targets=packed([mask for mask, _ in instances]),
        labels=torch.tensor([label for _, label in instances], dtype=torch.int64),
        crowd=packed([mask for mask, _ in crowds]),
        crowd_labels=torch.tensor([label for _, label in crowds], dtype=torch.int64),
        height=SIDE,
        width=SIDE,
        name="",
    )


def found(*instances) -> Prediction:
    masks = torch.stack([mask for mask, _, _ in instances]) if instances else torch.zeros(0, SIDE, SIDE).bool()
    labels = torch.tensor([label for _, label, _ in instances], dtype=torch.int64)
    return Prediction(masks, labels, torch.tensor([score for _, _, score in instances]))


TOP, BOTTOM = block(0, 0, 10, 10), block(10, 10, 10, 10)


def test_the_truth_scores_one():
    scenes = [scene([(TOP, 0), (BOTTOM, 1)]), scene([(BOTTOM, 0)])]
    predictions = [found((TOP, 0, 0.9), (BOTTOM, 1, 0.8)), found((BOTTOM, 0, 0.7))]
    scores = evaluate(scenes, predictions, ["a", "b"])
    assert (scores.ap, scores.ap50, scores.ap75, scores.mean_iou) == pytest.approx((1, 1, 1, 1))
    assert scores.class_ap50 == pytest.approx({"a": 1, "b": 1})
    assert (scores.scenes, scores.instances) == (2, 3)


def test_nothing_found_scores_zero():
    scores = evaluate([scene([(TOP, 0)])], [found()], ["a"])
    assert (scores.ap, scores.ap50, scores.mean_iou) == (0, 0, 0)


def test_half_of_two_instances_is_half_of_the_recall_thresholds():
    """One of two found: precision 1 up to a recall of 0.5, so at 51 of COCO's 101 thresholds."""
    scores = evaluate([scene([(TOP, 0), (BOTTOM, 0)])], [found((TOP, 0, 0.9))], ["a"])
    assert scores.ap50 == pytest.approx(51 / 101)


def test_a_false_alarm_above_the_hit_halves_precision():
    alarm = block(0, 12, 6, 6)
    scores = evaluate([scene([(TOP, 0)])], [found((alarm, 0, 0.9), (TOP, 0, 0.8))], ["a"])
    assert scores.ap50 == pytest.approx(0.5)
    behind = evaluate([scene([(TOP, 0)])], [found((TOP, 0, 0.9), (alarm, 0, 0.8))], ["a"])
    assert behind.ap50 == pytest.approx(1)


def test_iou_decides_at_which_thresholds_a_mask_counts():
    """An IoU of 0.72 counts at 0.50, 0.55, 0.60, 0.65 and 0.70, five of ten."""
    part = block(0, 0, 9, 8)
    scores = evaluate([scene([(TOP, 0)])], [found((part, 0, 0.9))], ["a"])
    assert (scores.ap50, scores.ap75) == pytest.approx((1, 0))
    assert scores.ap == pytest.approx(0.5)
    assert scores.mean_iou == pytest.approx(0.72)


def test_the_right_mask_with_the_wrong_class_counts_for_neither():
    scores = evaluate([scene([(TOP, 0), (BOTTOM, 1)])], [found((TOP, 1, 0.9), (BOTTOM, 1, 0.8))], ["a", "b"])
    assert scores.class_ap50 == {"a": 0, "b": pytest.approx(0.5)}
    # Class b: 100 pixels right of the 200 found; class a: none.
    assert scores.mean_iou == pytest.approx(0.25)


def test_a_class_that_does_not_occur_is_left_out():
    scores = evaluate([scene([(TOP, 0)])], [found((TOP, 0, 0.9))], ["a", "b"])
    assert scores.ap50 == pytest.approx(1) and math.isnan(scores.class_ap50["b"])
    assert scores.as_dict()["class_ap50"] == {"a": scores.ap50, "b": None}


def test_predictions_inside_a_crowd_are_not_counted():
    crowd, inside = block(10, 0, 10, 10), block(12, 2, 5, 5)
    predictions = [found((inside, 0, 0.9), (TOP, 0, 0.8))]
    assert evaluate([scene([(TOP, 0)], [(crowd, 0)])], predictions, ["a"]).ap50 == pytest.approx(1)
    assert evaluate([scene([(TOP, 0)])], predictions, ["a"]).ap50 == pytest.approx(0.5)


def test_mean_iou_takes_the_best_prediction_of_a_pixel_and_none_that_is_unsure():
    truth = [scene([(TOP, 0)])]
    assert mean_iou(truth, [found((TOP, 0, 0.9), (TOP, 1, 0.8))], 2) == 1
    assert mean_iou(truth, [found((TOP, 1, 0.9), (TOP, 0, 0.8))], 2) == 0
    assert mean_iou(truth, [found((TOP, 0, 0.49))], 2) == 0


def test_decoding_cuts_away_the_padding_and_sorts_by_score():
    """Two queries on a square of which the image takes the upper half."""
    wide = scene([(TOP, 0)])._replace(height=SIDE // 2)
    logits = torch.full((1, 3, SIDE // 2, SIDE // 2), -8.0)
    logits[0, 0, :, :2] = 8
    logits[0, 1, 6:] = 8  # in the padding only
    logits[0, 2, :3] = 8
    classes = torch.tensor([[[1.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 4.0, 0.0]]])
    [prediction] = decode(Output([classes], [logits]), [wide])
    assert prediction.masks.shape == (2, SIDE // 2, SIDE)
    assert prediction.labels.tolist() == [1, 0]
    assert prediction.masks[0, :5].all() and not prediction.masks[0, 7:].any()
    probability = classes[0, 2].softmax(0)[1]
    assert 0.95 * probability < prediction.scores[0] <= probability
