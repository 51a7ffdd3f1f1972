"""The implementations that are compared, each behind the same three calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from maskloss import ClipOptions, MaskCriterion, MaskTargets, PointSampling
from maskloss.errors import require
from maskloss.lab.bench import dense, rf_detr
from maskloss.lab.bench.cases import STRATIFIED, Case
from maskloss.lab.bench.inputs import Inputs
from maskloss.lab.bench.measure import Timed, wrap
from maskloss.outputs import CriterionOutput

ARMS = ("maskloss", "stratified", "stratified/4", "factors", "reference", "transformers", "rfdetr", "dense")


class Arm(Protocol):
    """One implementation of the step."""

    name: str
    # Whether a step may be given bool masks; the others get what `prepare` makes of them before the step.
    takes_masks: bool

    def prepare(self, masks: Sequence[Tensor]) -> Any:
        """Bring bool masks `[T, H, W]` of each image into the form that the loss takes."""

    def forward(self, inputs: Inputs, targets: Any, seed: int) -> Tensor:
        """Compute the weighted total of all layers, ready for `backward`."""

    def split(self, timed: Timed) -> None:
        """Wrap the stages of the step in `timed`, for good: a process that does this measures nothing else after."""


class MasklossArm:
    """This library.

    "reference" has the plain PyTorch backend, all other arms have `backend`, or that of the device. "factors" takes the
    masks of a head as factors; for all others their product is formed first, as a part of the step. Those of
    `STRATIFIED` draw stratified points.
    """

    takes_masks = True

    def __init__(self, case: Case, device: torch.device, name: str = "maskloss", backend: str | None = None) -> None:
        self.name = name
        self.factors = name == "factors"
        self._pack: Callable[..., MaskTargets] | None = None
        layout = "stratified" if name in STRATIFIED else "independent"
        sampling = PointSampling(num_points=case.points // STRATIFIED.get(name, 1), layout=layout)
        backend = "reference" if name == "reference" else backend
        clips = ClipOptions(unit=case.unit) if case.unit else None
        self.criterion = MaskCriterion(case.classes, sampling=sampling, clips=clips, backend=backend).to(device)

    def prepare(self, masks: Sequence[Tensor]) -> MaskTargets:
        """Pack the masks of all images."""
        return MaskTargets.from_masks(masks)

    def compute(self, inputs: Inputs, targets: MaskTargets | Sequence[Tensor], seed: int) -> CriterionOutput:
        """Compute the step, with everything that the criterion returns; bool masks are packed on the way."""
        batch: Any = {"masks": targets, "labels": inputs.labels}
        if not isinstance(targets, MaskTargets) and self._pack is not None:
            batch["masks"] = self._pack(targets)
        elif not isinstance(targets, MaskTargets):
            pairs = zip(targets, inputs.labels, strict=True)
            batch = [{"masks": masks, "labels": labels} for masks, labels in pairs]
        logits = inputs.mask_logits if self.factors else inputs.dense()
        return self.criterion(inputs.class_logits, logits, batch, seed=seed)  # type: ignore[no-any-return]

    def forward(self, inputs: Inputs, targets: MaskTargets | Sequence[Tensor], seed: int) -> Tensor:
        """Compute the weighted total."""
        return self.compute(inputs, targets, seed).total

    def split(self, timed: Timed) -> None:
        """Time packing, the matching costs, the assignment, the mask loss and the classification."""
        self._pack = timed("packing", MaskTargets.from_masks)
        matcher, loss = self.criterion.matcher, self.criterion.mask_loss
        wrap(timed, matcher, "costs", "matching cost")
        wrap(timed, matcher, "match", "assignment")
        wrap(timed, loss, "instance_losses", "mask loss")
        wrap(timed, self.criterion, "_classify", "classification")


class TransformersArm:
    """`Mask2FormerLoss` of Hugging Face Transformers, with Mask2Former's defaults.

    Its targets are dense float masks, as its image processor makes them: that is not part of the step. It does not take
    logits of half precision, so these are converted to float32 in the step, as its users have to.
    """

    name = "transformers"
    takes_masks = False

    def __init__(self, case: Case, device: torch.device) -> None:
        package = require("transformers", "transformers")
        self.module = require("transformers.models.mask2former.modeling_mask2former", "transformers")
        self.weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
        config = package.Mask2FormerConfig(num_labels=case.classes, train_num_points=case.points)
        self.loss = self.module.Mask2FormerLoss(config, self.weights).to(device)

    def prepare(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Make the masks float."""
        return [each.float() for each in masks]

    def terms(self, inputs: Inputs, targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the unweighted terms of all layers."""
        masks, classes = ([_full(each) for each in part] for part in (inputs.dense(), inputs.class_logits))
        earlier = [
            {"masks_queries_logits": mask, "class_queries_logits": label}
            for mask, label in zip(masks[:-1], classes[:-1], strict=True)
        ]
        terms: dict[str, Tensor] = self.loss(masks[-1], classes[-1], targets, inputs.labels, earlier)
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weigh and add up the terms."""
        weighted = [
            weight * value
            for name, value in terms.items()
            for key, weight in self.weights.items()
            if name.startswith(key)
        ]
        return torch.stack(weighted).sum()

    def forward(self, inputs: Inputs, targets: Sequence[Tensor], seed: int) -> Tensor:
        """Compute the weighted total; the points come from torch's default generator, which is seeded."""
        torch.manual_seed(seed)
        return self.total(self.terms(inputs, targets))

    def split(self, timed: Timed) -> None:
        """Time the matching costs, the assignment, the mask loss and the classification."""
        wrap(timed, self.loss.matcher, "forward", "matching cost")
        wrap(timed, self.module, "linear_sum_assignment", "assignment")
        wrap(timed, self.loss, "loss_masks", "mask loss")
        wrap(timed, self.loss, "loss_labels", "classification")


def make_arm(name: str, case: Case, device: torch.device) -> Arm:
    """Build an arm by its name, one of `ARMS`."""
    if case.groups > 1:
        return rf_detr.make_arm(name, case, device)
    if name == "transformers":
        return TransformersArm(case, device)
    if name == "dense":
        return dense.DenseArm(case, device)
    return MasklossArm(case, device, name)


def _full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
