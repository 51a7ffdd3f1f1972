"""Calls that must fail, and what their errors must say: the tables of `test_errors`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskloss import (
    HungarianMatcher,
    MaskCriterion,
    MaskLoss,
    MaskTargets,
    Matches,
    PointSampling,
    StepTotals,
    functional,
    step_totals,
)

NAN, INF = float("nan"), float("inf")
FEW = PointSampling(num_points=8)

PAIRS = torch.zeros(2, 8, 8)  # two predictions, [N, h, w]
LAYER = torch.zeros(2, 3, 8, 8)  # two images of three queries, [B, Q, h, w]
CLASSES = torch.zeros(2, 3, 5)  # four classes
MASKS = torch.zeros(2, 10, 12, dtype=torch.bool)
MAP = torch.tensor([[0, 7], [7, 9]])
TRIANGLE = [0, 0, 3, 0, 3, 3]


def index(*numbers: float) -> Tensor:
    return torch.tensor(numbers) if numbers else torch.empty(0, dtype=torch.int64)


def entry(labels: Any = (0, 1), masks: Any = MASKS, **more: Any) -> dict[str, Any]:
    return {"masks": masks, "labels": index(*labels) if isinstance(labels, tuple) else labels, **more}


def loss(logits: Any = PAIRS, masks: Any = MASKS, matches: Any = None, **options: Any) -> object:
    return MaskLoss(sampling=FEW, backend="reference")(logits, masks, matches, **options)


def criterion(classes: Any = CLASSES, logits: Any = LAYER, targets: Any = None, **options: Any) -> object:
    targets = [entry(), entry()] if targets is None else targets
    return MaskCriterion(4, sampling=FEW, backend="reference")(classes, logits, targets, **options)


def matching(classes: Any = CLASSES, logits: Any = LAYER, targets: Any = None, **options: Any) -> Matches:
    targets = [entry(), entry()] if targets is None else targets
    return HungarianMatcher(num_points=8, backend="reference")(classes, logits, targets, **options)


def matched(*pairs: Any) -> object:
    """The loss of two images with the same pairs."""
    return loss(LAYER, [MASKS, MASKS], list(pairs))


def rle(counts: Any, size: Any = (10, 12)) -> object:
    return MaskTargets.from_coco([{"size": size, "counts": counts}], 10, 12)


def polygon(*coordinates: Any) -> object:
    return MaskTargets.from_coco([[list(coordinates)]], 10, 12)


@dataclass(frozen=True)
class Bad:
    """A call that must fail; `found` is part of the cause, or of the rule where that says all."""

    operation: str
    rule: str
    found: str
    call: Callable[[], object]


Loss, Criterion, Matcher, Sampling, From = MaskLoss, MaskCriterion, HungarianMatcher, PointSampling, MaskTargets
meta = partial(torch.zeros, device="meta")

OPTIONS = {
    "no points": Bad("PointSampling", "num_points must be an integer", "num_points=0", lambda: Sampling(0)),
    "half a point": Bad("PointSampling", "num_points must be an integer", "=2.5", lambda: Sampling(2.5)),
    "num_points a flag": Bad("PointSampling", "num_points must be an integer", "=True", lambda: Sampling(True)),
    "k below 1": Bad("PointSampling", "oversample_ratio must be", "=0.5", lambda: Sampling(8, 0.5)),
    "k NaN": Bad("PointSampling", "oversample_ratio must be", "=nan", lambda: Sampling(8, NAN)),
    "k infinite": Bad("PointSampling", "oversample_ratio must be", "=inf", lambda: Sampling(8, INF)),
    "k a string": Bad("PointSampling", "oversample_ratio must be", "='3'", lambda: Sampling(8, "3")),
    "alpha above 1": Bad("PointSampling", "a finite number in [0, 1]", "=1.1", lambda: Sampling(8, 3.0, 1.1)),
    "alpha below 0": Bad("PointSampling", "a finite number in [0, 1]", "=-0.1", lambda: Sampling(8, 3.0, -0.1)),
    "alpha NaN": Bad("PointSampling", "a finite number in [0, 1]", "=nan", lambda: Sampling(8, 3.0, NAN)),
    "alpha None": Bad("PointSampling", "a finite number in [0, 1]", "=None", lambda: Sampling(8, 3.0, None)),
    "negative weight": Bad("MaskLoss", "ce_weight must be a finite", "=-1", lambda: Loss(ce_weight=-1)),
    "NaN weight": Bad("MaskLoss", "dice_weight must be a finite", "=nan", lambda: Loss(dice_weight=NAN)),
    "infinite weight": Bad("HungarianMatcher", "class_weight must be", "=inf", lambda: Matcher(class_weight=INF)),
    "weight a string": Bad("MaskLoss", "ce_weight must be a finite", "='5'", lambda: Loss(ce_weight="5")),
    "no-object weight": Bad("MaskCriterion", "no_object_weight", "=-0.1", lambda: Criterion(4, no_object_weight=-0.1)),
    "weight of a part": Bad("MaskCriterion", "dice_weight must be", "=-2", lambda: Criterion(4, dice_weight=-2)),
    "padding mode": Bad("MaskLoss", "one of zeros, border", "='reflection'", lambda: Loss(padding_mode="reflection")),
    "target mode": Bad(
        "MaskCriterion", "one of bilinear, nearest", "'cubic'", lambda: Criterion(4, target_mode="cubic")
    ),
    "focal alpha alone": Bad("MaskLoss", "focal_alpha needs focal_gamma", "None", lambda: Loss(focal_alpha=0.25)),
    "focal alpha": Bad("HungarianMatcher", "in [0, 1]", "=1.5", lambda: Matcher(focal_alpha=1.5, focal_gamma=2.0)),
    "focal gamma": Bad(
        "MaskLoss", "focal_gamma must be a finite number, at least 0", "=-1.0", lambda: Loss(focal_gamma=-1.0)
    ),
    "focal gamma NaN": Bad(
        "MaskLoss", "focal_gamma must be a finite number, at least 0", "=nan", lambda: Loss(focal_gamma=NAN)
    ),
    "backend": Bad("MaskLoss", "one of reference, cpu, gpu", "backend='cuda'", lambda: Loss(backend="cuda")),
    "sampling a number": Bad("MaskLoss", "must be a PointSampling", "got 128", lambda: Loss(sampling=128)),
    "no classes": Bad("MaskCriterion", "num_classes must be an integer, at least 1", "=0", lambda: Criterion(0)),
    "all weights 0": Bad(
        "HungarianMatcher",
        "at least one weight must be positive, or extra_costs given",
        "all are 0",
        lambda: Matcher(class_weight=0, mask_weight=0, dice_weight=0)(CLASSES, LAYER, [entry(), entry()]),
    ),
    "points of the matcher": Bad("HungarianMatcher", "num_points must be", "=0", lambda: Matcher(num_points=0)),
}

LOSS = {
    "too many pairs": Bad(
        "MaskLoss", "must pair up", "3 predictions but 2 targets", lambda: loss(torch.zeros(3, 8, 8))
    ),
    "rank 2": Bad("MaskLoss", "mask_logits must be [N, h, w]", "got 2 dimensions", lambda: loss(PAIRS[0])),
    "queries without matches": Bad("MaskLoss", "[B, Q, h, w] need matches", "is None", lambda: loss(LAYER)),
    "matches without queries": Bad(
        "MaskLoss", "must be [B, Q, h, w]", "got 3", lambda: loss(PAIRS, [MASKS], [(index(0), index(0))])
    ),
    "integer logits": Bad("MaskLoss", "mask_logits must be float16, bfloat16", "int64", lambda: loss(PAIRS.long())),
    "logits an array": Bad("MaskLoss", "must be a tensor [N, h, w]", "numpy [2, 8, 8]", lambda: loss(PAIRS.numpy())),
    "no pixels": Bad("MaskLoss", "must have at least one pixel", "[2, 8, 0]", lambda: loss(torch.zeros(2, 8, 0))),
    "logits elsewhere": Bad("MaskLoss", "on the device of the logits", "logits on meta", lambda: loss(meta(2, 8, 8))),
    "masks elsewhere": Bad(
        "MaskLoss",
        "on the device of the logits",
        "masks on meta",
        lambda: loss(masks=From.from_masks(MASKS).to("meta")),
    ),
    "masks None": Bad("MaskLoss", "must pair up", "2 predictions but 0 targets", lambda: loss(masks=None)),
    "masks of rank 2": Bad(
        "MaskLoss", "masks must be a tensor or an array [T, H, W]", "[10, 12] bool", lambda: loss(masks=MASKS[0])
    ),
    "array of text": Bad("MaskLoss", "must be a tensor or an array", "numpy", lambda: loss(masks=np.array([[["x"]]]))),
    "complex masks": Bad(
        "MaskLoss", "must be bool, integer or float", "complex64", lambda: loss(masks=MASKS.to(torch.complex64))
    ),
    "integer masks": Bad(
        "MaskLoss", "integer masks must be 0 or 1", "from 2 to 2", lambda: loss(masks=MASKS.long() + 2)
    ),
    "images": Bad(
        "MaskLoss", "the same number of images", "2 images of logits but 1", lambda: loss(LAYER, [MASKS], [])
    ),
    "matches of one image": Bad("MaskLoss", "matches for every image", "1 entries for 2", lambda: matched((0, 0))),
    "no pair": Bad("MaskLoss", "must be a pair", "image 0 are [1] int64", lambda: matched(index(0), index(0))),
    "one query too many": Bad(
        "MaskLoss", "must pair up", "[2] queries and [1]", lambda: matched(*[(index(0, 1), index(0))] * 2)
    ),
    "query out of range": Bad(
        "MaskLoss", "queries of a match must lie in [0, 3)", "to 3", lambda: matched(*[(index(3), index(0))] * 2)
    ),
    "target out of range": Bad(
        "MaskLoss", "targets of a match must lie in [0, 2)", "to 2", lambda: matched(*[(index(0), index(2))] * 2)
    ),
    "negative query": Bad(
        "MaskLoss",
        "must lie in [0, 3)",
        "image 1 reach from -1",
        lambda: matched((index(), index()), (index(-1), index(0))),
    ),
    "half a query": Bad(
        "MaskLoss", "matches must be integers", "float32", lambda: matched(*[(index(0.5), index(0))] * 2)
    ),
    "matches of many layers": Bad(
        "MaskLoss",
        "of one decoder layer",
        "2 layers",
        lambda: loss(LAYER, [MASKS, MASKS], matching([CLASSES] * 2, [LAYER] * 2)),
    ),
    "matches of other queries": Bad(
        "MaskLoss",
        "those of these predictions and targets",
        "3 queries",
        lambda: loss(LAYER[:, :1], [MASKS, MASKS], matching()),
    ),
    "matches of other targets": Bad(
        "MaskLoss",
        "those of these predictions and targets",
        "[1, 2] targets",
        lambda: loss(LAYER, [MASKS[:1], MASKS], matching()),
    ),
    "points of rank 2": Bad("MaskLoss", "points must be float", "[2, 8]", lambda: loss(points=torch.zeros(2, 8))),
    "points in space": Bad("MaskLoss", "points must be float", "[2, 8, 3]", lambda: loss(points=torch.zeros(2, 8, 3))),
    "integer points": Bad(
        "MaskLoss", "points must be float", "int64", lambda: loss(points=torch.zeros(2, 8, 2).long())
    ),
    "points of others": Bad("MaskLoss", "for every instance", "[1, 8, 2]", lambda: loss(points=torch.zeros(1, 8, 2))),
    "no given points": Bad("MaskLoss", "for every instance", "[2, 0, 2]", lambda: loss(points=torch.zeros(2, 0, 2))),
    "points elsewhere": Bad("MaskLoss", "points must be on the device", "meta", lambda: loss(points=meta(2, 8, 2))),
    "instance weights whole": Bad(
        "MaskLoss",
        "instance_weights must be a bool or float",
        "[2] int64",
        lambda: loss(instance_weights=torch.ones(2).long()),
    ),
    "instance weights a list": Bad(
        "MaskLoss", "instance_weights must be", "True", lambda: loss(instance_weights=[True, False])
    ),
    "instance weight negative": Bad(
        "MaskLoss", "finite and at least 0", "from -1 to 1", lambda: loss(instance_weights=torch.tensor([-1.0, 1.0]))
    ),
    "instance weight NaN": Bad(
        "MaskLoss", "finite and at least 0", "nan", lambda: loss(instance_weights=torch.tensor([1.0, NAN]))
    ),
    "negative count": Bad("MaskLoss", "num_instances must be a finite", "=-1", lambda: loss(num_instances=-1)),
    "NaN count": Bad("MaskLoss", "num_instances must be a finite", "=nan", lambda: loss(num_instances=NAN)),
    "image ids": Bad(
        "MaskLoss", "one integer in [0, 2^32) for each image", "[0, 1] for 1 image", lambda: loss(image_ids=[0, 1])
    ),
    "image id too large": Bad("MaskLoss", "[0, 2^32)", "to 4294967296", lambda: loss(image_ids=[2**32])),
    "negative image id": Bad("MaskLoss", "[0, 2^32)", "from -1", lambda: loss(image_ids=[-1])),
    "half an image id": Bad(
        "MaskLoss", "one integer in [0, 2^32) for each image", "[0.5]", lambda: loss(image_ids=[0.5])
    ),
    "seed and generator": Bad(
        "MaskLoss", "seed or generator", "both were given", lambda: loss(seed=1, generator=torch.Generator())
    ),
    "seed too large": Bad("MaskLoss", "seed must be a 64-bit integer", str(2**64), lambda: loss(seed=2**64)),
    "seed too small": Bad("MaskLoss", "seed must be a 64-bit integer", "=-9223", lambda: loss(seed=-(2**63) - 1)),
    "half a seed": Bad("MaskLoss", "seed must be a 64-bit integer", "=0.5", lambda: loss(seed=0.5)),
    "seed elsewhere": Bad(
        "MaskLoss",
        "on the CPU or on the device",
        "it is on meta, the logits on cpu",
        lambda: loss(seed=index(1).to("meta")),
    ),
    "two seeds": Bad("MaskLoss", "seed tensor must hold one int64", "[2] int64", lambda: loss(seed=index(1, 2))),
    "backend of a GPU": Bad(
        "MaskLoss",
        "backend 'gpu' runs on CUDA and ROCm tensors only",
        "on cpu",
        lambda: Loss(backend="gpu")(PAIRS, MASKS),
    ),
}

TARGETS = {
    "soft above 1": Bad(
        "MaskTargets.from_masks", "in [0, 1]", "to 255", lambda: From.from_masks((~MASKS).float() * 255)
    ),
    "soft NaN": Bad("MaskTargets.from_masks", "in [0, 1]", "nan", lambda: From.from_masks(MASKS.float() + NAN)),
    "forced soft": Bad(
        "MaskTargets.from_masks", "in [0, 1]", "from -1", lambda: From.from_masks(MASKS.float() - 1, soft=True)
    ),
    "small canvas": Bad(
        "MaskTargets.from_masks", "at least as large", "canvas 9 x 12", lambda: From.from_masks(MASKS, canvas=(9, 12))
    ),
    "canvas with channels": Bad(
        "MaskTargets.from_masks",
        "must be (height, width)",
        "(3, 20, 20)",
        lambda: From.from_masks(MASKS, canvas=(3, 20, 20)),
    ),
    "window outside": Bad(
        "MaskTargets.from_masks",
        "must be a part of the frame",
        "frame 10 x 12",
        lambda: From.from_masks(MASKS, valid=(0, 0, 11, 12)),
    ),
    "empty window": Bad(
        "MaskTargets.from_masks",
        "must be a part of the frame",
        "(0, 0, 10, 0)",
        lambda: From.from_masks(MASKS, valid=(0, 0, 10, 0)),
    ),
    "negative window": Bad(
        "MaskTargets.from_masks",
        "must be a part of the frame",
        "(-1, 0",
        lambda: From.from_masks(MASKS, valid=(-1, 0, 2, 2)),
    ),
    "window of three": Bad(
        "MaskTargets.from_masks",
        "(top, left, height, width)",
        "(0, 4, 4)",
        lambda: From.from_masks(MASKS, valid=(0, 4, 4)),
    ),
    "ignore of another size": Bad(
        "MaskTargets.from_masks",
        "of the size of the masks",
        "[12, 10]",
        lambda: From.from_masks(MASKS, ignore=MASKS[0].T),
    ),
    "ignore of floats": Bad(
        "MaskTargets.from_masks",
        "must be bool [H, W]",
        "float32",
        lambda: From.from_masks(MASKS, ignore=torch.zeros(10, 12)),
    ),
    "ignore a text": Bad(
        "MaskTargets.from_masks", "must be bool [H, W]", "'x'", lambda: From.from_masks(MASKS, ignore="x")
    ),
    "no void value": Bad(
        "MaskTargets.from_masks", "must be neither 0 nor 1", "=1", lambda: From.from_masks(MASKS, ignore_value=1)
    ),
    "void id": Bad(
        "MaskTargets.from_label_map", "no target's id", "7", lambda: From.from_label_map(MAP, [7], ignore_value=7)
    ),
    "ignore elsewhere": Bad(
        "MaskTargets.from_masks",
        "on the device of the masks",
        "meta",
        lambda: From.from_masks(MASKS, ignore=MASKS[0].to("meta")),
    ),
    "packed too narrow": Bad(
        "MaskTargets.from_packed",
        "ceil(width / 8)",
        "for width 9",
        lambda: From.from_packed(torch.zeros(1, 4, 1).byte(), 9),
    ),
    "packed of floats": Bad(
        "MaskTargets.from_packed", "must be uint8", "float32", lambda: From.from_packed(torch.zeros(1, 4, 1), 8)
    ),
    "packed of another type": Bad(
        "MaskTargets.from_packed", "must be uint8", "int16", lambda: From.from_packed(np.zeros((1, 4, 1), np.int16), 8)
    ),
    "map of rank 4": Bad(
        "MaskTargets.from_label_map", "[H, W]", "[1, 1, 2, 2]", lambda: From.from_label_map(MAP[None, None], [7])
    ),
    "map of floats": Bad(
        "MaskTargets.from_label_map", "[H, W]", "float", lambda: From.from_label_map(MAP.float(), [7])
    ),
    "array of floats": Bad(
        "MaskTargets.from_label_map", "[H, W]", "[2, 2] float64", lambda: From.from_label_map(MAP.numpy() / 2, [7])
    ),
    "missing ids": Bad(
        "MaskTargets.from_label_map",
        "every id must occur",
        "2 of 3 do not, the first is 8",
        lambda: From.from_label_map(MAP, [8, 7, -1]),
    ),
    "half an id": Bad(
        "MaskTargets.from_label_map", "an id must be an integer in", "=0.5", lambda: From.from_label_map(MAP, [0.5])
    ),
    "ids of rank 2": Bad(
        "MaskTargets.from_label_map",
        "an id must be an integer in",
        "=[7]",
        lambda: From.from_label_map(MAP, index(7)[None]),
    ),
    "id too large": Bad(
        "MaskTargets.from_label_map",
        "an id must be an integer in",
        f"={2**63}",
        lambda: From.from_label_map(MAP, [2**63]),
    ),
    "one id": Bad("MaskTargets.from_label_map", "ids must be", "got 7", lambda: From.from_label_map(MAP, 7)),
    "counts too few": Bad(
        "MaskTargets.from_coco", "must fill its size", "119 pixels, 10 x 12 = 120", lambda: rle([19, 100])
    ),
    "counts too many": Bad("MaskTargets.from_coco", "must fill its size", "121 pixels", lambda: rle([21, 100])),
    "counts negative": Bad("MaskTargets.from_coco", "must fill its size", "segmentation 0", lambda: rle([-10, 130])),
    "counts empty": Bad("MaskTargets.from_coco", "must fill its size", "0 pixels", lambda: rle("")),
    "counts cut off": Bad("MaskTargets.from_coco", "must be complete", "inside a number", lambda: rle("P")),
    "counts None": Bad("MaskTargets.from_coco", "a compressed string or a list", "None", lambda: rle(None)),
    "size of another image": Bad(
        "MaskTargets.from_coco", "that of its image", "(12, 10)", lambda: rle([120], (12, 10))
    ),
    "size None": Bad("MaskTargets.from_coco", "that of its image", "size None", lambda: rle([120], None)),
    "no counts": Bad(
        "MaskTargets.from_coco", '"size" and "counts"', "['size']", lambda: From.from_coco([{"size": [10, 12]}], 10, 12)
    ),
    "odd polygon": Bad("MaskTargets.from_coco", "even number", "with 7", lambda: polygon(*TRIANGLE, 1)),
    "two corners": Bad("MaskTargets.from_coco", "at least 6", "with 4", lambda: polygon(0, 0, 3, 3)),
    "NaN corner": Bad("MaskTargets.from_coco", "must be numbers", "nan", lambda: polygon(0, 0, 3, 0, 3, NAN)),
    "far corner": Bad(
        "MaskTargets.from_coco", "must be numbers", "1000000000000.0", lambda: polygon(0, 0, 3, 0, 3, 1e12)
    ),
    "corner a string": Bad("MaskTargets.from_coco", "must be numbers", "'3'", lambda: polygon(0, 0, 3, 0, 3, "3")),
    "flat polygon": Bad(
        "MaskTargets.from_coco", "a list of polygons", "holds a int", lambda: From.from_coco([TRIANGLE], 10, 12)
    ),
    "no polygon": Bad(
        "MaskTargets.from_coco", "a non-empty list of polygons", "0 is list", lambda: From.from_coco([[]], 9, 9)
    ),
    "one segmentation": Bad(
        "MaskTargets.from_coco", "a list with one per target", "size", lambda: From.from_coco({"size": [4, 4]}, 4, 4)
    ),
    "no height": Bad(
        "MaskTargets.from_coco", "height must be an integer, at least 1", "=0", lambda: From.from_coco([], 0, 4)
    ),
    "fewer ids than maps": Bad(
        "MaskTargets.from_label_map",
        "needs a list of their ids",
        "1 x [7]",
        lambda: From.from_label_map([MAP] * 2, [[7]]),
    ),
    "no maps": Bad(
        "MaskTargets.from_label_map", "needs a list of their ids", "empty", lambda: From.from_label_map([], [])
    ),
    "float ids on a device": Bad(
        "MaskTargets.from_label_map",
        "ids must be",
        "float32",
        lambda: From.from_label_map(MAP.to("meta"), torch.zeros(2, device="meta")),
    ),
    "no images": Bad("MaskTargets.from_masks", "one tensor per image", "empty", lambda: From.from_masks([])),
    "masks on two devices": Bad(
        "MaskTargets.from_masks", "on one device", "cpu, meta", lambda: From.from_masks([MASKS, MASKS.to("meta")])
    ),
    "nothing to join": Bad("MaskTargets.cat", "the MaskTargets to join", "got empty", lambda: From.cat([])),
    "tensors to join": Bad(
        "MaskTargets.cat", "the MaskTargets to join", "[2, 10, 12]", lambda: From.cat([MASKS, MASKS])
    ),
    "two devices": Bad(
        "MaskTargets.cat",
        "must be on one device",
        "cpu, meta",
        lambda: From.cat([From.from_masks(MASKS), From.from_masks(MASKS.to("meta"))]),
    ),
}

CRITERION = {
    "classes": Bad("MaskCriterion", "num_classes + 1 = 5", "got 4", lambda: criterion(CLASSES[..., :4])),
    "classes of rank 2": Bad(
        "MaskCriterion", "float [B, Q, C + 1]", "[2, 3] float32", lambda: criterion(CLASSES[..., 0])
    ),
    "integer classes": Bad("MaskCriterion", "float [B, Q, C + 1]", "int64", lambda: criterion(CLASSES.long())),
    "classes of other queries": Bad(
        "MaskCriterion", "B and Q of the mask logits", "[2, 2, 5]", lambda: criterion(CLASSES[:, :2])
    ),
    "classes elsewhere": Bad(
        "MaskCriterion", "class_logits must be on the", "meta", lambda: criterion(CLASSES.to("meta"))
    ),
    "no masks": Bad("MaskCriterion", "must be a tensor [B, Q, h, w]", "got None", lambda: criterion(CLASSES, None)),
    "masks of rank 3": Bad(
        "MaskCriterion", "mask_logits must be [B, Q, h, w]", "got 3", lambda: criterion(logits=LAYER[0])
    ),
    "layers of classes": Bad(
        "MaskCriterion",
        "the same decoder layers",
        "1 layers of classes but 2",
        lambda: criterion([CLASSES], [LAYER] * 2),
    ),
    "no layers": Bad("MaskCriterion", "at least one decoder layer", "is empty", lambda: criterion([], [])),
    "layers of other queries": Bad(
        "MaskCriterion",
        "must agree in batch size",
        "layer 1 is [2, 2]",
        lambda: criterion([CLASSES] * 2, [LAYER, LAYER[:, :2]]),
    ),
    "layers of other dtypes": Bad(
        "MaskCriterion",
        "must agree in",
        "layer 1 is [2, 3] torch.float16",
        lambda: criterion([CLASSES] * 2, [LAYER, LAYER.half()]),
    ),
    "layers elsewhere": Bad(
        "MaskCriterion", "must agree in", "on meta", lambda: criterion([CLASSES] * 2, [LAYER, LAYER.to("meta")])
    ),
    "one entry": Bad("MaskCriterion", "the same number of images", "2 images", lambda: criterion(targets=[entry()])),
    "no entries": Bad("MaskCriterion", "a list with one dict per image", "got empty", lambda: criterion(targets=[])),
    "targets a tensor": Bad("MaskCriterion", "a list with one dict", "[2, 10, 12]", lambda: criterion(targets=MASKS)),
    "entries tensors": Bad(
        "MaskCriterion", "must be a dict", "entry 0 is [2, 10, 12]", lambda: criterion(targets=[MASKS] * 2)
    ),
    "no labels": Bad(
        "MaskCriterion",
        "must be a dict",
        "entry 1 has ['masks']",
        lambda: criterion(targets=[entry(), {"masks": MASKS}]),
    ),
    "masks as text": Bad(
        "MaskCriterion",
        "must be a tensor, an array or a MaskTargets",
        "image 0 is 'mask'",
        lambda: criterion(targets=[entry(masks="mask")] * 2),
    ),
    "masks of several sizes": Bad(
        "MaskCriterion",
        "must be a tensor, an array or a MaskTargets",
        "image 0 is 2 x [10, 12]",
        lambda: criterion(targets=[entry(masks=[MASKS[0], MAP])] * 2),
    ),
    "labels too few": Bad(
        "MaskCriterion",
        "masks and labels must pair up",
        "image 1 has 2 masks but 1",
        lambda: criterion(targets=[entry(), entry((0,))]),
    ),
    "labels as floats": Bad(
        "MaskCriterion", "an integer tensor [T]", "[2] float32", lambda: criterion(targets=[entry((0.0, 1.0))] * 2)
    ),
    "labels a list": Bad(
        "MaskCriterion", "an integer tensor [T]", "[0.5, 1]", lambda: criterion(targets=[entry([0.5, 1])] * 2)
    ),
    "labels elsewhere": Bad(
        "MaskCriterion",
        "labels must be on the device of the masks",
        "meta",
        lambda: criterion(targets=[entry(index(0, 1).to("meta"))] * 2),
    ),
    "label too large": Bad(
        "MaskCriterion", "labels must lie in [0, 4)", "the first is 4", lambda: criterion(targets=[entry((0, 4))] * 2)
    ),
    "label negative": Bad(
        "MaskCriterion", "labels must lie in [0, 4)", "the first is -1", lambda: criterion(targets=[entry((-1, 0))] * 2)
    ),
    "label of the matcher": Bad(
        "HungarianMatcher", "labels must lie in [0, 4)", "is 4", lambda: matching(targets=[entry((0, 4))] * 2)
    ),
    "map without ids": Bad(
        "MaskCriterion", "must pair up", "has 2 masks but 1 labels", lambda: criterion(targets=[entry((0,), MAP)] * 2)
    ),
    "batch in an entry": Bad(
        "MaskCriterion",
        "must hold one image",
        "entry 0 holds 2",
        lambda: criterion(targets=[entry(masks=From.from_masks([MASKS, MASKS]))] * 2),
    ),
    "dict of tensors": Bad(
        "MaskCriterion", "must hold a collated batch", "[2, 10, 12]", lambda: criterion(targets=entry())
    ),
    "batch of other labels": Bad(
        "MaskCriterion",
        "must hold a collated batch",
        "1 x [1]",
        lambda: criterion(targets={"masks": From.from_masks([MASKS, MASKS]), "labels": [index(0)]}),
    ),
    "targets elsewhere": Bad(
        "MaskCriterion",
        "targets must be on the device of the logits",
        "targets on meta",
        lambda: criterion(targets=[entry(index(0, 1).to("meta"), MASKS.to("meta"))] * 2),
    ),
    "image ids": Bad(
        "MaskCriterion", "one integer in [0, 2^32) for each", "[3] for 2 images", lambda: criterion(image_ids=[3])
    ),
    "seed": Bad("MaskCriterion", "seed must be a 64-bit", "=True", lambda: criterion(seed=True)),
    "totals a number": Bad("MaskCriterion", "totals must be a StepTotals", "got 4.0", lambda: criterion(totals=4.0)),
    "totals negative": Bad(
        "MaskCriterion", "totals.instances", "=-1.0", lambda: criterion(totals=StepTotals(-1.0, 6.0))
    ),
    "totals NaN": Bad("MaskCriterion", "totals.queries", "=nan", lambda: criterion(totals=StepTotals(1.0, NAN))),
    "negative targets": Bad(
        "step_totals", "a number of targets must be an integer, at least 0", "=-1", lambda: step_totals([[3, -1]], 10)
    ),
    "no queries": Bad("step_totals", "num_queries must be an integer, at least 1", "=0", lambda: step_totals([[3]], 0)),
    "half a query": Bad(
        "step_totals", "num_queries must be an integer, at least 1", "=2.5", lambda: step_totals([[3]], 2.5)
    ),
    "one micro-batch": Bad("step_totals", "must list the micro-batches", "got [3, 1]", lambda: step_totals([3, 1], 10)),
    "targets for counts": Bad(
        "step_totals", "must list the micro-batches", "MaskTargets", lambda: step_totals([From.from_masks(MASKS)], 10)
    ),
}

POINTS = torch.zeros(2, 4, 2)
FUNCTIONAL = {
    "maps of rank 4": Bad(
        "point_sample", "maps must be [..., h, w]", "got 1 dim", lambda: functional.point_sample(LAYER[0, 0, 0], POINTS)
    ),
    "points of others": Bad(
        "point_sample",
        "must broadcast",
        "[2], points [3]",
        lambda: functional.point_sample(PAIRS, POINTS[:1].repeat(3, 1, 1)),
    ),
    "points a list": Bad(
        "point_sample", "points must be", "[0.5, 0.5]", lambda: functional.point_sample(PAIRS, [0.5, 0.5])
    ),
    "mode": Bad(
        "point_sample",
        "one of bilinear, nearest",
        "'area'",
        lambda: functional.point_sample(PAIRS, POINTS, mode="area"),
    ),
    "padding": Bad(
        "point_sample",
        "one of zeros, border",
        "'wrap'",
        lambda: functional.point_sample(PAIRS, POINTS, padding_mode="wrap"),
    ),
    "logits of rank 4": Bad("uncertain_points", "[N, h, w]", "got 4", lambda: functional.uncertain_points(LAYER)),
    "sampling a dict": Bad(
        "uncertain_points", "must be a PointSampling", "{}", lambda: functional.uncertain_points(PAIRS, sampling={})
    ),
    "shapes": Bad(
        "mask_bce", "the same shape [..., P]", "[2, 8, 8], [2, 4, 2]", lambda: functional.mask_bce(PAIRS, POINTS)
    ),
    "weights": Bad(
        "mask_dice",
        "w must broadcast to [..., P]",
        "[2, 3]",
        lambda: functional.mask_dice(POINTS, POINTS, POINTS[:, 0, :1].repeat(1, 3)),
    ),
    "bool targets": Bad("mask_bce", "must be float", "bool", lambda: functional.mask_bce(POINTS, POINTS.bool())),
    "lists": Bad("mask_dice", "must be float", "got [0.5]", lambda: functional.mask_dice([0.5], [1.0])),
    "targets elsewhere": Bad(
        "mask_bce", "t must be on", "meta", lambda: functional.mask_bce(POINTS, POINTS.to("meta"))
    ),
    "focal alpha": Bad(
        "mask_focal",
        "alpha must be a finite number in [0, 1]",
        "alpha=2.0",
        lambda: functional.mask_focal(POINTS, POINTS, alpha=2.0, gamma=2.0),
    ),
    "numbers of points": Bad(
        "pairwise_mask_cost", "[..., T, P]", "[2, 4, 2]", lambda: functional.pairwise_mask_cost(PAIRS, POINTS)
    ),
    "weights of points": Bad(
        "pairwise_mask_cost",
        "w must broadcast to [..., P]",
        "[2, 4, 2]",
        lambda: functional.pairwise_mask_cost(PAIRS, PAIRS, POINTS),
    ),
    "class logits": Bad("class_cost", "must be float [..., Q,", "int64", lambda: functional.class_cost(MAP, index(0))),
    "float labels": Bad("class_cost", "integers [..., T]", "float", lambda: functional.class_cost(CLASSES, index(0.0))),
    "match query": Bad(
        "Matches.from_pairs",
        "queries of a match must lie in [0, 1)",
        "to 1",
        lambda: Matches.from_pairs([(index(1), index(0))], num_queries=1, num_targets=[1]),
    ),
}

TABLES = {"options": OPTIONS, "loss": LOSS, "targets": TARGETS, "criterion": CRITERION, "functional": FUNCTIONAL}
