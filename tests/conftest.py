"""What every test runs under: two threads, fixed seeds, and no GPU test where there is no GPU."""

from __future__ import annotations

import os

# Set before torch starts its pool. Waiting threads sleep, so that two busy processes do not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from maskloss.ops import BACKENDS
from support import contract

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test draw from the global generator)
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each implementation of the operations that runs on CPU tensors."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True, scope="session")
def _checked_shapes() -> Iterator[None]:
    """Check shapes and dtypes at the boundary of every backend (see `contract`)."""
    with ExitStack() as stack:
        for name in BACKENDS:
            module = f"maskloss.ops.{name}"
            if find_spec(module) and (name != "gpu" or torch.cuda.is_available()):
                stack.enter_context(contract.checked(import_module(module)))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
