"""Which implementation runs an operation: a pure function of the device and an explicit request."""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from types import ModuleType

import torch

from maskloss.errors import Cause, describe

BACKENDS = ("reference", "cpu", "gpu")
VARIABLE = "MASKLOSS_BACKEND"
_NEEDS = {"cpu": "numba", "gpu": "triton"}
# Tuples of tensors as arguments of a kernel came with Triton 3.3, and that with PyTorch 2.7.
_OLDEST_TRITON = (3, 3)
_DISABLED = "Numba compiles nothing while NUMBA_DISABLE_JIT is set"


def choose_backend(device: torch.device, requested: str | None = None) -> str:
    """Name the backend for tensors on `device`.

    Args:
        device: where the logits are.
        requested: "reference", "cpu" or "gpu"; None asks the environment variable MASKLOSS_BACKEND, and without that
            takes the fastest one there is: "cpu" (Numba) on a CPU, "gpu" (Triton) on a CUDA or ROCm device,
            "reference" elsewhere.

    Returns:
        The backend's name. A request is met or raises, and is never replaced by another backend.

    Raises:
        Cause: the name is unknown, the backend does not run on that device, or its package is not installed.
    """
    wanted = requested if requested is not None else os.environ.get(VARIABLE) or None
    if wanted is None:
        return _default(device.type)
    check_backend(wanted)
    if wanted == "reference":
        return wanted
    if device.type != ("cpu" if wanted == "cpu" else "cuda"):
        raise Cause(
            f"backend {wanted!r} runs on {'CPU' if wanted == 'cpu' else 'CUDA and ROCm'} tensors only",
            f"the logits are on {device}",
            "leave backend out, or use 'reference', which runs everywhere",
        )
    obstacle = _obstacle(wanted)
    if obstacle is not None:
        raise Cause(
            f"backend {wanted!r} needs the package {_NEEDS[wanted]}",
            obstacle,
            f"{'unset NUMBA_DISABLE_JIT' if obstacle == _DISABLED else f'pip install {_NEEDS[wanted]}'}, "
            "or use backend='reference'",
        )
    return wanted


# What `torch.compiler.assume_constant_result` sets, without importing the compiler: the choice is made while tracing.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_backend(name: object) -> None:
    """Raise if a name is no backend's."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise Cause(
            f"backend must be one of {', '.join(BACKENDS)}",
            f"backend={describe(name)}",
            f"leave it out, or check the environment variable {VARIABLE}",
        )


def has_host_kernels() -> bool:
    """Whether host-side work, such as packing, may use Numba. Without it results are the same, so nothing is said."""
    return os.environ.get(VARIABLE) != "reference" and _obstacle("cpu") is None


def load(backend: str) -> ModuleType:
    """Import the module of a backend; heavy packages load here, at the first use, and nowhere else."""
    return importlib.import_module(f"maskloss.ops.{backend}")


@cache
def _obstacle(backend: str) -> str | None:
    """Return why a backend cannot run, or None."""
    try:
        package = importlib.import_module(_NEEDS[backend])
    except ImportError:
        return f"{_NEEDS[backend]} cannot be imported"
    if backend == "cpu" and package.config.DISABLE_JIT:
        return _DISABLED
    if backend == "gpu" and tuple(int(part) for part in package.__version__.split(".")[:2]) < _OLDEST_TRITON:
        return f"Triton {package.__version__} is too old, the kernels need 3.3, which comes with PyTorch 2.7"
    return None


@cache
def _default(device_type: str) -> str:
    backend = {"cpu": "cpu", "cuda": "gpu"}.get(device_type, "reference")
    obstacle = None if backend == "reference" else _obstacle(backend)
    if obstacle is None:
        return backend
    warnings.warn(
        f"maskloss: {obstacle}, so {device_type} tensors run on the slower reference backend",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"
