"""A process that measures one arm: it reads commands from its input, one JSON object a line, and answers in kind.

It is started by `python -m maskloss.lab.bench.worker`, computes only while a command is running, and waits otherwise.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import torch
from torch import Tensor

from maskloss import MaskTargets, ops
from maskloss.lab.bench.arms import Arm, make_arm
from maskloss.lab.bench.cases import PEERS, Case
from maskloss.lab.bench.check import compare
from maskloss.lab.bench.counting import StepCounter
from maskloss.lab.bench.inputs import Inputs, make_inputs
from maskloss.lab.bench.measure import Clock, PeakMemory, StageClock


class BaseWorker:
    """What measures a step, whatever is in it."""

    device: torch.device

    def start(self, device: str) -> None:
        """Set the device, and the number of threads that the environment asks for."""
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.device = torch.device(device)

    def timed(self, forward: Callable[[], Tensor]) -> dict[str, float]:
        """Time a forward pass, which returns the loss, and its backward pass; seconds."""
        clock = Clock(self.device)
        clock.mark()
        total = forward()
        clock.mark()
        total.backward()
        clock.mark()
        spans = clock.spans()
        return {"forward": spans[0], "backward": spans[1], "loss": float(total.detach())}


class Worker(BaseWorker):
    """The commands; each method is one, and returns what is sent back."""

    case: Case
    arm: Arm
    inputs: Inputs
    dtype: torch.dtype

    def check(self, case: dict[str, Any], others: list[str], device: str, dtype: str, seed: int) -> dict[str, Any]:
        """Check other arms, and `maskloss` with them, on the inputs of a case."""
        self._start(case, device, dtype)
        inputs = make_inputs(self.case, seed=seed, dtype=self.dtype, device=self.device)
        found = [compare(self.case, inputs, other, seed).as_dict() for other in others]
        return {"digest": inputs.digest(), "checks": found}

    def setup(self, case: dict[str, Any], arm: str, device: str, dtype: str, seed: int) -> dict[str, Any]:
        """Make arm and inputs, measure the memory of the first step at this size, and count the operations of another.

        A step of the smallest case comes before, so that code which is loaded or compiled once does not count as
        memory of the step; scratch space that an implementation keeps from one step to the next does count.
        """
        self._start(case, device, dtype)
        small = self.case.smallest
        tiny = make_inputs(small, seed=seed, dtype=self.dtype, device=self.device)
        first = make_arm(arm, small, self.device)
        first.forward(tiny, first.prepare(tiny.masks), seed).backward()
        del first, tiny
        self.arm = make_arm(arm, self.case, self.device)
        self.inputs = make_inputs(self.case, seed=seed, dtype=self.dtype, device=self.device)
        found = {"digest": self.inputs.digest(), "backend": self._backend(arm), "memory": self._memory(seed)}
        found["counts"] = self._count(seed)
        found["launches"] = self._launches(seed)
        self.step(seed)
        return found

    def step(self, seed: int) -> dict[str, float]:
        """Time one step, and preparing targets; seconds.

        An arm that takes bool masks is given these, and takes a second step with targets that are prepared: "packed".
        The two change places from seed to seed, since the second one finds warm caches.
        """
        clock = Clock(self.device)
        clock.mark()
        targets = self.arm.prepare(self.inputs.masks)
        clock.mark()
        [prepared] = clock.spans()
        if not self.arm.takes_masks:
            return {"targets": prepared, **self._timed_step(targets, seed)}
        kinds: dict[str, Any] = {"": self.inputs.masks, "packed_": targets}
        found = {"targets": prepared}
        for kind in sorted(kinds, reverse=bool(seed % 2)):
            for name, value in self._timed_step(kinds[kind], seed).items():
                found[kind + name] = value
        return found

    def _timed_step(self, targets: Any, seed: int) -> dict[str, float]:
        self.inputs.drop_gradients()
        return self.timed(lambda: self.arm.forward(self.inputs, targets, seed))

    def _given(self) -> Any:
        """Return what the arm's user gives to a step: bool masks where it takes them."""
        return self.inputs.masks if self.arm.takes_masks else self.arm.prepare(self.inputs.masks)

    def _count(self, seed: int) -> dict[str, Any]:
        """Count the operations and transfers of one step with prepared targets: on a CPU, packing looks at values."""
        self.inputs.drop_gradients()
        targets = self.arm.prepare(self.inputs.masks)
        counter = StepCounter(self.device)
        with counter:
            self.arm.forward(self.inputs, targets, seed).backward()
        return counter.as_dict()

    def _launches(self, seed: int) -> dict[str, int] | None:
        """Count the kernels of a step with prepared targets, and the copies, as the driver saw them; None on a CPU."""
        if self.device.type == "cpu":
            return None
        self.inputs.drop_gradients()
        targets = self.arm.prepare(self.inputs.masks)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.arm.forward(self.inputs, targets, seed).backward()
            torch.cuda.synchronize()
        cuda = torch.profiler.DeviceType.CUDA
        return count_launches([event.name for event in profile.events() if event.device_type == cuda])

    def stages(self, seed: int, steps: int) -> list[dict[str, float]]:
        """Time the stages of some steps; from then on the arm is slower than it was."""
        clock = StageClock(self.device)
        self.arm.split(clock.timed)
        found = []
        for step in range(steps):
            self.inputs.drop_gradients()
            targets = self._given()
            clock.take()
            with clock.stage("other forward"):
                total = self.arm.forward(self.inputs, targets, seed + step)
            with clock.stage("backward"):
                total.backward()
            found.append(clock.take())
        return found

    def _start(self, case: dict[str, Any], device: str, dtype: str) -> None:
        self.start(device)
        self.case, self.dtype = Case.from_dict(case), getattr(torch, dtype)

    def _backend(self, arm: str) -> str | None:
        if arm in PEERS:
            return None
        return "reference" if arm == "reference" else ops.choose_backend(self.device)

    def _memory(self, seed: int) -> dict[str, Any]:
        """Measure the peaks, in bytes, of preparing targets and of the first step.

        The gradient of a query without a target is zeros that nobody has written, for which the system may keep no
        memory at all. What the step takes beyond its gradient is therefore counted from what the gradients really hold.
        """
        meter = PeakMemory(self.device)
        meter.start()
        targets = self.arm.prepare(self.inputs.masks)
        preparing, size = meter.peak(), _target_bytes(targets)
        del targets
        given = self._given()
        meter.start()
        self.arm.forward(self.inputs, given, seed).backward()
        peak, after = meter.peak(), meter.current()
        self.inputs.drop_gradients()
        left = meter.current()
        held = None if after is None or left is None else after - left
        return {
            "targets_peak": preparing,
            "targets": size,
            "gradient": sum(logits.numel() * logits.element_size() for logits in self.inputs.logits),
            "gradient_held": held,
            "peak": peak,
            "extra": None if peak is None or held is None else max(peak - held, 0),
            "not_measured": meter.why_not,
        }


def count_launches(names: Sequence[str]) -> dict[str, int]:
    """Count kernels, copies to the host and copies to the device among what the profiler calls by these names."""
    copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    return {
        "kernels": len(names) - len(copies),
        "to host": sum("DtoH" in name for name in copies),
        "to device": sum("HtoD" in name for name in copies),
    }


def _target_bytes(targets: MaskTargets | Sequence[MaskTargets | Tensor]) -> int:
    parts = [targets] if isinstance(targets, MaskTargets) else targets
    tensors = [each for part in parts for each in (part.tensors if isinstance(part, MaskTargets) else [part])]
    return sum(each.numel() * each.element_size() for each in tensors)


def serve(commands: TextIO, answers: TextIO, worker: BaseWorker) -> None:
    """Answer commands until there are no more; an exception is an answer too, and the worker lives on."""
    for line in commands:
        command = json.loads(line)
        try:
            answer = {"result": getattr(worker, command.pop("do"))(**command)}
        except Exception as error:  # noqa: BLE001 (whatever it is, it goes to the process that asked)
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def serve_process(worker: BaseWorker) -> None:
    """Serve the process that started this one; what libraries print goes to the error stream."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("default")
    serve(sys.stdin, answers, worker)


if __name__ == "__main__":
    serve_process(Worker())
