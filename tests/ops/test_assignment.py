"""The assignment by kernels makes the very matches that SciPy's makes, also where several are equally good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskloss import MaskTargets, ops
from maskloss._abi import IMAGE, LAYER, QUERY, TARGET
from maskloss.errors import Cause
from maskloss.ops import load
from maskloss.ops.assignment import solve_with_scipy
from support.assignments import KINDS


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_same_matches_as_scipy(kind: str, dtype: type) -> None:
    rng = np.random.default_rng(7)
    shapes = [(int(rng.integers(0, 40)), rng.integers(0, 45, 3).tolist()) for _ in range(40)]
    for queries, counts in [(1, [1]), (5, []), (0, [3]), (7, [0, 0]), (50, [0, 49, 50, 51]), *shapes]:
        shape = (2, len(counts), queries, max(counts, default=0))
        with np.errstate(over="ignore"):
            cost = KINDS[kind](rng, shape).astype(dtype)
        found, expected = load("cpu").assign(cost, counts), solve_with_scipy(cost, counts)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected), (queries, counts)


def test_large_problem() -> None:
    """Long ways: correlated costs, as of masks that many queries predict."""
    rng = np.random.default_rng(0)
    cost = rng.standard_normal((1, 2, 300, 1)) + 0.1 * rng.standard_normal((1, 2, 300, 250))
    assert np.array_equal(load("cpu").assign(cost, [250, 201]), solve_with_scipy(cost, [250, 201]))


def test_costs_in_any_order_of_memory() -> None:
    cost = np.random.default_rng(1).standard_normal((12, 9, 3, 2)).transpose(3, 2, 1, 0)
    assert np.array_equal(load("cpu").assign(cost, [12, 4, 9]), solve_with_scipy(cost, [12, 4, 9]))


def test_broken_pairs_are_the_last_choice() -> None:
    """What is finite is matched as well as it can be; a broken query is taken only where none is left."""
    rng = np.random.default_rng(3)
    cost = rng.standard_normal((1, 1, 6, 4))
    cost[0, 0, :3] = np.nan
    index = load("cpu").assign(cost, [4])
    taken = index[index[:, QUERY] >= 3]
    assert len(taken) == 3
    assert len(index) == 4
    best = solve_with_scipy(cost[:, :, 3:], [4])
    assert np.array_equal(taken[:, TARGET], best[:, TARGET])


@pytest.mark.parametrize("backend", ["", "reference"])
def test_both_solvers_serve_the_operation(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable takes SciPy's, and everything that comes with the matches is the same."""
    solvers = []
    monkeypatch.setenv("MASKLOSS_BACKEND", backend)
    monkeypatch.setattr(
        "maskloss.ops.assignment.solve_with_scipy", lambda *args: solvers.append("scipy") or solve_with_scipy(*args)
    )
    cost = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 3, 6, 7)))
    labels = torch.arange(13) % 5
    images = MaskTargets.cat([MaskTargets.from_masks(torch.ones(count, 2, 2)) for count in (7, 0, 6)]).images
    index, wanted = ops.assign(cost, labels, images, [7, 0, 6], 5)
    assert solvers == ["scipy"] * (backend == "reference")
    assert index[:, LAYER].tolist() == [0] * 12 + [1] * 12
    assert index[:, IMAGE].tolist() == ([0] * 6 + [2] * 6) * 2
    assert index[:, QUERY].tolist() == [*range(6)] * 4
    first = torch.tensor([0, 7, 7])
    expected = torch.full((2, 3, 6), 5)
    expected[index[:, LAYER], index[:, IMAGE], index[:, QUERY]] = labels[first[index[:, IMAGE]] + index[:, TARGET]]
    assert torch.equal(wanted, expected)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_groups_are_matched_each_on_its_own(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLOSS_BACKEND", backend)
    counts, groups, each = [3, 0, 9], 4, 6
    cost = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, groups * each, 9)))
    labels, images = torch.arange(12) % 5, torch.empty(0)
    index, wanted = ops.assign(cost, labels, images, counts, 5, groups=groups)
    for group in range(groups):
        queries = slice(group * each, (group + 1) * each)
        alone, classes = ops.assign(cost[:, :, queries].contiguous(), labels, images, counts, 5)
        mine = index[(index[:, QUERY] >= queries.start) & (index[:, QUERY] < queries.stop)]
        mine[:, QUERY] -= queries.start
        assert torch.equal(mine, alone)
        assert torch.equal(wanted[:, :, queries], classes)
    key = (index[:, LAYER] * 3 + index[:, IMAGE]) * groups * each + index[:, QUERY]
    assert torch.equal(key, key.sort().values)


def test_where_assignments_are_solved() -> None:
    pytest.importorskip("triton")

    def solver(device: str, queries: int, targets: int, where: str = "auto", backend: str | None = None) -> str:
        with FakeTensorMode(), Noted() as noted:
            cost, labels = torch.empty(1, 1, queries, targets, device=device), torch.empty(targets, dtype=torch.int64)
            ops.assign(cost, labels, labels, [targets], 5, where=where, backend=backend)
        return noted.name

    assert solver("cpu", 100, 20) == "assign"
    assert solver("cuda", 100, 20) == "assign_on_device"
    assert solver("cuda", 1024, 1024) == "assign_on_device"
    assert solver("cuda", 1025, 1) == "assign"
    assert solver("cuda", 100, 20, "host") == "assign"
    assert solver("cuda", 100, 20, "auto", "reference") == "assign"
    for device, queries, backend in (("cpu", 100, None), ("cuda", 1025, None), ("cuda", 100, "reference")):
        with pytest.raises(Cause, match="assignment='device' needs the GPU backend"):
            solver(device, queries, 20, "device", backend)


class Noted(TorchDispatchMode):
    """Notes the last of our operations."""

    name = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        self.name = name if namespace == "maskloss" else self.name
        return func(*args, **(kwargs or {}))
