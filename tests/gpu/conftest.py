"""The Triton kernels, as their tests call them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support import garbage
from support.kernel_cases import INTERPRETED


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The operations; what they allocate without filling it holds garbage, and no arithmetic warns."""
    from maskloss.ops import gpu as ops

    if INTERPRETED:
        from triton.runtime import interpreter

        # An assertion after every addition, for integers that do not wrap; those of the random numbers must.
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
        monkeypatch.setattr(interpreter.interpreter_builder, "create_fma", _fused, raising=True)
    garbage.fill_tensors(monkeypatch)
    with np.errstate(all="ignore"):
        yield ops


def _fused(x: Any, y: Any, z: Any) -> Any:
    """Multiply and add with one rounding, as a GPU does and the interpreter does not."""
    from triton.runtime.interpreter import TensorHandle

    assert z.data.dtype == np.float32
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(np.float32), z.dtype.scalar)
