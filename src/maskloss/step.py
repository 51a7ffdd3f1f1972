"""One training step: what every criterion does with its targets, its points, its matches and its counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskloss import _inputs, distributed
from maskloss._abi import IMAGE, LAYER, QUERY
from maskloss._tracing import active
from maskloss.distributed import Group, StepTotals
from maskloss.errors import Cause, describe, reported
from maskloss.layers import Layer
from maskloss.matches import Matches, Pairs, matches_of_layers, wanted_classes
from maskloss.options import TargetRules
from maskloss.points import draw_seed
from maskloss.targets import MaskTargets
from maskloss.targets.clips import planes
from maskloss.targets.collate import WHOLE, Annotated, Batch, check_labels

# The class of a query that is matched with a target of an unknown one; PyTorch's cross-entropy leaves it out too.
IGNORED = -100
_NO_RULES = TargetRules()


class _Told(NamedTuple):
    totals: StepTotals | None = None
    image_ids: Tensor | Sequence[int] | None = None
    seed: Tensor | None = None
    group: Group = None
    unlabeled: Sequence[Any] | None = None
    annotated_classes: Sequence[Any] | None = None


_NOTHING = _Told()
_told: ContextVar[_Told] = ContextVar("_told", default=_NOTHING)
# The same for compiled code, in which torch.compile cannot read a ContextVar, but reads and guards a global.
_told_compiled = _NOTHING


def _current() -> _Told:
    return _told_compiled if torch.compiler.is_compiling() else _told.get()


@contextmanager
def step(
    *,
    totals: StepTotals | None = None,
    image_ids: Tensor | Sequence[int] | None = None,
    seed: int | Tensor | None = None,
    group: Group = None,
    unlabeled: Sequence[Any] | None = None,
    annotated_classes: Sequence[Any] | None = None,
) -> Iterator[None]:
    """Tell all losses inside a block what the training loop knows about the step.

    `MaskLoss`, `MaskCriterion`, `HungarianMatcher`, patched models of Transformers and the classes of
    `maskloss.integrations` use what is told here, as far as a call has no arguments of its own for it: a model's
    `forward` has none for its criterion. Inside another block, what is None is taken from that one.

    Args:
        totals: of the whole step, over its micro-batches and ranks (`step_totals`): the micro-batches then add up to
            the step exactly. Nothing is summed over the ranks any more.
        image_ids: global numbers of the images of this batch, `[B]`, in [0, 2^32); points depend on them.
        seed: 64-bit seed of the points.
        group: the process group over whose ranks to count, always. False: this rank alone. Default None: all ranks,
            and only where a gradient is wanted: under `torch.no_grad()`, or for logits without a graph, a loss is
            normalized by this rank's own instances, so that a rank may compute a validation loss by itself.
        unlabeled: regions of this batch that nobody annotated (see `MaskCriterion.forward`).
        annotated_classes: the classes that were annotated in each image of this batch.

    Yields:
        Nothing.

    Raises:
        MaskLossError: totals that are no `StepTotals`, or something else than a process group of this rank.

    Example:
        >>> from maskloss import MaskCriterion
        >>> criterion, logits = MaskCriterion(1), (torch.zeros(1, 2, 2), torch.zeros(1, 2, 8, 8))
        >>> targets = [{"masks": torch.ones(1, 8, 8), "labels": torch.tensor([0])}]
        >>> with step(totals=StepTotals(instances=4, queries=8), seed=0):
        ...     out = criterion(*logits, targets)
        >>> f"{out.loss_mask.item():.4f}", out.seed
        ('0.1733', tensor(0))
    """
    global _told_compiled
    told = _checked(totals, image_ids, seed, group)._replace(unlabeled=unlabeled, annotated_classes=annotated_classes)
    before = _told.get()
    merged = before._replace(**{name: new for name, new in told._asdict().items() if new is not None})
    _told_compiled, token = merged, _told.set(merged)
    try:
        yield
    finally:
        _told_compiled = before
        _told.reset(token)


@reported("step")
def _checked(
    totals: StepTotals | None, image_ids: Tensor | Sequence[int] | None, seed: int | Tensor | None, group: Group
) -> _Told:
    if totals is not None:
        check_totals(totals)
    distributed.check_group(group)
    # Tensors, because code that was compiled for a number is compiled anew for the next.
    if isinstance(image_ids, (list, tuple)) and all(isinstance(each, int) for each in image_ids):
        image_ids = torch.tensor(image_ids, dtype=torch.int64, device="cpu")
    return _Told(totals, image_ids, None if seed is None else draw_seed(seed), group)


@dataclass(frozen=True)
class Step:
    """The targets of a step, what decides its points, and what its losses are divided by."""

    targets: MaskTargets  # of all images
    labels: Tensor  # int64 `[T_all]`
    image_ids: Tensor  # int64 `[B]`, global numbers of the images
    seed: Tensor  # int64 `[]`
    totals: StepTotals | None = None  # of the whole step, if the training loop has told them
    group: Group = None  # whom to count with: None, all ranks; a process group; False, nobody
    # bool `[T_all]`, whether the class of a target is unknown, and its label means nothing; None: none is
    unknown: Tensor | None = None
    has_mask: Tensor | None = None  # bool `[T_all]`, whether a target has a mask; None: all have
    rules: TargetRules = _NO_RULES  # how targets are understood
    planes: MaskTargets | None = None  # the frames of clips as images, described once; None: not described yet
    annotated: Annotated = WHOLE  # what is said of images that are annotated partly

    @staticmethod
    def begin(
        batch: Batch,
        predictions: Sequence[Layer],
        rules: TargetRules = _NO_RULES,
        *,
        totals: StepTotals | None = None,
        image_ids: Tensor | Sequence[int] | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        group: Group = None,
    ) -> Step:
        """Check the targets, number the images and draw a seed; what is not given is taken from `step(...)`.

        Args:
            batch: targets and labels.
            predictions: all of them; the first is `[B, Q, h, w]`.
            rules: how labels and masks are understood.
            totals: see `step`, also the others.
            image_ids: default: consecutive over the ranks.
            seed: of the points.
            generator: where to draw a seed from. Default: torch's default generator.
            group: default: all ranks if a gradient is wanted, else nobody.
        """
        told, logits = _current(), predictions[0]
        targets, labels, has_mask, annotated = batch
        annotated = annotated._replace(
            unlabeled=told.unlabeled if annotated.unlabeled is None else annotated.unlabeled,
            classes=told.annotated_classes if annotated.classes is None else annotated.classes,
        )
        _inputs.check_targets(targets, logits)
        if logits.ndim == 5 and targets.frames == 1 and not targets.num_masks:
            # Nothing says that images without targets are clips.
            present = torch.ones(0, logits.shape[2], dtype=torch.bool, device=targets.device)
            targets = replace(targets, frames=logits.shape[2], present=present)
        unknown = None
        if rules.ignore_label is not None:
            unknown = labels == rules.ignore_label
            labels = labels.masked_fill(unknown, 0)
        has_mask = masks_that_count(targets, has_mask, rules)
        if totals is not None:
            check_totals(totals)
        totals = told.totals if totals is None else totals
        ids = told.image_ids if image_ids is None else image_ids
        seed = told.seed if seed is None and generator is None else seed
        distributed.check_group(group)
        group = told.group if group is None else group
        if group is None and not _wants_gradient(predictions):
            group = False
        device = logits.device
        numbers = distributed.image_numbers(ids, logits.shape[0], device)
        drawn = draw_seed(seed, generator, device)
        by_plane = planes(targets) if targets.frames > 1 else None
        known = (targets, labels, numbers, drawn, totals, group, unknown, has_mask)
        return Step(*known, rules=rules, planes=by_plane, annotated=annotated)

    def wanted_classes(self, matches: Matches, shape: Sequence[int], no_object: int) -> Tensor:
        """Write the classes that queries should have, int64 `[L, B, Q]`; the unmatched ones get `no_object`.

        IGNORED for those whose target's class is unknown.
        """
        first_rows = self.targets.first_rows
        wanted = wanted_classes(matches, self.labels, first_rows, shape, no_object)
        if self.unknown is None:
            return wanted
        place = matches.index[:, LAYER], matches.index[:, IMAGE], matches.index[:, QUERY]
        found = wanted[place].masked_fill(self.unknown[matches.target_rows(first_rows)], IGNORED)
        return wanted.index_put(place, found)

    def mask_weights(self, matches: Matches, weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the weight of each matched instance in the mask terms, `[N]`: 0 without a mask. None: all are 1.

        Args:
            matches: the instances.
            weights: of the targets, `[T_all]`, or None.
            dtype: of the result.
        """
        if self.has_mask is not None:
            shown = self.has_mask.to(dtype)
            weights = shown if weights is None else weights * shown
        return None if weights is None else weights[matches.target_rows(self.targets.first_rows)]

    def given(self, matches: Matches | Pairs | Sequence[Pairs], layers: int, queries: int, num_classes: int) -> Matches:
        """Take matches that were made elsewhere, for labels below `num_classes`."""
        check_labels(self.labels, num_classes)
        return matches_of_layers(matches, layers, queries, self.targets.num_targets).to(self.labels.device)

    def means(self, counts: Sequence[float | Tensor]) -> list[float | Tensor]:
        """Average counts over the ranks with which this one counts."""
        return distributed.mean_over_ranks(counts, self.device, self.group)

    def divisor(self, count: float | Tensor, *, times: int = 1, weighted: bool = False) -> float | Tensor:
        """Return what sums over instances are divided by: those of the step if they are known, else of all ranks.

        Args:
            count: the number of instances, or the sum of their weights.
            times: how many queries of a layer each target supervises.
            weighted: whether `count` is a sum of weights.

        Returns:
            The mean over the ranks, at least 1.
        """
        if self.totals is None:
            return distributed.at_least_one(self.means([count * times])[0])
        check_weights_of_totals(self.totals, instance_weight="instance_weights" if weighted else None)
        found = self.totals.instance_weight if weighted else self.totals.instances
        return distributed.at_least_one((self.totals.instances if found is None else found) * times)

    def query_weight(self, weights: Tensor) -> Tensor | None:
        """Sum the class weights `[C + 1]` of all queries of the whole step: `[]`.

        Classes weigh alike, unless the totals know what the matched ones weigh, as they must with `ignore_label`. None
        if the training loop has not told the step's totals.
        """
        if self.totals is None:
            return None
        weights = weights.to(self.device)
        matched = self.totals.class_weight
        if matched is None:
            if self.rules.ignore_label is not None:
                check_weights_of_totals(self.totals, class_weight="ignore_label")
            matched = weights[0] * self.totals.instances
        return matched + weights[-1] * (self.totals.queries - self.totals.instances)

    def by_plane(self) -> MaskTargets:
        """Return the targets, those of clips as planes."""
        return planes(self.targets) if self.planes is None else self.planes

    def with_targets(self, targets: MaskTargets, **changes: Any) -> Step:
        """Return the step of other targets, with what else changes."""
        return replace(self, targets=targets, planes=None, **changes)

    def counted(
        self,
        matches: Matches,
        queries: float | Tensor,
        dtype: torch.dtype,
        weights: Tensor | None,
        class_weight: Tensor | None,
    ) -> StepTotals:
        """Count a batch over the ranks; of layers that differ, `[L]`.

        Args:
            matches: the instances.
            queries: how many queries of a layer are taught.
            dtype: of what is summed over the ranks.
            weights: of the instances in the divisor, `[N]`; None: all are 1.
            class_weight: the sum of the weights of the matched queries, `[L]`, if it is asked for.
        """
        instances: float | Tensor = float(matches.layer_sizes[0])
        layers, device = len(matches.layer_sizes), matches.index.device
        if not matches.is_even:
            instances = (matches.index[:, LAYER, None] == torch.arange(layers, device=device)).sum(0, dtype=dtype)
        counts = [instances, queries]
        many = distributed.world_size(self.group) > 1
        if weights is not None or many:
            counts.append(instances if weights is None else matches.by_layer(weights[None])[0])
        if class_weight is not None:
            counts.append(class_weight)
        if many:
            # What is reduced must not depend on this rank's own data: the same numbers, [L] each, in one dtype.
            counts = [
                count.to(dtype).expand(layers)
                if isinstance(count, Tensor)
                else torch.full((layers,), count, dtype=dtype, device=device)
                for count in counts
            ]
        means = self.means(counts)
        by_instance = means[2] if weights is not None or many else None
        return StepTotals(means[0], means[1], by_instance, None if class_weight is None else means[-1])

    @property
    def device(self) -> torch.device:
        """Where sums over the ranks run: with the images' numbers, on the device of the logits."""
        return self.image_ids.device


def check_whole(annotated: Annotated | None = None) -> None:
    """Raise if images are said to be annotated partly where the classification, which that is about, is not ours.

    Default: what the training loop says.
    """
    told = _current()
    said = Annotated(told.unlabeled, told.annotated_classes) if annotated is None else annotated
    for name, value in (("unlabeled", said.unlabeled), ("annotated_classes", said.classes)):
        if value is not None:
            raise Cause(
                f"{name} must be given where maskloss computes the classification",
                "here another criterion does",
                "MaskCriterion and SetCriterion of maskloss.integrations take it",
            )


def masks_that_count(targets: MaskTargets, has_mask: Tensor | None, rules: TargetRules) -> Tensor | None:
    """Join what the targets say of their masks with what is seen of these: bool `[T_all]`, None if all count."""
    if not rules.drop_empty:
        return has_mask
    inhabited = targets.inhabited()
    return inhabited if has_mask is None else has_mask & inhabited


def _wants_gradient(predictions: Sequence[Layer]) -> bool:
    return active() or (torch.is_grad_enabled() and any(each.requires_grad for each in predictions))


def check_totals(totals: StepTotals) -> None:
    """Raise if totals are none, or no numbers."""
    if not isinstance(totals, StepTotals):
        raise Cause("totals must be a StepTotals", f"got {describe(totals)}", "step_totals makes them")
    for name, count in totals._asdict().items():
        if count is not None or name in ("instances", "queries"):
            _inputs.check_count(f"totals.{name}", count)


# The option by which totals have a weight, in the ordinary case, and how to count it.
_WEIGHTS_OF_TOTALS = {
    "instance_weight": ("instance_weights", "step_totals takes instance_weights: 0 for a target without a mask"),
    "class_weight": ("class_weights", "step_totals takes labels along with class_weights or ignore_label"),
}


def check_weights_of_totals(totals: StepTotals, **used_by: str | None) -> None:
    """Raise if totals have a weight that a call does not use, or lack one; by field, the option that uses it."""
    for field, option in used_by.items():
        value, (usual, hint) = getattr(totals, field), _WEIGHTS_OF_TOTALS[field]
        if (option is None) != (value is None):
            used = "nothing here weighs by it" if option is None else f"{option} needs it"
            raise Cause(f"totals.{field} belongs to {option or usual}", f"{used}, and it is {value!r}", hint)


def of_groups(totals: StepTotals, groups: int) -> StepTotals:
    """Count each target once for every group of queries."""
    if groups > 1 and totals.class_weight is not None:
        raise Cause(
            "totals cannot weigh classes where queries are matched in groups",
            f"groups={groups}, totals.class_weight={totals.class_weight!r}",
            "leave totals out, or class_weights",
        )
    weight = totals.instance_weight
    return totals._replace(
        instances=totals.instances * groups, instance_weight=None if weight is None else weight * groups
    )
