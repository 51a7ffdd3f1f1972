"""Run the tests of the Triton kernels on a CPU, under Triton's interpreter.

The interpreter must be chosen before Triton is imported and holds for a whole process, hence one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Of each family of kernels.
SOME = (
    "test_kernels.py::test_loss_and_gradient_follow_the_reference[plain]",
    "test_kernels.py::test_loss_and_gradient_follow_the_reference[bfloat16, ignored pixels, windows]",
    "test_kernels.py::test_points_are_those_of_the_reference[stratified]",
    "test_kernels.py::test_deterministic_gradients_are_as_good[dtype0]",
    "test_kernels.py::test_a_logit_that_is_not_finite_shows[nan]",
    "test_kernels.py::test_no_instances",
    "test_kernels.py::test_matching_costs_follow_the_reference[plain]",
    "test_kernels.py::test_point_sampling[dtype0-zeros-bilinear]",
    "test_factored_kernels.py::test_planes_are_overwritten_with_their_gradients[plain-False]",
    "test_factored_kernels.py::test_factored_operations_follow_the_reference[dtype0]",
    "test_clip_kernels.py",
    "test_assignment.py::test_same_matches_as_on_the_host[broken-float64]",
    "test_assignment.py::test_same_matches_in_three_hundred_problems[some equal]",
    "test_assignment.py::test_same_matches_in_three_hundred_problems[broken]",
    "test_hostile.py::test_order_margins_and_second_launches[small]",
    "test_assignment.py::test_groups_of_queries_are_matched_each_on_its_own",
)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(SOME, id="some"),
        pytest.param(("test_kernels.py",), id="kernels", marks=pytest.mark.slow),
        pytest.param(("test_factored_kernels.py",), id="factored kernels", marks=pytest.mark.slow),
        pytest.param(("test_clip_kernels.py", "-m", "slow"), id="clip kernels", marks=pytest.mark.slow),
        pytest.param(("test_assignment.py",), id="assignment", marks=pytest.mark.slow),
        pytest.param(("test_hostile.py",), id="hostile", marks=pytest.mark.slow),
    ],
)
def test_kernels_under_the_interpreter(names: tuple[str, ...]) -> None:
    run_under_the_interpreter(*names)


@pytest.mark.long
def test_thousands_of_assignments_under_the_interpreter() -> None:
    run_under_the_interpreter("test_assignment.py", "-m", "slow")


def run_under_the_interpreter(*names: str) -> None:
    pytest.importorskip("triton")
    here = Path(__file__).parent
    tests = [str(here / name) if ".py" in name else name for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=here.parents[1])
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout
