"""A process that runs every Triton kernel on one input: many times, with other numbers of warps, on memory full of NaN.

    python -m maskloss.lab.bench.kernels races --device cuda --case small --repeats 200 --warps 1 2 4 8 --seconds 90

It prints one line of JSON. With TRITON_INTERPRET=1 and `--device cpu` the kernels run under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from maskloss import MaskTargets
from maskloss._abi import Draw, Factors, Gradients, Instances, Job, Stack, Targets, Term
from maskloss.factors import MaskFactors
from maskloss.lab.bench.cases import PRESETS, Case
from maskloss.lab.bench.inputs import make_inputs
from maskloss.lab.bench.measure import Clock
from maskloss.ops import factored, reference
from maskloss.points import PointSampling

# Of the largest value: sums in another order, and gradients that are rounded to half precision.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
Launch = Callable[..., Any]
Visit = Callable[[str, Launch, list[Tensor]], None]


class Operations:
    """Every operation on the inputs of a case: dense logits, factors, volumes, points, and the assignment."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    ) -> None:
        inputs = make_inputs(case, seed=0, dtype=torch.float32, device=device)
        self.case, self.inputs, self.dtypes = case, inputs, dtypes
        self.targets = MaskTargets.from_masks(inputs.masks)
        sampling = PointSampling(case.points)
        images = torch.arange(case.batch, device=device)
        numbers = (case.points, sampling.num_candidates, sampling.num_uncertain)
        group = Targets(self.targets.encoding, *self.targets.tensors)
        self.job = Job(group, Draw(images, torch.tensor(7), *numbers), Term())
        rows = [(layer, image, target, target) for layer in range(case.layers) for image in images.tolist()
                for target in range(case.targets)]  # fmt: skip
        self.index = torch.tensor(rows, device=device)
        self.sizes = [case.batch * case.targets] * case.layers
        self.labels = torch.cat(inputs.labels)

    def run(self, ops: Any) -> dict[str, list[Tensor]]:
        """Call the operations of a backend."""
        found: dict[str, list[Tensor]] = {}
        for dtype in self.dtypes:
            found |= self._dense(ops, [each.detach().to(dtype) for each in self.inputs.dense()], str(dtype)[6:])
        found |= self._stacked(ops)
        if ops is not reference and isinstance(self.inputs.mask_logits[0], MaskFactors):
            found |= self._factored(ops)
        return found

    def _dense(self, ops: Any, logits: list[Tensor], name: str) -> dict[str, list[Tensor]]:
        instances, counts = Instances(logits, self.index, self.sizes), self.targets.num_targets
        cost = ops.match_cost(logits, counts, self.job)
        *loss, saved = ops.mask_loss(instances, self.job)
        weight = torch.linspace(0.5, 1.5, len(self.index), dtype=loss[0].dtype, device=self.index.device)
        slopes = Gradients(weight, 2 - weight)
        points = ops.uncertain_points(instances, self.job.draw, self.targets.windows, "zeros")
        maps = logits[0].flatten(0, 1)
        some = points[: len(maps)]
        reading = (maps, torch.arange(len(some), device=some.device), some, "bilinear", "zeros")
        found = {
            "match_cost": list(cost),
            "mask_loss": [*loss, saved.chosen],
            "mask_loss_backward": ops.mask_loss_backward(slopes, saved, instances, self.job, [True] * len(logits)),
            "uncertain_points": [points],
            "point_sample": [ops.point_sample(*reading)],
            "point_sample_backward": [ops.point_sample_backward(torch.ones_like(some[..., 0]), *reading)],
        }
        if ops is not reference and name == "float32":
            # The host's solver is compared with it in the tests.
            given = (cost[0] + cost[1], self.labels, self.targets.images, counts, self.case.classes, 1)
            found["assign"] = [ops.assign(*given)]
        return {f"{key}, {name}": values for key, values in found.items()}

    def _stacked(self, ops: Any) -> dict[str, list[Tensor]]:
        """Volumes of two slices, the second one the first one mirrored."""
        logits = [torch.stack([each.detach(), each.detach().flip(-1)], 2) for each in self.inputs.dense()]
        targets = MaskTargets.from_masks([torch.stack([each, each.flip(-1)], 1) for each in self.inputs.masks])
        job = self.job._replace(targets=Targets(targets.encoding, *targets.tensors))
        instances, kernels = Instances(logits, self.index, self.sizes), import_module(f"{ops.__name__}.volumes")
        slopes = Gradients(*(torch.ones(len(self.index), device=self.index.device) for _ in range(2)))
        stack = Stack(2, linear=True)
        *loss, saved = kernels.volume_loss(instances, job, stack)
        gradients = kernels.volume_loss_backward(slopes, saved, instances, job, stack, [True] * len(logits))
        return {
            "volume_cost": list(kernels.volume_cost(logits, targets.num_targets, job, stack)),
            "volume_loss": [*loss, saved.chosen],
            "volume_loss_backward": gradients,
        }

    def _factored(self, ops: Any) -> dict[str, list[Tensor]]:
        layers = [each for each in self.inputs.mask_logits if isinstance(each, MaskFactors)]
        features = layers[0].features.detach()
        embeddings = [each.embeddings.detach() for each in layers]
        factors = Factors(embeddings, [], [features], [0] * len(layers), 1 << 25)
        products = (factors, self.index, [self.case.targets] * (len(layers) * self.case.batch), self.job)
        cost = factored.match_cost(ops, factors, self.targets.num_targets, self.job)
        *losses, kept = factored.mask_loss(ops, *products)
        slopes = Gradients(*(torch.ones_like(each) for each in losses))
        gradients = factored.mask_loss_backward(ops, slopes, kept, *products, needs_grad=[True, False, True])
        return {
            "factored match_cost": list(cost),
            "factored mask_loss": losses,
            "factored mask_loss_backward": gradients,
        }


@contextmanager
def intercepted(visit: Visit) -> Iterator[None]:
    """Call `visit(name of the kernel, launch, its tensors)` in place of each launch of a kernel.

    `launch(num_warps=...)` launches it, with other options if wanted.
    """
    from triton.runtime.jit import KernelInterface

    inner = KernelInterface.__getitem__

    def item(self: Any, grid: Any) -> Launch:
        def call(*arguments: Any, **options: Any) -> None:
            def launch(**more: Any) -> None:
                inner(self, grid)(*arguments, **{**options, **more})

            tensors = [each for each in tree_leaves((arguments, options)) if isinstance(each, Tensor)]
            visit(self.__name__, launch, tensors)

        return call

    KernelInterface.__getitem__ = item
    try:
        yield
    finally:
        KernelInterface.__getitem__ = inner


class Memory:
    """The memory behind some tensors, views of it and of its neighbors included, and what was in it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
        self.bytes = [
            torch.empty(0, dtype=torch.uint8, device=each.device).set_(each) for each in storages.values() if len(each)
        ]
        self.before = self.copy()

    def copy(self) -> list[Tensor]:
        """Copy what is there now."""
        return [each.clone() for each in self.bytes]

    def restore(self) -> None:
        """Put back what was there at first."""
        for now, before in zip(self.bytes, self.before, strict=True):
            now.copy_(before)

    def differs(self, other: Sequence[Tensor]) -> Tensor:
        """Whether a bit is not that of a copy, `[]` on the device: nothing waits."""
        return torch.stack([(now != then).any() for now, then in zip(self.bytes, other, strict=True)]).any()


def races(operations: Operations, ops: Any, repeats: int, warps: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Launch every kernel again and again on the same memory, in deterministic mode.

    Returns:
        For each kernel and number of warps: "kernel", "warps", "repeats", "equal" (all bits, every time), "difference"
        (the largest from the launch with its usual warps, relative to the largest value; integers must be equal) and
        "passed"; with "skipped" instead for want of time.
    """
    found: list[dict[str, Any]] = []
    seen: set[tuple[Any, ...]] = set()
    deadline = time.monotonic() + seconds

    def visit(kernel: str, launch: Launch, tensors: list[Tensor]) -> None:
        kind = (kernel, *((each.dtype, each.ndim) for each in tensors))
        if kind in seen or not tensors:
            launch()
            return
        seen.add(kind)
        memory = Memory(tensors)
        launch()
        usual = [each.clone() for each in tensors]
        for count in warps:
            entry = {"kernel": kernel, "warps": count, "repeats": repeats}
            if time.monotonic() > deadline:
                found.append({**entry, "skipped": True})
                continue
            memory.restore()
            launch(num_warps=count)
            first, changed = memory.copy(), []
            for _ in range(repeats - 1):
                memory.restore()
                launch(num_warps=count)
                changed.append(memory.differs(first))
            equal = not changed or not bool(torch.stack(changed).any())
            gap, close = _difference(tensors, usual)
            found.append({**entry, "equal": equal, "difference": gap, "passed": equal and close})
        memory.restore()
        launch()

    torch.use_deterministic_algorithms(True)
    try:
        with intercepted(visit):
            operations.run(ops)
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def _difference(tensors: Sequence[Tensor], usual: Sequence[Tensor]) -> tuple[float, bool]:
    largest, close = 0.0, True
    for now, then in zip(tensors, usual, strict=True):
        if not now.is_floating_point():
            close &= torch.equal(now, then)
            continue
        same = torch.equal(now.isfinite(), then.isfinite())
        a, b = (each.double().nan_to_num(0.0, 0.0, 0.0) for each in (now, then))
        gap = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if a.numel() else 0.0
        largest = max(largest, gap)
        close &= same and gap <= TOLERANCE.get(now.dtype, 1e-4)
    return largest, close


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """Fill what `torch.empty`, `empty_like` and `new_empty` allocate, so that a value which nobody wrote shows."""
    places = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
    before = [getattr(owner, name) for owner, name in places]

    def dirty(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*arguments: Any, **options: Any) -> Tensor:
            made = allocate(*arguments, **options)
            return made.fill_(float("nan") if made.is_floating_point() else 113)

        return allocated

    for (owner, name), inner in zip(places, before, strict=True):
        setattr(owner, name, dirty(inner))
    try:
        yield
    finally:
        for (owner, name), inner in zip(places, before, strict=True):
            setattr(owner, name, inner)


def unwritten(operations: Operations, ops: Any) -> list[dict[str, Any]]:
    """Run every operation on memory full of NaN.

    Returns:
        For each: "operation", "difference" from the reference backend, relative to the largest value (of factors from
        the same operation on clean memory), and "passed".
    """
    with filled_with_nan():
        found = operations.run(ops)
    clean = operations.run(ops)
    plain = {**clean, **operations.run(reference)}
    results = []
    for name, values in found.items():
        gap, close = _difference(values, [each.to(now.dtype) for each, now in zip(plain[name], values, strict=True)])
        if name.startswith("match_cost"):
            # Columns beyond an image's targets mean nothing, and there are none here.
            close &= all(bool(each.isfinite().all()) for each in values)
        results.append({"operation": name, "difference": gap, "passed": close})
    return results


def bandwidth(device: torch.device, megabytes: int) -> dict[str, Any]:
    """Measure how fast memory is copied, in bytes read and written per second: the best of ten copies."""
    source = torch.ones(megabytes * 2**18, device=device)
    target, clock, best = torch.empty_like(source), Clock(device), float("inf")
    for _ in range(10):
        clock.mark()
        target.copy_(source)
        clock.mark()
        best = min(best, clock.spans()[0])
    return {"bytes_per_second": 2 * source.numel() * source.element_size() / best}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of these, and print what it found."""
    parser = argparse.ArgumentParser(prog="python -m maskloss.lab.bench.kernels", description=__doc__)
    add = parser.add_argument
    add("what", choices=["races", "unwritten", "bandwidth", "once"])
    add("--device", type=torch.device, required=True)
    add("--case", choices=list(PRESETS), default="tiny-head")
    add("--repeats", type=int, default=200)
    add("--warps", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--seconds", type=float, default=60.0)
    add("--megabytes", type=int, default=1024)
    options = parser.parse_args(arguments)
    found: Any
    if options.what == "bandwidth":
        found = bandwidth(options.device, options.megabytes)
    else:
        from maskloss.ops import gpu

        operations = Operations(PRESETS[options.case], options.device)
        if options.what == "races":
            found = races(operations, gpu, options.repeats, options.warps, options.seconds)
        elif options.what == "unwritten":
            found = unwritten(operations, gpu)
        else:
            found = sorted(operations.run(gpu))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
