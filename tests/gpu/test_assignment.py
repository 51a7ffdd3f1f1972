"""The assignment on the device makes the very matches of the one on the host, also where several are equally good."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from maskloss import _abi as abi
from maskloss.ops import cpu
from maskloss.ops.assignment import solve_with_scipy
from support.assignments import KINDS
from support.kernel_cases import DEVICE, INTERPRETED

pytestmark = [pytest.mark.gpu] * (not INTERPRETED)

CLASSES = 5
# Numbers of queries and of the targets of each image.
SHAPES: list[tuple[int, list[int]]] = [
    (1, [1]), (5, [0, 3]), (0, [3]), (7, [0, 0]), (8, [7, 8, 9]), (17, [10]),
]  # fmt: skip


def images_of(counts: list[int]) -> torch.Tensor:
    """The two columns of `MaskTargets.images` that an assignment reads; the others hold garbage."""
    images = torch.full((len(counts), abi.IMAGE_COLUMNS), 113, dtype=torch.int64)
    images[:, abi.COUNT] = torch.tensor(counts)
    images[:, abi.FIRST] = torch.tensor([0, *itertools.accumulate(counts)][: len(counts)])
    return images.to(DEVICE)


def solved(gpu: Any, cost: np.ndarray[Any, Any], counts: list[int], groups: int = 1) -> tuple[Any, Any]:
    labels = torch.arange(sum(counts), device=DEVICE) % CLASSES
    given = torch.from_numpy(np.ascontiguousarray(cost)).to(DEVICE)
    answer = gpu.assign(given, labels, images_of(counts), counts, CLASSES, groups).cpu()
    layers, batch, queries = cost.shape[:3]
    wanted = layers * batch * queries
    index = answer[: len(answer) - wanted].view(-1, abi.INDEX_COLUMNS)
    return index.numpy(), answer[len(answer) - wanted :].view(layers, batch, queries).numpy()


def classes_of(index: np.ndarray[Any, Any], counts: list[int], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    first = np.array([0, *itertools.accumulate(counts)])
    wanted = np.full(shape, CLASSES)
    where = index[:, abi.LAYER], index[:, abi.IMAGE], index[:, abi.QUERY]
    wanted[where] = (first[index[:, abi.IMAGE]] + index[:, abi.TARGET]) % CLASSES
    return wanted


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_same_matches_as_on_the_host(gpu: Any, kind: str, dtype: type) -> None:
    rng = np.random.default_rng(7)
    for queries, counts in SHAPES:
        with np.errstate(over="ignore"):
            cost = KINDS[kind](rng, (1 + (queries < 8), len(counts), queries, max(counts))).astype(dtype)
        index, wanted = solved(gpu, cost, counts)
        expected = solve_with_scipy(cost, counts)
        assert np.array_equal(index, expected), (queries, counts)
        assert np.array_equal(wanted, classes_of(expected, counts, cost.shape[:3])), (queries, counts)


def test_long_ways(gpu: Any) -> None:
    """Correlated costs, as of masks that many queries predict, in both directions."""
    rng = np.random.default_rng(0)
    for queries, targets in ((24, 18), (18, 24)):
        cost = rng.standard_normal((1, 1, queries, 1)) + 0.1 * rng.standard_normal((1, 1, queries, targets))
        index, _ = solved(gpu, cost, [targets])
        assert np.array_equal(index, solve_with_scipy(cost, [targets]))


def test_groups_of_queries_are_matched_each_on_its_own(gpu: Any) -> None:
    rng = np.random.default_rng(1)
    counts, groups, each = [3, 0, 9], 4, 6
    cost = rng.standard_normal((2, 3, groups * each, 9)).astype(np.float32)
    index, wanted = solved(gpu, cost, counts, groups)
    parts = []
    for group in range(groups):
        part = solve_with_scipy(cost[:, :, group * each : (group + 1) * each], counts)
        part[:, abi.QUERY] += group * each
        parts.append(part)
    together = np.concatenate(parts)
    expected = together[np.lexsort([together[:, column] for column in (abi.QUERY, abi.IMAGE, abi.LAYER)])]
    assert np.array_equal(index, expected)
    assert np.array_equal(wanted, classes_of(expected, counts, cost.shape[:3]))


def test_without_labels_every_query_has_no_object(gpu: Any) -> None:
    cost = torch.rand(1, 1, 4, 2, device=DEVICE)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    answer = gpu.assign(cost, none, images_of([2]), [2], CLASSES, 1).cpu()
    assert answer[-4:].tolist() == [CLASSES] * 4


def drawn_problems(
    rng: np.random.Generator, kind: str, largest: tuple[int, int], images: int
) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Costs of two layers of some images, one of them without targets; small numbers are drawn more often than big."""
    most = [largest[0], *[largest[1]] * (images - 1)]
    queries, *counts = np.rint(np.power(most, rng.random(images) ** 2)).astype(int).tolist()
    with np.errstate(over="ignore"):
        cost = KINDS[kind](rng, (2, images, queries, max(counts))).astype(rng.choice([np.float32, np.float64]))
    return cost, [0, *counts]


def assert_same_matches(gpu: Any, cost: np.ndarray[Any, Any], counts: list[int]) -> None:
    """As the solvers of the host find them, SciPy's and this library's."""
    index, wanted = solved(gpu, cost, counts)
    expected = solve_with_scipy(cost, counts)
    assert np.array_equal(index, expected), (cost.shape, counts)
    assert np.array_equal(cpu.assign(cost, counts), expected), (cost.shape, counts)
    assert np.array_equal(wanted, classes_of(expected, counts, cost.shape[:3]))


@pytest.mark.parametrize("kind", KINDS)
def test_same_matches_in_three_hundred_problems(gpu: Any, kind: str) -> None:
    rng = np.random.default_rng(list(KINDS).index(kind))
    for _ in range(2):
        assert_same_matches(gpu, *drawn_problems(rng, kind, (6, 6), 10))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", KINDS)
def test_same_matches_in_three_thousand_problems(gpu: Any, kind: str, seed: int) -> None:
    """80 times 40 problems with targets, and 8 without."""
    rng = np.random.default_rng(100 * list(KINDS).index(kind) + seed)
    for _ in range(4):
        assert_same_matches(gpu, *drawn_problems(rng, kind, (300, 400), 6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *(("normal", shape) for shape in ((1, 1), (300, 100), (100, 20), (257, 256), (1024, 40))),
        *((kind, (300, 400)) for kind in KINDS),
    ],
)
def test_same_matches_in_large_problems(gpu: Any, kind: str, shape: tuple[int, int]) -> None:
    with np.errstate(over="ignore"):
        cost = KINDS[kind](np.random.default_rng(2), (1, 1, *shape)).astype(np.float32)
    assert_same_matches(gpu, cost, [shape[1]])
