"""The shape checks that all tests run under do catch a backend that breaks the contract."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import jaxtyping
import pytest
import torch
from torch import Tensor

from maskloss.ops import reference
from support import contract

MAPS, INDEX, POINTS = torch.zeros(2, 5, 7), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4, 2)


def backend(values: Tensor) -> Any:
    """Make a backend whose `point_sample` returns `values`."""
    names = [operation.__name__ for operation in contract.OPERATIONS]
    functions = {name: getattr(reference, name) for name in names}
    return cast(Any, SimpleNamespace(**functions | {"point_sample": lambda *args: values}))


def test_a_right_shape_passes() -> None:
    fake = backend(torch.ones(3, 4))
    with contract.checked(fake):
        assert fake.point_sample(MAPS, INDEX, POINTS, "bilinear", "zeros").sum() == 12


@pytest.mark.parametrize("values", [torch.ones(4, 3), torch.ones(3, 4, 1), torch.ones(3, 4, dtype=torch.int64)])
def test_a_wrong_result_is_caught(values: Tensor) -> None:
    fake = backend(values)
    with contract.checked(fake), pytest.raises(jaxtyping.TypeCheckError, match="point_sample"):
        fake.point_sample(MAPS, INDEX, POINTS, "bilinear", "zeros")


def test_wrong_arguments_are_caught() -> None:
    fake = backend(torch.ones(3, 4))
    with contract.checked(fake), pytest.raises(jaxtyping.TypeCheckError, match="points"):
        fake.point_sample(MAPS, INDEX, POINTS[:2], "bilinear", "zeros")


def test_the_checks_end_with_the_block() -> None:
    fake = backend(torch.ones(1))
    original = fake.point_sample
    with contract.checked(fake):
        assert fake.point_sample is not original
    assert fake.point_sample is original
