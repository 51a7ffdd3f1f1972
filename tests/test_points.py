"""The generator, and which points the loss draws with it."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from maskloss import MaskCriterion, MaskLoss, MaskTargets, PointSampling, functional, ops
from maskloss._abi import ALL_TARGETS, CANDIDATES, MATCHER, RANDOM
from maskloss.points import (
    draw_seed,
    instance_keys,
    threefry2x32,
    uniform_points,
)


def words(*values: int) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.int64) for value in values]


def draw(
    logits: list[Tensor],
    index: list[tuple[int, int, int, int]],
    image_ids: list[int],
    *,
    seed: int = 11,
    backend: str = "reference",
    num_points: int = 200,
) -> Tensor:
    """Draw points through the operation itself: rows (layer, image, query, target)."""
    rows, sampling = torch.tensor(index), PointSampling(num_points)
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(len(image_ids), 1)
    sizes = [sum(row[0] == layer for row in index) for layer in range(len(logits))]
    numbers = (sampling.num_points, sampling.num_candidates, sampling.num_uncertain)
    drawn = ops.Draw(torch.tensor(image_ids), draw_seed(seed), *numbers)
    return ops.uncertain_points(ops.Instances(logits, rows, sizes), drawn, windows, "zeros", backend)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers_of_random123(key: tuple[int, int], counter: tuple[int, int], expected: tuple[int, int]) -> None:
    assert tuple(int(word) for word in threefry2x32(*words(*key), *words(*counter))) == expected


def test_points_lie_on_an_exact_grid() -> None:
    points = uniform_points(instance_keys(words(3)[0], *[torch.tensor([0])] * 2), 5000, torch.tensor([0]), RANDOM)
    assert points.dtype == torch.float32
    assert float(points.min()) >= 0.0 and float(points.max()) < 1.0
    assert torch.equal((points * 2**24).round(), points * 2**24)


def test_streams_layers_images_targets_and_seeds_differ() -> None:
    def first(seed: int, image: int, target: int, layer: int, stream: int) -> tuple[float, ...]:
        keys = instance_keys(words(seed)[0], torch.tensor([image]), torch.tensor([target]))
        return tuple(uniform_points(keys, 4, torch.tensor([layer]), stream).flatten().tolist())

    drawn = {
        first(seed, image, target, layer, stream)
        for seed in (0, 1, 2**32, -1)
        for image in (0, 1, 2**31)
        for target in (0, 1, ALL_TARGETS)
        for layer in (0, 1, 9)
        for stream in (CANDIDATES, RANDOM, MATCHER)
    }
    assert len(drawn) == 4 * 3 * 3 * 3 * 3


def test_points_depend_on_the_instance_alone(backend: str) -> None:
    """On seed, layer, global image and target: not on order or composition of the batch, nor on the query's number."""
    planes = torch.randn(5, 33, 17)
    logits = [torch.stack([planes[:3], planes[2:]]), torch.stack([planes[1:4], planes[:3]])]
    index = [(0, 0, 1, 0), (0, 0, 2, 5), (0, 1, 0, 3), (1, 0, 0, 0), (1, 1, 2, 7)]
    together = draw(logits, index, [40, 41], backend=backend)
    # One instance on its own, in a batch of another order, with the plane in another place.
    alone = draw([planes[None, 2:3].clone()], [(0, 0, 0, 5)], [40], backend=backend)
    assert torch.equal(together[1], alone[0])
    swapped = draw(
        [logits[0].flip(0), logits[1].flip(0)], [(0, 0, 0, 3), (0, 1, 1, 0), (1, 0, 2, 7)], [41, 40], backend=backend
    )
    assert torch.equal(swapped, together[[2, 0, 4]])
    other = draw(logits, index, [42, 41], backend=backend)
    assert not torch.equal(other[0], together[0]) and torch.equal(other[2], together[2])


def test_points_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    logits = [torch.randn(1, 8, 65, 33)]
    index = [(0, 0, query, query) for query in range(8)]
    drawn = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        drawn.append(draw(logits, index, [0], backend=backend))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_points_do_not_depend_on_how_the_batch_is_divided(backend: str) -> None:
    """Two ranks (or micro-batches) with an image each give the losses of one process with both."""
    criterion = MaskCriterion(2, sampling=PointSampling(64), backend=backend)
    classes, masks = torch.randn(2, 6, 3), torch.randn(2, 6, 16, 16)
    targets = [
        {"masks": torch.rand(count, 32, 32) > 0.5, "labels": torch.zeros(count, dtype=torch.int64)} for count in (2, 3)
    ]
    whole = criterion(classes, masks, targets, seed=5)
    halves = [
        criterion(classes[b : b + 1], masks[b : b + 1], targets[b : b + 1], seed=5, image_ids=[b]) for b in (0, 1)
    ]
    assert torch.equal(whole.per_instance.ce, torch.cat([half.per_instance.ce for half in halves]))
    assert torch.equal(whole.matches.index[:, 2:], torch.cat([half.matches.index[:, 2:] for half in halves]))


@pytest.mark.parametrize(
    "sampling",
    [PointSampling(500), PointSampling(64, 1.0, 0.5), PointSampling(9, 2.5, 1.0), PointSampling(7, 3.0, 0.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_uncertain_part_is_exactly_the_most_uncertain(
    backend: str, sampling: PointSampling, dtype: torch.dtype
) -> None:
    logits = torch.randn(3, 21, 34).to(dtype)
    points = functional.uncertain_points(logits, sampling=sampling, seed=9, backend=backend)
    assert points.shape == (3, sampling.num_points, 2)
    keys = instance_keys(draw_seed(9), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    layer = torch.zeros(3, dtype=torch.int64)
    candidates = uniform_points(keys, sampling.num_candidates, layer, CANDIDATES)
    values = functional.point_sample(logits, candidates, backend=backend)
    kept = sampling.num_uncertain
    for instance in range(3):
        order = functional.uncertainty(values[instance].float()).sort(descending=True, stable=True).indices
        chosen = order[:kept].sort().values
        assert torch.equal(points[instance, :kept], candidates[instance, chosen])
    assert torch.equal(points[:, kept:], uniform_points(keys, sampling.num_random, layer, RANDOM))


def test_ties_go_to_the_candidate_drawn_first(backend: str) -> None:
    sampling = PointSampling(40)
    points = functional.uncertain_points(torch.zeros(1, 8, 8), sampling=sampling, seed=2, backend=backend)
    keys = instance_keys(draw_seed(2), torch.tensor([0]), torch.tensor([0]))
    candidates = uniform_points(keys, sampling.num_candidates, torch.tensor([0]), CANDIDATES)
    assert torch.equal(points[:, : sampling.num_uncertain], candidates[:, : sampling.num_uncertain])


def test_the_random_part_is_uniform(backend: str) -> None:
    """Chi-squared over 16 x 16 cells, Kolmogorov-Smirnov along both axes, and no correlation between neighbours."""
    logits = torch.linspace(-4, 4, 64).repeat(8, 64, 1)
    sampling = PointSampling(20000)
    points = functional.uncertain_points(logits, sampling=sampling, seed=1, backend=backend)[
        :, sampling.num_uncertain :
    ]
    x, y = points.reshape(-1, 2).double().unbind(1)
    cells = torch.bincount((x * 16).long() * 16 + (y * 16).long(), minlength=256).numpy()
    assert stats.chisquare(cells).pvalue > 1e-3
    for axis in (x, y):
        assert stats.kstest(axis.numpy(), "uniform").pvalue > 1e-3
        assert stats.pearsonr(axis[:-1].numpy(), axis[1:].numpy()).pvalue > 1e-3
    assert stats.pearsonr(x.numpy(), y.numpy()).pvalue > 1e-3


def test_the_uncertain_part_follows_the_formula_in_distribution(backend: str) -> None:
    """On logits linear in x, |z| grows with the distance from the middle: the chosen share is the nearest quarter."""
    logits = torch.linspace(-1, 1, 256).repeat(1, 256, 1)
    sampling = PointSampling(30000, 3.0, 0.75)
    chosen = functional.uncertain_points(logits, sampling=sampling, seed=4, backend=backend)[
        0, : sampling.num_uncertain
    ]
    distance = ((chosen[:, 0].double() - 0.5).abs() / 0.125).clamp(max=1)
    assert stats.kstest(distance.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(chosen[:, 1].double().numpy(), "uniform").pvalue > 1e-3


def test_matcher_points_are_those_of_the_image(backend: str) -> None:
    """The costs change with the image's number and the seed, not with layer or position in the batch."""
    logits, targets = torch.randn(1, 4, 16, 16), MaskTargets.from_masks(torch.rand(3, 20, 20) > 0.5)

    def costs(copies: int, numbers: list[int], seed: int = 0) -> Tensor:
        batch = MaskTargets.cat([targets] * copies)
        layers = [logits.expand(copies, -1, -1, -1)] * 2
        group, drawn = ops.Targets("bits", *batch.tensors), ops.Draw(torch.tensor(numbers), draw_seed(seed), 50)
        return ops.match_cost(layers, batch.num_targets, ops.Job(group, drawn, ops.Term()), backend)[0]

    both = costs(2, [7, 8])
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)
    torch.testing.assert_close(both[:, 1:], costs(1, [8]), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(both[:, 0], both[:, 1])
    assert not torch.allclose(both[:, :1], costs(1, [7], seed=1))


def test_seeds_and_generators() -> None:
    logits, masks = torch.randn(2, 9, 9), torch.rand(2, 9, 9) > 0.5
    loss = MaskLoss(sampling=PointSampling(32))
    torch.manual_seed(3)
    first = loss(logits, masks)
    torch.manual_seed(3)
    assert torch.equal(loss(logits, masks).total, first.total)
    assert not torch.equal(loss(logits, masks).total, first.total)
    assert torch.equal(loss(logits, masks, seed=first.seed).total, first.total)
    assert torch.equal(loss(logits, masks, seed=int(first.seed)).total, first.total)
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    assert torch.equal(*[loss(logits, masks, generator=generator).total for generator in generators])
    assert int(draw_seed(2**64 - 1)) == -1
