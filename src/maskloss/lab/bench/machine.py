"""Where and with what a measurement was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import maskloss
from maskloss.errors import require

_PACKAGES = ("torch", "numpy", "scipy", "numba", "triton", "transformers")


def describe_machine(device: str) -> dict[str, Any]:
    """Name the hardware, and how busy it was.

    Returns:
        CPU model, cores, memory in bytes, the load average of the last minute before the measurement, and the like.
    """
    psutil = require("psutil", "bench")
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "logical_cores": psutil.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory": psutil.virtual_memory().total,
        "load_before": psutil.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
    }
    if device != "cpu":
        chosen = torch.cuda.get_device_properties(device)
        found["gpu"] = {"name": chosen.name, "memory": chosen.total_memory, "cuda": torch.version.cuda}
        found["gpu"]["driver"] = _driver()
    return found


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, where its tool is there to ask."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return answer.stdout.strip().partition("\n")[0] or None


def describe_software() -> dict[str, str]:
    """List the versions of Python, of this package, and of what it runs on."""
    installed = {name: _version(name) for name in _PACKAGES}
    versions = {"python": platform.python_version(), "maskloss": maskloss.__version__}
    return versions | {name: version for name, version in installed.items() if version is not None}


def default_threads() -> int:
    """Return the number of CPU cores that this process may use, at most the physical ones."""
    allowed = allowed_cores()
    return max(min(allowed, require("psutil", "bench").cpu_count(logical=False) or allowed), 1)


def allowed_cores() -> int:
    """Return the number of cores that this process may use, those of hyperthreading included."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Name the processor."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # with the build, which the package index leaves out
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
