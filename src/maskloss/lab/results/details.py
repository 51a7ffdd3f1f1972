"""Scores in detail: class by class, what is taken for what, precision over recall, and how far to trust an AP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from maskloss.errors import require
from maskloss.lab.results.inference import FOUND

# An instance is found by a prediction of at least this IoU, as in AP50.
MATCHED = 0.5
# Fewer images than this say little.
FEW = 10
# COCO's recalls, at which precision is read.
RECALLS = np.linspace(0, 1, 101)
# Draws of images from which an interval is estimated, and how much of them it holds.
_DRAWS, _HELD = 200, 0.95


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class, each in [0, 1], and counts; nan where there was nothing to score."""

    ap: float  # COCO's mask AP
    ap50: float  # AP at IoU 0.50
    precision: float  # share of the predictions which score at least `FOUND` that are right, at IoU 0.50
    recall: float  # share of the instances that these predictions find
    images: int  # images with the class
    instances: int  # in the truth
    found: int  # predictions that score at least `FOUND`, without those in crowds


class Ranked(NamedTuple):
    """The predictions of one class in all images, best first, as pycocotools matched them at IoU 0.50."""

    scores: NDArray[np.float64]  # `[D]`, without those in crowds
    right: NDArray[np.bool_]  # whether each finds an instance, bool `[D]`
    image: NDArray[np.int64]  # the image of each, counted from 0, `[D]`
    instances: NDArray[np.int64]  # in each image, `[I]`


def rank(judge: Any, images: int, label: int) -> Ranked:
    """Collect the predictions of a class from pycocotools' evaluation."""
    instances = np.zeros(images, dtype=np.int64)
    scores: list[Any] = [np.zeros(0)]
    right: list[Any] = [np.zeros(0, dtype=bool)]
    image: list[Any] = [np.zeros(0, dtype=np.int64)]
    # In the order of classes, sizes and images; the first of the sizes is any.
    first = label * len(judge.params.areaRng) * images
    for number, found in enumerate(judge.evalImgs[first : first + images]):
        if found is not None:
            counted = found["dtIgnore"][0] == 0
            scores.append(np.asarray(found["dtScores"])[counted])
            right.append(found["dtMatches"][0][counted] > 0)
            image.append(np.full(int(counted.sum()), number))
            instances[number] = int((np.asarray(found["gtIgnore"]) == 0).sum())
    joined = np.concatenate(scores)
    order = np.argsort(-joined, kind="mergesort")
    return Ranked(joined[order], np.concatenate(right)[order], np.concatenate(image)[order], instances)


def score_class(ranked: Ranked, ap: float, ap50: float) -> ClassScores:
    """Count how many predictions of a class are right."""
    kept = ranked.scores >= FOUND
    right, found, instances = int(ranked.right[kept].sum()), int(kept.sum()), int(ranked.instances.sum())
    return ClassScores(
        ap=ap,
        ap50=ap50,
        precision=right / found if found else math.nan,
        recall=right / instances if instances else math.nan,
        images=int((ranked.instances > 0).sum()),
        instances=instances,
        found=found,
    )


def average_precision(ranked: Ranked, copies: NDArray[np.int64]) -> float:
    """Compute COCO's AP50 of a class, as if each image were there so many times; nan where the class is not."""
    positives = int(copies @ ranked.instances)
    if not positives:
        return math.nan
    weight = copies[ranked.image]
    right, looked_at = np.cumsum(weight * ranked.right), np.cumsum(weight)
    precision = np.maximum.accumulate((right / np.maximum(looked_at, 1))[::-1])[::-1]
    places = np.searchsorted(right / positives, RECALLS, side="left")
    return float(np.append(precision, 0.0)[places].mean())


def interval(classes: Sequence[Ranked]) -> tuple[float, float]:
    """Estimate in which range AP50 would lie on other images of the same kind: 95% of draws of images (bootstrap).

    Returns:
        Both ends; nan for fewer than two images, or none with an instance.
    """
    present = [each for each in classes if each.instances.any()]
    images = len(present[0].instances) if present else 0
    if images < 2:
        return math.nan, math.nan
    random = np.random.default_rng(0)
    found = []
    for _ in range(_DRAWS):
        copies = np.bincount(random.integers(images, size=images), minlength=images)
        each = np.array([average_precision(ranked, copies) for ranked in present])
        if not np.isnan(each).all():
            found.append(np.nanmean(each))
    low, high = np.quantile(found, [(1 - _HELD) / 2, (1 + _HELD) / 2]) if found else (math.nan, math.nan)
    return float(low), float(high)


def matched_pairs(iou: NDArray[np.float64], threshold: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair instances and predictions one to one, so that as many pairs as possible reach an IoU, given all `[T, D]`.

    Returns:
        Rows and columns of the pairs that count; among the largest choices the one with the highest IoU.
    """
    fewer = min(iou.shape)
    if not fewer or not (iou >= threshold).any():
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    rows, columns = linear_sum_assignment((iou >= threshold) + iou / (2 * fewer), maximize=True)
    counts = iou[rows, columns] >= threshold
    return rows[counts], columns[counts]


def taken_for(
    truth: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], num_classes: int
) -> NDArray[np.int64]:
    """Say for each instance of an image, whatever its class, what it was found to be, from entries as COCO's has them.

    Returns:
        truth * (C + 1) + found for each pair, missed instance and false alarm, where C stands for nothing. Predictions
        in crowds are left out, and those that score below `FOUND`.
    """
    kept = [each for each in found if each["score"] >= FOUND]
    objects = [each for each in truth if not each["iscrowd"]]
    crowds = [each for each in truth if each["iscrowd"]]
    iou, inside = _iou(kept, objects, 0).T, _iou(kept, crowds, 1)
    rows, columns = matched_pairs(iou, MATCHED)
    labels = np.array([each["category_id"] for each in objects], dtype=np.int64)
    its_labels = np.array([each["category_id"] for each in kept], dtype=np.int64)
    missed = np.setdiff1d(np.arange(len(objects)), rows)
    alarms = np.setdiff1d(np.flatnonzero((inside < MATCHED).all(1)), columns)
    base = num_classes + 1
    pairs = labels[rows] * base + its_labels[columns]
    return np.concatenate([pairs, labels[missed] * base + num_classes, num_classes * base + its_labels[alarms]])


def _iou(found: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]], crowd: int) -> NDArray[np.float64]:
    """Compute the IoU of masks `[D, T]`, or the share of a prediction that lies in a crowd."""
    if not found or not truth:
        return np.zeros((len(found), len(truth)))
    runs = ([each["segmentation"] for each in some] for some in (found, truth))
    shared: NDArray[np.float64] = require("pycocotools.mask", "train").iou(*runs, [crowd] * len(truth))
    return shared
