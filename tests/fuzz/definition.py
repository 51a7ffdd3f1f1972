"""A call, the definition of its results in float64, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cross_entropy

from fuzz import cases
from fuzz.cases import CLASSES, FLOATS, Case, Layer
from fuzz.interpreted import interpreted
from maskloss import CriterionOutput, MaskCriterion, MaskOptions, MaskTargets
from maskloss._abi import IMAGE, QUERY, TARGET
from maskloss.matcher import HungarianMatcher
from maskloss.ops import load, reference
from maskloss.ops.reference import formulas
from maskloss.points import draw_seed
from maskloss.step import Step
from support import oracle
from support.batches import Batch, group

# Of the size of the logits, where that is above 1: what sums in float32 and in float64 may be off.
UNIT = {torch.float32: 2e-6, torch.float64: 1e-11}
# One rounding to the dtype of the logits, for gradients, which are written in it.
STORED = {"float32": 0.0, "float64": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float32": 1e-37, "float64": 1e-300, "float16": 2.0**-24, "bfloat16": 1e-37}
# Logits up to this size are ordinary: errors of larger ones grow with their size, and are left out of the table.
ORDINARY = 100.0


@dataclass
class Record:
    """The largest errors so far: of each backend and dtype and result, relative to the largest value."""

    cases: int = 0
    worst: dict[str, float] = field(default_factory=dict)

    def note(self, backend: str, dtype: str, result: str, error: float) -> None:
        key = f"{backend} {dtype} {result}"
        self.worst[key] = max(error, self.worst.get(key, 0.0))


class Call:
    """One case, computed by a backend."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend = case, backend
        case.generator.manual_seed(case.content_seed)
        self.layers = [Layer(case, *each) for each in zip(case.sizes, case.factors, strict=True)]
        self.classes = cases.class_logits(case)
        self.targets = cases.targets(case)
        class_weight, mask_weight, dice_weight = case.weights
        self.criterion = MaskCriterion(
            CLASSES,
            class_weight=class_weight,
            mask_weight=mask_weight,
            dice_weight=dice_weight,
            classification=case.classification,
            class_weights=case.class_weights,
            sampling=case.sampling,
            groups=case.groups,
            options=MaskOptions(backend=backend, **case.options()),
        )
        self.told: dict[str, Any] = {"seed": case.seed, "image_ids": case.image_ids}
        if case.given is not None:
            self.told["matches"] = cases.pairs(case)
        elif case.extra_costs:
            shapes = [(len(case.sizes), case.queries, count) for count in case.counts]
            self.told["extra_costs"] = [case.normal(*shape).float() for shape in shapes]
        if case.instance_weights is not None:
            self.told["instance_weights"] = cases.instance_weights(case)
        self.step = Step(
            MaskTargets.cat([entry["masks"] for entry in self.targets]),
            torch.cat([entry["labels"] for entry in self.targets]),
            torch.tensor(case.image_ids or range(case.batch)),
            draw_seed(case.seed),
        )

    def run(self) -> tuple[CriterionOutput, list[Tensor]]:
        """The step, and the gradients of all leaves."""
        logits = [layer.given() for layer in self.layers]
        out = self.criterion(self.classes, logits, self.targets, **self.told)
        leaves = [leaf for layer in self.layers for leaf in layer.leaves] + self.classes
        found = torch.autograd.grad(out.total, leaves, allow_unused=True)
        return out, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


@dataclass
class Exact:
    """What the definition has for given matches: the points; then, in float64, terms and gradients.

    Attributes:
        points: `[N, P, 2]`.
        terms: classification, cross-entropy and Dice of each layer, and the total.
        gradients: of all leaves.
        per_instance: cross-entropy and Dice.
    """

    points: Tensor
    terms: list[Tensor]
    gradients: list[Tensor]
    per_instance: tuple[Tensor, Tensor]


def check(case: Case, backends: Sequence[str], record: Record) -> None:
    """Run a case and compare everything with the definition; raises an AssertionError where it is something else."""
    known = _Known()
    for backend in backends:
        with interpreted(backend):
            _check(Call(case, backend), known, record)


class _Known:
    """The definition of one case, which is the same for every backend with the same matches."""

    def __init__(self) -> None:
        self._costs: Tensor | None = None
        self._exact: dict[bytes, Exact] = {}

    def costs(self, call: Call) -> Tensor:
        if self._costs is None:
            self._costs = _costs(call)
        return self._costs

    def exact(self, call: Call, out: CriterionOutput, batch: Batch) -> Exact:
        key = out.matches.index.numpy().tobytes()
        if key not in self._exact:
            self._exact[key] = _definition(call, out, _points(call, batch, reference))
        return self._exact[key]


def _check(call: Call, known: _Known, record: Record) -> None:
    case, backend = call.case, call.backend
    out, gradients = call.run()
    record.cases += 1
    logits = [layer.dense().detach() for layer in call.layers]
    if not all(bool(layer.isfinite().all()) for layer in logits):
        _check_broken(call, out, logits)
        return
    size = max(1.0, *(float(layer.abs().max()) for layer in logits))
    accumulated = torch.float64 if case.dtype == "float64" else torch.float32
    unit = UNIT[accumulated] * size
    if case.given is None:
        _check_matches(call, out, known.costs(call), unit)
    step = call.step
    batch = Batch(logits, out.matches.index, list(out.matches.layer_sizes), step.targets, step.image_ids, step.seed)
    exact = known.exact(call, out, batch)
    if backend != "reference":
        assert torch.equal(_points(call, batch, load(backend)), exact.points)
    ordinary = size <= ORDINARY
    for name, found, wanted in (
        ("cross-entropy", out.per_instance.ce, exact.per_instance[0]),
        ("Dice", out.per_instance.dice, exact.per_instance[1]),
        ("mask terms", torch.stack([out.loss_mask, out.loss_dice]), torch.stack(exact.terms[1:3])),
        ("classification", out.loss_class, exact.terms[0]),
        ("total", out.total, exact.terms[3]),
    ):
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        error = _error(found, wanted) / scale
        assert error <= 10 * unit, (name, error, unit)
        if ordinary:
            record.note(backend, case.dtype, name, error)
    for number, (found, wanted) in enumerate(zip(gradients, exact.gradients, strict=True)):
        masks = number < len(gradients) - len(call.classes)
        assert found.dtype == FLOATS[case.dtype] and bool(found.isfinite().all())
        # Contributions to a pixel cancel: what rounds is their size, at least that of an even spread over the plane.
        spread = sum(case.weights) / max(1, found[0, 0].numel()) if found.numel() else 0.0
        scale = max(float(wanted.abs().max()), spread) if wanted.numel() else 1.0
        error = _error(found, wanted)
        allowed = (20 * unit + 2 * STORED[case.dtype]) * scale + 4 * TINY[case.dtype]
        assert error <= allowed, ("gradient", number, error, allowed)
        if ordinary and scale > TINY[case.dtype] * 1e3:
            record.note(backend, case.dtype, f"gradient of {'masks' if masks else 'classes'}", error / scale)


def _error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.detach().double() - wanted.detach()).abs().max()) if found.numel() else 0.0


def _check_broken(call: Call, out: CriterionOutput, logits: list[Tensor]) -> None:
    """Infinities and NaN show where they are, nowhere else, and every target that can be is matched."""
    case = call.case
    if case.given is None:
        _check_counts(call, out)
    rows, sizes = out.matches.index, list(out.matches.layer_sizes)
    for layer, part, ce in zip(logits, rows.split(sizes), out.per_instance.ce.split(sizes), strict=True):
        whole = layer[part[:, IMAGE], part[:, QUERY]].isfinite().all(-1).all(-1)
        assert bool(ce[whole].isfinite().all())


def _check_counts(call: Call, out: CriterionOutput) -> None:
    case, sizes = call.case, list(out.matches.layer_sizes)
    each = case.queries // case.groups
    for rows in out.matches.index.split(sizes):
        for image, count in enumerate(case.counts):
            own = rows[rows[:, IMAGE] == image]
            assert len(own) == case.groups * min(count, each)
            assert len(own[:, QUERY].unique()) == len(own)
            for first in range(0, case.queries, each):
                taken = own[(own[:, QUERY] >= first) & (own[:, QUERY] < first + each), TARGET]
                assert len(taken) == len(taken.unique()) == min(count, each)


def _costs(call: Call) -> Tensor:
    """The matching cost `[layers, images, queries, targets]` in float64."""
    case = call.case
    class_weight, mask_weight, dice_weight = case.weights
    matcher = HungarianMatcher(
        class_weight=class_weight,
        mask_weight=mask_weight,
        dice_weight=dice_weight,
        num_points=case.sampling.num_points,
        layout=case.sampling.layout,
        classification=case.classification,
        options=MaskOptions(backend="reference", **case.options()),
    )
    classes = torch.stack([layer.detach().double() for layer in call.classes])
    return matcher.costs(classes, [layer.exact().dense().detach() for layer in call.layers], call.step).double()


def _check_matches(call: Call, out: CriterionOutput, costs: Tensor, unit: float) -> None:
    """Each group has its matches, which cost no more than the best ones, in float64."""
    case = call.case
    _check_counts(call, out)
    extra = call.told.get("extra_costs")
    each = case.queries // case.groups
    for depth, rows in enumerate(out.matches.index.split(list(out.matches.layer_sizes))):
        for image, count in enumerate(case.counts):
            cost = costs[depth, image, :, :count]
            if extra is not None:
                cost = cost + extra[image][depth].double()
            if not count:
                continue
            own = rows[rows[:, IMAGE] == image]
            for first in range(0, case.queries, each):
                block = cost[first : first + each]
                best = float(block[linear_sum_assignment(block.numpy())].sum())
                part = own[(own[:, QUERY] >= first) & (own[:, QUERY] < first + each)]
                paid = float(cost[part[:, QUERY], part[:, TARGET]].sum())
                allowed = 20 * unit * max(1.0, float(block.abs().max())) * len(part) * sum(case.weights)
                assert paid <= best + allowed, ("matches", paid, best, allowed)


def _points(call: Call, batch: Batch, module: Any) -> Tensor:
    """The points that a backend draws; they must be the very same for each."""
    sampling = call.case.sampling
    numbers = (sampling.num_points, sampling.num_candidates, sampling.num_uncertain, sampling.layout)
    return batch.points(module, numbers, call.case.padding)


def _definition(call: Call, out: CriterionOutput, points: Tensor) -> Exact:
    """Compute everything at given points by the formulas, and let PyTorch differentiate them."""
    case, step = call.case, call.step
    options, sizes = call.criterion.mask_loss.options, list(out.matches.layer_sizes)
    layers = [layer.exact() for layer in call.layers]
    classes = [layer.detach().double().requires_grad_() for layer in call.classes]
    # Where a point lies on the border of two pixels, the nearest is a matter of rounding: that of the case.
    reading = FLOATS["float64" if case.dtype == "float64" else "float32"]
    reading = torch.float64 if case.target_mode == "bilinear" else reading
    parts = []
    for layer, rows, at in zip(layers, out.matches.index.split(sizes), points.split(sizes), strict=True):
        planes = layer.dense()[rows[:, IMAGE], rows[:, QUERY]]
        z = oracle.read(planes, at, "bilinear", case.padding)
        t, w = reference._targets_at(at, rows, group(step.targets), options.term, reading)
        parts.append(formulas.instance_losses(z, t.double(), w.double(), *options.focal))
    ce, dice = (torch.cat(part) for part in zip(*parts, strict=True))
    weights = torch.ones(len(ce), dtype=torch.float64)
    if case.instance_weights is not None:
        given = call.told["instance_weights"]
        joined = given if isinstance(given, Tensor) else torch.cat(given)
        weights = joined.double()[out.matches.target_rows(step.targets.first_rows)]
    counts = torch.stack([part.sum() for part in weights.split(sizes)]).clamp(min=1)
    loss_ce, loss_dice = (
        torch.stack([part.sum() for part in (term * weights).split(sizes)]) / counts for term in (ce, dice)
    )
    loss_class = torch.stack([_classification(call, *each) for each in zip(classes, _wanted(call, out), strict=True)])
    class_weight, mask_weight, dice_weight = case.weights
    total = (class_weight * loss_class + mask_weight * loss_ce + dice_weight * loss_dice).sum()
    leaves = [leaf for layer in layers for leaf in layer.leaves] + classes
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    terms = [term.detach() for term in (loss_class, loss_ce, loss_dice, total)]
    return Exact(points, terms, gradients, (ce.detach(), dice.detach()))


def _wanted(call: Call, out: CriterionOutput) -> list[Tensor]:
    """The class of each query of each layer, CLASSES for one that is not matched."""
    found = []
    for rows in out.matches.index.split(list(out.matches.layer_sizes)):
        wanted = torch.full((call.case.batch, call.case.queries), CLASSES)
        for _, image, query, target in rows.tolist():
            wanted[image, query] = call.targets[image]["labels"][target]
        found.append(wanted)
    return found


def _classification(call: Call, logits: Tensor, wanted: Tensor) -> Tensor:
    case = call.case
    given = torch.ones(CLASSES) if case.class_weights is None else torch.tensor(case.class_weights)
    if case.classification == "softmax":
        weights = torch.cat([given.double(), torch.tensor([call.criterion.no_object_weight], dtype=torch.float64)])
        nll = cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights, reduction="none").sum()
        total = weights[wanted].sum()
        return nll / total if total > 0 else nll
    hot = torch.nn.functional.one_hot(wanted, CLASSES + 1)[..., :-1].double()
    terms = formulas.focal(logits, hot, 0.25, 2.0) * given.double()
    return terms.sum() / max(1, int((wanted < CLASSES).sum()))
