"""What `torch.func` does with the losses, and tensors that are not ordinary ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from maskloss import MaskCriterion, MaskFactors, MaskLoss, MaskLossError, MaskTargets, PointSampling, functional

FEW = PointSampling(num_points=32)
MASKS = torch.zeros(2, 16, 16, dtype=torch.bool)
MASKS[0, 3:9, 2:11] = MASKS[1, 8:, 4:] = True


def loss(backend: str, masks: Any = MASKS) -> Callable[[Tensor], Tensor]:
    return lambda logits: MaskLoss(sampling=FEW, backend=backend)(logits, masks, seed=1).total


def plain_gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    return gradient


@pytest.mark.parametrize(
    "masks", [MASKS, MASKS.float() * 0.7, MaskTargets.from_masks(MASKS)], ids=["bool", "soft", "packed"]
)
def test_gradients_of_functions(backend: str, masks: Any) -> None:
    logits, function = torch.randn(2, 8, 8), loss(backend, masks)
    expected = plain_gradient(function, logits)
    assert torch.equal(torch.func.grad(function)(logits), expected)
    value, pull_back = torch.func.vjp(function, logits)
    assert torch.equal(value, function(logits))
    torch.testing.assert_close(pull_back(torch.tensor(2.0))[0], 2 * expected)


def test_parameters_of_a_model(backend: str) -> None:
    model = torch.nn.Conv2d(3, 2, 3, padding=1)
    image, parameters = torch.randn(1, 3, 8, 8), dict(model.named_parameters())

    def step(values: dict[str, Tensor]) -> Tensor:
        return loss(backend)(torch.func.functional_call(model, values, (image,))[0])

    found = torch.func.grad(step)({name: value.detach() for name, value in parameters.items()})
    expected = torch.autograd.grad(step(parameters), list(parameters.values()))
    for mine, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_the_criterion(backend: str, form: str) -> None:
    criterion, classes = MaskCriterion(3, sampling=FEW, backend=backend), torch.randn(1, 5, 4)
    features, targets = torch.randn(1, 6, 8, 8), [{"masks": MASKS, "labels": torch.tensor([0, 2])}]

    def step(embeddings: Tensor) -> Tensor:
        factors = MaskFactors(embeddings, features)
        return criterion(classes, factors.dense() if form == "dense" else factors, targets, seed=4).total

    embeddings = torch.randn(1, 5, 6)
    torch.testing.assert_close(torch.func.grad(step)(embeddings), plain_gradient(step, embeddings))


def test_points_of_maps(backend: str) -> None:
    maps, points = torch.randn(2, 5, 6), torch.rand(2, 4, 2)

    def read(values: Tensor) -> Tensor:
        return functional.point_sample(values, points, backend=backend).square().sum()

    torch.testing.assert_close(torch.func.grad(read)(maps), plain_gradient(read, maps))


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (lambda f, z: torch.vmap(f)(torch.stack([z, z])), "torch.vmap over losses is not supported"),
        (lambda f, z: torch.func.jacrev(lambda x: f(x)[None].repeat(2))(z), "torch.vmap over losses is not supported"),
        pytest.param(
            lambda f, z: torch.func.jvp(f, (z,), (z,)),
            "no forward-mode derivative",
            marks=pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
        ),
        (lambda f, z: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(z), "differentiable once"),
    ],
    ids=["vmap", "jacrev", "jvp", "grad of grad"],
)
def test_what_cannot_says_so(backend: str, transform: Any, text: str) -> None:
    with pytest.raises(MaskLossError, match=text):
        transform(loss(backend), torch.randn(2, 8, 8))


def sparse(tensor: Tensor) -> Tensor:
    return tensor.to_sparse()


def nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor.unbind()))


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize("change", [sparse, nested])
@pytest.mark.parametrize(
    "call",
    [
        lambda change: MaskLoss()(change(torch.randn(2, 8, 8)), MASKS),
        lambda change: MaskLoss()(torch.randn(2, 8, 8), change(MASKS.float())),
        lambda change: MaskLoss(sampling=FEW)(torch.randn(2, 8, 8), MASKS, points=change(torch.rand(2, 4, 2))),
        lambda change: MaskCriterion(3)(
            torch.randn(1, 5, 4), change(torch.randn(1, 5, 8, 8)), [{"masks": MASKS, "labels": torch.tensor([0, 1])}]
        ),
        lambda change: MaskCriterion(3)(
            change(torch.randn(1, 5, 4)), torch.randn(1, 5, 8, 8), [{"masks": MASKS, "labels": torch.tensor([0, 1])}]
        ),
        lambda change: MaskFactors(change(torch.randn(1, 5, 4)), torch.randn(1, 4, 8, 8)),
        lambda change: MaskTargets.from_label_map(change(torch.randint(3, (8, 8))), [1]),
    ],
    ids=["logits", "masks", "points", "mask logits", "class logits", "embeddings", "label map"],
)
def test_tensors_without_strides_are_refused(change: Any, call: Callable[[Any], Any]) -> None:
    with pytest.raises(MaskLossError, match="must be an ordinary tensor with strides"):
        call(change)
