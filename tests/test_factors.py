"""Masks as factors: the terms, costs and gradients of the dense logits, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskloss import MaskCriterion, MaskFactors, MaskLoss, MaskTargets, Matches, PointSampling, ops
from maskloss.layers import match_cost
from maskloss.matches import join_layers
from support.accuracy import assert_no_worse
from support.batches import group
from support.examples import number
from support.products import (
    BATCH,
    CHANNELS,
    FEW,
    QUERIES,
    SEED,
    TOLERANCE,
    Step,
    assert_as_dense,
    leaf,
    some_factors,
    some_matches,
    some_targets,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# More pixels than points, and fewer.
LARGE, SMALL = (9, 13), (5, 7)
ONE_PLANE = 1e-6


def step(sizes: Any = (LARGE, LARGE), *, targets: MaskTargets | None = None, **options: Any) -> Step:
    """Factored layers with matches; `options` are those of `some_factors` and of `Step`."""
    mine = {name: options.pop(name) for name in ("points", "options", "backend") if name in options}
    targets = some_targets() if targets is None else targets
    matches = some_matches(targets, options.get("queries", QUERIES), len(sizes))
    return Step(some_factors(sizes, **options), matches, targets, **mine)


def some_points(count: int, num_points: int = 50) -> Tensor:
    return torch.rand(count, num_points, 2) * 1.2 - 0.1


# -------------------------------------------------------------------------------------------------- terms and gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ["bits", "labels", "values"])
def test_every_encoding_and_dtype(dtype: torch.dtype, encoding: str) -> None:
    work = step(dtype=dtype, targets=some_targets(encoding))
    if dtype in (torch.bfloat16, torch.float16):
        # The rounding of a product may decide between two candidates.
        work.points = some_points(len(work.matches))
    assert_as_dense(work)


@pytest.mark.parametrize(
    "options",
    [
        {"padding_mode": "border"},
        {"target_mode": "nearest"},
        {"focal_alpha": 0.25, "focal_gamma": 2.0},
        {"padding_mode": "border", "target_mode": "nearest", "focal_gamma": 1.5},
        {"dice": "soft"},
        {"dice": "semimetric"},
    ],
    ids=str,
)
@pytest.mark.parametrize("extra", [False, True], ids=["", "windows and ignored pixels"])
def test_every_option(options: dict[str, Any], extra: bool) -> None:
    assert_as_dense(step(options=options, targets=some_targets(extra=extra)))


def test_windows_and_ignored_pixels_of_soft_targets() -> None:
    assert_as_dense(step(targets=some_targets("values", extra=True)))


def test_given_points() -> None:
    work = step()
    work.points = some_points(len(work.matches))
    assert_as_dense(work)


@pytest.mark.parametrize(
    "sampling", [PointSampling(60, importance_ratio=0.0), PointSampling(1), PointSampling(7, 1.0, 1.0)]
)
def test_numbers_of_points(sampling: PointSampling) -> None:
    work = step()
    work.sampling = sampling
    assert_as_dense(work)


@pytest.mark.parametrize("scratch_mb", [ONE_PLANE, 3 * 9 * 13 * 4 / 2**20, 32.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_any_number_of_planes_at_a_time(scratch_mb: float, dtype: torch.dtype, bias: bool) -> None:
    work = step(dtype=dtype, scratch_mb=scratch_mb, bias=bias, sizes=[LARGE] * 3)
    work.points = some_points(len(work.matches))
    assert_as_dense(work)


@pytest.mark.parametrize("shared", [True, False])
def test_layers_with_features_of_their_own(shared: bool) -> None:
    assert_as_dense(step([LARGE, SMALL, LARGE, (1, 1), SMALL], shared=shared))


def test_layers_of_different_widths() -> None:
    """Narrower ones get channels of zeros, from which no gradient comes back."""
    narrow = some_factors([LARGE, SMALL])
    wide = MaskFactors(
        leaf(BATCH, QUERIES, CHANNELS + 3, dtype=torch.float32),
        leaf(BATCH, CHANNELS + 3, *LARGE, dtype=torch.float32),
    )
    work = step([LARGE] * 3)
    work.layers = [narrow[0], wide, narrow[1]]
    assert_as_dense(work)
    for mine, theirs in zip(costs(work), costs(work, dense=True), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_more_targets_than_queries_and_images_without_any() -> None:
    assert_as_dense(step(targets=some_targets(counts=(0, 7, 0, 2)), batch=4))


def test_one_embedding_used_twice() -> None:
    """Two layers with one embedding, and a query with two targets: the gradients add up."""
    targets = some_targets()
    first = some_factors([LARGE])[0]
    layers = [
        first,
        MaskFactors(first.embeddings, leaf(BATCH, CHANNELS, *SMALL, dtype=torch.float32), first.bias),
        first,
    ]
    pairs = [(torch.tensor([1, 1, 0]), torch.tensor([0, 2, 1])), (torch.tensor([4]), torch.tensor([0]))]
    one = Matches.from_pairs(pairs, num_queries=QUERIES, num_targets=targets.num_targets)
    assert_as_dense(Step(layers, join_layers([one] * 3), targets))


@pytest.mark.parametrize("layout", ["channels last", "expanded", "a slice"])
def test_strided_features(layout: str) -> None:
    work = step([LARGE])
    first = work.layers[0]
    assert isinstance(first, MaskFactors)
    values = first.features.detach()
    if layout == "channels last":
        features = values.contiguous(memory_format=torch.channels_last)
    elif layout == "expanded":
        features = values[:1].expand_as(values)
    else:
        features = torch.stack([values, values * 0 + 9], -1)[..., 0]
    work.layers = [MaskFactors(first.embeddings, features.requires_grad_(), first.bias)]
    assert_as_dense(work)


@pytest.mark.parametrize("bias", [0.7, (), (1,), (QUERIES,), (BATCH, QUERIES)], ids=str)
def test_forms_of_the_bias(bias: Any) -> None:
    work = step([LARGE, LARGE], bias=False)
    value = bias if isinstance(bias, float) else leaf(*bias, dtype=torch.float32)
    # The other layer has none.
    first, second = work.layers
    work.layers = [first, MaskFactors(second.embeddings, second.features, value)]  # type: ignore[union-attr]
    assert_as_dense(work)
    for mine, theirs in zip(costs(work), costs(work, dense=True), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_dense_layers_among_factored_ones(where: int) -> None:
    work = step([LARGE, SMALL, LARGE])
    work.layers[where] = leaf(BATCH, QUERIES, 6, 11, dtype=torch.float32)
    assert_as_dense(work)
    for points in (None, some_points(len(work.matches))):
        work.points = points
        reference = Step(work.layers, work.matches, work.targets, points, backend="reference")
        for mine, theirs in zip(work.terms(), reference.terms(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_no_instances() -> None:
    work = step(targets=some_targets(counts=(0, 0)))
    ce, dice = work.terms()
    assert ce.shape == dice.shape == (0,)
    for gradient in torch.autograd.grad(ce.sum() + dice.sum(), work.leaves):
        assert not gradient.any()


def test_only_some_factors_need_a_gradient() -> None:
    work = step(targets=some_targets())
    whole = dict(zip(map(id, work.leaves), work.results()[2:], strict=True))
    for keep in range(len(work.leaves)):
        wanted = work.leaves[keep]
        for other in work.leaves:
            other.requires_grad_(other is wanted)
        torch.testing.assert_close(work.results()[2], whole[id(wanted)])
        for layer in work.layers:
            for part in (layer.embeddings, layer.features, layer.bias):  # type: ignore[union-attr]
                part.requires_grad_()  # type: ignore[union-attr]


def test_one_term_alone_has_a_gradient() -> None:
    work = step()
    for term in (0, 1):
        mine = torch.autograd.grad(work.terms()[term].sum(), work.leaves)
        theirs = torch.autograd.grad(work.terms(dense=True)[term].sum(), work.leaves)
        for each, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(each, other, atol=1e-5, rtol=1e-5)


def test_rows_in_any_order() -> None:
    """Matches whose rows are not sorted by image give the same losses, row by row."""
    work = step()
    work.points = some_points(len(work.matches))
    order = torch.cat([part[torch.randperm(len(part))] for part in torch.arange(10).split(5)])
    shuffled = Matches(work.matches.index[order], (5, 5), QUERIES, work.targets.num_targets)
    other = Step(work.layers, shuffled, work.targets, work.points[order])
    for mine, theirs in zip(other.terms(), work.terms(), strict=True):
        torch.testing.assert_close(mine, theirs[order])


def test_gradcheck() -> None:
    work = step([LARGE, SMALL], dtype=torch.float64, scratch_mb=2 * 9 * 13 * 8 / 2**20)
    work.points = some_points(len(work.matches)).double()
    leaves = work.leaves
    assert len(leaves) == 6
    assert torch.autograd.gradcheck(lambda *_: work.terms(), leaves, fast_mode=True)


@pytest.mark.thorough
@settings(max_examples=number(100))
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, queries, depth = number(1, 3), number(1, 6), number(1, 3)
    sizes = [(number(1, 12), number(1, 12)) for _ in range(depth)]
    counts = [number(0, 7) for _ in range(batch)]
    torch.manual_seed(number(0, 2**31))
    scratch = data.draw(st.sampled_from([ONE_PLANE, 1e-3, 1.0]))
    targets = some_targets(data.draw(st.sampled_from(["bits", "labels", "values"])), counts)
    shared = data.draw(st.booleans())
    # In float64, where no rounding decides between candidates.
    work = step(
        sizes, targets=targets, dtype=torch.float64, batch=batch, queries=queries, scratch_mb=scratch, shared=shared
    )
    for mine, theirs in zip(work.results(), work.results(dense=True), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)
    for mine, theirs in zip(costs(work), costs(work, dense=True), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)


# ------------------------------------------------------------------------------------------------------------- matching


def costs(work: Step, *, dense: bool = False, num_points: int = 60) -> tuple[Tensor, Tensor]:
    layers = work.dense() if dense else work.layers
    options = work.options
    term = ops.Term(
        options.get("padding_mode", "zeros"),
        options.get("target_mode", "bilinear"),
        options.get("focal_alpha", -1.0),
        options.get("focal_gamma", -1.0),
        options.get("dice", "standard"),
    )
    draw = ops.Draw(torch.arange(len(work.targets)), SEED, num_points)
    detached = [layer.detach() for layer in layers]
    return match_cost(detached, work.targets.num_targets, ops.Job(group(work.targets), draw, term), work.backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [LARGE, SMALL])
@pytest.mark.parametrize("scratch_mb", [ONE_PLANE, 32.0])
def test_matching_costs(dtype: torch.dtype, size: tuple[int, int], scratch_mb: float) -> None:
    work = step([size, LARGE, size], dtype=dtype, scratch_mb=scratch_mb, targets=some_targets(extra=True))
    found, plain, exact = costs(work), costs(work, dense=True), costs(work.exact(), dense=True)
    # Half precision rounds the features at the points as well as the logits there.
    bound = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, TOLERANCE[dtype])
    for mine, theirs, right in zip(found, plain, exact, strict=True):
        assert_no_worse(mine, theirs, right, bound, everywhere=False)


@pytest.mark.parametrize("encoding", ["bits", "labels", "values"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding_mode": "border", "target_mode": "nearest", "dice": "soft"},
        {"focal_alpha": 0.25, "focal_gamma": 2.0, "dice": "semimetric"},
    ],
    ids=str,
)
def test_matching_costs_of_every_option(encoding: str, options: dict[str, Any]) -> None:
    work = step([LARGE, SMALL], targets=some_targets(encoding, extra=True), options=options)
    for mine, theirs in zip(costs(work), costs(work, dense=True), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_matching_costs_without_targets() -> None:
    found = costs(step(targets=some_targets(counts=(0, 0))))
    assert [list(cost.shape) for cost in found] == [[2, BATCH, QUERIES, 0]] * 2


# ---------------------------------------------------------------------------------------------------------- whole steps


def classes(depth: int, batch: int = BATCH, queries: int = QUERIES) -> list[Tensor]:
    return [torch.randn(batch, queries, 4).requires_grad_() for _ in range(depth)]


def entries(targets: MaskTargets) -> dict[str, Any]:
    return {"masks": targets, "labels": [torch.randint(3, (count,)) for count in targets.num_targets]}


@pytest.mark.parametrize("counts", [(3, 2), (0, 9), (0, 0)])
def test_the_criterion(backend: str, counts: tuple[int, int]) -> None:
    work = step([LARGE, LARGE, SMALL], targets=some_targets(counts=counts))
    logits, targets = classes(3), entries(work.targets)
    criterion = MaskCriterion(3, sampling=FEW, backend=backend)
    weights = torch.linspace(0.0, 2.0, sum(counts))
    options = {"instance_weights": weights, "image_ids": [7, 2**31], "seed": 11}
    leaves = [*logits, *work.leaves]
    mine, theirs = (criterion(logits, layers, targets, **options) for layers in (work.layers, work.dense()))
    assert torch.equal(mine.matches.index, theirs.matches.index)
    torch.testing.assert_close(mine.total, theirs.total)
    found, wanted = (torch.autograd.grad(out.total, leaves) for out in (mine, theirs))
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, atol=1e-5, rtol=1e-5)
    again = criterion(logits, work.layers, targets, **{**options, "image_ids": [8, 2**31]})
    assert sum(counts) == 0 or counts[0] == 0 or float(again.total.detach()) != float(mine.total.detach())


@pytest.mark.parametrize("given", ["pairs", "matches of one layer", "matches of every layer"])
def test_given_matches(given: str) -> None:
    work = step([LARGE, SMALL])
    one = Matches.from_pairs(work.matches.pairs(0), num_queries=QUERIES, num_targets=work.targets.num_targets)
    matches: Any = {"pairs": one.pairs(), "matches of one layer": one, "matches of every layer": work.matches}[given]
    logits, criterion = classes(2), MaskCriterion(3, sampling=FEW, backend="cpu")
    targets = entries(work.targets)
    mine, theirs = (
        criterion(logits, layers, targets, matches=matches, seed=3) for layers in (work.layers, work.dense())
    )
    for each, other in zip(mine.per_instance, theirs.per_instance, strict=True):
        torch.testing.assert_close(each, other, atol=1e-5, rtol=1e-5)


def test_the_mask_loss() -> None:
    work = step([LARGE])
    (factors,), pairs = work.layers, work.matches.pairs()
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    loss = MaskLoss(sampling=FEW, backend="cpu")
    mine, theirs = (
        loss(layer, work.targets, pairs, instance_weights=weights, seed=1) for layer in (factors, *work.dense())
    )
    torch.testing.assert_close(mine.total, theirs.total)
    found, wanted = (torch.autograd.grad(out.total, work.leaves) for out in (mine, theirs))
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, atol=1e-6, rtol=1e-5)
