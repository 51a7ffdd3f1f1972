"""Calls with arguments that do not fit: they work, or raise this library's own error, and no other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from maskloss import (
    HungarianMatcher,
    MaskCriterion,
    MaskFactors,
    MaskLoss,
    MaskLossError,
    MaskOptions,
    MaskTargets,
    PointSampling,
    StepTotals,
    functional,
)

FEW = PointSampling(num_points=9)
MASKS, LABELS = torch.rand(2, 7, 9) > 0.5, torch.tensor([0, 2])
LAYER, CLASSES = torch.randn(1, 4, 5, 6), torch.randn(1, 4, 4)
POINTS = torch.rand(2, 9, 2)
ENTRIES = [{"masks": MASKS, "labels": LABELS}]
PAIRS = [(torch.tensor([0, 3]), torch.tensor([1, 0]))]
Z, T, W = torch.randn(2, 9), torch.rand(2, 9), torch.ones(2, 9)

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16),
    *(torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn),
)


@st.composite
def tensors(draw: Any) -> Tensor:
    """Tensors of any dtype, rank, size and layout, on the CPU or without data."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=5))
    fill = draw(st.sampled_from([0.0, 1.0, 0.5, -1.0, 3.0, 1e30, float("inf"), float("nan")]))
    fill = fill if dtype.is_floating_point or dtype.is_complex else int(np.nan_to_num(fill, posinf=99.0).clip(-1, 99))
    kind = draw(st.sampled_from(["plain", "plain", "plain", "gradient", "strided", "meta", "sparse", "negative"]))
    if kind == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    tensor = torch.full(shape, float(fill)).to(dtype)
    if kind == "gradient" and dtype.is_floating_point:
        return tensor.requires_grad_()
    if kind == "strided" and len(shape):
        return tensor.transpose(0, -1)
    if kind == "sparse" and len(shape) and dtype in DTYPES[:4]:
        return tensor.to_sparse()
    return tensor


JUNK = st.one_of(
    tensors(),
    tensors(),
    tensors(),
    st.lists(tensors(), max_size=3),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.none(),
    st.booleans(),
    st.sampled_from([10**400, object, len, 1j, {"masks": MASKS}, {"masks": [MASKS], "labels": [LABELS]}, [[]], [None]]),
    st.lists(st.one_of(st.integers(-2, 9), st.floats(), st.none()), max_size=6),
    st.tuples(st.integers(-2, 9), st.integers(-2, 9)),
    st.builds(np.zeros, st.lists(st.integers(0, 3), max_size=3)),
    st.just(MaskTargets.from_masks(MASKS)),
    st.just(MaskFactors(torch.randn(1, 4, 2), torch.randn(1, 2, 5, 6))),
    st.just(StepTotals(3, 4)),
)

# A call, and arguments that fit.
Good = tuple[Callable[..., Any], dict[str, Any]]


def _entry(masks: Any, labels: Any, **more: Any) -> Any:
    return MaskCriterion(3, sampling=FEW)(CLASSES, LAYER, [{"masks": masks, "labels": labels, **more}])


CALLS: dict[str, Good] = {
    "MaskLoss of pairs": (
        MaskLoss(sampling=FEW),
        {"mask_logits": LAYER[0, :2], "masks": MASKS, "points": POINTS, "instance_weights": torch.ones(2), "seed": 1},
    ),
    "MaskLoss of matches": (
        MaskLoss(sampling=FEW),
        {"mask_logits": LAYER, "masks": [MASKS], "matches": PAIRS, "num_instances": 2, "image_ids": [3], "seed": 1},
    ),
    "MaskCriterion": (
        MaskCriterion(3, sampling=FEW),
        {
            "class_logits": CLASSES,
            "mask_logits": LAYER,
            "targets": ENTRIES,
            "extra_costs": [torch.zeros(4, 2)],
            "instance_weights": [torch.ones(2)],
            "totals": None,
            "image_ids": [0],
            "seed": 0,
        },
    ),
    "an entry of MaskCriterion": (_entry, {"masks": MASKS, "labels": LABELS}),
    "an entry with a map": (_entry, {"masks": torch.tensor([[0, 7], [7, 9]]), "labels": LABELS, "ids": [7, 9]}),
    "matches of MaskCriterion": (
        lambda **given: MaskCriterion(3, sampling=FEW)(CLASSES, LAYER, ENTRIES, **given),
        {"matches": PAIRS, "seed": 0},
    ),
    "options of MaskCriterion": (
        MaskCriterion,
        {
            "num_classes": 3,
            "class_weight": 1.0,
            "mask_weight": 1.0,
            "dice_weight": 1.0,
            "no_object_weight": 0.1,
            "classification": "softmax",
            "class_weights": [1.0, 2.0, 1.0],
            "sampling": FEW,
            "groups": 2,
        },
    ),
    "HungarianMatcher": (
        HungarianMatcher(num_points=9),
        {"class_logits": CLASSES, "mask_logits": LAYER, "targets": ENTRIES, "image_ids": [0], "seed": 0},
    ),
    "options of HungarianMatcher": (
        HungarianMatcher,
        {
            "class_weight": 1.0,
            "mask_weight": 2.0,
            "groups": 2,
            "assignment": "host",
            "num_points": 4,
            "layout": "stratified",
        },
    ),
    "MaskOptions": (
        MaskOptions,
        {"padding_mode": "border", "target_mode": "nearest", "focal_alpha": 0.5, "focal_gamma": 1.0, "backend": "cpu"},
    ),
    "PointSampling": (
        PointSampling,
        {"num_points": 9, "oversample_ratio": 2.0, "importance_ratio": 0.5, "layout": "stratified"},
    ),
    "MaskFactors": (
        MaskFactors,
        {"embeddings": torch.randn(1, 4, 2), "features": torch.randn(1, 2, 5, 6), "bias": 0.5, "scratch_mb": 1.0},
    ),
    "from_masks": (
        MaskTargets.from_masks,
        {"masks": MASKS, "soft": None, "canvas": (8, 9), "ignore": MASKS[0], "valid": (0, 1, 5, 6)},
    ),
    "from_packed": (MaskTargets.from_packed, {"packed": torch.zeros(2, 7, 2, dtype=torch.uint8), "width": 9}),
    "from_label_map": (
        MaskTargets.from_label_map,
        {"labels": torch.tensor([[0, 7], [7, 9]]), "ids": [7, 9], "allow_missing": True},
    ),
    "cat": (MaskTargets.cat, {"parts": [MaskTargets.from_masks(MASKS)]}),
    "select": (MaskTargets.from_masks(MASKS).select, {"keep": [[1, 0]]}),
    "point_sample": (
        functional.point_sample,
        {"maps": LAYER[0, :2], "points": POINTS, "mode": "nearest", "padding_mode": "border"},
    ),
    "uncertain_points": (
        functional.uncertain_points,
        {"logits": LAYER[0], "sampling": FEW, "padding_mode": "zeros", "window": (0.1, 0.2, 0.5, 0.5), "seed": 3},
    ),
    "uncertainty": (functional.uncertainty, {"z": Z}),
    "mask_bce": (functional.mask_bce, {"z": Z, "t": T, "w": W}),
    "mask_focal": (functional.mask_focal, {"z": Z, "t": T, "w": W, "alpha": 0.2, "gamma": 1.0}),
    "mask_dice": (functional.mask_dice, {"z": Z, "t": T, "w": W}),
    "pairwise_mask_cost": (functional.pairwise_mask_cost, {"z": Z, "t": T, "w": W[0]}),
    "class_cost": (functional.class_cost, {"class_logits": CLASSES[0], "labels": LABELS}),
    "focal_class_cost": (functional.focal_class_cost, {"class_logits": CLASSES[0], "labels": LABELS}),
}


@st.composite
def wrong_calls(draw: Any) -> tuple[str, dict[str, Any]]:
    """A call by its name, and the arguments that are given in place of those that fit."""
    name = draw(st.sampled_from([*CALLS]))
    names = draw(st.lists(st.sampled_from([*CALLS[name][1]]), min_size=1, max_size=2, unique=True))
    return name, {each: draw(JUNK) for each in names}


def check(wrong: tuple[str, dict[str, Any]]) -> bool:
    """Call; return whether it was rejected. Any other exception or warning is passed on."""
    name, given = wrong
    call, good = CALLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            partial(call, **{**good, **given})()
        except MaskLossError as error:
            parts = error.parts
        else:
            return False
    assert_readable(parts)
    return True


def assert_readable(parts: tuple[str, str, str] | None) -> None:
    """Fail unless an error has a rule, a cause and a hint, each of them a clause of one line."""
    assert parts is not None
    for part in parts:
        assert part and part.isprintable() and len(part) < 1000, repr(part)
