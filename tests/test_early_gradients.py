"""Gradients that the forward pass computes for the sum that a criterion announces, whatever is then made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from maskloss import CriterionOutput, MaskCriterion, MaskLoss, PointSampling
from maskloss.integrations import detr
from maskloss.integrations.transformers import patch
from maskloss.ops import cpu, dense
from maskloss.ops.cpu import loss as cpu_loss
from maskloss.targets.collate import collate
from support import tiny
from support.steps import FEW, SIZES, criterion, entries, predictions

SUMS: dict[str, Callable[[CriterionOutput], Tensor]] = {
    "as announced": lambda out: out.total,
    "scaled": lambda out: 65536 * out.total,
    "a tiny share": lambda out: out.total / 7e5,
    "other weights": lambda out: out.loss_mask.sum() + 3 * out.loss_dice.sum(),
    "one term": lambda out: out.loss_dice.sum(),
    "one layer": lambda out: out.loss_mask[1] + out.loss_dice[1],
    "each instance": lambda out: (out.per_instance.ce * torch.arange(len(out.per_instance.ce))).sum(),
    "nothing": lambda out: 0 * out.total,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "focal": {"focal_alpha": 0.25, "focal_gamma": 2.0},
    "border, nearest": {"padding_mode": "border", "target_mode": "nearest"},
    "stratified": {"sampling": PointSampling(num_points=61, layout="stratified")},
    "no cross-entropy": {"mask_weight": 0.0},
}


class Calls:
    """How often the CPU backend did what."""

    def __init__(self) -> None:
        self.ahead, self.later, self.settled, self.computed_later = 0, 0, 0, 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()

    def counted(owner: Any, name: str, counter: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any) -> Any:
            setattr(seen, counter, getattr(seen, counter) + 1)
            return original(*args)

        monkeypatch.setattr(owner, name, call)

    counted(cpu, "mask_loss_ahead", "ahead")
    counted(cpu, "mask_loss_backward", "later")
    counted(cpu, "mask_loss_settle", "settled")
    # Whoever asks for it: the backward pass, or a comparison that failed.
    counted(cpu_loss, "_backward", "computed_later")
    return seen


@contextmanager
def later(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute gradients in the backward pass, as all other backends do."""
    with monkeypatch.context() as patch:
        patch.setattr(dense, "_pays_ahead", lambda *_: False)
        yield


def assert_equal_gradients(step: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    found = step()
    assert (calls.ahead, calls.later) == (1, 0)
    with later(monkeypatch):
        wanted = step()
    assert (calls.ahead, calls.later) == (1, 1)
    for one, other in zip(found, wanted, strict=True):
        scale = other.abs().max().nan_to_num().item()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * scale, equal_nan=True)


@pytest.mark.parametrize("total", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_gradients_whatever_is_summed(
    dtype: torch.dtype, total: Callable[[CriterionOutput], Tensor], monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    classes, masks = predictions(dtype=dtype)
    targets = entries()

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(total(criterion("cpu")(classes, masks, targets, seed=1)), masks))

    assert_equal_gradients(step, monkeypatch, calls)


@pytest.mark.parametrize("name", ["as announced", "other weights"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_gradients_with_every_option(
    options: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    classes, masks = predictions()
    targets = entries()

    def step() -> list[Tensor]:
        out = criterion("cpu", **options)(classes, masks, targets, seed=1)
        return list(torch.autograd.grad(SUMS[name](out), masks))

    assert_equal_gradients(step, monkeypatch, calls)


def test_weights_of_instances_and_their_nan(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    """A target of weight 0 whose query has NaN logits leaves gradients finite."""
    classes, masks = predictions()
    targets = entries()
    matches = criterion("cpu")(classes, masks, targets, seed=1).matches
    layer, image, query, target = matches.index[0].tolist()
    masks[layer].data[image, query] = float("nan")
    weights = [torch.rand(len(entry["labels"])) for entry in targets]
    weights[image][target] = 0

    def step() -> list[Tensor]:
        out = criterion("cpu")(classes, masks, targets, matches=matches, instance_weights=weights, seed=1)
        return list(torch.autograd.grad(out.total, masks))

    calls.ahead = 0
    assert_equal_gradients(step, monkeypatch, calls)
    assert all(bool(grad.isfinite().all()) for grad in step())


def test_non_finite_logits_and_gradients(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    classes, masks = predictions()
    targets = entries()
    masks[0].data[0, :, 3, 3] = float("inf")

    def step() -> list[Tensor]:
        out = criterion("cpu")(classes, masks, targets, seed=1)
        return list(torch.autograd.grad(out.total * float("inf"), masks))

    assert_equal_gradients(step, monkeypatch, calls)


def test_layers_without_gradient(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    classes, masks = predictions()
    masks[0] = masks[0].detach()

    def step() -> list[Tensor]:
        out = criterion("cpu")(classes, masks, targets, seed=1)
        return list(torch.autograd.grad(2 * out.loss_mask[1] + out.loss_mask[0], masks[1]))

    targets = entries()
    assert_equal_gradients(step, monkeypatch, calls)


def test_some_of_the_gradients(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    classes, masks = predictions()
    targets = entries()

    def step() -> list[Tensor]:
        out = criterion("cpu")(classes, masks, targets, seed=1)
        return list(torch.autograd.grad(out.total, [masks[1]]))

    assert_equal_gradients(step, monkeypatch, calls)


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given points"])
@pytest.mark.parametrize("soft", [False, True], ids=["bits", "soft"])
def test_pairs(given: bool, soft: bool, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    logits = torch.randn(4, 9, 12, requires_grad=True)
    masks = torch.rand(4, 20, 26)
    masks = masks if soft else masks > 0.6
    points = torch.rand(4, 50, 2) if given else None
    weights = torch.tensor([1.0, 0.0, 2.5, 0.3])

    def step() -> list[Tensor]:
        loss = MaskLoss(ce_weight=2.0, dice_weight=0.5, sampling=FEW, backend="cpu")
        out = loss(logits, masks, points=points, instance_weights=weights, seed=1)
        return list(torch.autograd.grad(out.total, logits))

    assert_equal_gradients(step, monkeypatch, calls)


def test_the_backward_pass_only_compares(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel runs in it where the sum is the announced one, or half of it; a leaf gets the memory itself."""
    classes, masks = predictions()
    early: list[Tensor] = []
    original = cpu.mask_loss_ahead

    def spy(*args: Any) -> Any:
        found = original(*args)
        early.extend(found[-1])
        return found

    monkeypatch.setattr(cpu, "mask_loss_ahead", spy)
    out = criterion("cpu")(classes, masks, entries(), seed=1)
    places = [grad.data_ptr() for grad in early]
    early.clear()
    monkeypatch.setattr("maskloss.ops.cpu.loss.launch", None)
    out.total.backward()
    assert (calls.ahead, calls.settled, calls.later) == (1, 1, 0)
    assert [layer.grad.data_ptr() for layer in masks if layer.grad is not None] == places


def test_backward_twice(calls: Calls) -> None:
    """What the first one has taken may have been changed since: the second one computes it again."""
    classes, masks = predictions()
    out = criterion("cpu")(classes, masks, entries(), seed=1)
    first = torch.autograd.grad(out.total, masks, retain_graph=True)
    for grad in first:
        grad.mul_(-3)
    second = torch.autograd.grad(out.total, masks)
    assert calls.later == 1
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, -3 * other)


def test_gradients_add_up_in_leaves(calls: Calls) -> None:
    classes, masks = predictions()
    for _ in range(2):
        criterion("cpu")(classes, masks, entries((1, 1, 1)), seed=1).total.backward()
    assert (calls.ahead, calls.later) == (2, 0)
    assert all(layer.grad is not None and layer.grad.count_nonzero() > 0 for layer in masks)


class Named(Tensor):
    """A subclass, as users have them."""


@pytest.mark.parametrize("why", ["half precision", "no gradient", "compiled", "grad", "subclass"])
def test_where_nothing_comes_early(why: str, calls: Calls) -> None:
    """Half precision would be rounded before mixed precision scales it, and a transform has derivatives of its own.

    What comes early bypasses the dispatcher, which a tensor of another class may need.
    """
    classes, masks = predictions(sizes=SIZES[:1] * 2)
    module, targets = criterion("cpu"), entries()

    def total(*layers: Tensor) -> Tensor:
        return module(classes, list(layers), targets, seed=1).total

    if why == "half precision":
        total(*(layer.half() for layer in masks)).backward()
    elif why == "no gradient":
        total(*(layer.detach() for layer in masks))
    elif why == "subclass":
        total(*(layer.detach().as_subclass(Named).requires_grad_() for layer in masks)).backward()
    elif why == "compiled":
        torch.compile(total, backend="aot_eager")(*masks).backward()
    else:
        torch.func.grad(total, argnums=(0, 1))(*masks)
    assert calls.ahead == 0


def test_fake_tensors_have_no_values(calls: Calls) -> None:
    """Tools that estimate memory run a step on tensors without values; these take the operation of the dispatcher."""
    classes, masks = predictions()
    targets = collate(entries())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [[mode.from_tensor(layer.detach()).requires_grad_() for layer in layers] for layers in (classes, masks)]
        packed = {"masks": targets[0], "labels": list(targets[1].split(list(targets[0].num_targets)))}
        criterion("cpu")(*fake, packed, seed=1).total.backward()
    assert calls.ahead == 0
    assert [layer.grad.shape for layer in fake[1] if layer.grad is not None] == [layer.shape for layer in masks]


def test_differentiable_once(calls: Calls) -> None:
    """A gradient of a gradient is refused, and not taken for zero."""
    classes, masks = predictions()
    total = criterion("cpu")(classes, masks, entries(), seed=1).total
    (grad, *_) = torch.autograd.grad(total, masks, create_graph=True)
    assert calls.ahead == 1
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_accumulated_micro_batches(calls: Calls) -> None:
    """Micro-batches that are divided by their number, as training loops do it, come early too."""
    classes, masks = predictions()
    module: MaskCriterion = criterion("cpu")
    (module(classes, masks, entries(), seed=1).total / 4).backward()
    assert (calls.ahead, calls.settled, calls.computed_later) == (1, 1, 0)


def test_patched_models_announce_their_weights(calls: Calls) -> None:
    """Transformers multiplies the terms by weights of its own, here unequal ones."""
    model = tiny.mask2former(mask_weight=3.0, dice_weight=4.0)
    patch(model, backend="cpu")
    masks, labels = [torch.rand(2, 64, 64) > 0.5], [torch.tensor([0, 1])]
    model(torch.rand(1, 3, 64, 64), mask_labels=[each.float() for each in masks], class_labels=labels).loss.backward()
    assert calls.ahead == calls.settled > 0
    assert calls.computed_later == 0


def test_other_loops_announce_their_weights(calls: Calls) -> None:
    (classes,), (masks,) = predictions(sizes=SIZES[:1])
    weights = {"loss_ce": 2.0, "loss_mask": 20.0, "loss_dice": 1.0}
    module = detr.SetCriterion(
        3, detr.HungarianMatcher(num_points=60), weights, 0.1, ["labels", "masks"], 60, 3.0, 0.75
    )
    terms = module({"pred_logits": classes, "pred_masks": masks}, entries())
    torch.stack([terms[name] * weight for name, weight in weights.items()]).sum().backward()
    assert (calls.ahead, calls.settled, calls.computed_later) == (1, 1, 0)
