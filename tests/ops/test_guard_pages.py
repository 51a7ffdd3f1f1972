"""CPU kernels and reference read and write nothing beside their tensors: pages there would end the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="protects pages")


def run(what: str) -> subprocess.CompletedProcess[str]:
    program = Path(__file__).parents[1] / "support" / "guard_pages.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(program), what], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("what", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_kernels_read_nothing_beside_their_tensors(what: str) -> None:
    done = run(what)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "inside"


def test_a_byte_further_on_ends_the_process() -> None:
    done = run("overrun")
    assert done.stdout.strip() == "reading on"
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
