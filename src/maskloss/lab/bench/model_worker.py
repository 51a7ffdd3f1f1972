"""A process that trains one model: the commands behind `maskloss bench --model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode

from maskloss.integrations.transformers import patch
from maskloss.lab.bench.cases import Case
from maskloss.lab.bench.check import _Draws, _draws
from maskloss.lab.bench.measure import Clock, PeakMemory, spied
from maskloss.lab.bench.model import ModelCase, build, make_batch, to_device
from maskloss.lab.bench.worker import BaseWorker, serve_process
from maskloss.loss import MaskLoss

# Relative differences that pass. The gradient is that of all parameters, |a - b| / |b|: two candidates of equal
# uncertainty but for rounding may be chosen one for the other, and an attention mask may flip where a logit is 0.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-2


class ModelWorker(BaseWorker):
    """The commands; each method is one, and returns what is sent back."""

    model: Any
    batch: dict[str, Any]

    def check(self, case: dict[str, Any], others: list[str], device: str, dtype: str, seed: int) -> dict[str, Any]:
        """Compare a step of the patched model, with and without factors, with one of the unpatched model.

        The unpatched model gets the points that the patched one has drawn, and does all the rest itself.
        """
        found = self._start(case, device, dtype, seed)
        # The matches and the seed of every call of the patched criterion.
        with spied(MaskLoss, "layer_terms", lambda given, _: (given[2], int(given[3].seed))) as calls:
            steps = {other: self._one_step(other, seed) for other in others[:1]}
        steps |= {other: self._one_step(other, seed) for other in others[1:]}
        points, batch = self.model.config.train_num_points, found.batch
        sizes = Case("model", batch, 1, found.targets, 1, found.classes, (1, 1), (1, 1), points=points)
        with _Draws(draw for matches, drawn in calls for draw in _draws(sizes, matches, drawn)):
            unpatched = self._one_step("unpatched", seed)
        return {"digest": "", "checks": [_compare(other, mine, unpatched) for other, mine in steps.items()]}

    def setup(self, case: dict[str, Any], arm: str, device: str, dtype: str, seed: int) -> dict[str, Any]:
        """Make the model, patch it, take a step that loads and compiles all code, and measure the memory of another."""
        self._start(case, device, dtype, seed)
        if arm != "unpatched":
            patch(self.model, factors=arm == "factors")
        self.step(seed)
        self._drop_gradients()
        meter = PeakMemory(self.device)
        meter.start()
        self.model(**self.batch).loss.backward()
        return {"digest": "", "memory": {"peak": meter.peak(), "not_measured": meter.why_not}}

    def step(self, seed: int) -> dict[str, float]:
        """Time forward and backward of one step, targets packed within it, and the criterion in the first; seconds."""
        self._drop_gradients()
        torch.manual_seed(seed)
        clock = Clock(self.device)
        # Before and after: every other span is one of the criterion.
        hooks = [
            self.model.criterion.register_forward_pre_hook(lambda *_: clock.mark()),
            self.model.criterion.register_forward_hook(lambda *_: clock.mark()),
        ]
        found = self.timed(lambda: self.model(**self.batch).loss)
        for hook in hooks:
            hook.remove()
        return {**found, "criterion": sum(clock.spans()[::2])}

    def _start(self, case: dict[str, Any], device: str, dtype: str, seed: int) -> ModelCase:
        self.start(device)
        found = ModelCase.from_dict(case)
        if dtype != "float32":
            raise ValueError(f"models are measured in float32, not in {dtype}: some layers of theirs take nothing else")
        self.model = build(found, seed).to(self.device)
        self.batch = to_device(make_batch(found, seed), self.device)
        return found

    def _drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def _one_step(self, arm: str, seed: int) -> tuple[float, list[Tensor], list[Tensor]]:
        """Return the loss, the gradient of every parameter, and the logits that attention masks are made of."""
        self._drop_gradients()
        with nullcontext() if arm == "unpatched" else patch(self.model, factors=arm == "factors"):
            torch.manual_seed(seed)
            with _Resized(self.model.config.num_queries) as resized:
                loss = self.model(**self.batch).loss
            loss.backward()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return float(loss.detach()), gradients, resized.signs


class _Resized(TorchFunctionMode):
    """Notes where logits are above 0 after they were resized for attention masks."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.queries = queries
        self.signs: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is interpolate and args[0].shape[1] == self.queries:
            self.signs.append(out.detach() > 0)
        return out


def _compare(
    name: str, mine: tuple[float, list[Tensor], list[Tensor]], base: tuple[float, list[Tensor], list[Tensor]]
) -> dict[str, Any]:
    difference = norm = 0.0
    for a, b in zip(mine[1], base[1], strict=True):
        difference += float((a.double() - b.double()).square().sum())
        norm += float(b.double().square().sum())
    loss, gradient = abs(mine[0] - base[0]) / abs(base[0]), (difference / norm) ** 0.5
    return {
        "other": name,
        "base": "the unpatched model",
        "loss": loss,
        "gradient": gradient,
        "flips": sum(int((a != b).sum()) for a, b in zip(mine[2], base[2], strict=True)),
        "attention": sum(a.numel() for a in mine[2]),
        "passed": loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE,
    }


if __name__ == "__main__":
    serve_process(ModelWorker())
