"""What a training loop tells all losses inside a block: totals, numbers of images, the seed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from maskloss import HungarianMatcher, MaskCriterion, MaskLoss, MaskLossError, StepTotals, step, step_totals
from maskloss.integrations import detr, maskdino
from support.steps import FEW, QUERIES, criterion, entries, predictions

COUNTS = (3, 2)


def batch() -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
    classes, masks = predictions(len(COUNTS))
    return classes, masks, entries(COUNTS)


def part(image: int, classes: list[Tensor], masks: list[Tensor], targets: list[dict[str, Tensor]]) -> Any:
    """One image of a batch, as a batch."""
    one = slice(image, image + 1)
    return [layer[one] for layer in classes], [layer[one] for layer in masks], targets[one]


def test_the_criterion_is_told(backend: str) -> None:
    given = {"totals": step_totals([[7]], QUERIES), "image_ids": [5, 9], "seed": 3}
    inputs = batch()
    expected = criterion(backend)(*inputs, **given)
    with step(**given):
        found = criterion(backend)(*inputs)
    assert torch.equal(found.total, expected.total)
    assert int(found.seed) == 3
    assert not torch.equal(found.total, criterion(backend)(*inputs, seed=3).total), "told no more"


def test_loss_and_matcher_are_told(backend: str) -> None:
    logits, masks = torch.randn(3, 9, 9), torch.rand(3, 12, 12) > 0.5
    loss = MaskLoss(sampling=FEW, backend=backend)
    with step(totals=StepTotals(6.0, 10.0), image_ids=torch.tensor([4]), seed=8):
        found = loss(logits, masks)
    assert torch.equal(found.total, loss(logits, masks, num_instances=6.0, image_ids=[4], seed=8).total)
    inputs = batch()
    matcher = HungarianMatcher(num_points=5, class_weight=0.0, backend=backend)
    with step(image_ids=[5, 9], seed=3):
        matches = matcher(*inputs)
    assert torch.equal(matches.index, matcher(*inputs, image_ids=[5, 9], seed=3).index)


def test_arguments_and_inner_blocks_come_first() -> None:
    inputs = batch()
    module = criterion("reference")
    with step(seed=1, image_ids=[3, 4]):
        with step(seed=2):
            inner = module(*inputs)
        outer, argument = module(*inputs), module(*inputs, seed=2)
        with pytest.raises(ZeroDivisionError), step(seed=5):
            raise ZeroDivisionError
        drawn = module(*inputs, generator=torch.Generator().manual_seed(0))
        assert torch.equal(module(*inputs).total, outer.total)
    assert [int(out.seed) for out in (inner, outer, argument)] == [2, 1, 2]
    assert int(drawn.seed) != 1
    assert torch.equal(inner.total, argument.total)
    assert torch.equal(inner.total, module(*inputs, seed=2, image_ids=[3, 4]).total)


def test_another_thread_is_told_nothing() -> None:
    seeds: list[int] = []
    inputs = batch()
    with step(seed=1):
        thread = threading.Thread(target=lambda: seeds.append(int(criterion("reference")(*inputs).seed)))
        thread.start()
        thread.join()
    assert len(seeds) == 1
    assert seeds[0] != 1


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_micro_batches_of_a_drop_in_add_up(classification: str) -> None:
    """`SetCriterion` has no arguments for it; OneFormer's and MaskDINO's forward have none either."""
    classes, masks, targets = batch()
    if classification == "focal":
        classes = [layer[..., :-1] for layer in classes]
    package = detr if classification == "softmax" else maskdino
    matcher = package.HungarianMatcher(num_points=32)
    names = ["labels", "masks"]
    module = package.SetCriterion(classes[0].shape[2] - (package is detr), matcher, {}, 0.1, names, 32)

    def losses(classes: list[Tensor], masks: list[Tensor], targets: Any) -> dict[str, Tensor]:
        layers = [{"pred_logits": c, "pred_masks": m} for c, m in zip(classes, masks, strict=True)]
        return module(layers[-1] | {"aux_outputs": layers[:-1]}, targets)

    totals = step_totals([[count] for count in COUNTS], QUERIES)
    with step(seed=2):
        whole = losses(classes, masks, targets)
    summed: dict[str, Tensor] = {}
    for image in range(len(COUNTS)):
        with step(totals=totals, image_ids=[image], seed=2):
            for name, value in losses(*part(image, classes, masks, targets)).items():
                summed[name] = summed.get(name, torch.zeros(())) + value
    assert summed.keys() == whole.keys()
    for name, value in whole.items():
        assert_close(summed[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="PyTorch 2.6 compiles no criterion into one graph")
def test_compiled_code_is_told() -> None:
    """Every step anew, and compiled once for all seeds and totals."""
    inputs = batch()
    module = criterion("cpu")
    graphs: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compiled: Any = torch.compile(module, fullgraph=True, backend=count)
    with torch.no_grad():
        for seed in range(1, 6):
            with step(seed=seed, totals=StepTotals(3.5 + seed, 7.25), image_ids=[seed, 2]):
                out, expected = compiled(*inputs), module(*inputs)
            assert int(out.seed) == seed
            assert_close(out.total, expected.total)
        with step(seed=9):
            assert_close(compiled(*inputs).total, module(*inputs).total)
    assert len(graphs) <= 4


def test_a_default_device_is_nobodys_business() -> None:
    """Numbers become tensors on the CPU, also where new tensors go elsewhere."""
    inputs = batch()
    weights = {"labels": [[torch.tensor([0, 2])]], "class_weights": [1.0, 2.0, 4.0]}
    expected = criterion("reference", class_weights=[1.0, 2.0, 3.0])(*inputs, image_ids=[3, 4], seed=5)
    with torch.device("meta"):
        module = criterion("reference", class_weights=[1.0, 2.0, 3.0])
        totals = step_totals([[2]], QUERIES, instance_weights=[[[1.0, 0.5]]], **weights)
        told = step(image_ids=[3, 4], seed=5)
        with told:
            pass
    assert [float(count) for count in totals if count is not None] == [2.0, 5.0, 1.5, 5.0]
    assert torch.equal(module(*inputs, image_ids=[3, 4], seed=5).total, expected.total)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("totals must be a StepTotals", {"totals": 5}),
        ("totals.instances must be a finite number", {"totals": StepTotals(-1.0, 2.0)}),
        ("seed must be a 64-bit integer", {"seed": 0.5}),
        ("group must be a process group that this rank is in", {"group": 2}),
        ("group must be a process group that this rank is in", {"group": True}),
        ("image_ids must hold one integer", {"image_ids": [1, 2, 3]}),
    ],
)
def test_what_is_refused(text: str, told: dict[str, Any]) -> None:
    with pytest.raises(MaskLossError, match=text), step(**told):
        criterion("reference")(*batch())


def test_totals_must_have_the_weights_that_are_used() -> None:
    logits, masks = torch.randn(3, 9, 9), torch.rand(3, 12, 12) > 0.5
    with step(totals=StepTotals(6.0, 10.0)), pytest.raises(MaskLossError, match=r"totals\.instance_weight belongs to"):
        MaskLoss(sampling=FEW)(logits, masks, instance_weights=torch.ones(3))
    with step(totals=StepTotals(6.0, 10.0)), pytest.raises(MaskLossError, match=r"totals\.class_weight belongs to"):
        MaskCriterion(2, class_weights=[1.0, 2.0])(
            torch.zeros(1, 3, 3), logits[None], [{"masks": masks, "labels": torch.zeros(3).long()}]
        )
