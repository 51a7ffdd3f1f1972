"""The Triton kernels on CPU tensors, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from maskloss import ops
from maskloss.ops import dispatch


@contextmanager
def interpreted(backend: str) -> Iterator[None]:
    """Let a request for the backend "gpu" be met on a CPU; TRITON_INTERPRET has to be set before Triton is imported."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "gpu":
            for module in (ops, dispatch):
                patch.setattr(module, "choose_backend", lambda _, requested=None: requested or "gpu")
        yield
