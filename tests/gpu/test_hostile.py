"""The Triton kernels in hostile surroundings, under the interpreter; `test_interpreter.py` runs this file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from maskloss.lab.bench.cases import PRESETS
from maskloss.lab.bench.kernels import Launch, Memory, Operations, intercepted
from support.hostile import fenced, shuffled
from support.kernel_cases import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter alone has an order of programs")

CASES = {
    "small": replace(PRESETS["tiny-head"], queries=3, targets=2, layers=1, points=16, logit_size=(6, 7)),
    "two layers, two images": replace(PRESETS["tiny-head"], batch=2, points=40, logit_size=(9, 7)),
}
# They add to what is there.
ADDING = {"scatter"}

Results = dict[str, list[torch.Tensor]]


@pytest.fixture(params=["small", pytest.param("two layers, two images", marks=pytest.mark.slow)])
def operations(request: pytest.FixtureRequest) -> Iterator[Operations]:
    """In deterministic mode, in which gradients do not depend on the order."""
    torch.use_deterministic_algorithms(True)
    one = (torch.float32,) if request.param == "small" else (torch.float32, torch.bfloat16)
    yield Operations(CASES[request.param], torch.device("cpu"), one)
    torch.use_deterministic_algorithms(False)


def assert_same(found: Results, expected: Results) -> None:
    for name, values in expected.items():
        for mine, theirs in zip(found[name], values, strict=True):
            assert torch.equal(mine.nan_to_num(), theirs.nan_to_num()), name
            assert torch.equal(mine.isnan(), theirs.isnan()), name


def test_order_margins_and_second_launches(gpu: Any, operations: Operations) -> None:
    expected = operations.run(gpu)
    with shuffled(1):
        assert_same(operations.run(gpu), expected)
    with fenced() as outside:
        assert_same(operations.run(gpu), expected)
    assert outside == []
    changed: set[str] = set()
    seen: set[str] = set()

    def twice(kernel: str, launch: Launch, tensors: list[torch.Tensor]) -> None:
        launch()
        seen.add(kernel)
        if tensors:
            memory = Memory(tensors)
            launch()
            if bool(memory.differs(memory.before)):
                changed.add(kernel)
            memory.restore()

    with intercepted(twice):
        assert_same(operations.run(gpu), expected)
    assert changed == ADDING, (changed, seen)
