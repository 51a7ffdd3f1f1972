"""What every test runs under: few threads, fixed seeds, checked shapes, and garbage in memory that nobody filled."""

from __future__ import annotations

import os

# Set before torch starts its pool. Waiting threads sleep, so that two busy processes do not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")

import gc
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from maskloss.ops import BACKENDS
from support import contract, garbage

# Shells start what runs in the background with an interrupt that is ignored, and ignored signals stay ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One for each of several processes that run the tests side by side. Tests of threads set their number.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

# `make test` tries fewer examples of each property than `make slow` (--hypothesis-profile=thorough), always the same,
# however slow the machine.
ALIKE = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", ALIKE, max_examples=100)
settings.register_profile("thorough", ALIKE, max_examples=500)
settings.load_profile("quick")


def seed_all() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test draw from the global generator)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let tests begin alike, whatever ran before, and what several of them share, which the first of them makes."""
    seed_all()
    torch.set_num_threads(THREADS)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    seed_all()


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


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_zero_by_chance() -> Iterator[None]:
    """Fill what the CPU backend allocates with garbage (see `garbage`)."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("numba"):
            garbage.fill_arrays(patch)
        yield


def pytest_collection_finish() -> None:
    """Leave out what stays for good, and collect the rest less often: collecting took an eighth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
