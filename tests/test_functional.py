"""The public functions take the same options in the same way, and read maps as `grid_sample` users expect."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torch.testing import assert_close

from maskloss import MaskOptions, PointSampling, functional
from maskloss.errors import MaskLossError

# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("maps", "points", "result"),
    [
        ((5, 6), (7, 2), (7,)),
        ((3, 5, 6), (3, 7, 2), (3, 7)),
        ((3, 5, 6), (7, 2), (3, 7)),
        ((5, 6), (3, 7, 2), (3, 7)),
        ((3, 4, 5, 6), (3, 7, 2), (3, 4, 7)),
        ((3, 4, 5, 6), (3, 4, 7, 2), (3, 4, 7)),
        ((3, 4, 5, 6), (1, 4, 7, 2), (3, 4, 7)),
        ((3, 1, 5, 6), (3, 4, 7, 2), (3, 4, 7)),
        ((3, 5, 6), (3, 4, 7, 2), (3, 4, 7)),
        ((0, 4, 5, 6), (0, 7, 2), (0, 4, 7)),
    ],
)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_point_sample_broadcasts(
    backend: str, mode: str, maps: tuple[int, ...], points: tuple[int, ...], result: tuple[int, ...]
) -> None:
    """Leading dimensions are aligned from the left, as those of maps and grid are."""
    values, where = torch.randn(maps, requires_grad=True), torch.rand(points) * 1.2 - 0.1
    found = functional.point_sample(values, where, mode=mode, backend=backend)
    assert tuple(found.shape) == result
    lead = result[:-1]
    missing = [1] * len(lead)
    wide = values.reshape(*maps[:-2], *missing[len(maps) - 2 :], *maps[-2:]).expand(*lead, *maps[-2:])
    each = where.reshape(*points[:-2], *missing[len(points) - 2 :], *points[-2:]).expand(*lead, *points[-2:])
    if found.numel():
        flat = wide.reshape(-1, 1, *maps[-2:]), each.reshape(-1, 1, *points[-2:]) * 2 - 1
        expected = grid_sample(*flat, mode=mode, align_corners=False).view(result)
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert_close(*(torch.autograd.grad(out.square().sum(), values)[0] for out in (found, expected)))


def test_channels_share_the_points_of_their_image() -> None:
    """The case that right-aligned broadcasting would read wrongly without a word: as many channels as images."""
    maps, points = torch.randn(3, 3, 5, 6), torch.rand(3, 7, 2)
    expected = grid_sample(maps, points[:, None] * 2 - 1, align_corners=False)[:, :, 0]
    assert_close(functional.point_sample(maps, points, backend="reference"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("maps", "points", "text"),
    [
        ((3, 4, 5, 6), (4, 7, 2), "must broadcast"),
        ((3, 5, 6), (2, 7, 2), "must broadcast"),
        ((5,), (7, 2), r"maps must be \[..., h, w\]"),
        ((5, 6), (2,), r"points must be float \[..., P, 2\]"),
        ((5, 6), (7, 3), r"points must be float \[..., P, 2\]"),
        ((5, 6), (0, 2), "points for every instance"),
    ],
)
def test_shapes_that_are_refused(maps: tuple[int, ...], points: tuple[int, ...], text: str) -> None:
    with pytest.raises(MaskLossError, match=text):
        functional.point_sample(torch.zeros(maps), torch.zeros(points))


# ----------------------------------------------------------------------------------------------------- the same options


def test_options_are_the_same_everywhere() -> None:
    """z, t, w come first, all else by its name; both focal functions have the same numbers and defaults."""
    for name in ("mask_bce", "mask_dice", "mask_focal", "pairwise_mask_cost"):
        parameters = inspect.signature(getattr(functional, name)).parameters
        assert list(parameters)[:3] == ["z", "t", "w"], name
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:]), name
    defaults = [
        {name: p.default for name, p in inspect.signature(function).parameters.items() if name in {"alpha", "gamma"}}
        for function in (functional.mask_focal, functional.focal_class_cost)
    ]
    assert defaults == [{"alpha": 0.25, "gamma": 2.0}] * 2
    pairwise = inspect.signature(functional.pairwise_mask_cost).parameters
    assert [pairwise[name].default for name in ("focal_alpha", "focal_gamma")] == [None, None]
    assert (MaskOptions().focal_alpha, MaskOptions().focal_gamma) == (None, None)


@pytest.mark.parametrize("weights", [None, (), (9,), (3, 9), (2, 1, 9)])
def test_weights_broadcast(weights: tuple[int, ...] | None) -> None:
    z, t = torch.randn(2, 3, 9), torch.rand(2, 3, 9)
    w = None if weights is None else (torch.rand(weights) > 0.4).float()
    wide = torch.ones(2, 3, 9) if w is None else w.expand(2, 3, 9)
    for function in (functional.mask_bce, functional.mask_dice, functional.mask_focal):
        found = function(z, t, w)
        assert_close(found, function(z, t, wide))
    count = wide.sum(-1).clamp(min=1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(z, t, reduction="none")
    assert_close(functional.mask_bce(z, t, w), (bce * wide).sum(-1) / count)


@pytest.mark.parametrize("focal", [{}, {"focal_gamma": 2.0}, {"focal_alpha": 0.3, "focal_gamma": 1.5}])
@pytest.mark.parametrize("weights", [None, (9,), (2, 9)])
def test_pairwise_costs_are_those_of_the_pairs(focal: dict[str, Any], weights: tuple[int, ...] | None) -> None:
    z, t = torch.randn(2, 3, 9), (torch.rand(2, 4, 9) > 0.5).float()
    w = None if weights is None else (torch.rand(weights) > 0.4).float()
    cost = functional.pairwise_mask_cost(z, t, w, **focal)
    assert cost.ce.shape == cost.dice.shape == (2, 3, 4)

    def pair(function: Any, **options: Any) -> Tensor:
        left, right = z[:, :, None].expand(-1, -1, 4, -1), t[:, None].expand(-1, 3, -1, -1)
        each = None if w is None else w if w.ndim == 1 else w[:, None, None]
        return function(left, right, each, **options)

    named = {name.removeprefix("focal_"): value for name, value in focal.items()}
    if named and "alpha" not in named:
        named["alpha"] = None
    by_pair = pair(functional.mask_focal, **named) if focal else pair(functional.mask_bce)
    assert_close(cost.ce, by_pair, rtol=1e-4, atol=1e-5)
    assert_close(cost.dice, pair(functional.mask_dice), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.01, 0.5, 0.99, 1.0])
def test_a_focal_loss_has_a_gradient_where_a_prediction_is_perfect(gamma: float) -> None:
    """At a miss of 0, miss^gamma has an infinite slope below gamma = 1; the loss it multiplies is 0."""
    z = torch.tensor([[20.0, 200.0, -200.0, 0.5]], requires_grad=True)
    t = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    functional.mask_focal(z, t, gamma=gamma).sum().backward()
    assert z.grad is not None
    assert_close(z.grad[:, :3], torch.zeros(1, 3), rtol=0, atol=1e-6)
    assert z.grad[0, 3] < -0.01
    for cost in (
        lambda z: functional.pairwise_mask_cost(z, t, focal_gamma=gamma).ce,
        lambda z: functional.focal_class_cost(z, torch.arange(4), gamma=gamma),
    ):
        z.grad = None
        cost(z).sum().backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert z.grad.any()


def test_a_class_cost_without_balance() -> None:
    logits, labels = torch.randn(2, 5, 3), torch.tensor([[0, 2], [1, 1]])
    plain = functional.focal_class_cost(logits, labels, alpha=None, gamma=1.0)
    even = functional.focal_class_cost(logits, labels, alpha=0.5, gamma=1.0)
    assert_close(plain, 2 * even)


@pytest.mark.parametrize("function", [functional.mask_focal, functional.focal_class_cost])
@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"alpha": "0.2"}, {"gamma": -1.0}, {"gamma": None}])
def test_numbers_that_are_refused(function: Any, options: dict[str, Any]) -> None:
    inputs = (torch.randn(2, 3), torch.rand(2, 3))
    if function is functional.focal_class_cost:
        inputs = (torch.randn(2, 3), torch.tensor([0]))
    [name] = options
    with pytest.raises(MaskLossError, match=rf"{name} must be a finite number"):
        function(*inputs, **options)


@pytest.mark.parametrize("options", [{"focal_gamma": -1.0}, {"focal_alpha": 0.2}, {"focal_gamma": float("inf")}])
def test_numbers_of_the_pairwise_cost_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MaskLossError, match="focal_"):
        functional.pairwise_mask_cost(torch.zeros(2, 3), torch.zeros(2, 3), **options)


@pytest.mark.parametrize("focal", [None, (None, 0.0), (0.25, 2.0)])
def test_the_derivative_at_a_logit_of_zero(focal: tuple[float | None, float] | None) -> None:
    """Logits begin at exact zeros where a layer does; the largest of z and 0 has a corner there, its sum has none."""
    t = torch.tensor([[0.0, 0.3, 1.0]], dtype=torch.float64)
    slopes = []
    for value in (0.0, 1e-9):
        z = torch.full((1, 3), value, dtype=torch.float64, requires_grad=True)
        if focal is None:
            loss = functional.mask_bce(z, t)
        else:
            loss = functional.mask_focal(z, t, alpha=focal[0], gamma=focal[1])
        slopes.append(*torch.autograd.grad(loss.sum(), z))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-8)


# -------------------------------------------------------------------------------------------------------------- windows


def test_a_window_holds_the_points(backend: str) -> None:
    sampling = PointSampling(num_points=60, importance_ratio=0.5)
    options: dict[str, Any] = {"sampling": sampling, "seed": 1, "backend": backend}
    x, y = functional.uncertain_points(torch.randn(2, 5, 6), window=(0.25, 0.5, 0.5, 0.25), **options).unbind(-1)
    assert 0.25 <= x.min() < 0.35 and 0.65 < x.max() <= 0.75
    assert 0.5 <= y.min() < 0.55 and 0.7 < y.max() <= 0.75


@pytest.mark.parametrize(
    "window",
    [
        (0, 0, 1),
        (0, 0, 1, 1.1),
        (0, 0, 1.1, 1),
        (0.5, 0, 0.6, 1),
        (0, 0.5, 1, 0.6),
        (0, 0, 0, 1),
        (0, 0, 1, 0),
        (-0.1, 0, 1, 1),
    ],
)
def test_windows_that_are_refused(window: tuple[float, ...]) -> None:
    with pytest.raises(MaskLossError, match="window must be"):
        functional.uncertain_points(torch.zeros(1, 4, 4), window=window, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("z", "t"), [((2, 3), (1, 3)), ((3,), (2, 3)), ((), ())])
def test_pairs_that_are_refused(z: tuple[int, ...], t: tuple[int, ...]) -> None:
    with pytest.raises(MaskLossError, match=r"z and t must have the same shape \[\.\.\., P\]"):
        functional.mask_bce(torch.zeros(z), torch.zeros(t))
