"""What can be shown of CUDA, MPS and XPU tensors without such a device: see `fake_devices.py`, which runs by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[1] / "support" / "fake_devices.py"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="lends device guards inside the Linux library"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this build has the guard of a real device"),
]


def run(*checks: str) -> None:
    """One after the other in a process."""
    done = subprocess.run([sys.executable, str(PROGRAM), *checks], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_step_neither_copies_nor_waits_and_compiles_to_one_graph() -> None:
    """The criterion as it is, compiled, captured, of factors and volumes; the reference called with CUDA tensors."""
    run("criterion", "cuda", "compile", "uneven", *(("padded", "factors", "volumes") if find_spec("triton") else ()))


@pytest.mark.slow
def test_the_reference_never_waits_for_other_devices() -> None:
    run("mps", "xpu")


def test_launches_of_a_step() -> None:
    """Of every preset; they grow with nothing but the memory that bounds a part."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(PROGRAM.with_name("launch_counts.py"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    counts = {name: {operation: sum(each.values()) for operation, each in case.items()} for name, case in found.items()}
    plain = {"match_cost": 5, "assign": 1, "mask_loss": 4, "mask_loss_backward": 3}
    whole = ("coco", "cityscapes", "small", "rf-detr", "tiny", "tiny-rf-detr", "clip as a whole", "tiny-volume")
    grown = [name for name in counts if name.startswith("coco, ") or name == "rf-detr, groups"]
    assert len(grown) == 5
    for name in (*whole, *grown):
        assert counts[name] == plain, (name, found[name])
    # 60 instances of 50,176 points: 903 kB each.
    assert counts["volume"] == plain
    # 2,000 instances: scratch memory of 226 kB each is bounded to 256 MiB.
    assert counts["crowded"] == {**plain, "mask_loss": 7, "mask_loss_backward": 6}
    # Factors: more for each part of the planes that `scratch_mb` allows, and of each layer's own features.
    heads = {name: tuple(case.values()) for name, case in counts.items() if name.endswith("-head")}
    assert heads == {
        "coco-head": (10, 1, 16, 12),
        "crowded-head": (14, 1, 64, 48),
        "cityscapes-head": (8, 1, 20, 15),
        "rf-detr-head": (36, 1, 24, 18),
        "tiny-head": (6, 1, 4, 3),
        "tiny-rf-detr-head": (18, 1, 12, 9),
    }
