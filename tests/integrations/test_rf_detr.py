"""RF-DETR's own package: a criterion and a matcher of its shape, and the package itself where it is installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskloss import MaskLossError, MaskTargets, PointSampling, layers
from maskloss.integrations import rf_detr
from support import tiny

GROUPS, PER_GROUP = 2, 4


class Matcher(nn.Module):
    """What is read of RF-DETR's matcher; called itself it matches query t of each group with target t."""

    cost_class, cost_bbox, cost_giou, focal_alpha = 2.0, 5.0, 2.0, 0.25
    cost_mask_ce, cost_mask_dice, mask_point_sample_ratio = 5.0, 5.0, 4

    def forward(self, outputs: Any, targets: Any, group_detr: int = 1) -> Any:
        assert all(isinstance(entry.get("masks", entry["boxes"]), Tensor) for entry in targets)
        size = outputs["pred_logits"].shape[1] // group_detr
        rows = [torch.arange(len(entry["labels"])) for entry in targets]
        return [(torch.cat([row + g * size for g in range(group_detr)]), row.repeat(group_detr)) for row in rows]

    def _match_many(self, layers: Any, targets: Any, group_detr: int = 1) -> Any:
        return [self(layer, targets, group_detr) for layer in layers]


class Criterion(nn.Module):
    """DETR's, with groups, the encoder's outputs, and a divisor that may be given."""

    mask_point_sample_ratio = 4

    def __init__(self) -> None:
        super().__init__()
        self.matcher, self.pairs = Matcher(), []

    def forward(self, outputs: Any, targets: Any, num_boxes: Any = None) -> dict[str, Tensor]:
        groups = GROUPS if self.training else 1
        stack = {"": outputs, "_0": outputs["aux_outputs"][0], "_enc": outputs["enc_outputs"]}
        self.pairs = Matcher._match_many(self.matcher, list(stack.values()), targets, group_detr=groups)
        count = torch.tensor(float(num_boxes or groups * sum(len(entry["labels"]) for entry in targets)))
        losses = {}
        for (suffix, layer), pairs in zip(stack.items(), self.pairs, strict=True):
            found = self.loss_masks(layer, targets, pairs, count)
            losses |= {f"{name}{suffix}": value for name, value in found.items()}
        return losses

    def loss_masks(self, outputs: Any, targets: Any, indices: Any, num_boxes: Any) -> dict[str, Tensor]:
        return {"own": num_boxes}


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("rfdetr.models.criterion")
    module.SetCriterion, module.HungarianMatcher = Criterion, Matcher  # type: ignore[attr-defined]
    for name in ("rfdetr", "rfdetr.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def batch(*, form: str = "dict", groups: int = GROUPS) -> tuple[Any, list[dict[str, Any]], list[list[int]]]:
    """Predictions of which query `order[t]` of each group is right about target t."""
    masks = [(each > 0) for each in tiny.blobs()]
    targets = [
        {"labels": labels, "boxes": boxes, "masks": each}
        for each, labels, boxes in zip(masks, tiny.labels_of(masks), tiny.boxes_of(masks), strict=True)
    ]
    order = [[2, 0], [3, 1, 2]]
    size = masks[0].shape[-1]

    def layer() -> dict[str, Any]:
        features = torch.zeros(2, 3, size, size)
        embeddings = torch.zeros(2, groups * PER_GROUP, 3)
        for image, each in enumerate(masks):
            features[image, : len(each)] = each * 40.0 - 20
            for group in range(groups):
                for target, query in enumerate(order[image]):
                    embeddings[image, group * PER_GROUP + query, target] = 1
        parts = {"spatial_features": features, "query_features": embeddings, "bias": torch.zeros(1)}
        parts = {name: part.requires_grad_() for name, part in parts.items()}
        dense = torch.einsum("bdhw,bqd->bqhw", features, embeddings)
        shape = (2, groups * PER_GROUP)
        return {
            "pred_masks": parts if form == "dict" else dense,
            "pred_logits": torch.zeros(*shape, tiny.CLASSES),
            "pred_boxes": torch.full((*shape, 4), 0.5),
        }

    return layer() | {"aux_outputs": [layer()], "enc_outputs": layer()}, targets, order


@pytest.mark.parametrize("form", ["dict", "dense"])
@pytest.mark.parametrize("training", [True, False])
def test_masks_are_matched_and_compared(form: str, training: bool, backend: str) -> None:
    groups = GROUPS if training else 1
    outputs, targets, order = batch(form=form, groups=groups)
    criterion = Criterion().train(training)
    with rf_detr.patch(backend=backend):
        losses = criterion(outputs, targets)
    assert list(losses) == [f"{name}{suffix}" for suffix in ("", "_0", "_enc") for name in rf_detr.NAMES]
    for pairs in criterion.pairs:
        for image, (queries, rows) in enumerate(pairs):
            found = sorted(zip(queries.tolist(), rows.tolist(), strict=True))
            expected = [(g * PER_GROUP + q, t) for g in range(groups) for t, q in enumerate(order[image])]
            assert found == sorted(expected)
    # Pixels at the edge of a mask are between the two, and nothing else is off.
    assert all(0 < value.item() < 0.35 for name, value in losses.items() if "ce" in name)
    assert all(0 < value.item() < 0.2 for name, value in losses.items() if "dice" in name)
    sum(losses.values()).backward()  # type: ignore[union-attr]


def test_the_divisor_may_be_given_and_packing_and_matching_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    inner, cost = MaskTargets.from_masks, layers.match_cost
    monkeypatch.setattr(MaskTargets, "from_masks", staticmethod(lambda *a, **k: made.append(0) or inner(*a, **k)))
    monkeypatch.setattr(layers, "match_cost", lambda *a: made.append(1) or cost(*a))
    outputs, targets, _ = batch()
    criterion = Criterion()
    with rf_detr.patch(sampling=PointSampling(20_000, importance_ratio=0.0)):
        losses = criterion(outputs, targets)
        assert sorted(made) == [0, 1]
        once = criterion(outputs, targets, num_boxes=1.0)
    for name, value in losses.items():
        torch.testing.assert_close(once[name], value * 10, rtol=0.1, atol=0)


def test_masks_that_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes and boxes alone are matched then, and masks are not even read for it."""
    outputs, targets, _ = batch()
    for name in ("cost_mask_ce", "cost_mask_dice"):
        monkeypatch.setattr(Matcher, name, 0.0)
    monkeypatch.setattr(layers, "match_cost", lambda *_: pytest.fail("masks are matched"))
    for image, entry in enumerate(targets):
        for layer in (outputs, outputs["aux_outputs"][0], outputs["enc_outputs"]):
            for first in range(0, GROUPS * PER_GROUP, PER_GROUP):
                last = first + PER_GROUP
                layer["pred_boxes"][image, last - len(entry["boxes"]) : last] = entry["boxes"].flip(0)
    criterion = Criterion()
    with rf_detr.patch():
        losses = criterion(outputs, targets)
    assert all(value.isfinite() for value in losses.values())
    for pairs in criterion.pairs:
        for queries, rows in pairs:
            assert torch.equal(queries % PER_GROUP, PER_GROUP - 1 - rows)


def test_void_pixels_and_empty_masks(backend: str) -> None:
    """What lies below void pixels does not matter, and an empty mask has no terms, in loss and matching."""
    outputs, targets, _ = batch()
    size = targets[0]["masks"].shape[-1]
    void = torch.zeros(size, size, dtype=torch.bool)
    void[:, size // 2 :] = True
    targets[0]["masks"][1] = False

    def losses(changed: Any, **options: Any) -> list[float]:
        entries = [entry | {"masks": changed(entry["masks"])} for entry in targets]
        torch.manual_seed(0)
        with rf_detr.patch(backend=backend, **options):
            return [value.item() for value in Criterion()(outputs, entries).values()]

    found = losses(lambda masks: masks.byte().masked_fill(void, 255), ignore_value=255)
    assert found == losses(lambda masks: MaskTargets.from_masks(masks & ~void, ignore=void))
    assert found != losses(lambda masks: masks & ~void)
    kept, dropped = losses(lambda masks: masks), losses(lambda masks: masks, drop_empty=True)
    assert all(without < whole for without, whole in zip(dropped, kept, strict=True))
    with pytest.raises(MaskLossError, match="ignore_value=255"):
        losses(lambda masks: masks.byte().masked_fill(void, 255))


def test_it_is_undone() -> None:
    before = [dict(vars(kind)) for kind in (Criterion, Matcher)]
    handle = rf_detr.patch()
    assert repr(handle) == "Patch(on)"
    with pytest.raises(MaskLossError, match="that is not patched already"):
        rf_detr.patch()
    handle.undo()
    assert repr(handle) == "Patch(undone)"
    assert [dict(vars(kind)) for kind in (Criterion, Matcher)] == before


def test_what_has_no_masks_is_left_to_rf_detr() -> None:
    outputs, targets, _ = batch()
    outputs = {name: value for name, value in outputs.items() if name != "pred_masks"}
    outputs["aux_outputs"], outputs["enc_outputs"] = [outputs], outputs
    plain = [{name: value for name, value in entry.items() if name != "masks"} for entry in targets]
    criterion = Criterion()
    with rf_detr.patch():
        assert criterion(outputs, plain) == {}
        assert criterion.pairs[0][0][0].tolist() == [0, 1, 4, 5]
        # Padded targets: RF-DETR says itself that masks have none.
        padded = [entry | {"valid": torch.ones(len(entry["labels"]), dtype=torch.bool)} for entry in targets]
        assert set(criterion(batch()[0], padded)) == {"own", "own_0", "own_enc"}


def test_a_copy_of_the_criterion_keeps_its_matching() -> None:
    class Copied(Criterion):
        def loss_masks(self, *args: Any) -> Any:
            raise AssertionError

    outputs, targets, _ = batch()
    criterion = Copied()
    with rf_detr.patch(Copied):
        assert set(criterion(outputs, targets)) == {f"{n}{s}" for n in rf_detr.NAMES for s in ("", "_0", "_enc")}
        assert criterion.pairs[0][0][0].tolist() == [0, 1, 4, 5]
    with pytest.raises(MaskLossError, match="must be a class with a method loss_masks"):
        rf_detr.patch(nn.Linear)


def test_it_says_that_rfdetr_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rfdetr", "rfdetr.models", "rfdetr.models.criterion"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MaskLossError, match="rfdetr must be installed"):
        rf_detr.patch()
