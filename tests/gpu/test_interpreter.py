"""Run the tests of the Triton kernels on a CPU, under Triton's interpreter.

The interpreter must be chosen before Triton is imported and holds for a whole process, hence one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("test_kernels.py", "test_factored_kernels.py")


@pytest.mark.parametrize("name", FILES)
def test_kernels_under_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=file.parents[2])
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout
