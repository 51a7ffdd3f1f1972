"""What is drawn: shapes, dtypes, strides, sampling, kinds of targets, weights, matches, seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from maskloss import MaskFactors, MaskTargets, PointSampling

FLOATS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = 3
# Contents of logits. "broken" has infinities and NaN in it; in "ties" most values occur often.
CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda z: z * 3,
    "small": lambda z: z * 1e-3,
    "large": lambda z: z * 30,
    "huge": lambda z: z * 1e30,
    "denormal": lambda z: z * 1e-40,
    "zero": torch.zeros_like,
    "constant": lambda z: torch.full_like(z, 0.75),
    "ties": lambda z: (z * 2).round() / 2,
    "broken": lambda z: torch.where(z > 2, float("inf"), torch.where(z < -2, float("nan"), z)),
}
# How a tensor [B, Q, h, w] lies in memory: a larger one, and the view of it.
STRIDES: dict[str, tuple[Callable[..., tuple[int, ...]], Callable[[Tensor], Tensor]]] = {
    "contiguous": (lambda b, q, h, w: (b, q, h, w), lambda t: t),
    "transposed": (lambda b, q, h, w: (b, q, w, h), lambda t: t.transpose(2, 3)),
    "channels last": (lambda b, q, h, w: (b, h, w, q), lambda t: t.permute(0, 3, 1, 2)),
    "every second": (lambda b, q, h, w: (b, q, 2 * h, 2 * w), lambda t: t[:, :, ::2, 1::2]),
    "queries first": (lambda b, q, h, w: (q + 1, b, h, w), lambda t: t[1:].transpose(0, 1)),
    "broadcast": (lambda b, q, h, w: (b, 1, h, w), lambda t: t),  # expanded to the queries in `Layers`
}
KINDS = ("bool", "uint8", "binary floats", "soft", "label map", "packed", "rle", "mixed")
SIDES = st.one_of(st.integers(1, 9), st.sampled_from([1, 2, 7, 16, 31, 32, 33, 64, 65]))


@dataclass(frozen=True)
class Case:
    """One call of `MaskCriterion`, or of `HungarianMatcher` and `MaskLoss`, as numbers and names."""

    dtype: str
    batch: int
    queries: int
    sizes: tuple[tuple[int, int], ...]
    factors: tuple[bool, ...]
    content: str
    strides: str
    kind: str
    counts: tuple[int, ...]
    frame: tuple[int, int]
    frame_options: tuple[bool, bool, bool]
    points: tuple[int, float, float, str]
    padding: str
    target_mode: str
    focal: tuple[float | None, float | None]
    weights: tuple[float, float, float]
    classification: str
    class_weights: tuple[float, ...] | None
    instance_weights: str | None
    groups: int
    given: str | None
    extra_costs: bool
    seed: int
    image_ids: tuple[int, ...] | None
    content_seed: int

    @property
    def sampling(self) -> PointSampling:
        return PointSampling(*self.points)

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.content_seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def options(self) -> dict[str, Any]:
        alpha, gamma = self.focal
        return {
            "padding_mode": self.padding,
            "target_mode": self.target_mode,
            "focal_alpha": alpha,
            "focal_gamma": gamma,
        }


@st.composite
def cases(draw: Any, largest: int = 65) -> Case:
    batch = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    layers = draw(st.integers(1, 3))
    sides = SIDES.filter(lambda side: side <= largest)
    gamma = draw(st.sampled_from([None, None, None, 0.0, 0.5, 1.0, 2.0, 3.5]))
    alpha = None if gamma is None else draw(st.sampled_from([None, 0.0, 0.25, 1.0]))
    few = st.sampled_from([0.0, 0.1, 1.0, 2.0, 5.0])
    weights = draw(st.tuples(few, few, few).filter(any))
    factors = draw(st.sampled_from(["none", "none", "none", "all", "some"]))
    return Case(
        dtype=draw(st.sampled_from(["float32", "float32", "float64", "bfloat16", "float16"])),
        batch=batch,
        queries=groups * draw(st.integers(1, 6)),
        sizes=tuple(draw(st.lists(st.tuples(sides, sides), min_size=layers, max_size=layers))),
        factors=tuple(factors == "all" or (factors == "some" and draw(st.booleans())) for _ in range(layers)),
        content=draw(st.sampled_from(["ordinary", "ordinary", *CONTENTS])),
        strides=draw(st.sampled_from([*STRIDES])),
        kind=draw(st.sampled_from(KINDS)),
        counts=tuple(draw(st.lists(st.integers(0, 8), min_size=batch, max_size=batch))),
        frame=draw(st.tuples(sides, sides)),
        frame_options=draw(st.tuples(*[st.sampled_from([False, False, True])] * 3)),
        points=(
            draw(st.one_of(st.integers(1, 200), st.sampled_from([1, 2, 127, 128, 129, 500]))),
            draw(st.one_of(st.sampled_from([1.0, 3.0]), st.floats(1.0, 4.0))),
            draw(st.one_of(st.sampled_from([0.0, 0.75, 1.0]), st.floats(0.0, 1.0))),
            draw(st.sampled_from(["independent", "stratified"])),
        ),
        padding=draw(st.sampled_from(["zeros", "border"])),
        target_mode=draw(st.sampled_from(["bilinear", "nearest"])),
        focal=(alpha, gamma),
        weights=weights,
        classification=draw(st.sampled_from(["softmax", "focal"])),
        class_weights=draw(st.one_of(st.none(), st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 3.0])] * CLASSES))),
        instance_weights=draw(st.sampled_from([None, None, "bool", "float", "one tensor"])),
        groups=groups,
        given=draw(st.sampled_from([None, None, None, "pairs", "layers", "none"])),
        extra_costs=draw(st.booleans()),
        seed=draw(st.one_of(st.integers(-(2**63), 2**64 - 1), st.sampled_from([0, -1, 2**63, 2**64 - 1]))),
        image_ids=draw(
            st.one_of(
                st.none(),
                st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1)), min_size=batch, max_size=batch).map(
                    tuple
                ),
            )
        ),
        content_seed=draw(st.integers(0, 2**32 - 1)),
    )


class Layer:
    """The mask logits of one decoder layer: leaves of any dtype, and what is given to a call, dense or as factors."""

    def __init__(self, case: Case, size: tuple[int, int], factored: bool) -> None:
        dtype = FLOATS[case.dtype]
        self._case, self._factored = case, factored
        if factored:
            # Products of such numbers are exact in every dtype, so that dense() is the same wherever it is formed.
            embeddings = case.normal(case.batch, case.queries, 4).round().clamp(-2, 2)
            features = case.normal(case.batch, 4, *size).round().clamp(-3, 3) / 4
            bias = case.normal(case.batch, case.queries).round() / 4
            values = [embeddings, features, bias]
        else:
            shape, _ = STRIDES[case.strides]
            values = [_within(CONTENTS[case.content](case.normal(*shape(case.batch, case.queries, *size))), dtype)]
        self.leaves = [value.to(dtype).requires_grad_() for value in values]

    def exact(self) -> Layer:
        """The same values in float64, as leaves of their own."""
        other = Layer.__new__(Layer)
        other._case, other._factored = self._case, self._factored
        other.leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        return other

    def given(self) -> Tensor | MaskFactors:
        if self._factored:
            return MaskFactors(*self.leaves)
        _, view = STRIDES[self._case.strides]
        return view(self.leaves[0]).expand(-1, self._case.queries, -1, -1)

    def dense(self) -> Tensor:
        given = self.given()
        return given.dense() if isinstance(given, MaskFactors) else given


def _within(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep finite values finite in the dtype, with room for a sum of some hundred of them."""
    largest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max / 1e3
    return torch.where(values.isfinite(), values.clamp(-largest, largest), values)


def class_logits(case: Case) -> list[Tensor]:
    outputs = CLASSES + (case.classification == "softmax")
    dtype = FLOATS[case.dtype]
    scale = 30.0 if case.content == "large" else 2.0
    return [(case.normal(case.batch, case.queries, outputs) * scale).to(dtype).requires_grad_() for _ in case.sizes]


def targets(case: Case) -> list[dict[str, Any]]:
    """One entry for each image; in "mixed" each of another kind."""
    entries = []
    for image, count in enumerate(case.counts):
        kind = KINDS[(case.content_seed + image) % (len(KINDS) - 1)] if case.kind == "mixed" else case.kind
        labels = torch.randint(CLASSES, (count,), generator=case.generator)
        entries.append({"masks": _masks(case, kind, count), "labels": labels})
    return entries


def _masks(case: Case, kind: str, count: int) -> MaskTargets:
    height, width = case.frame
    framed, ignored, windowed = case.frame_options
    options: dict[str, Any] = {}
    frame = (height, width)
    if framed:
        frame = options["canvas"] = (height + 3, width + 2)
    if ignored:
        options["ignore"] = case.normal(height, width) > 0.5
    if windowed:
        options["valid"] = (frame[0] // 3, frame[1] // 4, frame[0] - frame[0] // 3, frame[1] - frame[1] // 4)
    values = case.normal(count, height, width)
    inside = values > 0.4
    # The first is empty, the second full, others may be a corner of the frame.
    inside[:1], inside[1:2] = False, True
    inside[3:4, height // 2 :], inside[3:4, :, width // 2 :] = False, False
    if kind == "label map":
        labels = torch.randint(count + 2, (height, width), generator=case.generator)
        dtype = (torch.int64, torch.int32, torch.uint8, torch.int16)[case.content_seed % 4]
        return MaskTargets.from_label_map(labels.to(dtype), range(1, count + 1), allow_missing=True, **options)
    if kind == "packed":
        packed = np.packbits(inside.numpy(), axis=-1, bitorder="little")
        return MaskTargets.from_packed(torch.from_numpy(packed), width, **options)
    if kind == "rle":
        return MaskTargets.from_coco([_runs(mask) for mask in inside.numpy()], height, width, **options)
    if kind == "soft":
        dtype = (torch.float32, torch.float64, torch.float16, torch.bfloat16)[case.content_seed % 4]
        return MaskTargets.from_masks(values.sigmoid().to(dtype), soft=True, **options)
    dense = {"bool": inside, "uint8": inside.to(torch.uint8), "binary floats": inside.float()}[kind]
    return MaskTargets.from_masks(dense, **options)


def _runs(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, beginning with the pixels outside."""
    edges = np.flatnonzero(np.diff(mask.T.ravel().astype(np.int8), prepend=0))
    runs = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": [int(run) for run in runs]}


def pairs(case: Case) -> Any:
    """Matches that are given: of one layer for all, or of each layer; several queries may share a target."""

    def of_image(count: int) -> tuple[Tensor, Tensor]:
        most = 0 if case.given == "none" or not count else case.queries
        number = int(torch.randint(most + 1, (), generator=case.generator))
        queries = torch.randperm(case.queries, generator=case.generator)[:number]
        return queries, torch.randint(max(count, 1), (number,), generator=case.generator)

    def of_layer() -> list[tuple[Tensor, Tensor]]:
        return [of_image(count) for count in case.counts]

    return [of_layer() for _ in case.sizes] if case.given == "layers" else of_layer()


def instance_weights(case: Case) -> Any:
    """Weights of the targets of each image."""
    drawn = [torch.rand(count, generator=case.generator) * 3 for count in case.counts]
    if case.instance_weights == "bool":
        return [each > 1 for each in drawn]
    drawn = [torch.where(each < 0.5, 0.0, each) for each in drawn]
    return torch.cat(drawn) if case.instance_weights == "one tensor" else drawn
