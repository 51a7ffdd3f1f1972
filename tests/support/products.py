"""Masks as factors beside the dense logits that they stand for, on the same points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from maskloss import MaskFactors, MaskLoss, MaskTargets, Matches, PointSampling, ops
from maskloss.layers import Layer
from maskloss.matches import join_layers
from maskloss.step import Step as TrainingStep
from support.accuracy import assert_no_worse

FEW = PointSampling(num_points=60)
SEED = torch.tensor(2**40 + 5)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
BATCH, QUERIES, CHANNELS = 2, 5, 6


def double(value: Any, seen: dict[int, Tensor]) -> Any:
    """The same tensor in float64, a leaf; one object stays one."""
    if not isinstance(value, Tensor):
        return value
    if id(value) not in seen:
        seen[id(value)] = value.detach().double().requires_grad_()
    return seen[id(value)]


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def some_targets(
    encoding: str = "bits", counts: Sequence[int] = (3, 2), *, extra: bool = False, size: tuple[int, int] = (21, 30)
) -> MaskTargets:
    """Targets of each image; `extra` adds ignored pixels and a window within a canvas."""
    height, width = size
    options: dict[str, Any] = {}
    if extra:
        ignore = torch.rand(height, width) > 0.6
        options = {"ignore": ignore, "canvas": (height + 3, width + 1), "valid": (1, 2, height - 2, width - 5)}
    images = []
    for count in counts:
        if encoding == "labels":
            ids = range(1, count + 1)
            label_map = torch.randint(count + 2, (height, width))
            images.append(MaskTargets.from_label_map(label_map, ids, allow_missing=True, **options))
        elif encoding == "values":
            images.append(MaskTargets.from_masks(torch.rand(count, height, width), soft=True, **options))
        else:
            images.append(MaskTargets.from_masks(torch.rand(count, height, width) > 0.5, **options))
    return MaskTargets.cat(images)


def some_factors(
    sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    *,
    shared: bool = True,
    bias: bool = True,
    queries: int = QUERIES,
    batch: int = BATCH,
    scratch_mb: float = 32.0,
) -> list[MaskFactors]:
    """A layer for each size; layers of one size share their features, if `shared`."""
    features: dict[Any, Tensor] = {}
    layers = []
    for number, size in enumerate(sizes):
        key = size if shared else number
        if key not in features:
            features[key] = leaf(batch, CHANNELS, *size, dtype=dtype)
        each = leaf(batch, queries, dtype=dtype) if bias else None
        embeddings = leaf(batch, queries, CHANNELS, dtype=dtype)
        layers.append(MaskFactors(embeddings, features[key], each, scratch_mb=scratch_mb))
    return layers


def some_matches(targets: MaskTargets, queries: int = QUERIES, layers: int = 1) -> Matches:
    """Other pairs in each layer."""
    parts = []
    for _ in range(layers):
        pairs = []
        for count in targets.num_targets:
            number = min(count, queries)
            pairs.append((torch.randperm(queries)[:number], torch.randperm(count)[:number]))
        parts.append(Matches.from_pairs(pairs, num_queries=queries, num_targets=targets.num_targets))
    return join_layers(parts)


@dataclass
class Step:
    """The losses of some instances, for factors or what they stand for."""

    layers: list[Layer]
    matches: Matches
    targets: MaskTargets
    points: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    backend: str = "cpu"
    sampling: PointSampling = FEW

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients flow to, each once."""
        found: dict[int, Tensor] = {}
        for layer in self.layers:
            parts = (layer,) if isinstance(layer, Tensor) else (layer.embeddings, layer.features, layer.bias)
            found |= {id(part): part for part in parts if isinstance(part, Tensor) and part.requires_grad}
        return list(found.values())

    def dense(self) -> list[Tensor]:
        return [layer if isinstance(layer, Tensor) else layer.dense() for layer in self.layers]

    def exact(self) -> Step:
        """The same values in float64, at the points that are drawn in this precision."""
        seen: dict[int, Tensor] = {}
        layers: list[Layer] = []
        for layer in self.layers:
            if isinstance(layer, Tensor):
                layers.append(double(layer, seen))
            else:
                parts = {name: double(getattr(layer, name), seen) for name in ("embeddings", "features", "bias")}
                layers.append(replace(layer, **parts))
        return replace(self, layers=layers, points=self.drawn() if self.points is None else self.points)

    def drawn(self) -> Tensor:
        instances = ops.Instances(
            [each.detach() for each in self.dense()], self.matches.index, self.matches.layer_sizes
        )
        sampling = self.sampling
        numbers = (sampling.num_points, sampling.num_candidates, sampling.num_uncertain)
        draw = ops.Draw(torch.arange(len(self.targets)), SEED, *numbers)
        padding = self.options.get("padding_mode", "zeros")
        return ops.uncertain_points(instances, draw, self.targets.windows, padding, "reference")

    def terms(self, *, dense: bool = False) -> tuple[Tensor, Tensor]:
        loss = MaskLoss(sampling=self.sampling, backend=self.backend, **self.options)
        layers = self.dense() if dense else self.layers
        batch = TrainingStep(self.targets, SEED.new_empty(0), torch.arange(len(self.targets)), SEED)
        return loss.instance_losses(layers, self.matches, batch, self.points)

    def results(self, *, dense: bool = False) -> list[Tensor]:
        """Both terms of each instance, and the gradients of a weighted sum of them."""
        ce, dice = self.terms(dense=dense)
        weight = torch.linspace(0.5, 1.5, len(ce), dtype=ce.dtype)
        total = (weight * ce).sum() + ((2 - weight) * dice).sum()
        return [ce.detach(), dice.detach(), *torch.autograd.grad(total, self.leaves, retain_graph=True)]


def assert_as_dense(step: Step, tolerance: float | None = None) -> None:
    """Factors are no worse than dense logits of the same dtype; both are judged by a run in float64."""
    found, plain, exact = step.results(), step.results(dense=True), step.exact().results(dense=True)
    for mine, theirs, right in zip(found, plain, exact, strict=True):
        bound = TOLERANCE[step.layers[0].dtype] if tolerance is None else tolerance
        assert_no_worse(mine, theirs, right, bound, everywhere=False)
