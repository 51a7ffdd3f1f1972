"""Do two implementations compute the same? Nothing is timed before this has been answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from maskloss import PointSampling
from maskloss._abi import ALL_TARGETS, CANDIDATES, IMAGE, LAYER, MATCHER, RANDOM, TARGET
from maskloss.clips import matches_of_planes
from maskloss.lab.bench import rf_detr
from maskloss.lab.bench.arms import MasklossArm, TransformersArm
from maskloss.lab.bench.cases import PEERS, STRATIFIED, Case
from maskloss.lab.bench.dense import DenseArm
from maskloss.lab.bench.inputs import Inputs
from maskloss.lab.bench.measure import spied
from maskloss.matches import Matches, Pairs
from maskloss.points import instance_keys, uniform_points, uniform_points3

# Largest differences that pass. Losses: of any term of any layer, relative. Gradients: |a - b| / |b|, over a layer.
# Two candidates whose |logit| differ by rounding only may be chosen one for the other; that moves a gradient at
# single points, and the loss hardly at all.
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Agreement:
    """How far an arm is from what it is compared with, on the same inputs and the same random numbers."""

    other: str  # name of the arm
    # what it is compared with: "maskloss", with border padding if that is what it has, or "the reference backend"
    # with the arm's own points
    base: str
    pairs: int  # matched pairs over all layers and images
    pairs_equal: int  # how many of them both found
    loss: float  # largest relative difference of a loss term
    mask_gradient: float  # largest relative difference of a layer's gradient of the mask logits
    class_gradient: float  # the same for the class logits, and for boxes
    passed: bool  # all pairs are equal, and no difference is above its tolerance

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, with the tolerances."""
        return asdict(self) | {"loss_tolerance": LOSS_TOLERANCE}


@dataclass
class _Step:
    """What one step computed: terms by `CriterionOutput.as_dict`'s names, pairs of each layer, gradients."""

    terms: dict[str, float]
    pairs: Sequence[Pairs]
    gradients: list[Tensor]


def compare(case: Case, inputs: Inputs, other: str, seed: int) -> Agreement:
    """Run a step of `maskloss` and one of another arm, and compare losses, matches and gradients.

    Both get the same inputs and the same random numbers. The reference backend draws them from the same seed. Those of
    `transformers` and `dense` come from `torch.rand`; in its place they are given, call by call, the numbers that
    `maskloss` draws from the seed. Their own code does all the rest: it matches, it chooses the uncertain points, it
    computes the loss.

    No other implementation draws stratified points. An arm that does is compared with itself on the reference backend,
    which draws as many of the same layout from the same seed.
    """
    device, base = inputs.labels[0].device, "maskloss"
    if other in STRATIFIED:
        base = "the reference backend"
        mine, theirs = (
            _run_maskloss(_maskloss(case, device, other, backend), inputs, seed)[0] for backend in (None, "reference")
        )
    elif other in PEERS and case.groups > 1:
        arm = rf_detr.MasklossArm(case, "maskloss")
        if other == "rfdetr":
            base = "maskloss with border padding"
            arm = rf_detr.MasklossArm(case, "factors", padding_mode="border")
        mine, matches = _run_maskloss(arm, inputs, seed)
        theirs = _run_rf_detr(rf_detr.make_peer(other, case, device), inputs, case, matches, seed)
    else:
        mine, matches = _run_maskloss(_maskloss(case, device), inputs, seed)
        if other == "transformers":
            theirs = _run_transformers(TransformersArm(case, device), inputs, case, matches, seed)
        elif other == "dense":
            theirs = _run_dense(DenseArm(case, device), inputs, case, matches, seed)
        else:
            theirs = _run_maskloss(_maskloss(case, device, other), inputs, seed)[0]
    return _agreement((other, base), mine, theirs, len(inputs.leaves))


def _maskloss(case: Case, device: torch.device, name: str = "maskloss", backend: str | None = None) -> Any:
    if case.groups > 1:
        return rf_detr.MasklossArm(case, name, backend)
    return MasklossArm(case, device, name, backend)


def _run_maskloss(arm: Any, inputs: Inputs, seed: int) -> tuple[_Step, Matches]:
    inputs.drop_gradients()
    out = arm.compute(inputs, arm.prepare(inputs.masks), seed)
    out.total.backward()
    counts = [len(each) for each in inputs.labels]
    # In groups of queries, copies of a target have numbers of their own.
    pairs = [
        [(queries, targets % max(count, 1)) for (queries, targets), count in zip(images, counts, strict=True)]
        for images in (out.matches.pairs(layer) for layer in range(len(inputs.mask_logits)))
    ]
    return _Step(_values(out.as_dict()), pairs, _take_gradients(inputs)), out.matches


def _run_transformers(arm: TransformersArm, inputs: Inputs, case: Case, matches: Matches, seed: int) -> _Step:
    inputs.drop_gradients()
    found: list[Pairs] = []
    hook = arm.loss.matcher.register_forward_hook(lambda _module, _args, result: found.append(result))
    with _Draws(_draws(case, matches, seed)):
        terms = arm.terms(inputs, arm.prepare(inputs.masks))
    hook.remove()
    arm.total(terms).backward()
    renamed = {name.replace("loss_cross_entropy", "loss_class"): value for name, value in terms.items()}
    return _Step(_values(renamed), [*found[1:], found[0]], _take_gradients(inputs))


def _run_dense(arm: DenseArm, inputs: Inputs, case: Case, matches: Matches, seed: int) -> _Step:
    inputs.drop_gradients()
    layers = zip(*_draws_by_layer(case, matches, seed), strict=True)
    with _Draws(draw for layer in layers for part in layer for draw in part):
        out = arm.compute(inputs, arm.prepare(inputs.masks))
    out.total.backward()
    return _Step(_values(out.terms), out.pairs, _take_gradients(inputs))


def _run_rf_detr(arm: rf_detr.Peer, inputs: Inputs, case: Case, matches: Matches, seed: int) -> _Step:
    """Run a criterion of RF-DETR, in Transformers or in its package, whose layers are in the order of `matches`."""
    inputs.drop_gradients()
    matcher, instances = _draws_by_layer(case, matches, seed)
    if arm.name == "transformers":
        # Layer by layer: the matcher's points, then the loss's.
        draws = (draw for pair in zip(matcher, instances, strict=True) for part in pair for draw in part)
    else:
        draws = (draw for part in (*matcher, *instances) for draw in part)
    with _Draws(iter(draws), exact=False), spied(arm.matcher, "forward") as found:
        total, terms = arm.compute(inputs, arm.prepare(inputs.masks))
    total.backward()
    return _Step(_values(terms), found, _take_gradients(inputs))


class _Draws(TorchFunctionMode):
    """Answers calls of `torch.rand` with given tensors, in order, which must have as many points as were asked for.

    Unless `exact` is False: the matcher of Transformers' RF-DETR asks for another number than its configuration says.
    """

    def __init__(self, draws: Iterator[Tensor], *, exact: bool = True) -> None:
        super().__init__()
        self.draws, self.exact = draws, exact

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.rand:
            return func(*args, **(kwargs or {}))
        values = next(self.draws)
        if values.shape != args and (self.exact or (values.shape[0], *values.shape[2:]) != (args[0], *args[2:])):
            raise RuntimeError(f"expected a draw of shape {list(values.shape)}, but {list(args)} was asked for")
        return values


def _draws(case: Case, matches: Matches, seed: int) -> Iterator[Tensor]:
    """Yield the random numbers of `maskloss` in the order in which Transformers' Mask2Former draws its own.

    That is the final layer first, then the others; in each layer the matcher's points of each image, then the
    candidates of all instances, then their uniform points.
    """
    layers = list(zip(*_draws_by_layer(case, matches, seed), strict=True))
    for matcher, instances in (layers[-1], *layers[:-1]):
        yield from (*matcher, *instances)


def _draws_by_layer(case: Case, matches: Matches, seed: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """List what `maskloss` draws in each layer: the matcher's points of each image; candidates and uniform points."""
    sampling = PointSampling(num_points=case.points)
    device = matches.index.device
    images = torch.arange(case.batch, device=device)
    drawn = torch.tensor(seed, device=device)
    draw = uniform_points3 if case.unit == "volume" else uniform_points
    everyone = instance_keys(drawn, images, torch.full_like(images, ALL_TARGETS))
    shared = draw(everyone, case.points, torch.zeros_like(images), MATCHER)
    if case.unit == "frame":
        matches = matches_of_planes(matches, case.frames)
    instances = []
    for rows in matches.index.split(list(matches.layer_sizes)):
        keys = instance_keys(drawn, images[rows[:, IMAGE]], rows[:, TARGET])
        candidates = draw(keys, sampling.num_candidates, rows[:, LAYER], CANDIDATES)
        instances.append([candidates, draw(keys, sampling.num_random, rows[:, LAYER], RANDOM)])
    return [list(shared[:, None])] * len(instances), instances


def _values(terms: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in terms.items()}


def _take_gradients(inputs: Inputs) -> list[Tensor]:
    gradients = [logits.grad for logits in (*inputs.leaves, *inputs.class_logits)]
    inputs.drop_gradients()
    return [each for each in gradients if each is not None]


def _agreement(names: tuple[str, str], mine: _Step, theirs: _Step, layers: int) -> Agreement:
    losses = [abs(mine.terms[name] - value) / max(abs(value), 1e-6) for name, value in theirs.terms.items()]
    gaps = [_gap(a, b) for a, b in zip(mine.gradients, theirs.gradients, strict=True)]
    total, equal = 0, 0
    for mine_here, theirs_here in zip(mine.pairs, theirs.pairs, strict=True):
        for a, b in zip(mine_here, theirs_here, strict=True):
            total += len(b[0])
            known = set(zip(*(side.tolist() for side in a), strict=True))
            equal += len(known & set(zip(*(side.tolist() for side in b), strict=True)))
    # NumPy's maximum is NaN if one value is, and a comparison with NaN is false.
    loss, masks, classes = (float(np.max(part)) for part in (losses, gaps[:layers], gaps[layers:]))
    tolerance = GRADIENT_TOLERANCE[mine.gradients[0].dtype]
    passed = (
        total == equal
        and mine.terms.keys() == theirs.terms.keys()
        and loss <= LOSS_TOLERANCE
        and masks <= tolerance
        and classes <= tolerance
    )
    return Agreement(*names, total, equal, loss, masks, classes, passed)


def _gap(a: Tensor, b: Tensor) -> float:
    """Compute |a - b| / |b|, plane by plane, so that no copy in float64 of a large gradient is made."""
    difference = norm = 0.0
    for mine, theirs in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True):
        wide = theirs.double()
        difference += float((mine.double() - wide).square().sum())
        norm += float(wide.square().sum())
    return float((difference / norm) ** 0.5) if norm else float(difference > 0)
