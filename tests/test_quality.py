"""RF-DETR's classification: summed in parts, as it is defined."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskloss import _quality

PLACE = tuple(torch.tensor([[0, 0, 2], [0, 1, 0], [0, 1, 4], [1, 0, 0], [1, 1, 4]]).T)
CLASSES = torch.tensor([3, 0, 6, 6, 2])


@pytest.mark.parametrize("at_a_time", [1, 21, 1000])
def test_sums_and_gradients_are_those_of_the_terms(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quality, "_AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    logits = (8 * torch.randn(2, 2, 5, 7, dtype=torch.float64)).requires_grad_()
    with torch.no_grad():
        logits[0, 0, 0, :3] = torch.tensor([-800.0, 60.0, -torch.inf])
    iou, place = torch.rand(5, dtype=torch.float64), (*PLACE, CLASSES)
    quality = (logits.detach()[place].sigmoid() ** 0.25 * iou**0.75).clamp(min=0.01)
    weights = torch.rand(2, 2, 5, dtype=torch.float64)
    expected = _quality.quality_terms(logits, place, quality).nan_to_num(0.0).sum(-1)
    found = _quality.quality_sums(logits, place, iou, 0.25)
    torch.testing.assert_close(found, expected)
    [gradient] = torch.autograd.grad(found, logits, weights)
    [wanted] = torch.autograd.grad(expected, logits, weights)
    torch.testing.assert_close(gradient, wanted.nan_to_num(0.0))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("matched", [True, False])
def test_what_is_not_finite_shows(value: float, matched: bool) -> None:
    logits = torch.zeros(2, 2, 5, 7)
    logits[0, 0, 2, 3 if matched else 4] = value
    sums = _quality.quality_sums(logits, (*PLACE, CLASSES), torch.full((5,), 0.5), 0.25)
    assert sums.isfinite().logical_not().nonzero().tolist() == [[0, 0, 2]]


def test_fake_tensors_need_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """More logits than are computed at a time."""
    monkeypatch.setattr(_quality, "_AT_A_TIME", 16)
    with FakeTensorMode():
        place, logits = torch.empty(5, dtype=torch.int64), torch.empty(2, 2, 7, 5, requires_grad=True)
        sums = _quality.quality_sums(logits, (place, place, place, place), torch.empty(5), 0.25)
    assert sums.shape == (2, 2, 7)
    assert sums.requires_grad
