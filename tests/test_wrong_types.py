"""Whatever is given for an argument, the error is this library's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from maskloss import (
    HungarianMatcher,
    MaskCriterion,
    MaskLoss,
    MaskLossError,
    PointSampling,
    StepTotals,
    step,
    step_totals,
)
from maskloss.integrations import detr, maskdino

FEW = PointSampling(num_points=4)
MASKS, LABELS = torch.zeros(2, 10, 12, dtype=torch.bool), torch.tensor([0, 1])
ENTRY = {"masks": MASKS, "labels": LABELS}
WRONG: dict[str, Any] = {
    "an integer": 5,
    "a negative integer": -1,
    "a huge integer": 10**400,
    "a fraction": 1.5,
    "NaN": float("nan"),
    "a flag": True,
    "text": "x",
    "no text": "",
    "bytes": b"a",
    "a list": [1],
    "an empty list": [],
    "a list of lists": [[1]],
    "a list of None": [None],
    "a pair": (0, 0),
    "a dict": {"a": 1},
    "an empty dict": {},
    "an object": object(),
    "a function": len,
    "an array": np.zeros(2),
    "a tensor": torch.zeros(1),
    "an empty tensor": torch.zeros(0),
    "a tensor of rank 5": torch.zeros(2, 2, 2, 2, 2),
    "a sparse tensor": torch.zeros(2).to_sparse(),
}

Call = Callable[[], object]


def replaced(call: Callable[..., object], **good: Any) -> Callable[[Any], dict[str, Call]]:
    """A call, with each of its arguments in turn replaced by something else."""
    return lambda wrong: {name: partial(call, **{**good, name: wrong}) for name in good}


def in_a_block(**told: Any) -> object:
    with step(**told):
        return criterion()


def criterion(**options: Any) -> object:
    given = {"class_logits": torch.zeros(1, 3, 3), "mask_logits": torch.zeros(1, 3, 8, 8), "targets": [ENTRY]}
    return MaskCriterion(2, sampling=FEW, backend="reference")(**{**given, **options})


def parts(wrong: Any) -> dict[str, Call]:
    """What lies inside the arguments of a criterion."""
    return {
        "masks": lambda: criterion(targets=[ENTRY | {"masks": wrong}]),
        "labels": lambda: criterion(targets=[ENTRY | {"labels": wrong}]),
        "an entry": lambda: criterion(targets=[wrong]),
        "collated masks": lambda: criterion(targets=ENTRY | {"masks": wrong}),
        "a layer of classes": lambda: criterion(class_logits=[wrong]),
        "a layer of masks": lambda: criterion(mask_logits=[wrong]),
        "matches of an image": lambda: criterion(matches=[wrong]),
        "matched queries": lambda: criterion(matches=[(wrong, LABELS)]),
        "costs of an image": lambda: criterion(extra_costs=[wrong]),
        "weights of an image": lambda: criterion(instance_weights=[wrong]),
        "total instances": lambda: criterion(totals=StepTotals(wrong, 2.0)),
        "total queries": lambda: criterion(totals=StepTotals(2.0, wrong)),
    }


def drop_in(package: Any, losses: list[str], outputs: Any = None, targets: Any = None) -> object:
    matcher = package.HungarianMatcher(num_points=4, backend="reference")
    module = package.SetCriterion(2, matcher, {}, 0.1, losses, 4, backend="reference")
    classes = torch.zeros(1, 3, 3 if package is detr else 2)
    given = {"pred_logits": classes, "pred_masks": torch.zeros(1, 3, 8, 8), "pred_boxes": torch.rand(1, 3, 4)}
    given = given | outputs if isinstance(outputs, dict) else given if outputs is None else outputs
    entry = ENTRY | {"boxes": torch.rand(2, 4)}
    return module(given, [entry | targets] if isinstance(targets, dict) else [entry] if targets is None else targets)


def parts_of(package: Any) -> Callable[[Any], dict[str, Call]]:
    def make(wrong: Any) -> dict[str, Call]:
        outputs = ("pred_logits", "pred_masks", "pred_boxes", "aux_outputs", "interm_outputs", "extra_costs")
        calls: dict[str, Call] = {
            name: lambda name=name: drop_in(package, ["labels", "masks", "boxes"], {name: wrong}) for name in outputs
        }
        for name in ("masks", "labels", "ids", "boxes"):
            calls[f"target {name}"] = lambda name=name: drop_in(package, ["masks", "boxes"], targets={name: wrong})
        if not isinstance(wrong, dict):
            calls["outputs"] = lambda: drop_in(package, ["masks"], wrong)
            calls["targets"] = lambda: drop_in(package, ["masks"], targets=wrong)
        calls["an entry"] = lambda: drop_in(package, ["masks"], targets=[wrong])
        return calls

    return make


MASK_OPTIONS = {"options": None, "padding_mode": "zeros", "focal_gamma": None}
COSTS = {"cost_class": 1, "cost_mask": 1, "cost_dice": 1, "num_points": 4, "cost_box": 0, "cost_giou": 0}
SET = {"num_classes": 2, "weight_dict": {}, "eos_coef": 0.1, "losses": ["masks"], "num_points": 4, "options": None}
POINTS = {"oversample_ratio": 3.0, "importance_sample_ratio": 0.75, "layout": "independent"}
DENOISING = {"dn": "no", "dn_losses": (), "panoptic_on": False, "semantic_ce_loss": False}
CALLS: dict[str, Callable[[Any], dict[str, Call]]] = {
    "MaskLoss": replaced(MaskLoss, ce_weight=1, dice_weight=1, sampling=FEW, **MASK_OPTIONS),
    "HungarianMatcher": replaced(
        HungarianMatcher, class_weight=1, num_points=4, layout="independent", classification="softmax", **MASK_OPTIONS
    ),
    "MaskCriterion": replaced(
        MaskCriterion,
        num_classes=2,
        class_weight=1,
        no_object_weight=0.1,
        classification="softmax",
        class_weights=None,
        sampling=FEW,
        matcher=None,
        **MASK_OPTIONS,
    ),
    "loss": replaced(
        MaskLoss(sampling=FEW, backend="reference"),
        mask_logits=torch.zeros(2, 8, 8),
        masks=MASKS,
        matches=None,
        points=None,
        instance_weights=None,
        num_instances=None,
        image_ids=None,
        seed=None,
        generator=None,
        group=None,
    ),
    "criterion": replaced(
        criterion,
        class_logits=torch.zeros(1, 3, 3),
        mask_logits=torch.zeros(1, 3, 8, 8),
        targets=[ENTRY],
        matches=None,
        extra_costs=None,
        instance_weights=None,
        totals=None,
        image_ids=None,
        seed=None,
        generator=None,
        group=None,
    ),
    "parts of a criterion's arguments": parts,
    "step": replaced(in_a_block, totals=None, image_ids=None, seed=None, group=None),
    "step_totals": replaced(
        step_totals,
        num_targets=[[1]],
        num_queries=3,
        instance_weights=[[torch.ones(1)]],
        labels=[[torch.zeros(1).long()]],
        class_weights=[1.0, 2.0],
        device="cpu",
        group=None,
    ),
    "detr.HungarianMatcher": replaced(detr.HungarianMatcher, **COSTS, layout="independent", options=None),
    "maskdino.HungarianMatcher": replaced(maskdino.HungarianMatcher, **COSTS, layout="independent", options=None),
    "detr.SetCriterion": replaced(detr.SetCriterion, matcher=len, **SET, **POINTS),
    "maskdino.SetCriterion": replaced(maskdino.SetCriterion, matcher=len, **SET, **POINTS, **DENOISING),
    "parts of detr's arguments": parts_of(detr),
    "parts of MaskDINO's arguments": parts_of(maskdino),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", CALLS)
def test_errors_are_ours(call: str, wrong: str) -> None:
    """A call may succeed: 5 is a weight. Any other exception fails the test."""
    # An integer is a device too, and a PyTorch with CUDA says itself that there is none.
    told = [MaskLossError, RuntimeError] if torch.version.cuda and wrong == "an integer" else [MaskLossError]
    for each in CALLS[call](WRONG[wrong]).values():
        with suppress(*told):
            each()
