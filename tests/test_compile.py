"""`torch.compile` of a step: one graph, and the numbers of eager execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from maskloss import MaskLoss, MaskLossError, MaskTargets, Matches
from support.steps import FEW, criterion, entries, gradients, predictions

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 7), reason="PyTorch 2.6 compiles no step into one graph")
Step = Callable[..., Any]


def compiled(step: Step) -> Step:
    """One graph, run by torch's own operators: what is under test is the tracing."""
    result: Step = torch.compile(step, fullgraph=True, backend="aot_eager")
    return result


def label_maps(counts: tuple[int, ...] = (3, 2)) -> list[dict[str, Any]]:
    maps = [torch.randint(0, 5, (20, 26)) for _ in counts]
    return [
        {"masks": labels, "ids": list(range(count)), "labels": torch.zeros(count, dtype=torch.int64)}
        for labels, count in zip(maps, counts, strict=True)
    ]


def packed(targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry | {"masks": MaskTargets.from_masks(entry["masks"])} for entry in targets]


def ids_as_tensors() -> list[dict[str, Any]]:
    return [entry | {"ids": torch.tensor(entry["ids"])} for entry in label_maps()]


FORMS: dict[str, Callable[[], Any]] = {
    "dense": lambda: entries((3, 0)),
    "soft": lambda: [entry | {"masks": entry["masks"] * 0.7} for entry in entries((3, 2))],
    "no targets": lambda: packed(entries((0, 0))),
    "label maps": label_maps,
    "ids as tensors": ids_as_tensors,
    "collated": lambda: {
        "masks": MaskTargets.from_masks([torch.rand(2, 9, 9) > 0.5, torch.rand(1, 5, 7) > 0.5]),
        "labels": [torch.tensor([0, 1]), torch.tensor([2])],
    },
}
QUICK_FORMS = ("dense", "label maps", "collated")


def compare(backend: str, targets: Any) -> None:
    """The whole step with two layers, matching included, and its gradients."""
    module, (classes, masks) = criterion(backend), predictions(images=2)
    expected = module(classes, masks, targets, seed=torch.tensor(3))
    out = compiled(module)(classes, masks, targets, seed=torch.tensor(3))
    assert torch.equal(out.matches.index, expected.matches.index)
    for name, term in expected.as_dict().items():
        assert torch.equal(out.as_dict()[name], term), name
    assert torch.equal(out.total, expected.total)
    for found, wanted in zip(gradients(out, classes, masks), gradients(expected, classes, masks), strict=True):
        assert torch.equal(found, wanted)


def test_criterion(backend: str) -> None:
    compare(backend, packed(entries((7, 2))))


@pytest.mark.parametrize(
    "form",
    [*QUICK_FORMS, *(pytest.param(each, marks=pytest.mark.slow) for each in FORMS if each not in QUICK_FORMS)],
)
def test_forms_of_targets(form: str) -> None:
    compare("reference", FORMS[form]())


@pytest.mark.parametrize("masks", [torch.rand(3, 9, 14) > 0.5, torch.rand(3, 9, 14)])
def test_loss_of_pairs(backend: str, masks: Tensor) -> None:
    logits = torch.randn(3, 8, 8, dtype=torch.bfloat16, requires_grad=True)

    def step(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        out = MaskLoss(sampling=FEW, backend=backend)(logits, masks, seed=3)
        return out.total, out.per_instance.dice

    expected, found = step(logits, masks), compiled(step)(logits, masks)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    grads = [torch.autograd.grad(total, logits) for total, _ in (expected, found)]
    assert torch.equal(*(grad for (grad,) in grads))


def test_loss_of_matches(backend: str) -> None:
    targets = MaskTargets.from_masks([torch.rand(2, 9, 9) > 0.5, torch.rand(3, 7, 7) > 0.5])
    pairs = [(torch.tensor([4, 1]), torch.tensor([0, 1])), (torch.tensor([0]), torch.tensor([2]))]
    matches = Matches.from_pairs(pairs, num_queries=5, num_targets=targets.num_targets)
    loss, logits = MaskLoss(sampling=FEW, backend=backend), torch.randn(2, 5, 8, 8)
    expected = loss(logits, targets, matches, seed=3, image_ids=[5, 6])
    assert torch.equal(compiled(loss)(logits, targets, matches, seed=3, image_ids=[5, 6]).total, expected.total)


@pytest.mark.slow
def test_numbers_of_targets_may_change() -> None:
    module = criterion("reference")

    def step(classes: list[Tensor], masks: list[Tensor], targets: Any, seed: Tensor) -> Tensor:
        total: Tensor = module(classes, masks, targets, seed=seed).total
        return total

    fast = compiled(step)
    for number, counts in enumerate([(3, 2), (0, 2), (6, 4), (5, 2), (7, 3)]):
        (classes, masks), seed = predictions(images=2), torch.tensor(number)
        targets = packed(entries(counts))
        assert torch.equal(fast(classes, masks, targets, seed), step(classes, masks, targets, seed)), counts


def test_two_graphs_serve_all_numbers_of_targets() -> None:
    """The largest number, and how many are matched, are expressions: no graph for each order of the images."""
    module, graphs = criterion("reference"), 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Step:
        nonlocal graphs
        graphs += 1
        return graph.forward

    step: Step = torch.compile(module, fullgraph=True, backend=count)
    classes, masks = predictions(images=6)
    for number in range(10):
        counts = [2 + (3 * number + 5 * image) % 9 for image in range(6)]
        step(classes, masks, packed(entries(counts)), seed=torch.tensor(number))
    assert graphs == 2


def test_drawn_seeds_differ_from_call_to_call(backend: str) -> None:
    targets = MaskTargets.from_masks(torch.rand(3, 9, 14) > 0.5)
    loss, logits = compiled(MaskLoss(sampling=FEW, backend=backend)), torch.randn(3, 8, 8)
    first, second = loss(logits, targets), loss(logits, targets)
    assert not torch.equal(first.total, second.total)
    assert torch.equal(loss(logits, targets, seed=first.seed).total, first.total)


def test_errors_keep_their_text() -> None:
    """Where the graph may break, an error is told as in eager execution."""
    loss = torch.compile(MaskLoss(sampling=FEW, backend="reference"), backend="aot_eager")
    with pytest.raises(MaskLossError, match=r"MaskLoss: mask_logits and masks must pair up\n(.*\n)*.*2 predictions"):
        loss(torch.zeros(2, 8, 8), MaskTargets.from_masks(torch.zeros(3, 9, 9, dtype=torch.bool)))
