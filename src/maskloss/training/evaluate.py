"""How good predictions are: COCO's mask AP, and mean IoU, on scenes with their truth."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from maskloss.errors import require
from maskloss.training.data import Scene
from maskloss.training.model import Output, QueryNet

# A prediction of at least this score counts as found: in pictures and in mean IoU. AP needs no such threshold.
FOUND = 0.5
# Scenes that are predicted at once.
BATCH = 64


class Prediction(NamedTuple):
    """What the model found in one scene, best first.

    Attributes:
        masks: bool `[K, H, W]`, at the resolution of the truth.
        labels: int64 `[K]`.
        scores: float32 `[K]` in [0, 1].
    """

    masks: Tensor
    labels: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Scores over a set of scenes, each in [0, 1]; nan where there was nothing to score.

    Attributes:
        ap: COCO's mask AP, the mean over IoU thresholds 0.50, 0.55, ..., 0.95.
        ap50: AP at IoU 0.50.
        ap75: AP at IoU 0.75.
        mean_iou: IoU of the pixels of each class over all scenes, the mean over classes.
        class_ap50: AP at IoU 0.50 of each class.
        scenes: number of scenes.
        instances: number of instances in the truth.
    """

    ap: float
    ap50: float
    ap75: float
    mean_iou: float
    class_ap50: dict[str, float]
    scenes: int
    instances: int

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as JSON can hold them: nan becomes None."""

        def held(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: held(each) for name, each in value.items()}
            return None if isinstance(value, float) and math.isnan(value) else value

        plain: dict[str, Any] = held(asdict(self))
        return plain


@torch.no_grad()
def predict(model: QueryNet, scenes: Sequence[Scene], device: torch.device) -> list[Prediction]:
    """Predict scenes with the model as it is in evaluation."""
    training = model.training
    model.eval()
    predictions = []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        output = model(torch.stack([scene.image for scene in batch]).to(device))
        predictions += decode(output, batch)
    model.train(training)
    return predictions


def decode(output: Output, scenes: Sequence[Scene]) -> list[Prediction]:
    """Turn the final layer's logits into predictions, one for each query with a mask that is not empty.

    The score is the probability of the best class times the mean probability of the pixels inside the mask, as in
    Mask2Former. Masks are enlarged to the frame of the truth and cut to the image.
    """
    predictions = []
    for classes, logits, scene in zip(output.class_logits[-1].cpu(), output.mask_logits[-1].cpu(), scenes, strict=True):
        probability, labels = classes.softmax(-1)[:, :-1].max(-1)
        frame = (scene.frame, scene.frame)
        sharp = interpolate(logits[None], frame, mode="bilinear")[0, :, : scene.height, : scene.width]
        masks = sharp > 0
        area = masks.flatten(1).sum(1)
        certainty = (sharp.sigmoid() * masks).flatten(1).sum(1) / area.clamp(min=1)
        scores = probability * certainty
        order = scores.argsort(descending=True, stable=True)
        order = order[area[order] > 0]
        predictions.append(Prediction(masks[order], labels[order], scores[order]))
    return predictions


def evaluate(scenes: Sequence[Scene], predictions: Sequence[Prediction], class_names: Sequence[str]) -> Evaluation:
    """Compare predictions with the truth.

    Args:
        scenes: with their truth.
        predictions: one for each scene.
        class_names: the classes, in the order of their labels.

    Raises:
        MissingExtraError: pycocotools is not installed (extra `train`).
    """
    precision = _coco_precision(scenes, predictions, class_names)
    return Evaluation(
        ap=_mean(precision),
        ap50=_mean(precision[0]),
        ap75=_mean(precision[5]),
        mean_iou=mean_iou(scenes, predictions, len(class_names)),
        class_ap50={name: _mean(precision[0, :, label]) for label, name in enumerate(class_names)},
        scenes=len(scenes),
        instances=sum(len(scene.labels) for scene in scenes),
    )


def mean_iou(scenes: Sequence[Scene], predictions: Sequence[Prediction], num_classes: int) -> float:
    """Compute the IoU of the pixels of each class over all scenes, and the mean over the classes that occur.

    A pixel is of the class of the best prediction that covers it and scores at least `FOUND`, else of none.
    """
    shared, either = torch.zeros(2, num_classes)
    for scene, prediction in zip(scenes, predictions, strict=True):
        truth = torch.full((scene.height, scene.width), num_classes)
        for mask, label in zip(scene.masks(), scene.labels, strict=True):
            truth[mask] = label
        found = torch.full_like(truth, num_classes)
        for mask, label, score in reversed(list(zip(*prediction, strict=True))):
            if score >= FOUND:
                found[mask] = label
        counted = ~scene.crowd_masks().any(0)
        pairs = torch.bincount(truth[counted] * (num_classes + 1) + found[counted], minlength=(num_classes + 1) ** 2)
        confusion = pairs.view(num_classes + 1, num_classes + 1)
        hits = confusion.diagonal()[:-1]
        shared += hits
        either += confusion.sum(0)[:-1] + confusion.sum(1)[:-1] - hits
    return float((shared / either)[either > 0].mean())


def _coco_precision(
    scenes: Sequence[Scene], predictions: Sequence[Prediction], class_names: Sequence[str]
) -> np.ndarray[Any, Any]:
    """Return COCO's precision `[IoU thresholds, recall thresholds, classes]`, -1 where a class does not occur."""
    coco, cocoeval = require("pycocotools.coco", "train"), require("pycocotools.cocoeval", "train")
    truth, found = coco.COCO(), coco.COCO()
    truth.dataset = _dataset(scenes, class_names, _truth_entries(scenes))
    found.dataset = _dataset(scenes, class_names, _found_entries(predictions))
    with contextlib.redirect_stdout(io.StringIO()):
        for each in (truth, found):
            each.createIndex()
        judge = cocoeval.COCOeval(truth, found, "segm")
        judge.evaluate()
        judge.accumulate()
    all_sizes, most_detections = 0, -1
    precision: np.ndarray[Any, Any] = judge.eval["precision"][..., all_sizes, most_detections]
    return precision


def _dataset(
    scenes: Sequence[Scene], class_names: Sequence[str], entries: Iterable[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    return {
        "images": [{"id": image, "height": each.height, "width": each.width} for image, each in enumerate(scenes)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(class_names)],
        # COCO's evaluation takes the id 0 for "not matched".
        "annotations": [{"id": number, **entry} for number, entry in enumerate(entries, start=1)],
    }


def _truth_entries(scenes: Sequence[Scene]) -> Iterable[dict[str, Any]]:
    for image, scene in enumerate(scenes):
        for mask, label in zip(scene.masks(), scene.labels.tolist(), strict=True):
            yield {"image_id": image, "category_id": label, "iscrowd": 0, **_encode(mask)}
        for mask, label in zip(scene.crowd_masks(), scene.crowd_labels.tolist(), strict=True):
            yield {"image_id": image, "category_id": label, "iscrowd": 1, **_encode(mask)}


def _found_entries(predictions: Sequence[Prediction]) -> Iterable[dict[str, Any]]:
    for image, prediction in enumerate(predictions):
        for mask, label, score in zip(*prediction, strict=True):
            yield {"image_id": image, "category_id": int(label), "score": float(score), "iscrowd": 0, **_encode(mask)}


def _encode(mask: Tensor) -> dict[str, Any]:
    codec = require("pycocotools.mask", "train")
    return {"segmentation": codec.encode(np.asfortranarray(mask.numpy().astype(np.uint8))), "area": int(mask.sum())}


def _mean(precision: np.ndarray[Any, Any]) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")
