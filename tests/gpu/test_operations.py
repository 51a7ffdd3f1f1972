"""How little a training step asks of PyTorch: few operations, and one trip to the host.

The step runs on the meta device, where tensors have no data: there is no kernel to wait for, and whoever looks at a
value gets an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskloss import MaskCriterion, MaskFactors, MaskTargets, ops

META = torch.device("meta")
# They pass a tensor on and touch no memory.
FREE = {"detach", "alias", "lift_fresh"}
# The `coco` preset of the benchmark, but for the sizes of the maps, which do not matter here.
LAYERS, BATCH, QUERIES, TARGETS, CLASSES = 10, 2, 100, 20, 80


class Count(TorchDispatchMode):
    """Counts operations, each custom one as one, and the copies from and to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE:
            self.operations[name] += 1
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        if "copy" in name and len(devices) > 1:
            self.copies.append(name)
        return result


def predictions(channels: tuple[int, ...]) -> list[torch.Tensor]:
    """Outputs of a model are no leaves: what autograd does to accumulate the gradients of leaves is not counted."""
    leaf = torch.empty(BATCH, QUERIES, *channels, device=META, requires_grad=True)
    return [leaf.clone() for _ in range(LAYERS)]


def labels() -> list[torch.Tensor]:
    return [torch.empty(TARGETS, dtype=torch.int64, device=META) for _ in range(BATCH)]


def masks(device: str | torch.device = META) -> list[torch.Tensor]:
    return [torch.ones(TARGETS, 12, 12, dtype=torch.bool, device=device) for _ in range(BATCH)]


def by_image(entries: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"masks": entry, "labels": label} for entry, label in zip(entries, labels(), strict=True)]


def label_maps(ids: Any) -> list[dict[str, Any]]:
    found = [torch.empty(12, 12, dtype=torch.int32, device=META) for _ in range(BATCH)]
    return [entry | {"ids": ids} for entry in by_image(found)]


# How many copies of the description of the masks go to the device before the assignment makes its trip.
FORMS: dict[str, tuple[Callable[[], Any], int]] = {
    "collated": (lambda: {"masks": MaskTargets.from_masks(masks("cpu")).to(META), "labels": labels()}, 0),
    "packed": (lambda: by_image([MaskTargets.from_masks(each).to(META) for each in masks("cpu")]), 0),
    "dense": (lambda: by_image(masks()), 1),
    "label maps": (lambda: label_maps(list(range(TARGETS))), 1),
    "label maps, ids on the host": (lambda: label_maps(torch.arange(TARGETS)), 1),
    "label maps, ids on the device": (lambda: label_maps(torch.arange(TARGETS, device=META)), 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_operations_of_a_step(form: str) -> None:
    make, copies = FORMS[form]
    targets, criterion = make(), MaskCriterion(CLASSES).to(META)
    classes, logits = predictions((CLASSES + 1,)), predictions((16, 16))
    with Count() as count:
        out = criterion(classes, logits, targets, seed=0)
        torch.autograd.grad(out.total, classes + logits)
    assert count.operations.total() <= 90, count.operations.most_common()
    for name in ("match_cost", "assign", "mask_loss", "mask_loss_backward"):
        assert count.operations[f"maskloss::{name}"] == 1
    # The assignment makes the one trip to the host and back, inside its operation.
    assert len(count.copies) == copies


@pytest.mark.parametrize("layers", [1, 3])
def test_operations_do_not_grow_with_the_layers(layers: int) -> None:
    criterion, targets = MaskCriterion(CLASSES).to(META), FORMS["collated"][0]()
    classes = [torch.empty(BATCH, QUERIES, CLASSES + 1, device=META, requires_grad=True).clone()] * layers
    logits = [torch.empty(BATCH, QUERIES, 16, 16, device=META, requires_grad=True).clone()] * layers
    with Count() as count:
        out = criterion(classes, logits, targets, seed=0)
        torch.autograd.grad(out.total, [*classes[:1], *logits[:1]])
    assert count.operations.total() <= 75 + 2 * layers, count.operations.most_common()


def factored(layers: int) -> tuple[list[MaskFactors], list[torch.Tensor]]:
    """Layers that share their features, and what gradients flow to."""
    features = torch.empty(BATCH, 32, 16, 16, device=META, requires_grad=True).clone()
    made = [torch.empty(BATCH, QUERIES, 32, device=META, requires_grad=True).clone() for _ in range(layers)]
    return [MaskFactors(each, features) for each in made], [*made, features]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [1, LAYERS])
def test_operations_of_a_step_with_factors(form: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as with dense logits, and each operation once; with kernels, as the reference takes no factors."""
    make, copies = FORMS[form]
    targets, criterion = make(), MaskCriterion(CLASSES).to(META)
    classes, (masks_, leaves) = predictions((CLASSES + 1,))[:layers], factored(layers)
    monkeypatch.setattr(ops, "choose_backend", lambda *_: "gpu")
    with Count() as count:
        out = criterion(classes, masks_, targets, seed=0)
        torch.autograd.grad(out.total, classes + leaves)
    assert count.operations.total() <= 85 + layers, (count.operations.total(), count.operations.most_common(99))
    for name in ("factored_match_cost", "assign_on_device", "factored_mask_loss", "factored_mask_loss_backward"):
        assert count.operations[f"maskloss::{name}"] == 1
    assert len(count.copies) == copies


@pytest.mark.parametrize("images", [1, 7])
def test_operations_do_not_grow_with_the_images(images: int) -> None:
    parts = [MaskTargets.from_masks(torch.ones(TARGETS, 12, 12, dtype=torch.bool)).to(META)] * images
    with Count() as count:
        MaskTargets.cat(parts)
    assert count.operations.total() <= 10, count.operations.most_common()
    for dtype, width in ((torch.bool, 16), (torch.bool, 13), (torch.uint8, 16)):
        with Count() as count:
            MaskTargets.from_masks([torch.ones(TARGETS, 12, width, dtype=dtype, device=META)] * images)
        # What is more than a constant are views.
        assert count.operations.total() - count.operations["view"] <= 15, count.operations.most_common()
        assert len(count.copies) == 1
    ids = [torch.arange(TARGETS, device=META)] * images
    with Count() as count:
        MaskTargets.from_label_map([torch.ones(12, 16, dtype=torch.int32, device=META)] * images, ids)
    assert count.operations.total() - count.operations["view"] <= 15, count.operations.most_common()
    assert len(count.copies) == 1
