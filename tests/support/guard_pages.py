"""Run as a program: CPU kernels and reference on tensors that border on pages which cannot be read.

Whoever reads or writes there is killed. "some" are two dtypes and sizes, "all" all of them, and clips and volumes;
"overrun" reads one byte on, and is killed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from maskloss import ClipOptions, MaskCriterion, MaskFactors, MaskTargets, PointSampling
from support.hostile import guarded

FRAME = (21, 30)
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda masks: masks,
    "soft": lambda masks: MaskTargets.from_masks(masks.float(), soft=True),
    "ignore": lambda masks: MaskTargets.from_masks(masks, ignore=torch.rand(masks.shape[1:]) > 0.7),
    "labels": lambda masks: MaskTargets.from_label_map(
        torch.randint(4, masks.shape[1:]), [1, 2, 3], allow_missing=True
    ),
}
OPTIONS: tuple[Any, ...] = ({}, {"padding_mode": "border", "target_mode": "nearest", "focal_gamma": 2.0})
SIZES = ((1, 1), (7, 9), (16, 16), (33, 65))
UNITS = ("frame", "clip", "volume")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def step(
    dtype: torch.dtype, size: tuple[int, int], form: str, options: Any, backend: str, unit: str = "", *, at_end: bool
) -> None:
    fence, frames = partial(guarded, at_end=at_end), (2,) if unit else ()
    clips = ClipOptions(unit=unit) if unit else None

    def drawn(*shape: int) -> Tensor:
        return fence(torch.randn(*shape).to(dtype)).requires_grad_()

    targets = FORMS[form](fence(torch.rand(3, *frames, *FRAME) > 0.5))
    if isinstance(targets, MaskTargets):
        parts = {name: getattr(targets, name) for name in ("data", "table", "images", "windows", "ignore")}
        targets = replace(targets, **{name: fence(part) for name, part in parts.items() if part.numel()})
    entry = [{"masks": targets, "labels": fence(torch.tensor([0, 1, 2]))}]
    criterion = MaskCriterion(3, sampling=PointSampling(num_points=300), clips=clips, backend=backend, **options)
    for masks in (drawn(1, 5, *frames, *size), MaskFactors(drawn(1, 5, 4), drawn(1, 4, *frames, *size))):
        criterion(drawn(1, 5, 4), masks, entry).total.backward()


def main(what: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if what == "overrun":
        sys.stdout.write("reading on\n")
        sys.stdout.flush()
        ctypes.string_at(guarded(torch.zeros(3), at_end=True).data_ptr(), 13)
        return
    few = what == "some"
    some = (DTYPES[:2], SIZES[1::2]) if few else (DTYPES, SIZES)
    cases = [*product(*some, FORMS, OPTIONS[few:], ("cpu", "reference"))]
    if not few:
        cases += product(DTYPES[:2], SIZES[1::2], FORMS, OPTIONS, ("cpu", "reference"), UNITS)
    for case in cases:
        for at_end in (True, False):
            step(*case, at_end=at_end)
    sys.stdout.write("inside\n")


if __name__ == "__main__":
    main(sys.argv[1])
