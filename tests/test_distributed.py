"""Normalisation over ranks and accumulation steps: the gradient is that of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.testing import assert_close

from maskloss import MaskLoss, StepTotals, step_totals
from support import ranks

each_case = pytest.mark.parametrize("case", ranks.COUNTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two ranks found, each with half of the images."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(ranks.run, args=(str(folder),), nprocs=ranks.RANKS)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in range(ranks.RANKS)]


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(found[name], grad, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@each_case
@pytest.mark.parametrize("step", ["default", "accumulated"])
def test_ranks_have_the_gradient_of_the_whole_batch(
    results: list[dict[Any, Any]], step: str, case: str, backend: str
) -> None:
    """On each rank two images at once, numbered by default, or one after the other, with the totals of the step."""
    loss, expected = ranks.whole_batch(case, backend)
    assert any(bool(grad.any()) for grad in expected.values())
    for rank in results:
        agree(rank[step, case, backend][1], expected)
    mean = sum(rank[step, case, backend][0] for rank in results) / ranks.RANKS
    assert_close(mean, loss, rtol=1e-6, atol=1e-6)


@each_case
def test_factors_on_ranks(results: list[dict[Any, Any]], case: str) -> None:
    """Masks as factors, of which a rank may have none: the step of one process, with dense logits."""
    features, targets = ranks.batch(case)
    loss, expected = ranks.factored_step(ranks.Products(), features, targets, dense=True)
    for rank in results:
        agree(rank["factors", case][1], expected)
    mean = sum(rank["factors", case][0] for rank in results) / ranks.RANKS
    assert_close(mean, loss, rtol=1e-6, atol=1e-6)


@each_case
@pytest.mark.parametrize("micro_batches", [[[0, 1], [2, 3]], [[0], [1, 2, 3]], [[3], [1], [2], [0]]])
def test_accumulation_has_the_gradient_of_the_whole_batch(
    case: str, micro_batches: list[list[int]], backend: str
) -> None:
    expected_loss, expected = ranks.whole_batch(case, backend)
    model = ranks.Model()
    loss = ranks.accumulated(model, case, backend, micro_batches)
    agree(ranks.gradients(model), expected)
    assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)


def test_without_the_totals_the_gradient_is_another() -> None:
    """The check above can fail: normalizing each micro-batch on its own does not add up."""
    case = "uneven, more targets than queries"
    _, expected = ranks.whole_batch(case, "reference")
    model, (features, targets) = ranks.Model(), ranks.batch(case)
    for half in (slice(0, 2), slice(2, 4)):
        ids = [0, 1] if half.start == 0 else [2, 3]
        out = ranks.criterion("reference")(*model(features[half]), targets[half], image_ids=ids, seed=ranks.SEED)
        (out.total / 2).backward()
    with pytest.raises(AssertionError):
        agree(ranks.gradients(model), expected)


@pytest.mark.parametrize("kind", ["matched", "given"])
def test_weights_on_ranks(results: list[dict[Any, Any]], kind: str) -> None:
    """Weights of classes and of instances are added up over all ranks, layer by layer."""
    model = ranks.Model()
    expected_loss = ranks.weighted_step(model, range(ranks.IMAGES), kind)
    expected = ranks.gradients(model)
    for rank in results:
        agree(rank["weighted", kind][1], expected)
    mean = sum(rank["weighted", kind][0] for rank in results) / ranks.RANKS
    assert_close(mean, expected_loss, rtol=1e-6, atol=1e-6)


def test_ranks_with_and_without_masks_reduce_the_same_numbers(results: list[dict[Any, Any]]) -> None:
    """Only the first rank has a target without a mask; both count what such targets weigh."""
    model = ranks.Model()
    expected_loss = ranks.mixed_step(model, range(ranks.IMAGES))
    expected = ranks.gradients(model)
    for rank in results:
        agree(rank["mixed"][1], expected)
    mean = sum(rank["mixed"][0] for rank in results) / ranks.RANKS
    assert_close(mean, expected_loss, rtol=1e-6, atol=1e-6)


def test_totals_of_weights(results: list[dict[Any, Any]]) -> None:
    """(3 / 2 + 2 + 4 / 2 + 2) / 2 of the instances, (3 * 1 + 2 * 3 + 4 * 1 + 2 * 3) / 2 of their classes."""
    for rank in results:
        assert [float(count) for count in rank["weighted totals"]] == [5.5, 10.0, 3.75, 9.5]


def test_pairs_on_ranks(results: list[dict[Any, Any]], backend: str) -> None:
    """The loss of pairs counts them over all ranks, and only those that an instance mask keeps."""
    everything = slice(None)
    expected = ranks.pair_gradient(backend, everything)
    found = torch.cat([rank["pairs", backend] for rank in results]) / ranks.RANKS
    assert_close(found, expected, rtol=0, atol=1e-6)
    keep = torch.tensor([flag for flags in ranks.KEPT for flag in flags])
    expected = ranks.pair_gradient(backend, everything, instance_weights=keep)
    found = torch.cat([rank["kept pairs", backend] for rank in results]) / ranks.RANKS
    assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [4.0, torch.tensor(4.0)])
def test_pairs_in_micro_batches(count: float | Tensor, backend: str) -> None:
    expected = ranks.pair_gradient(backend, slice(None))
    halves = [ranks.pair_gradient(backend, half, num_instances=count) for half in (slice(0, 3), slice(3, 4))]
    assert_close(torch.cat(halves), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0.0, 0.25, torch.tensor(0.0)])
def test_the_number_of_instances_is_at_least_one(count: float | Tensor, backend: str) -> None:
    one = slice(0, 1)
    assert torch.equal(ranks.pair_gradient(backend, one, num_instances=count), ranks.pair_gradient(backend, one))


def test_totals_count_matches(results: list[dict[Any, Any]]) -> None:
    """At most Q per image, averaged over the ranks: (3 + 5 + 0 + 4 + 5 + 0) / 2, and three images of Q on each."""
    assert step_totals([[3, 9], [0]], 5) == StepTotals(8.0, 15.0)
    assert step_totals([], 5) == StepTotals(0.0, 0.0)
    for rank in results:
        assert rank["totals"] == StepTotals(torch.tensor(8.5), torch.tensor(15.0))


def test_a_rank_computes_a_loss_by_itself(results: list[dict[Any, Any]]) -> None:
    """Without a gradient, or where it is told to, a rank neither waits for the others nor counts their instances."""
    features, targets = ranks.batch("uneven, more targets than queries")
    classes, masks = ranks.Model()(features[:2])
    expected = ranks.criterion("reference")(classes, masks, targets[:2], seed=ranks.SEED).total
    pairs = MaskLoss(backend="reference")(masks[0][0, :2], targets[0]["masks"], seed=ranks.SEED).total
    found = results[0]["alone"]
    assert set(found) == {"no gradient", "no graph", "argument", "block", "pairs"}
    assert torch.equal(found.pop("pairs"), pairs)
    assert all(torch.equal(total, expected) for total in found.values())


def test_groups_of_ranks(results: list[dict[Any, Any]]) -> None:
    """A group that is named counts in evaluation too."""
    whole, _ = ranks.whole_batch("uneven, more targets than queries", "reference")
    assert_close(sum(rank["grouped"]["both"] for rank in results) / ranks.RANKS, whole, rtol=1e-6, atol=1e-6)
    assert [float(rank["grouped"]["totals"]) for rank in results] == [3.0, 4.0]
    assert torch.equal(results[0]["grouped"]["one"], results[0]["alone"]["no gradient"])
