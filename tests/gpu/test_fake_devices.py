"""What can be shown of CUDA, MPS and XPU tensors without such a device: see `fake_devices.py`, which runs by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[1] / "support" / "fake_devices.py"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="lends device guards inside the Linux library"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this build has the guard of a real device"),
]


def run(what: str) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_criterion_neither_copies_nor_waits() -> None:
    run("criterion")


def test_a_step_that_is_to_be_captured_copies_nothing() -> None:
    pytest.importorskip("triton")
    run("padded")


def test_factors_copy_nothing_either() -> None:
    pytest.importorskip("triton")
    run("factors")


def test_the_criterion_compiles_to_one_graph() -> None:
    run("compile")


@pytest.mark.parametrize("device", ["cuda", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mps", "xpu"))])
def test_the_reference_never_waits_for_the_device(device: str) -> None:
    run(device)
