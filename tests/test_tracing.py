"""Tensors whose memory does not hold their values, tracers that record calls, and a default device without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from maskloss import (
    HungarianMatcher,
    MaskCriterion,
    MaskFactors,
    MaskLoss,
    MaskLossError,
    MaskTargets,
    Matches,
    PointSampling,
    functional,
    step_totals,
)

FEW = PointSampling(num_points=24)
MASKS = torch.zeros(2, 9, 9, dtype=torch.bool)
MASKS[0, 2:7, 1:8] = MASKS[1, 5:, 3:] = True


def negated(tensor: Tensor) -> Tensor:
    """The same values, as a negation that is only noted."""
    lazy = torch._neg_view(-tensor)
    assert lazy.is_neg() and torch.equal(lazy, tensor)
    return lazy


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros without memory, as forward-mode differentiation makes them."""
    return torch._efficientzerotensor(shape, dtype=dtype)  # type: ignore[no-any-return]


def gradient(logits: Tensor, backend: str, masks: Any = MASKS, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    out = MaskLoss(sampling=FEW, backend=backend)(leaf, masks, seed=1, **options)
    return out.total.detach(), torch.autograd.grad(out.total, leaf)[0]


# ------------------------------------------------------------------------------------------------------------ lazy ones


def test_logits_with_a_lazy_sign(backend: str) -> None:
    parts = torch.randn(2, 8, 8, 2, requires_grad=True)
    lazy = torch.view_as_complex(parts).conj().imag
    assert lazy.is_neg() and lazy.requires_grad
    loss = MaskLoss(sampling=FEW, backend=backend)
    results = [loss(logits, MASKS, seed=1).total for logits in (lazy, lazy.resolve_neg())]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(total, parts)[0] for total in results))


def test_logits_that_are_lazy_zeros(backend: str) -> None:
    value, slope = gradient(zeros(2, 8, 8), backend)
    expected, other = gradient(torch.zeros(2, 8, 8), backend)
    assert torch.equal(value, expected) and torch.equal(slope, other)


def test_lazy_arguments_beside_the_logits(backend: str) -> None:
    logits, points = torch.randn(2, 8, 8), torch.rand(2, 5, 2)
    ids, weights = torch.tensor([3]), torch.tensor([1.0, 2.0])
    lazy: dict[str, Any] = {"points": negated(points), "image_ids": negated(ids), "instance_weights": negated(weights)}
    plain: dict[str, Any] = {"points": points, "image_ids": ids, "instance_weights": weights}
    for mine, theirs in zip(gradient(logits, backend, **lazy), gradient(logits, backend, **plain), strict=True):
        torch.testing.assert_close(mine, theirs)
    value, _ = gradient(logits, backend, points=zeros(2, 5, 2))
    assert torch.equal(value, gradient(logits, backend, points=torch.zeros(2, 5, 2))[0])


def test_lazy_gradients_of_the_losses(backend: str) -> None:
    leaf, given = torch.randn(2, 8, 8, requires_grad=True), torch.tensor([0.5, -2.0])
    for lazy, plain in ((negated(given), given), (zeros(2), torch.zeros(2))):
        found = []
        for grad in (lazy, plain):
            out = MaskLoss(sampling=FEW, backend=backend)(leaf, MASKS, seed=1).per_instance
            found.append(torch.autograd.grad([out.ce, out.dice], leaf, [grad, plain])[0])
        assert torch.equal(*found)


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (MaskTargets.from_masks, MASKS.to(torch.uint8)),
        (MaskTargets.from_masks, MASKS.float()),
        (MaskTargets.from_masks, MASKS.float() * 0.7),
        (lambda labels: MaskTargets.from_label_map(labels, [1]), MASKS[0].long()),
        (lambda ids: MaskTargets.from_label_map(MASKS[0].long(), ids), torch.tensor([1])),
        (lambda packed: MaskTargets.from_packed(packed, 8), MASKS[:, :, :1].to(torch.uint8) * 7),
        (lambda ignore: MaskTargets.from_masks(MASKS, ignore=ignore), MASKS[0].to(torch.uint8)),
    ],
    ids=["uint8", "float", "soft", "label map", "ids", "packed", "ignore"],
)
def test_lazy_masks(make: Callable[[Tensor], MaskTargets], plain: Tensor) -> None:
    for lazy, same in ((negated(plain), plain), (zeros(*plain.shape, dtype=plain.dtype), torch.zeros_like(plain))):
        if plain.ndim == 1 and not same.any():
            continue  # an id 0, which is in the map, is another case
        try:
            expected = make(same)
        except MaskLossError:
            with pytest.raises(MaskLossError):
                make(lazy)
            continue
        found = make(lazy)
        assert torch.equal(found.dense(), expected.dense()) and torch.equal(found.ignore, expected.ignore)


def test_lazy_factors(backend: str) -> None:
    classes, targets = torch.zeros(1, 3, 3), [{"masks": MASKS, "labels": torch.tensor([0, 1])}]
    embeddings, features = torch.randn(1, 3, 4), torch.randn(1, 4, 8, 8)
    totals = [
        MaskCriterion(2, sampling=FEW, backend=backend)(classes, MaskFactors(*each), targets, seed=1).total
        for each in ((embeddings, features), (negated(embeddings), negated(features)))
    ]
    torch.testing.assert_close(*totals)


# ------------------------------------------------------------------------------------------------------- inference mode


def test_targets_and_matches_of_inference_mode(backend: str) -> None:
    """A data loader or a matcher that needs no gradient makes them, and a training step takes them."""
    dense, embeddings = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(1, 3, 4, requires_grad=True)
    features = torch.randn(1, 4, 8, 8)

    def gradients(inference: bool) -> list[Tensor]:
        with torch.inference_mode(inference):
            weights, points = torch.tensor([1.0, 2.0]), torch.full((3, 5, 2), 0.3)
            entry = {"masks": MaskTargets.from_masks(MASKS), "labels": torch.tensor([0, 1])}
            matches = HungarianMatcher(num_points=20, backend=backend)(torch.zeros(1, 3, 3), dense, [entry], seed=1)
        loss, criterion = MaskLoss(sampling=FEW, backend=backend), MaskCriterion(2, sampling=FEW, backend=backend)
        options: dict[str, Any] = {"matches": matches, "seed": 1, "instance_weights": [weights]}
        classes = torch.zeros(1, 3, 3, requires_grad=True)
        totals = [
            loss(dense[0, :2], entry["masks"], seed=1, instance_weights=weights).total,
            criterion(classes, dense, [entry], **options).total,
            criterion(classes, MaskFactors(embeddings, features), [entry], **options).total,
            functional.point_sample(dense[0], points, backend=backend).sum(),
        ]
        leaves = (dense, dense, embeddings, dense)
        return [torch.autograd.grad(total, leaf)[0] for total, leaf in zip(totals, leaves, strict=True)]

    for mine, theirs in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(mine, theirs)


# -------------------------------------------------------------------------------------------------------------- tracers


def loss_of(logits: Tensor, masks: Tensor) -> Tensor:
    return MaskLoss(sampling=FEW)(logits, masks, seed=1).total


def packed_loss_of(logits: Tensor, packed: Tensor) -> Tensor:
    return loss_of(logits, MaskTargets.from_packed(packed, 9))  # type: ignore[arg-type]


def criterion_of(logits: Tensor, masks: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    entry = {"masks": masks, "labels": labels, "ids": [1, 2]}
    return MaskCriterion(2, sampling=FEW)(classes, logits, [entry], seed=1).total


def pairs() -> tuple[Tensor, ...]:
    return torch.randn(2, 8, 8), torch.rand(2, 9, 9) > 0.5


def soft_pairs() -> tuple[Tensor, ...]:
    return torch.randn(2, 8, 8), torch.rand(2, 9, 9)


def packed_pairs() -> tuple[Tensor, ...]:
    return torch.randn(2, 8, 8), torch.randint(256, (2, 9, 2), dtype=torch.uint8)


def queries() -> tuple[Tensor, ...]:
    return torch.randn(1, 4, 8, 8), torch.rand(2, 9, 9) > 0.5, torch.randn(1, 4, 3), torch.randint(2, (2,))


def map_queries() -> tuple[Tensor, ...]:
    return torch.randn(1, 4, 8, 8), torch.randint(3, (9, 9)), torch.randn(1, 4, 3), torch.randint(2, (2,))


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        pytest.param(loss_of, pairs, id="masks"),
        pytest.param(loss_of, soft_pairs, id="soft masks"),
        pytest.param(packed_loss_of, packed_pairs, id="packed masks"),
        pytest.param(criterion_of, queries, id="criterion"),
        pytest.param(criterion_of, map_queries, id="label map"),
    ],
)
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx(function: Callable[..., Tensor], inputs: Callable[[], tuple[Tensor, ...]], mode: str) -> None:
    first, other = inputs(), inputs()
    traced = make_fx(function, tracing_mode=mode)(*first)
    for each in (first, other):
        assert torch.equal(traced(*each), function(*each))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is")
def test_jit_trace_would_keep_the_masks() -> None:
    with pytest.raises(MaskLossError, match=r"packed under torch\.jit\.trace"):
        torch.jit.trace(loss_of, pairs())


# ------------------------------------------------------------------------------------------------------- default device


def test_numbers_and_lists_are_on_the_cpu_whatever_the_default_device() -> None:
    def make() -> list[Any]:
        criterion = MaskCriterion(2, sampling=FEW, class_weights=[1.0, 2.0])
        targets = MaskTargets.cat([MaskTargets.from_masks(MASKS), MaskTargets.from_masks(MASKS * soft)])
        matches = Matches.from_pairs([([0, 1], [1, 0])], num_queries=3, num_targets=[2])  # type: ignore[list-item]
        weights = [[torch.tensor([0.5, 1.0], device="cpu")]]
        labels = [[torch.tensor([0, 1], device="cpu")]]
        totals = step_totals([[2]], 5, instance_weights=weights, labels=labels, class_weights=[1.0, 2.0])
        loss = MaskLoss(sampling=FEW)(logits, MASKS, image_ids=[3], seed=1).total
        uniform = functional.uncertain_points(logits, sampling=FEW, seed=1)
        assert criterion.class_weights is not None
        return [
            criterion.class_weights,
            *(targets.data, targets.select([[1], [0, 1]]).table, matches.index),
            *(totals.instance_weight, totals.class_weight, loss, uniform),
        ]

    logits, soft = torch.randn(2, 8, 8), torch.rand(2, 9, 9)
    expected = make()
    with torch.device("meta"):
        found = make()
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.device.type == "cpu" and torch.equal(mine, theirs)


# ---------------------------------------------------------------------------------------------------------- wrong types

POINTS = torch.rand(2, 7)
TARGETS = MaskTargets.from_masks([MASKS, MASKS])
PAIRS = [(torch.tensor([0, 1]), torch.tensor([0, 1]))]
MATCHES = Matches.from_pairs(PAIRS, num_queries=3, num_targets=[2])
FACTORS = {"spatial_features": torch.zeros(1, 4, 8, 8), "query_features": torch.zeros(1, 3, 4)}
CLASSES, LABELS = torch.zeros(3, 4), torch.tensor([0, 1])
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "point_sample": (functional.point_sample, {"maps": torch.zeros(2, 8, 8), "points": torch.rand(2, 7, 2)}),
    "uncertainty": (functional.uncertainty, {"z": POINTS}),
    "uncertain_points": (
        functional.uncertain_points,
        {"logits": torch.zeros(2, 8, 8), "sampling": FEW, "window": (0.0, 0.0, 1.0, 1.0), "generator": None},
    ),
    "mask_bce": (functional.mask_bce, {"z": POINTS, "t": POINTS, "w": None}),
    "mask_focal": (functional.mask_focal, {"z": POINTS, "t": POINTS, "alpha": 0.25, "gamma": 2.0}),
    "pairwise": (functional.pairwise_mask_cost, {"z": POINTS, "t": POINTS, "focal_gamma": None}),
    "class_cost": (functional.class_cost, {"class_logits": CLASSES, "labels": LABELS}),
    "focal_class_cost": (functional.focal_class_cost, {"class_logits": CLASSES, "labels": LABELS, "gamma": 2.0}),
    "from_masks": (MaskTargets.from_masks, {"masks": MASKS, "canvas": None, "ignore": None, "valid": None}),
    "from_packed": (MaskTargets.from_packed, {"packed": torch.zeros(2, 9, 2, dtype=torch.uint8), "width": 9}),
    "from_label_map": (MaskTargets.from_label_map, {"labels": MASKS[0].long(), "ids": [1]}),
    "cat": (MaskTargets.cat, {"parts": [TARGETS, TARGETS]}),
    "select": (TARGETS.select, {"keep": [[0], [1]]}),
    "dense": (TARGETS.dense, {"image": 1}),
    "to": (TARGETS.to, {"device": "cpu"}),
    "factors": (MaskFactors, {"embeddings": torch.zeros(1, 3, 4), "features": torch.zeros(1, 4, 8, 8), "bias": None}),
    "from_dict": (MaskFactors.from_dict, {"factors": FACTORS}),
    "from_pairs": (Matches.from_pairs, {"pairs": PAIRS, "num_queries": 3, "num_targets": [2]}),
    "pairs": (MATCHES.pairs, {"layer": 0}),
    "matches to": (MATCHES.to, {"device": "cpu"}),
    "sampling": (PointSampling, {"num_points": 5, "oversample_ratio": 3.0, "layout": "independent"}),
    "matcher": (HungarianMatcher, {"num_points": 5, "layout": "independent", "backend": None}),
}
WRONG = [
    *(
        None,
        -9,
        2.5,
        float("nan"),
        "a",
        b"x",
        10**30,
        True,
        [],
        [1.0],
        [None],
        (0, 0),
        {},
        object(),
        [[1, 2]],
        ["a", "b"],
    ),
    *(POINTS.numpy(), torch.zeros(()), torch.zeros(2, 3), torch.zeros(0), torch.ones(2, dtype=torch.complex64)),
    *(torch.ones(1, 2, 3, 4, 5), [torch.zeros(2), torch.zeros(3)], torch.float32, torch.Generator, [(LABELS, 5)]),
    *(torch.zeros(2, 9, 9).to_sparse(), torch.zeros(2, 9, 9, device="meta"), torch.zeros(1, device="meta")),
]


@pytest.mark.parametrize("name", CALLS)
def test_wrong_types(name: str) -> None:
    """Each argument in turn is something else: the call works, or the error is the library's."""
    function, arguments = CALLS[name]
    function(**arguments)
    for argument in arguments:
        failed = sum(fails(function, {**arguments, argument: wrong}) for wrong in WRONG)
        assert failed >= len(WRONG) // 2, argument


def fails(function: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    try:
        function(**arguments)
    except MaskLossError:
        return True
    return False
