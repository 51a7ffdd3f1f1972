"""Criteria of code bases that subclass Transformers' own: what they override is called, what they inherit is ours."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from maskloss import MaskLossError, MaskTargets, PointSampling
from maskloss.integrations.transformers import patch, unpatch
from support import tiny
from support.forced import answered, recorded

modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
CALLED: list[str] = []


class ByBlock(modeling.Mask2FormerLoss):
    """As in EoMT's own code: a constructor and a `forward` of its own, called for each block; dicts as targets."""

    def __init__(self, num_points: int = tiny.POINTS) -> None:
        nn.Module.__init__(self)
        self.num_points, self.oversample_ratio, self.importance_sample_ratio = num_points, 3.0, 0.75
        self.num_labels = tiny.CLASSES
        self.register_buffer("empty_weight", torch.tensor([1.0] * tiny.CLASSES + [0.1]))
        self.matcher = modeling.Mask2FormerHungarianMatcher(2.0, 5.0, 5.0, num_points)

    def forward(self, masks: Any, targets: Any, classes: Any) -> Any:
        mask_labels = [target["masks"].to(masks.dtype) for target in targets]
        class_labels = [target["labels"] for target in targets]
        indices = self.matcher(masks, classes, mask_labels, class_labels)
        return self.loss_masks(masks, mask_labels, indices) | self.loss_labels(classes, class_labels, indices)

    def loss_masks(self, masks: Any, mask_labels: Any, indices: Any) -> Any:
        CALLED.append("loss_masks")
        count = sum(len(target) for _, target in indices)
        found = super().loss_masks(masks, mask_labels, indices, 1)
        return {name: value / count for name, value in found.items()}


class Trainer(nn.Module):
    """A module that is no model of Transformers and holds a criterion."""

    def __init__(self, criterion: Any = ByBlock) -> None:
        super().__init__()
        self.loss = criterion()


def blocks() -> tuple[list[tuple[Any, Any]], list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    outputs = [
        (
            torch.randn(2, tiny.QUERIES, 16, 16, generator=generator).requires_grad_(),
            torch.randn(2, tiny.QUERIES, tiny.CLASSES + 1, generator=generator).requires_grad_(),
        )
        for _ in range(3)
    ]
    masks = tiny.blobs()
    labels = tiny.labels_of(masks)
    return outputs, [{"masks": m > 0, "labels": c} for m, c in zip(masks, labels, strict=True)]


def losses_of(module: Any) -> list[Any]:
    outputs, targets = blocks()
    return [module.loss(masks, targets, classes) for masks, classes in outputs]


def test_a_subclass_agrees_on_the_same_points(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Trainer(), Trainer()
    patch(ours, backend=backend)
    outputs, targets = blocks()
    leaves = [tensor for pair in outputs for tensor in pair]
    CALLED.clear()
    with recorded(monkeypatch) as recorder:
        found = [ours.loss(masks, targets, classes) for masks, classes in outputs]
    assert CALLED == ["loss_masks"] * 3
    with answered(monkeypatch, recorder, final_first=False, shared=False):
        expected = [theirs.loss(masks, targets, classes) for masks, classes in outputs]
    for mine, other in zip(found, expected, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-7)
    totals = [sum(sum(layer.values()) for layer in each) for each in (found, expected)]
    mine, other = (torch.autograd.grad(total, leaves) for total in totals)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_masks_are_packed_once_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    inner = MaskTargets.from_masks
    monkeypatch.setattr(MaskTargets, "from_masks", staticmethod(lambda *a, **k: made.append(1) or inner(*a, **k)))
    module = Trainer()
    patch(module)
    losses_of(module)
    assert len(made) == 3


def test_it_is_undone_copied_and_pickled() -> None:
    module = Trainer()
    kinds, names = [type(m) for m in module.modules()], [set(vars(m)) for m in module.modules()]
    handle = patch(module)
    assert handle.families == ("Mask2Former",)
    changed = [type(m) for m in module.modules()]
    assert [a is b for a, b in zip(kinds, changed, strict=True)] == [True, False, False]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [type(m) for m in copied.modules()] == changed
        losses_of(copied)
        unpatch(copied)
        assert [type(m) for m in copied.modules()] == kinds
    handle.undo()
    assert [type(m) for m in module.modules()] == kinds
    assert [set(vars(m)) for m in module.modules()] == names


def test_subclasses_built_while_the_patch_is_on_are_patched() -> None:
    early = Trainer()
    with patch(sampling=PointSampling(17)) as handle:
        module = Trainer()
        assert handle.families == ("Mask2Former",)
        assert type(module.loss) is not ByBlock
        assert type(early.loss) is ByBlock
        losses_of(module)
    assert type(module.loss) is ByBlock
    assert type(Trainer().loss) is ByBlock


def test_a_subclass_without_changes_has_all_layers_at_once() -> None:
    class Mine(modeling.Mask2FormerLoss):
        pass

    model: Any = tiny.mask2former()
    model.criterion = Mine(model.config, model.weight_dict)
    model.criterion.losses = ["labels", "masks"]  # as in the criteria of DETR's code bases
    patch(model)
    type(model.criterion).loss_masks = None  # never called
    assert torch.isfinite(tiny.run(model, "mask2former", tiny.batch_for("mask2former"))[0]).all()


def test_methods_of_an_object_are_called_or_named() -> None:
    def nothing(*_: Any) -> dict[str, Any]:
        return {"loss_cross_entropy": torch.zeros(())}

    config: Any = tiny.mask2former().config
    before, after = (modeling.Mask2FormerLoss(config, {}) for _ in range(2))
    before.loss_labels = nothing
    masks, classes = torch.randn(1, 3, 8, 8), torch.randn(1, 3, tiny.CLASSES + 1)
    batch = masks, classes, [torch.ones(1, 16, 16)], [torch.tensor([1])]
    with patch(before), patch(after):
        assert before(*batch)["loss_cross_entropy"] == 0
        after.loss_labels = nothing
        with pytest.raises(MaskLossError, match=r"before the criterion is patched[\s\S]*loss_labels would not"):
            after(*batch)


def test_an_override_in_a_model_is_called() -> None:
    class Doubled(modeling.Mask2FormerLoss):
        def loss_labels(self, *args: Any) -> Any:
            CALLED.append("loss_labels")
            return super().loss_labels(*args)

    model: Any = tiny.mask2former()
    model.criterion = Doubled(model.config, model.weight_dict)
    patch(model)
    CALLED.clear()
    tiny.run(model, "mask2former", tiny.batch_for("mask2former"))
    assert len(CALLED) >= 3


class OtherSampling(ByBlock):
    def calculate_uncertainty(self, logits: Any) -> Any:
        return -logits.square()


class NothingLeft(modeling.Mask2FormerLoss):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.matcher = nn.Identity()

    def loss_masks(self, *_: Any) -> Any:
        return {}


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (OtherSampling, r"must not override what is not called any more[\s\S]*OtherSampling has calculate_uncertainty"),
        (NothingLeft, r"NothingLeft has loss_masks, and its matcher is torch[\s\S]*nothing is left to compute"),
    ],
)
def test_what_would_be_ignored_is_named(criterion: Any, message: str) -> None:
    module = Trainer(criterion)
    kinds = [type(m) for m in module.modules()]
    with pytest.raises(MaskLossError, match=message):
        patch(module)
    assert [type(m) for m in module.modules()] == kinds
    with pytest.raises(MaskLossError, match="with factors=True there must be a model"):
        patch(Trainer(), factors=True)
