"""The mask terms of criteria that are called for each layer."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskloss import MaskFactors, MaskLossError, MaskTargets, PointSampling, step
from maskloss.integrations.layerwise import LayerMasks
from support import tiny

NAMES = ("loss_mask_ce", "loss_mask_dice")
# Uniform points only, and as many as pixels of a grid: a mean that can be computed on the grid.
EXACT = PointSampling(20_000, importance_ratio=0.0)


class Criterion(nn.Module):
    """DETR's: each loss of each layer is a method."""

    def get_loss(self, name: str, *args: Any) -> dict[str, Tensor]:
        methods: dict[str, Any] = {"masks": self.loss_masks}
        found: dict[str, Tensor] = methods[name](*args)
        return found

    def loss_masks(self, *_: Any) -> dict[str, Tensor]:
        raise NotImplementedError


def example() -> tuple[Tensor, list[dict[str, Any]], list[tuple[Tensor, Tensor]]]:
    logits = torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = [{"masks": masks} for masks in tiny.blobs()]
    # Two groups of three queries: every target is there twice.
    pairs = [(torch.tensor([1, 2, 3, 5]), torch.tensor([0, 1, 1, 0])), (torch.arange(6), torch.arange(6) % 3)]
    return logits, targets, pairs


def test_the_terms_are_those_of_the_formulas(backend: str) -> None:
    logits, targets, pairs = example()
    loss_masks = LayerMasks(NAMES, sampling=EXACT, padding_mode="border", target_mode="nearest", backend=backend)
    criterion = Criterion()
    criterion.loss_masks = loss_masks  # type: ignore[method-assign,assignment]
    found = criterion.get_loss("masks", {"pred_masks": logits}, targets, pairs, 10.0)
    assert list(found) == list(NAMES)
    size = targets[0]["masks"].shape[-1]
    fine = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
    ce = dice = 0.0
    for image, (queries, rows) in enumerate(pairs):
        z, t = fine[image, queries], targets[image]["masks"][rows].float()
        ce += F.binary_cross_entropy_with_logits(z, t, reduction="none").mean((1, 2)).sum() / 10
        p, n = z.sigmoid(), EXACT.num_points / size**2
        dice += (1 - (2 * n * (p * t).sum((1, 2)) + 1) / (n * (p + t).sum((1, 2)) + 1)).sum() / 10
    torch.testing.assert_close(found[NAMES[0]], ce, rtol=0.02, atol=0)
    torch.testing.assert_close(found[NAMES[1]], dice, rtol=0.02, atol=0)
    for value in found.values():
        value *= 2.0  # as training loops do
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert logits.grad is not None


def test_queries_that_share_a_target_have_points_of_their_own() -> None:
    logits = torch.zeros(1, 4, 16, 16)
    logits[:] = torch.linspace(-3, 3, 16)
    masks = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    loss_masks = LayerMasks(sampling=PointSampling(8))
    pairs = [(torch.arange(4), torch.zeros(4, dtype=torch.int64))]
    shared = [(torch.tensor([2]), torch.tensor([0]))]
    torch.manual_seed(0)
    together = loss_masks({"pred_masks": logits}, [{"masks": masks}], pairs, 4.0)
    torch.manual_seed(0)
    alone = loss_masks({"pred_masks": logits}, [{"masks": masks}], shared, 1.0)
    assert together["loss_mask"] != alone["loss_mask"]


def test_layers_without_masks_are_skipped_and_factors_taken() -> None:
    logits, targets, pairs = example()
    loss_masks = LayerMasks(NAMES, pixels_per_point=4)
    for without in ({}, {"pred_masks": None}, {"pred_boxes": logits}):
        assert loss_masks(without, targets, pairs, 10.0) == {}
    factors = {"spatial_features": torch.randn(2, 3, 16, 16), "query_features": torch.randn(2, 6, 3), "bias": None}
    found = []
    for masks in (factors, MaskFactors.from_dict(factors), MaskFactors.from_dict(factors).dense()):
        torch.manual_seed(3)
        found.append(loss_masks({"pred_masks": masks}, targets, pairs, 10.0))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=0)


def test_points_by_area(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_masks = LayerMasks(pixels_per_point=16)
    given = [loss_masks._loss_for(torch.empty(1, 1, *size)).sampling.num_points for size in ((96, 96), (8, 8), (9, 31))]
    assert given == [576, 8, 17]


def test_each_call_has_its_own_targets_where_threads_share_the_object() -> None:
    """Another thread may write what is remembered at any time, here always."""

    class Shared(LayerMasks):
        _last: Any = property(lambda _: None, lambda *_: None)

    logits, targets, pairs = example()
    found = []
    for kind in (LayerMasks, Shared):
        torch.manual_seed(0)
        found.append(kind(sampling=EXACT)({"pred_masks": logits}, targets, pairs, 10.0))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_targets_are_packed_once_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    inner = MaskTargets.from_masks
    monkeypatch.setattr(MaskTargets, "from_masks", staticmethod(lambda *a, **k: made.append(1) or inner(*a, **k)))
    logits, targets, pairs = example()
    loss_masks = LayerMasks()
    for number in range(2):
        count = torch.tensor(10.0)
        for _ in range(3):
            # A new list with the same masks, as subclasses make them.
            loss_masks({"pred_masks": logits}, [dict(target) for target in targets], pairs, count)
        assert len(made) == number + 1
    # Other masks, and numbers that cannot tell steps apart.
    other = [{"masks": target["masks"].clone()} for target in targets]
    loss_masks({"pred_masks": logits}, other, pairs, count)
    loss_masks({"pred_masks": logits}, other, pairs, 10)
    loss_masks({"pred_masks": logits}, other, pairs, 10)
    assert len(made) == 5


def test_dense_masks_are_not_kept_and_copies_start_anew() -> None:
    logits, targets, pairs = example()
    loss_masks = LayerMasks()
    loss_masks({"pred_masks": logits}, targets, pairs, 10.0)
    gone = weakref.ref(targets[0]["masks"])
    del targets
    gc.collect()
    assert gone() is None
    for copied in (copy.deepcopy(loss_masks), pickle.loads(pickle.dumps(loss_masks))):
        assert repr(copied) == repr(loss_masks)
        assert copied._last is None


def test_what_criteria_pass_on_top_says_which_layers_have_masks() -> None:
    """As OpenSeeD and SEEM number their layers, and call it where nothing was matched."""
    logits, targets, pairs = example()
    loss_masks = LayerMasks(when=lambda layer, extra=None: layer < 1, drop_empty=True)
    assert "when=" in repr(loss_masks)
    assert "drop_empty=True" in repr(loss_masks)
    with step(seed=1):
        found = loss_masks({"pred_masks": logits}, targets, pairs, 10.0, 0, extra={})
        assert found.keys() == LayerMasks()({"pred_masks": logits}, targets, pairs, 10.0).keys()
        assert loss_masks({"pred_masks": logits}, targets, pairs, 10.0, 1) == {}
    nothing = sum(loss_masks({"pred_masks": logits}, targets, None, 10.0, 0).values(), torch.zeros(()))
    assert nothing == 0
    assert nothing.requires_grad == logits.requires_grad
    with pytest.raises(MaskLossError, match=r"on top needs when=[\s\S]*layer_id"):
        LayerMasks()({"pred_masks": logits}, targets, pairs, 10.0, layer_id=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LayerMasks(when=3), "when must be a function"),  # type: ignore[arg-type]
        (lambda: LayerMasks("ab"), "names must be those of cross-entropy and Dice"),  # type: ignore[arg-type]
        (lambda: LayerMasks(pixels_per_point=0), "pixels_per_point must be"),
        (
            lambda: LayerMasks()(
                {"pred_masks": torch.zeros(1, 2, 4, 4)},
                [{"masks": torch.ones(1, 4, 4)}],
                [(torch.tensor([1]), torch.tensor([0]))],
                float("nan"),
            ),
            "num_boxes must be a finite number",
        ),
        (lambda: LayerMasks()({"pred_masks": torch.zeros(1, 2, 4, 4)}, [{}], [], 1.0), 'must be a dict with "masks"'),
        (
            lambda: LayerMasks()(
                {"pred_masks": torch.zeros(1, 2, 4, 4)},
                [{"masks": torch.ones(1, 4, 4)}],
                [(torch.tensor([2]), torch.tensor([0]))],
                1.0,
            ),
            r"queries of a match must lie in \[0, 2\)",
        ),
    ],
)
def test_errors_say_what_is_wrong(call: Any, message: str) -> None:
    with pytest.raises(MaskLossError, match=message):
        call()
