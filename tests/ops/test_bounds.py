"""The CPU kernels under Numba's bounds checks: no array is declared larger than the memory it describes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import maskloss

SCRIPT = """
import torch
from maskloss import MaskCriterion, MaskLoss, MaskTargets, PointSampling
from maskloss.functional import point_sample

torch.manual_seed(0)
torch.set_num_threads(1)
few = PointSampling(num_points=700)
masks = torch.rand(3, 21, 30) > 0.5
for width in range(1, 72):
    MaskTargets.from_masks([torch.rand(2, 9, width) > share for share in (0.2, 0.99)])
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for make in (
        lambda dtype: torch.randn(3, 1, 1).to(dtype).expand(3, 8, 9),
        lambda dtype: torch.randn(3, 8, 1).to(dtype).expand(3, 8, 9),
        lambda dtype: torch.randn(3, 16, 18).to(dtype)[:, ::2, 1::2],
        lambda dtype: torch.randn(3, 9, 8).to(dtype).transpose(1, 2),
    ):
        leaf = make(dtype).detach().requires_grad_()
        for options in ({}, {"target_mode": "nearest"}, {"padding_mode": "border", "focal_gamma": 2.0}):
            for targets in (masks, MaskTargets.from_masks(masks.float(), soft=True), MaskTargets.from_masks(
                masks, ignore=torch.rand(21, 30) > 0.7
            )):
                MaskLoss(sampling=few, backend="cpu", **options)(leaf, targets).total.backward()
        points = torch.rand(3, 1, 2).expand(3, 600, 2)
        for mode in ("bilinear", "nearest"):
            point_sample(leaf, points, mode=mode, backend="cpu").sum().backward()
        MaskLoss(sampling=few, backend="cpu")(leaf, masks, points=points[:1].expand(3, 600, 2)).total.backward()

labels = torch.randint(4, (21, 30), dtype=torch.int16)
entries = [{"masks": masks, "labels": torch.zeros(3, dtype=torch.int64)},
           {"masks": MaskTargets.from_masks(masks[:0]), "labels": torch.zeros(0, dtype=torch.int64)}]
maps = MaskTargets.from_label_map(labels, [0, 1, 2], allow_missing=True)
classes, planes = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 1, 8, 9, requires_grad=True)
criterion = MaskCriterion(3, sampling=few, backend="cpu")
for first in (masks, maps):
    entries[0]["masks"] = first
    second = entries[:1] if first is maps else entries
    batch = len(second)
    criterion(classes[:batch], planes[:batch].expand(batch, 5, 8, 9), second).total.backward()
print("inside")
"""


@pytest.mark.slow
def test_kernels_stay_inside_their_arrays(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": str(Path(maskloss.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "inside"
