"""How little a training step asks of PyTorch: few operations, and one trip to the host.

The step runs on the meta device, where tensors have no data: there is no kernel to wait for, and whoever looks at a
value gets an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskloss import MaskCriterion, MaskTargets

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
    return [torch.empty(BATCH, QUERIES, *channels, device=META, requires_grad=True) for _ in range(LAYERS)]


def targets_of_an_image() -> dict[str, Any]:
    masks = MaskTargets.from_masks(torch.ones(TARGETS, 12, 12, dtype=torch.bool)).to(META)
    return {"masks": masks, "labels": torch.empty(TARGETS, dtype=torch.int64, device=META)}


def count_step(targets: Any) -> Count:
    criterion = MaskCriterion(CLASSES).to(META)
    classes, masks = predictions((CLASSES + 1,)), predictions((16, 16))
    with Count() as count:
        criterion(classes, masks, targets, seed=0).total.backward()
    return count


def test_operations_of_a_step() -> None:
    images = [targets_of_an_image() for _ in range(BATCH)]
    masks = MaskTargets.cat([image["masks"] for image in images])
    count = count_step({"masks": masks, "labels": [image["labels"] for image in images]})
    assert count.operations.total() <= 90, count.operations.most_common()
    for name in ("match_cost", "assign", "mask_loss", "mask_loss_backward"):
        assert count.operations[f"maskloss::{name}"] == 1
    # The assignment makes the one trip to the host, inside its operation.
    assert not count.copies


def test_joining_images_costs_operations_for_each_image() -> None:
    count = count_step([targets_of_an_image() for _ in range(BATCH)])
    assert count.operations.total() <= 90 + 20 * BATCH, count.operations.most_common()
    assert not count.copies


@pytest.mark.parametrize("layers", [1, 3])
def test_the_forward_pass_does_not_grow_with_the_layers(layers: int) -> None:
    images = {"masks": targets_of_an_image()["masks"], "labels": [torch.empty(TARGETS, dtype=torch.int64, device=META)]}
    criterion = MaskCriterion(CLASSES).to(META)
    with Count() as count, torch.no_grad():
        classes = [torch.empty(1, QUERIES, CLASSES + 1, device=META)] * layers
        criterion(classes, [torch.empty(1, QUERIES, 16, 16, device=META)] * layers, images, seed=0)
    assert count.operations.total() <= 55, count.operations.most_common()
