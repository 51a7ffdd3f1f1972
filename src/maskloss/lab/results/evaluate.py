"""How good predictions are: COCO's mask AP, mean IoU, and the AP of microscopy, on scenes with their truth."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause, require
from maskloss.instances import run_lengths
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.scenes import Scene
from maskloss.lab.files import plain
from maskloss.lab.results.details import (
    FEW,
    ClassScores,
    interval,
    matched_pairs,
    rank,
    score_class,
    taken_for,
)
from maskloss.lab.results.inference import FOUND, MOST, Prediction, Predictor

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
# Images that are predicted together.
_AT_ONCE = 16


@dataclass(frozen=True)
class Evaluation:
    """Scores over a set of scenes, each in [0, 1]; nan where there was nothing to score."""

    ap: float  # COCO's mask AP, the mean over IoU thresholds 0.50, 0.55, ..., 0.95
    ap50: float  # AP at IoU 0.50
    ap75: float  # AP at IoU 0.75
    ap_small: float  # AP of instances of less than 32 x 32 pixels
    ap_medium: float  # of those up to 96 x 96 pixels
    ap_large: float  # of larger ones
    mean_iou: float  # IoU of the pixels of each class over all scenes, the mean over classes
    # in which AP50 would lie on 95% of other images of the same kind, as far as these can tell
    ap50_range: tuple[float, float]
    by_class: dict[str, ClassScores]  # scores of each class
    # for label maps of one class, TP / (TP + FP + FN) over all scenes at each IoU threshold; else empty
    matching: dict[str, float]
    scenes: int  # number of scenes
    instances: int  # number of instances in the truth
    # instances by their class (rows) and the class of the prediction that found them (columns), with "none" last:
    # missed instances, and false alarms; IoU and score are at least 0.5
    confusion: list[list[int]]
    curves: dict[str, list[float]]  # precision of each class at COCO's 101 recalls, at IoU 0.50

    def as_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """Return the scores as JSON can hold them, where nan becomes None; confusion and curves on request."""
        held: dict[str, Any] = plain(asdict(self))
        return held if whole else {name: held[name] for name in held if name not in {"confusion", "curves"}}

    @property
    def cautions(self) -> list[str]:
        """Say which scores rest on few images."""
        if self.scenes < FEW:
            images = f"{self.scenes} image{'s' * (self.scenes != 1)}"
            return [f"all scores rest on {images}: others of the same kind may score quite differently"]
        few = [f"{name} ({each.images})" for name, each in self.by_class.items() if 0 < each.images < FEW]
        return [f"AP may be chance for classes in fewer than {FEW} images: {', '.join(few)}"] if few else []

    @property
    def confused(self) -> list[tuple[int, str, str]]:
        """List which classes were taken for which others: how often, the true one, the found one; the most first."""
        names = list(self.by_class)
        listed = [
            (count, names[truth], names[found])
            for truth, row in enumerate(self.confusion[:-1])
            for found, count in enumerate(row[:-1])
            if count and truth != found
        ]
        return sorted(listed, key=lambda each: -each[0])


class Judged(NamedTuple):
    """What is kept of one scene and its prediction."""

    number: int  # of the scene
    size: tuple[int, int]  # height and width
    truth: list[dict[str, Any]]  # its instances and crowds, as COCO's evaluation takes them
    found: list[dict[str, Any]]  # the predicted instances, in the same form
    # which pairs of a class in truth and prediction occur, numbers truth * (C + 1) + prediction, where C stands
    # for none, and how many pixels each has: int64 `[2, K]`
    pixels: NDArray[np.int64]
    taken: NDArray[np.int64]  # the same numbers of instances, see `taken_for`
    matched: NDArray[np.int64]  # true positives, false positives and false negatives at each IoU threshold, `[10, 3]`


def evaluate(
    predictor: Predictor,
    scenes: Sequence[Scene],
    class_names: Sequence[str],
    *,
    one_class_maps: bool = False,
    problems: Problems | None = None,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[list[Judged]], list[Judged]] = lambda judged: judged,
    each: Callable[[int, Scene, Prediction], None] = lambda *_: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Predict scenes and compare them with their truth, without holding more than a few of them.

    Of several processes, each takes its `share` of the scenes, rank and number of processes, and `gather` joins what
    they found. `stopped` is asked now and then; if it says so, there are no scores.
    """
    problems = problems or Problems()
    judged: list[Judged] = []
    numbers = range(share[0], len(scenes), share[1])
    for start in range(0, len(numbers), _AT_ONCE):
        if stopped():
            return None
        some: list[tuple[int, Scene]] = []
        for number in numbers[start : start + _AT_ONCE]:
            with problems.tolerated():
                some.append((number, scenes[number]))
        predictions = predictor([scene.image for _, scene in some])
        for (number, scene), prediction in zip(some, predictions, strict=True):
            judged.append(judge(number, scene, prediction, len(class_names), one_class_maps))
            each(number, scene, prediction)
    return summarize(sorted(gather(judged), key=lambda one: one.number), class_names, one_class_maps)


def judge(number: int, scene: Scene, prediction: Prediction, num_classes: int, one_class_maps: bool = False) -> Judged:
    """Compare one scene with its prediction."""
    size = (scene.height, scene.width)
    matched = np.zeros((len(THRESHOLDS), 3), dtype=np.int64)
    if one_class_maps:
        truth = np.zeros(size, dtype=np.int32)
        for place, mask in enumerate(scene.masks().numpy(), start=1):
            truth[mask] = place
        labels, _ = prediction.label_map()
        matched = np.array([matching(truth, labels, threshold) for threshold in THRESHOLDS])
    entries = truth_entries(scene)
    found = [
        {**_encode(each.whole(*size)), "category_id": each.label, "score": each.score, "iscrowd": 0}
        for each in prediction.instances
    ]
    return Judged(
        number,
        size,
        entries,
        found,
        pixels_by_class(scene, prediction, num_classes),
        taken_for(entries, found, num_classes),
        matched,
    )


def summarize(judged: Sequence[Judged], class_names: Sequence[str], one_class_maps: bool = False) -> Evaluation:
    """Compute the scores of all scenes."""
    if not judged:
        raise Cause("there must be held-out images to score on", "none could be read", "see what was skipped")
    judge = _coco(judged, class_names)
    precision: NDArray[np.float64] = judge.eval["precision"][..., -1]
    every, small, medium, large = (precision[..., area] for area in range(4))
    matched = np.sum([one.matched for one in judged], axis=0)
    ranked = [rank(judge, len(judged), label) for label in range(len(class_names))]
    base = len(class_names) + 1
    taken = np.bincount(np.concatenate([one.taken for one in judged]), minlength=base**2).reshape(base, base)
    return Evaluation(
        ap=_mean(every),
        ap50=_mean(every[0]),
        ap75=_mean(every[5]),
        ap_small=_mean(small),
        ap_medium=_mean(medium),
        ap_large=_mean(large),
        mean_iou=mean_iou(_pixels(judged, len(class_names))),
        ap50_range=interval(ranked),
        by_class={
            name: score_class(ranked[label], _mean(every[..., label]), _mean(every[0, :, label]))
            for label, name in enumerate(class_names)
        },
        matching={
            f"{threshold:.2f}": float(row[0] / row.sum()) if row.sum() else float("nan")
            for threshold, row in zip(THRESHOLDS, matched, strict=True)
        }
        if one_class_maps
        else {},
        scenes=len(judged),
        instances=sum(not each["iscrowd"] for one in judged for each in one.truth),
        confusion=taken.tolist(),
        curves={
            name: every[0, :, label].tolist() for label, name in enumerate(class_names) if ranked[label].instances.any()
        },
    )


def matching(
    truth: NDArray[np.integer[Any]], found: NDArray[np.integer[Any]], threshold: float
) -> tuple[int, int, int]:
    """Count true positives, false positives and false negatives of a label map at an IoU threshold.

    Instances are matched one to one so that as many pairs as possible reach the threshold, and among these matchings
    the one with the highest IoU; TP / (TP + FP + FN) is the average precision of StarDist and Cellpose.

    Args:
        truth: `[H, W]`, 0 for the background.
        found: `[H, W]`, the predictions in the same form.
        threshold: a pair with at least this IoU counts.

    Example:
        >>> truth = np.array([[1, 1, 2, 2], [1, 1, 2, 2]])
        >>> matching(truth, np.array([[5, 5, 0, 7], [5, 5, 0, 0]]), 0.5)
        (1, 1, 1)
    """
    ids, rows = np.unique(truth, return_inverse=True)
    others, columns = np.unique(found, return_inverse=True)
    shared = np.zeros((len(ids), len(others)), dtype=np.int64)
    np.add.at(shared, (rows.reshape(-1), columns.reshape(-1)), 1)
    areas, other_areas = shared.sum(1), shared.sum(0)
    either = areas[:, None] + other_areas[None] - shared
    iou = (shared / either)[ids != 0][:, others != 0]
    count, other_count = iou.shape
    good = len(matched_pairs(iou, threshold)[0])
    return good, other_count - good, count - good


def pixels_by_class(scene: Scene, prediction: Prediction, num_classes: int) -> NDArray[np.int64]:
    """Count pixels by their class in the truth and in the prediction: the pairs that occur, as in `Judged`.

    A pixel is of the class of the best prediction that covers it and scores at least `FOUND`, else of none. Crowds and
    void are left out.
    """
    truth = np.full((scene.height, scene.width), num_classes, dtype=np.int64)
    for mask, label in zip(scene.masks().numpy(), scene.labels.tolist(), strict=True):
        truth[mask] = label
    found = np.full_like(truth, num_classes)
    for instance in reversed(prediction.instances):
        if instance.score >= FOUND:
            top, left, bottom, right = instance.box
            found[top:bottom, left:right][instance.mask] = instance.label
    counted = ~scene.crowd_masks().any(0).numpy()
    if scene.ignored is not None:
        counted &= ~scene.ignored.numpy()
    return np.stack(np.unique(truth[counted] * (num_classes + 1) + found[counted], return_counts=True))


def _pixels(judged: Sequence[Judged], num_classes: int) -> NDArray[np.int64]:
    """Add up the pixels of all scenes: `[C + 1, C + 1]`."""
    whole = np.zeros((num_classes + 1) ** 2, dtype=np.int64)
    for one in judged:
        whole[one.pixels[0]] += one.pixels[1]
    return whole.reshape(num_classes + 1, num_classes + 1)


def mean_iou(confused: NDArray[np.int64]) -> float:
    """Compute the IoU of the pixels of each class, and the mean over the classes that occur."""
    hits = confused.diagonal()[:-1]
    either = confused.sum(0)[:-1] + confused.sum(1)[:-1] - hits
    known = either > 0
    return float((hits[known] / either[known]).mean()) if known.any() else float("nan")


def _coco(judged: Sequence[Judged], class_names: Sequence[str]) -> Any:
    """Let pycocotools evaluate; its precision is `[thresholds, recalls, classes, sizes, 1]`, -1 without the class."""
    coco, cocoeval = require("pycocotools.coco", "train"), require("pycocotools.cocoeval", "train")
    truth, found = coco.COCO(), coco.COCO()
    truth.dataset = _dataset(judged, class_names, ((one.number, one.truth) for one in judged))
    found.dataset = _dataset(judged, class_names, ((one.number, one.found) for one in judged))
    with contextlib.redirect_stdout(io.StringIO()):
        for each in (truth, found):
            each.createIndex()
        judge = cocoeval.COCOeval(truth, found, "segm")
        # COCO looks at the best 100 of an image; where an image has more instances, at as many.
        most = max([MOST, *(len(one.truth) for one in judged)])
        judge.params.maxDets = [most]
        judge.evaluate()
        judge.accumulate()
    return judge


def _dataset(
    judged: Sequence[Judged], class_names: Sequence[str], entries: Iterable[tuple[int, list[dict[str, Any]]]]
) -> dict[str, list[dict[str, Any]]]:
    listed = ({"image_id": number, **each} for number, some in entries for each in some)
    return {
        "images": [{"id": one.number, "height": one.size[0], "width": one.size[1]} for one in judged],
        "categories": [{"id": label, "name": name} for label, name in enumerate(class_names)],
        # COCO's evaluation takes the id 0 for "not matched".
        "annotations": [{"id": number, **entry} for number, entry in enumerate(listed, start=1)],
    }


def _entries(masks: Iterable[Any], labels: Sequence[int], crowd: int) -> Iterable[dict[str, Any]]:
    for mask, label in zip(masks, labels, strict=True):
        yield {"category_id": label, "iscrowd": crowd, **_encode(mask)}


def truth_entries(scene: Scene) -> list[dict[str, Any]]:
    """Return the instances and crowds of a scene as COCO's evaluation takes them, with labels for categories."""
    return [
        *_entries(scene.masks().numpy(), scene.labels.tolist(), 0),
        *_entries(scene.crowd_masks().numpy(), scene.crowd_labels.tolist(), 1),
    ]


def _encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    return {"segmentation": run_lengths(mask), "area": int(mask.sum())}


def _mean(precision: NDArray[np.float64]) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else math.nan
