"""Kinds of Dice: where they are smallest, when they are equal, and their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskloss import HungarianMatcher, MaskLoss, MaskLossError, MaskOptions, MaskTargets, PointSampling, functional
from maskloss.ops.reference.slopes import instance_slopes

KINDS = ("standard", "soft", "semimetric")
FEW = PointSampling(64)


def double(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind: str) -> None:
    z, t, w = double(3, 50) * 6 - 3, double(3, 50), (double(3, 50) > 0.3).double()
    s = z.sigmoid()
    if kind == "semimetric":  # as the paper writes it, with 1 added above and below
        common = ((s + t - (s - t).abs()) * w).sum(-1)
    else:
        common = 2 * (s * t * w).sum(-1)
    areas = s**2 + t**2 if kind == "soft" else s + t
    expected = 1 - (common + 1) / ((areas * w).sum(-1) + 1)
    torch.testing.assert_close(functional.mask_dice(z, t, w, dice=kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_where_it_is_smallest(kind: str) -> None:
    """At the target itself, however soft, for all kinds but the usual one, which prefers 0 and 1."""
    t = torch.tensor([[0.9, 0.7, 0.6, 0.3]], dtype=torch.float64)
    at_target = functional.mask_dice(t.logit(), t, dice=kind)
    others = double(1000, 4).clamp(1e-9, 1 - 1e-9)
    elsewhere = functional.mask_dice(others.logit(), t.expand(1000, -1), dice=kind)
    if kind == "standard":
        assert elsewhere.min() < at_target - 0.05
    else:
        torch.testing.assert_close(at_target, torch.zeros_like(at_target), atol=1e-12, rtol=0)
        assert elsewhere.min() > 0


def test_hard_targets_have_one_value(backend: str) -> None:
    """Pixels are read in their middle, so that a target is 0 or 1 at every point; not so for "soft", which squares."""
    logits, masks = torch.randn(4, 8, 8), torch.rand(4, 8, 8) > 0.5
    points = ((torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1) + 0.5) / 8).view(
        1, -1, 2
    )

    def losses(kind: str) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        out = MaskLoss(dice=kind, backend=backend)(leaf, masks, points=points.expand(4, -1, -1))
        return out.dice.detach(), torch.autograd.grad(out.total, leaf)[0]

    for mine, theirs in zip(losses("semimetric"), losses("standard"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert (losses("soft")[0] - losses("standard")[0]).abs() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind: str) -> None:
    z, t, w = (double(2, 9) * 4 - 2).requires_grad_(), double(2, 9), (double(2, 9) > 0.2).double()
    assert torch.autograd.gradcheck(lambda a: functional.mask_dice(a, t, w, dice=kind), (z,))
    expected = torch.autograd.grad(functional.mask_dice(z, t, w, dice=kind).sum(), z)[0]
    torch.testing.assert_close(instance_slopes(z.detach(), t, w, -1.0, -1.0, kind)[1], expected)
    # Where both are equal there is no derivative: the mean of both sides, as autograd has it.
    at = t.clamp(0.1, 0.9).logit().requires_grad_()
    expected = torch.autograd.grad(functional.mask_dice(at, at.detach().sigmoid(), dice=kind).sum(), at)[0]
    ones = torch.ones_like(w)
    found = instance_slopes(at.detach(), at.detach().sigmoid(), ones, -1.0, -1.0, kind)[1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_losses_and_costs_are_the_formulas(backend: str, kind: str) -> None:
    """Loss, gradient and matching cost, of soft targets; torch.func has the same derivative."""
    masks = MaskTargets.from_masks(torch.rand(3, 11, 9), soft=True)
    logits, points = torch.randn(3, 7, 8), torch.rand(3, 40, 2)
    loss = MaskLoss(ce_weight=0.0, dice_weight=1.0, dice=kind, backend=backend)
    leaf = logits.clone().requires_grad_()
    total = loss(leaf, masks, points=points).total
    exact = logits.double().requires_grad_()
    z = functional.point_sample(exact, points, backend="reference")
    t = functional.point_sample(masks.dense().double(), points, backend="reference")
    expected = functional.mask_dice(z, t, dice=kind).mean()
    torch.testing.assert_close(total.double(), expected)
    wanted = torch.autograd.grad(expected, exact)[0]
    torch.testing.assert_close(torch.autograd.grad(total, leaf)[0].double(), wanted, rtol=1e-4, atol=1e-6)
    by_transform = torch.func.grad(lambda a: loss(a, masks, points=points).total)(logits)
    torch.testing.assert_close(by_transform.double(), wanted, rtol=1e-4, atol=1e-6)
    pairs = functional.pairwise_mask_cost(z.detach(), t[:2], dice=kind)
    single = functional.mask_dice(z.detach()[:, None].expand(-1, 2, -1), t[:2].expand(3, -1, -1), dice=kind)
    torch.testing.assert_close(pairs.dice, single)


def test_the_matcher_takes_it(backend: str) -> None:
    """A pale prediction of a pale target is the better match, which the usual Dice does not see."""
    pale, bold = torch.full((16, 16), 0.3), torch.full((16, 16), 0.9)
    logits = torch.stack([pale, bold]).logit()[None]
    targets = [{"masks": MaskTargets.from_masks(pale[None], soft=True), "labels": torch.zeros(1, dtype=torch.int64)}]

    def matched(kind: str) -> int:
        matcher = HungarianMatcher(
            class_weight=0.0, mask_weight=0.0, dice_weight=1.0, num_points=50, dice=kind, backend=backend
        )
        return int(matcher(torch.zeros(1, 2, 2), logits, targets, seed=0).pairs()[0][0])

    assert [matched(kind) for kind in KINDS] == [1, 0, 0]


def test_an_unknown_kind() -> None:
    with pytest.raises(MaskLossError, match="dice must be one of standard, soft, semimetric"):
        MaskOptions(dice="Soft")
    with pytest.raises(MaskLossError, match="dice must be one of"):
        functional.mask_dice(torch.zeros(1, 2), torch.zeros(1, 2), dice="v-net")
