"""RF-DETR's classification: summed as it is defined."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskloss import _quality

PLACE = tuple(torch.tensor([[0, 0, 2], [0, 1, 0], [0, 1, 4], [1, 0, 0], [1, 1, 4]]).T)
CLASSES = torch.tensor([3, 0, 6, 6, 2])


@pytest.fixture(params=["kernels", "formulas"])
def computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, or by PyTorch."""
    if request.param == "formulas":
        monkeypatch.setenv("MASKLOSS_BACKEND", "reference")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize("queries", [5, 70])
@pytest.mark.usefixtures("computed")
def test_sums_and_gradients_are_those_of_the_terms(queries: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    logits = (8 * torch.randn(2, 2, queries, 7, dtype=dtype)).requires_grad_()
    with torch.no_grad():
        logits[0, 0, 0, :3] = torch.tensor([-800.0, 60.0, -torch.inf])
    iou, place = torch.rand(5, dtype=dtype), (*PLACE, CLASSES)
    exact = logits.detach().double().requires_grad_()
    quality = (exact.detach()[place].sigmoid() ** 0.25 * iou.double() ** 0.75).clamp(min=0.01)
    weights = torch.rand(2, 2, queries, dtype=dtype)
    expected = _quality.quality_terms(exact, place, quality).nan_to_num(0.0).sum(-1)
    found = _quality.quality_sums(logits, place, iou, 0.25)
    [wanted] = torch.autograd.grad(expected, exact, weights.double())
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found, expected.to(dtype), **near)
    for _ in range(2):  # the second time they are computed anew
        [gradient] = torch.autograd.grad(found, logits, weights, retain_graph=True)
        torch.testing.assert_close(gradient, wanted.nan_to_num(0.0).to(dtype), **near)
    with torch.no_grad():
        assert torch.equal(_quality.quality_sums(logits, place, iou, 0.25), found)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("matched", [True, False])
@pytest.mark.usefixtures("computed")
def test_what_is_not_finite_shows(value: float, matched: bool) -> None:
    logits = torch.zeros(2, 2, 5, 7)
    logits[0, 0, 2, 3 if matched else 4] = value
    sums = _quality.quality_sums(logits, (*PLACE, CLASSES), torch.full((5,), 0.5), 0.25)
    assert sums.isfinite().logical_not().nonzero().tolist() == [[0, 0, 2]]


def test_fake_tensors_need_no_values() -> None:
    with FakeTensorMode():
        place, logits = torch.empty(5, dtype=torch.int64), torch.empty(2, 2, 7, 5, requires_grad=True)
        sums = _quality.quality_sums(logits, (place, place, place, place), torch.empty(5), 0.25)
    assert sums.shape == (2, 2, 7)
    assert sums.requires_grad
