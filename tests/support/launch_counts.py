"""Run as a program: how many kernels a step of each preset launches, as JSON.

The tensors are fake CUDA tensors (see `fake_devices.py`), and launches are counted in place of being made.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from maskloss import MaskTargets, PointSampling
from maskloss._abi import INDEX_COLUMNS, Draw, Factors, Gradients, Instances, Job, Stack, Targets, Term
from maskloss.lab.bench.cases import PRESETS, Case
from maskloss.ops import factored
from support.fake_devices import lend_guards, watched

GROWN = {"layers": {"layers": 3}, "images": {"batch": 4}, "queries": {"queries": 400}, "targets": {"targets": 7}}


def launches(gpu: Any, case: Case) -> dict[str, dict[str, int]]:
    """Count launches by operation and kernel, for a step forward and backward; a head gives factors."""
    found: dict[str, dict[str, int]] = {}
    counter: Counter[str] = Counter()
    jit = import_module("triton.runtime.jit")
    jit.JITFunction.run = lambda self, *_, **__: counter.update([self.__name__])

    def noted(name: str, result: Any) -> Any:
        found[name] = dict(counter)
        counter.clear()
        return result

    with watched() as watch, torch.no_grad():
        sizes, batch = case.logit_shape, case.batch
        masks = [torch.empty(case.targets, *case.target_shape, dtype=torch.bool, device="cuda") for _ in range(batch)]
        targets = MaskTargets.from_masks(masks)
        points = PointSampling(case.points)
        seed = torch.empty((), dtype=torch.int64, device="cuda")
        numbers = (case.points, points.num_candidates, points.num_uncertain)
        draw = Draw(torch.arange(batch, device="cuda"), seed, *numbers)
        job = Job(Targets("bits", *targets.tensors), draw, Term())
        index = torch.empty(case.instances, INDEX_COLUMNS, dtype=torch.int64, device="cuda")
        costs = torch.empty(case.layers, batch, case.queries, case.targets, device="cuda")
        labels = torch.empty(batch * case.targets, dtype=torch.int64, device="cuda")
        watch.copies.clear()
        answer = (costs, labels, targets.images, targets.num_targets, case.classes, case.groups)
        if case.channels:
            rows = [torch.empty(batch, case.queries, case.channels, device="cuda") for _ in range(case.layers)]
            own = case.layers if case.groups > 1 else 1
            maps = [torch.empty(batch, case.channels, *sizes, device="cuda") for _ in range(own)]
            which = list(range(own)) if own > 1 else [0] * case.layers
            each = case.instances // (case.layers * batch)
            products = (Factors(rows, [], maps, which, 32 * 2**20), index, [each] * (case.layers * batch), job)
            noted("match_cost", factored.match_cost(gpu, products[0], targets.num_targets, job))
            noted("assign", gpu.assign(*answer))
            *terms, saved = noted("mask_loss", factored.mask_loss(gpu, *products))
            needs = [True, False] + [True] * own
            backward = factored.mask_loss_backward(gpu, Gradients(*terms), saved, *products, needs_grad=needs)
        else:
            logits = [torch.empty(batch, case.queries, *sizes, device="cuda") for _ in range(case.layers)]
            instances = Instances(logits, index, [case.instances // case.layers] * case.layers)
            stack = Stack(case.frames, case.unit == "volume") if case.unit else None
            noted("match_cost", gpu.match_cost(logits, targets.num_targets, job, stack))
            noted("assign", gpu.assign(*answer))
            *terms, saved = noted("mask_loss", gpu.mask_loss(instances, job, stack))
            backward = gpu.mask_loss_backward(Gradients(*terms), saved, instances, job, [True] * case.layers, stack)
        noted("mask_loss_backward", backward)
        assert all(isinstance(each, Tensor) for each in backward)
    assert not watch.copies, watch.copies
    assert not watch.operations & {"aten::_local_scalar_dense", "aten::nonzero"}
    return found


if __name__ == "__main__":
    lend_guards()
    backend = import_module("maskloss.ops.gpu")
    for name in ("", ".assignment", ".cost", ".loss", ".features"):
        import_module(f"maskloss.ops.gpu{name}").on_device = lambda _: nullcontext()  # type: ignore[attr-defined]
    grown = {f"coco, {name}": replace(PRESETS["coco"], **sizes) for name, sizes in GROWN.items()}
    grown["rf-detr, groups"] = replace(PRESETS["rf-detr"], groups=26)
    grown["clip as a whole"] = replace(PRESETS["clip"], unit="clip")
    # A clip whose frames are units launches what these launch as images.
    cases = {name: case for name, case in PRESETS.items() if case.unit != "frame"} | grown
    sys.stdout.write(json.dumps({name: launches(backend, case) for name, case in cases.items()}))
