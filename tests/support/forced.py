"""Give Transformers the very points that maskloss draws, by answering its calls of `torch.rand`."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from maskloss import distributed, layers
from maskloss._abi import CANDIDATES, IMAGE, LAYER, QUERY, RANDOM, TARGET, Draw, Job
from maskloss.loss import MaskLoss
from maskloss.matches import Matches
from maskloss.ops.reference.sampling import match_points
from maskloss.points import instance_keys, uniform_points
from maskloss.step import Step, step

SEED = 1234


def fix_seed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Let every step have this seed, in compiled code too."""
    # `maskloss.step` is the function; this is its module.
    monkeypatch.setattr(sys.modules["maskloss.step"], "draw_seed", lambda *_: torch.tensor(seed))


@dataclass
class Call:
    """One call of a criterion of maskloss: what decides its points, and its matches."""

    step: Step
    loss: MaskLoss
    matches: Matches
    match_points: int

    def instance_rows(self, layer: int) -> Tensor:
        """The matches of a layer, in the order of Transformers: by image, then by query."""
        rows = self.matches.index.split(list(self.matches.layer_sizes))[layer]
        return rows[(rows[:, IMAGE] * 10_000 + rows[:, QUERY]).argsort()]

    def draws(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The matcher's points `[B, P, 2]`, the candidates `[n, K, 2]` and the uniform points of a layer."""
        step, sampling = self.step, self.loss.sampling
        matcher = match_points(step.targets.windows, Draw(step.image_ids, step.seed, self.match_points))
        rows = self.instance_rows(layer)
        keys = instance_keys(step.seed, step.image_ids[rows[:, IMAGE]], rows[:, TARGET])
        candidates = uniform_points(keys, sampling.num_candidates, rows[:, LAYER], CANDIDATES)
        return matcher, candidates, uniform_points(keys, sampling.num_random, rows[:, LAYER], RANDOM)


@dataclass
class Recorder:
    """The calls of maskloss's criteria, in order."""

    calls: list[Call] = field(default_factory=list)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, *, one_image: bool = False) -> Iterator[Recorder]:
    """Fix the seed of maskloss's criteria and record their calls.

    Args:
        monkeypatch: pytest's.
        one_image: number all images 0, so that they share the matcher's points, as they do in RF-DETR.
    """
    recorder = Recorder()
    matched: list[int] = []
    terms, cost = MaskLoss.layer_terms, layers.match_cost

    def spy_terms(loss: MaskLoss, logits: Any, matches: Matches, step: Step, reduction: Any, *points: Any) -> Any:
        recorder.calls.append(Call(step, loss, matches, matched[-1]))
        return terms(loss, logits, matches, step, reduction, *points)

    def spy_cost(logits: Any, num_targets: Any, job: Job, *rest: Any) -> Any:
        matched.append(job.draw.num_points)
        return cost(logits, num_targets, job, *rest)

    with monkeypatch.context() as patch, step(seed=SEED):
        patch.setattr(MaskLoss, "layer_terms", spy_terms)
        patch.setattr(layers, "match_cost", spy_cost)
        if one_image:
            numbers = lambda ids, batch, device: torch.zeros(batch, dtype=torch.int64, device=device)  # noqa: E731
            patch.setattr(distributed, "image_numbers", numbers)
        yield recorder


@contextmanager
def answered(monkeypatch: pytest.MonkeyPatch, recorder: Recorder, *, final_first: bool, shared: bool) -> Iterator[None]:
    """Answer Transformers' calls of `torch.rand` with the recorded points, and check that it asked for all of them.

    Args:
        monkeypatch: pytest's.
        recorder: what maskloss drew.
        final_first: whether maskloss has the final layer last, and Transformers first.
        shared: whether Transformers draws the matcher's points once for the batch, not for each image.
    """
    queue: deque[Tensor] = deque()
    for call in recorder.calls:
        depth = len(call.matches.layer_sizes)
        for layer in [depth - 1, *range(depth - 1)] if final_first else range(depth):
            matcher, candidates, uniform = call.draws(layer)
            queue += [matcher[:1]] if shared else list(matcher.split(1))
            queue += [candidates, uniform]
    original = torch.rand

    def rand(*size: Any, **options: Any) -> Tensor:
        return queue.popleft() if len(size) == 3 and size[2] == 2 else original(*size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        yield
    assert not queue
