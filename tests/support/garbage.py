"""What a kernel allocates without filling it holds garbage in tests, so that a value which nobody wrote shows."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


class Garbage(ModuleType):
    """NumPy, but for `empty`."""

    def __init__(self) -> None:
        super().__init__("numpy")

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, *args: Any, **kwargs: Any) -> Any:
        array = np.empty(*args, **kwargs)
        array.fill(np.nan if array.dtype.kind == "f" else 113)
        return array


def fill_arrays(patch: pytest.MonkeyPatch) -> None:
    """Fill what the CPU backend allocates on the host, its work spaces included.

    Modules with kernels are left alone: Numba compiles what they call `np`.
    """
    from numba.extending import is_jitted

    package, scratch = import_module("maskloss.ops.cpu"), import_module("maskloss.ops.cpu.scratch")
    names = [package.__name__, *(f"{package.__name__}.{found.name}" for found in iter_modules(package.__path__))]
    hosts = [module for module in map(import_module, names) if not any(map(is_jitted, vars(module).values()))]
    assert package in hosts
    assert scratch in hosts
    for module in hosts:
        if hasattr(module, "np"):
            patch.setattr(module, "np", Garbage())


def fill_tensors(patch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and `torch.empty_like` allocate."""

    def dirty(allocate: Any) -> Any:
        def allocated(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

        return allocated

    patch.setattr(torch, "empty", dirty(torch.empty))
    patch.setattr(torch, "empty_like", dirty(torch.empty_like))
