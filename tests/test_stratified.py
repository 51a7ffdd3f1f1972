"""The stratified layout: its cells, that each point is uniform in its own, and how much quieter the losses are."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from scipy import stats
from torch import Tensor

from maskloss import (
    HungarianMatcher,
    MaskCriterion,
    MaskLoss,
    MaskLossError,
    MaskTargets,
    PointSampling,
    functional,
    ops,
)
from maskloss._abi import CANDIDATES, MATCHER, RANDOM
from maskloss.lab.bench.cases import Case
from maskloss.lab.bench.inputs import make_inputs
from maskloss.ops.reference.sampling import match_points
from maskloss.points import (
    MOST_CELLS,
    Strata,
    draw_seed,
    instance_keys,
    stratified_points,
    threefry2x32,
    uniform_points,
)
from maskloss.step import Step

COUNTS = (1, 2, 3, 5, 7, 97, 100, 1009, 3136, 9408)


def points_of(count: int, instances: int = 1, seed: int = 0, stream: int = RANDOM) -> Tensor:
    numbers = torch.arange(instances)
    keys = instance_keys(draw_seed(seed), numbers // 1000, numbers % 1000)
    return stratified_points(keys, count, torch.zeros_like(numbers), stream)


def cells_of(count: int) -> list[tuple[int, int, int]]:
    """For each cell of a draw: its place in its row, the cells of that row, and the first cell of the row."""
    strata = Strata.of(count)
    starts = [row * count // strata.rows for row in range(strata.rows + 1)]
    return [(i - a, b - a, a) for a, b in itertools.pairwise(starts) for i in range(a, b)]


# --------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize("count", [*COUNTS, 12544, 37632])
def test_cells_of_equal_area_tile_the_square(count: int) -> None:
    strata, cells = Strata.of(count), cells_of(count)
    assert len(cells) == count and strata.rows == math.isqrt(count)
    assert {wide for _, wide, _ in cells} <= {strata.narrow, strata.narrow + 1}
    top = Fraction(0)
    for i, (place, wide, first) in enumerate(cells):
        row = ((i + 1) * strata.rows - 1) // count
        assert (row * count // strata.rows, (row + 1) * count // strata.rows) == (first, first + wide)
        width, height = Fraction(1, wide), Fraction(wide, count)
        assert width * height == Fraction(1, count)
        assert Fraction(first, count) == top
        if place == wide - 1:
            top += height
    assert top == 1


@pytest.mark.parametrize("count", [*COUNTS, 37632, MOST_CELLS])
def test_each_cell_holds_one_point(count: int) -> None:
    points = points_of(count, 3).double()
    row = ((torch.arange(count) + 1) * Strata.of(count).rows - 1) // count
    first = row * count // Strata.of(count).rows
    wide = (row + 1) * count // Strata.of(count).rows - first
    place = torch.arange(count) - first
    x, y = points.unbind(-1)
    # Rounding down to the grid may take a point over the edge of its cell, by 2^-24 and the error of the inverse.
    slack = 1.125 * 2.0**-24
    assert bool(((x >= place / wide - slack) & (x < (place + 1) / wide)).all())
    assert bool(((y >= first / count - slack) & (y < (first + wide) / count)).all())
    assert torch.equal((points * 2**24).round(), points * 2**24)
    assert float(points.min()) >= 0 and float(points.max()) < 1


@pytest.mark.parametrize("count", [1, 2, 97, 3136, MOST_CELLS])
def test_points_are_the_formula_rounded_down(count: int) -> None:
    """From the words of the generator, in exact fractions."""
    keys = instance_keys(draw_seed(5), torch.tensor([2]), torch.tensor([3]))
    points = (stratified_points(keys, count, torch.tensor([4]), MATCHER)[0].double() * 2**24).long()
    cells = cells_of(count)
    for i in {0, 1, count // 2, count - 2, count - 1}.intersection(range(count)):
        words = threefry2x32(keys[0], keys[1], torch.tensor([i // 2]), torch.tensor([4 + (MATCHER << 16)]))
        word = int(words[i % 2])
        u, v = Fraction(word >> 16, 2**16), Fraction(word & 0xFFFF, 2**16)
        place, wide, first = cells[i]
        exact = ((place + u) / wide, (first + v * wide) / count)
        for found, value in zip(points[i].tolist(), exact, strict=True):
            assert found in (math.floor(value * 2**24), math.floor(value * 2**24) - 1)


def test_the_definition_does_not_drift() -> None:
    """Points of both layouts, by their 24-bit integers, as they were when the layouts were defined."""
    keys = instance_keys(draw_seed(1), torch.tensor([0]), torch.tensor([0]))
    layer = torch.zeros(1, dtype=torch.int64)
    drawn = {
        draw.__name__: (draw(keys, 5, layer, CANDIDATES)[0, -2:] * 2**24).long().tolist()
        for draw in (uniform_points, stratified_points)
    }
    assert drawn == {
        "uniform_points": [[5640899, 6822930], [12099329, 1056965]],
        "stratified_points": [[7085482, 9822207], [13240661, 15482367]],
    }


# ---------------------------------------------------------------------------------------------------------- uniformity


@pytest.mark.parametrize("count", [1, 2, 3, 7, 97, 1009])
def test_a_point_taken_at_random_is_uniform(count: int) -> None:
    """One point of each of many draws: these are independent. Chi-squared over 8 x 8 parts of the square."""
    draws = 20000 if count < 50 else 3000
    points = points_of(count, draws)[torch.arange(draws), torch.randint(count, (draws,))].double()
    parts = (points * 8).long()
    counted = torch.bincount(parts[:, 0] * 8 + parts[:, 1], minlength=64).numpy()
    assert stats.chisquare(counted).pvalue > 1e-3
    for axis in points.unbind(1):
        assert stats.kstest(axis.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("count", [2, 97, 1009])
def test_each_point_is_uniform_in_its_cell(count: int) -> None:
    """For the first, the last and a middle point: chi-squared over 4 x 4 parts of the cell, and no correlation."""
    points = points_of(count, 3000).double()
    for i in {0, count // 2, count - 1}:
        place, wide, first = cells_of(count)[i]
        u = (points[:, i, 0] * wide - place).clamp(0, 1 - 1e-12)
        v = ((points[:, i, 1] * count - first) / wide).clamp(0, 1 - 1e-12)
        counted = torch.bincount((u * 4).long() * 4 + (v * 4).long(), minlength=16).numpy()
        assert stats.chisquare(counted).pvalue > 1e-3
        assert stats.pearsonr(u.numpy(), v.numpy()).pvalue > 1e-3


def test_points_of_one_draw_are_independent_within_their_cells() -> None:
    """Neighbours share a counter of the generator, not their bits."""
    points = points_of(1024, 40).double()  # 32 x 32
    u, v = (points * 32).frac().unbind(-1)
    for one, other in ((u[:, ::2], u[:, 1::2]), (v[:, ::2], v[:, 1::2]), (u, v), (u[:, :-32], u[:, 32:])):
        assert stats.pearsonr(one.flatten().numpy(), other.flatten().numpy()).pvalue > 1e-3


# ------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("importance", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("count", [1, 97, 2000])
def test_the_uncertain_part_is_exactly_the_most_uncertain(backend: str, count: int, importance: float) -> None:
    logits = torch.randn(3, 21, 34)
    sampling = PointSampling(count, importance_ratio=importance, layout="stratified")
    points = functional.uncertain_points(logits, sampling=sampling, seed=9, backend=backend)
    keys = instance_keys(draw_seed(9), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    layer = torch.zeros(3, dtype=torch.int64)
    candidates = stratified_points(keys, sampling.num_candidates, layer, CANDIDATES)
    values = functional.point_sample(logits, candidates, backend=backend)
    kept = sampling.num_uncertain
    for instance in range(3):
        order = functional.uncertainty(values[instance]).sort(descending=True, stable=True).indices
        assert torch.equal(points[instance, :kept], candidates[instance, order[:kept].sort().values])
    assert torch.equal(points[:, kept:], stratified_points(keys, sampling.num_random, layer, RANDOM))


def test_ties_go_to_the_first_cells(backend: str) -> None:
    sampling = PointSampling(2000, layout="stratified")
    points = functional.uncertain_points(torch.zeros(1, 8, 8), sampling=sampling, seed=2, backend=backend)
    keys = instance_keys(draw_seed(2), torch.tensor([0]), torch.tensor([0]))
    candidates = stratified_points(keys, sampling.num_candidates, torch.tensor([0]), CANDIDATES)
    assert torch.equal(points[:, : sampling.num_uncertain], candidates[:, : sampling.num_uncertain])


def test_points_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    logits, sampling = torch.randn(8, 65, 33), PointSampling(500, layout="stratified")
    drawn = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        drawn.append(functional.uncertain_points(logits, sampling=sampling, seed=3, backend=backend))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_the_backward_pass_draws_the_same_points_again(backend: str) -> None:
    """The gradient is that of the loss at the points that were drawn, given by hand."""
    sampling = PointSampling(300, layout="stratified")
    masks = torch.rand(4, 40, 30) > 0.5
    logits = torch.randn(4, 17, 23, requires_grad=True)
    loss = MaskLoss(sampling=sampling, backend=backend)
    drawn = loss(logits, masks, seed=6)
    [gradient] = torch.autograd.grad(drawn.total, logits)
    points = functional.uncertain_points(logits.detach(), sampling=sampling, seed=6, backend=backend)
    given = loss(logits, masks, points=points)
    [expected] = torch.autograd.grad(given.total, logits)
    torch.testing.assert_close(drawn.total, given.total)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_windows_hold_all_points(backend: str) -> None:
    targets = MaskTargets.from_masks(torch.rand(2, 20, 30) > 0.5, canvas=(40, 50), valid=(3, 4, 14, 21))
    [window] = targets.windows
    drawn = ops.Draw(torch.tensor([0]), draw_seed(1), 500, 1500, 375, "stratified")
    instances = ops.Instances([torch.randn(1, 2, 9, 9)], torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]), [2])
    points = ops.uncertain_points(instances, drawn, targets.windows, "zeros", backend)
    inside = (points[:, 375:] - window[:2]) / window[2:]
    assert float(inside.min()) >= -1e-6 and float(inside.max()) <= 1 + 1e-6
    # The uniform points fill the window: each of its four quarters has a quarter of them, give or take a row.
    quarters = (inside > 0.5).long()
    for instance in quarters:
        counted = torch.bincount(instance[:, 0] * 2 + instance[:, 1], minlength=4)
        assert bool(((counted - 125 / 4).abs() <= 12).all())


def test_the_matcher_takes_its_own_points(backend: str) -> None:
    logits, masks = torch.randn(1, 4, 16, 16), torch.rand(3, 20, 20) > 0.5
    targets = [{"masks": masks, "labels": torch.zeros(3, dtype=torch.int64)}]
    packed = MaskTargets.from_masks(masks)
    draw = ops.Draw(torch.tensor([0]), draw_seed(4), 97, layout="stratified")
    points = match_points(packed.windows, draw).expand(4, -1, -1)
    z = functional.point_sample(logits[0], points, backend="reference")
    t = functional.point_sample(masks.float(), points[:3], backend="reference")
    criterion = MaskCriterion(
        1, sampling=PointSampling(97, layout="stratified"), class_weight=0.0, dice_weight=0.0, backend=backend
    )
    assert (criterion.matcher.num_points, criterion.matcher.layout) == (97, "stratified")
    step = Step(packed, torch.zeros(3, dtype=torch.int64), torch.tensor([0]), torch.tensor(4))
    cost = criterion.matcher.costs(torch.zeros(1, 1, 4, 2), [logits], step)[0, 0]
    expected = torch.stack([torch.stack([functional.mask_bce(row, column) for column in t]) for row in z])
    torch.testing.assert_close(cost, 5 * expected, rtol=1e-5, atol=1e-5)
    assert HungarianMatcher().layout == MaskCriterion(1).matcher.layout == "independent"
    criterion(torch.zeros(1, 4, 2), logits, targets, seed=4)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("layout", ["jittered", None, 3, torch.zeros(2)])
def test_unknown_layouts_are_refused(layout: object) -> None:
    for make in (PointSampling, HungarianMatcher):
        with pytest.raises(MaskLossError, match="layout must be one of independent, stratified"):
            make(layout=layout)


def test_too_many_cells_are_refused() -> None:
    most = MOST_CELLS // 4
    PointSampling(most, 4.0, layout="stratified")
    PointSampling(4 * most, 4.0, 0.0, layout="stratified")
    PointSampling(4 * most)
    with pytest.raises(MaskLossError, match="at most 1048576 cells"):
        PointSampling(most + 1, 4.0, layout="stratified")
    with pytest.raises(MaskLossError, match="at most 1048576 cells"):
        HungarianMatcher(num_points=MOST_CELLS + 1, layout="stratified")


# --------------------------------------------------------------------------------------------------------------- noise


def pairs_of(case: Case) -> tuple[Tensor, MaskTargets]:
    """Predictions of a middle layer, and the targets that they are matched with."""
    inputs = make_inputs(case, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    targets = [{"masks": inputs.masks[0], "labels": inputs.labels[0]}]
    logits = inputs.mask_logits[1].detach()
    matcher = HungarianMatcher(num_points=1024)
    [(queries, rows)] = matcher(inputs.class_logits[1].detach(), logits, targets, seed=0).pairs()
    return logits[0, queries], MaskTargets.from_masks(inputs.masks[0][rows])


def losses_of(pairs: tuple[Tensor, MaskTargets], sampling: PointSampling, draws: int, start: int = 0) -> Tensor:
    """Both terms of every pair over many draws: `[draws, 2, N]`, float64."""
    loss = MaskLoss(sampling=sampling)
    drawn = [loss(*pairs, seed=start + seed).per_instance for seed in range(draws)]
    return torch.stack([torch.stack(each) for each in drawn]).double()


def spread_of(losses: Tensor) -> Tensor:
    """Standard deviations of both terms, pooled over the pairs: `[2]`."""
    return losses.var(0).mean(1).sqrt()


def assert_same_means_and_less_noise(case: Case, few: int, draws: int = 400) -> None:
    pairs, many = pairs_of(case), 4 * few
    spreads = {}
    for alpha in (0.0, 0.75):
        found = {
            (layout, count): losses_of(pairs, PointSampling(count, importance_ratio=alpha, layout=layout), draws)
            for layout, count in (("independent", many), ("stratified", many), ("stratified", few))
        }
        one, other = found["independent", many], found["stratified", many]
        error = ((one.var(0) + other.var(0)) / draws).sqrt()
        assert bool(((one.mean(0) - other.mean(0)).abs() <= 4 * error).all())
        spreads |= {(alpha, *key): spread_of(losses) for key, losses in found.items()}
    for alpha in (0.0, 0.75):
        noise = spreads[alpha, "independent", many]
        assert bool((spreads[alpha, "stratified", many] <= 0.5 * noise).all())
        assert bool((spreads[alpha, "stratified", few] <= 1.15 * noise).all())


def test_means_stay_and_noise_falls() -> None:
    case = Case("small", 1, 8, 8, 3, 5, (128, 128), (512, 512), extent=(0.1, 0.5))
    assert_same_means_and_less_noise(case, 784, draws=150)


@pytest.mark.slow
def test_means_stay_and_noise_falls_at_full_size() -> None:
    assert_same_means_and_less_noise(Case("full", 1, 12, 12, 3, 5, (256, 256), (1024, 1024)), 3136)


def test_matching_costs_are_quieter() -> None:
    """The point of it for the matcher: less noise in the costs that decide."""
    logits, targets = pairs_of(Case("small", 1, 8, 8, 3, 5, (64, 64), (256, 256), extent=(0.1, 0.5)))
    group = ops.Targets(targets.encoding, *targets.tensors)

    def spread(layout: str) -> Tensor:
        costs = []
        for seed in range(200):
            draw = ops.Draw(torch.tensor([0]), torch.tensor(seed), 784, layout=layout)
            costs.append(torch.stack(ops.match_cost([logits[None]], [8], ops.Job(group, draw, ops.Term()), "cpu")))
        return torch.stack(costs).double().var(0).flatten(1).mean(1).sqrt()

    assert bool((spread("stratified") <= 0.5 * spread("independent")).all())
