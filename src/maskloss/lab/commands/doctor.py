"""`maskloss doctor`: what this installation is, and whether it computes what the definition says."""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from maskloss import MaskCriterion, MaskLossError, PointSampling, functional
from maskloss._abi import IMAGE, QUERY, TARGET
from maskloss.lab.bench.machine import allowed_cores, cpu_model, describe_software
from maskloss.lab.terminal import count, explain_error, tell
from maskloss.ops import choose_backend
from maskloss.ops.dispatch import VARIABLE, load

LESS_MEMORY = "close other programs"
DESCRIPTION = (
    "Print versions, device, backends, kernel cache and threads, and compare a loss, its gradient, its points and its "
    "matches with the definition in float64, on every backend that runs here. Exit status 1: something is wrong. "
    "Paste all of the output into a bug report."
)
# Settings that change what runs, and how fast.
_VARIABLES = (
    *(VARIABLE, "NUMBA_DISABLE_JIT", "NUMBA_CACHE_DIR", "NUMBA_BOUNDSCHECK", "TRITON_CACHE_DIR", "TRITON_INTERPRET"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "PYTORCH_NO_CUDA_MEMORY_CACHING"),
)
# Of the largest value: how far float32 may be from the definition in float64. The tests of the kernels ask for more.
TOLERANCE = 1e-4
_SAMPLING = PointSampling(num_points=1024)


class Step(NamedTuple):
    """What one step computed."""

    points: Tensor
    matches: Tensor
    loss: Tensor
    gradient: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `maskloss doctor`: there are none."""
    parser.description = DESCRIPTION


def main(options: argparse.Namespace) -> int:  # noqa: ARG001
    """Print what was found."""
    _describe()
    problems = [*_check_cache(), *_check_backends()]
    for problem in problems:
        _row("problem", problem)
    _row("result", f"{count(len(problems), 'problem')} found" if problems else "no problem found")
    return 1 if problems else 0


def _row(name: str, text: str) -> None:
    tell(f"{name:13} {text}")


def _describe() -> None:
    software = describe_software()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    _row("versions", ", ".join(f"{name} {version}" for name, version in software.items()) + f", {build}")
    instructions = torch.backends.cpu.get_cpu_capability()
    _row("system", f"{platform.system()} {platform.release()}, {cpu_model()}, {instructions}")
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        _row("device", f"cuda:{number} {found.name}, {found.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        _row("device", "cpu, no CUDA or ROCm device")
    _row("threads", f"PyTorch has {torch.get_num_threads()}, this process may use {allowed_cores()} cores")
    variables = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    _row("environment", _at_home(", ".join(variables) or "nothing that changes what runs"))


def _check_cache() -> Iterator[str]:
    """Say where compiled kernels of the CPU are kept and what is there; yield what is wrong with it."""
    if _why_not(torch.device("cpu"), "cpu"):
        return
    cache = load("cpu.compile")
    try:
        where = str(cache.directory())
        kept, damaged = cache.survey()
        size = sum(path.stat().st_size for path in kept)
        state = f"{count(len(kept), 'kernel')} of this version in {size / 2**20:.1f} MiB" if kept else "cold"
        cache.check_writable()
    except OSError as error:
        _row("kernel cache", "cannot be used")
        yield f"compiled kernels cannot be kept, so each process compiles its own: {error} (set NUMBA_CACHE_DIR)"
        return
    _row("kernel cache", f"{_at_home(where)}, writable, {state}")
    if damaged:
        yield f"damaged kernels, which will be compiled anew: {', '.join(path.name for path in damaged)}"


def _check_backends() -> Iterator[str]:
    """Run a step on every backend of every kind of device, and compare it with the definition."""
    devices = {"cpu": "cpu"} | ({"cuda": "gpu"} if torch.cuda.is_available() else {})
    for kind, kernels in devices.items():
        device = torch.device(kind)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # told below
                _row("backend", f"{kind} tensors run on {choose_backend(device)!r}")
        except MaskLossError as error:
            yield _sentence(error)
        for backend in ("reference", kernels):
            obstacle = _why_not(device, backend)
            if obstacle:
                yield obstacle
            else:
                yield from _check(device, backend)


def _check(device: torch.device, backend: str) -> Iterator[str]:
    """Print how far a step is from the definition; yield what is wrong."""
    began = time.perf_counter()
    inputs = _inputs()
    try:
        found = _step(backend, *(tensor.to(device) for tensor in inputs))
    except Exception as error:  # noqa: BLE001 (whatever a kernel, a compiler or a driver raises is the finding)
        yield f"{backend} on {device.type} raises {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return
    seconds = time.perf_counter() - began
    classes, logits, masks = inputs
    exact = _step("reference", classes.double(), logits.double(), masks, found.points)
    same = {
        "points": torch.equal(found.points, _step("reference", *inputs).points),
        "matches": torch.equal(found.matches, exact.matches),
    }
    errors = {name: _error(getattr(found, name), getattr(exact, name)) for name in ("loss", "gradient")}
    told = [f"{name} {'equal' if equal else 'differ'}" for name, equal in same.items()]
    told += [f"{name} within {error:.0e}" for name, error in errors.items()]
    _row("check", f"{backend} on {device.type}, compared with the definition: {', '.join(told)}; {seconds:.2f} s")
    wrong = [name for name, equal in same.items() if not equal]
    wrong += [name for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        yield f"{backend} on {device.type} does not compute what the definition says: {', '.join(wrong)}"


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Two images of three discs: class logits `[B, Q, 5]`, mask logits `[B, Q, h, w]`, masks `[B, T, H, W]`."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(2, 10, 5, generator=generator)
    logits = torch.randn(2, 10, 48, 40, generator=generator) * 2
    y, x = torch.meshgrid(torch.arange(90), torch.arange(110), indexing="ij")
    discs = [(x - 20 * n) ** 2 + (y - 15 * n) ** 2 < 400 for n in range(6)]
    return classes, logits, torch.stack(discs).view(2, 3, 90, 110)


def _step(backend: str, classes: Tensor, logits: Tensor, masks: Tensor, points: Tensor | None = None) -> Step:
    """Match, draw points unless there are some, and compute loss and gradient."""
    logits = logits.detach().requires_grad_()
    criterion = MaskCriterion(4, sampling=_SAMPLING, backend=backend)
    labels = torch.tensor([0, 1, 2], device=classes.device)
    targets = [{"masks": image, "labels": labels} for image in masks]
    rows = criterion(classes, logits, targets, seed=0).matches.index
    planes, paired = logits[rows[:, IMAGE], rows[:, QUERY]], masks[rows[:, IMAGE], rows[:, TARGET]]
    if points is None:
        points = functional.uncertain_points(planes.detach(), sampling=_SAMPLING, seed=0, backend=backend)
    total = criterion.mask_loss(planes, paired, points=points).total
    [gradient] = torch.autograd.grad(total, logits)
    return Step(*(tensor.detach().cpu() for tensor in (points, rows, total, gradient)))


def _error(found: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def _why_not(device: torch.device, backend: str) -> str | None:
    """Return why a backend cannot run on a device, or None."""
    try:
        choose_backend(device, backend)
    except MaskLossError as error:
        return _sentence(error)
    return None


def _sentence(error: MaskLossError) -> str:
    return explain_error(error, LESS_MEMORY) or str(error)


def _at_home(text: str) -> str:
    """Shorten the home folder, whose name is nobody's business in a public report."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
