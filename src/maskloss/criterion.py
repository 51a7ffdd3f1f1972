"""The whole criterion: match once, then classification and mask loss over all decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from maskloss import _inputs, distributed
from maskloss._collate import Targets, collate
from maskloss.distributed import StepTotals
from maskloss.errors import Cause, describe, reported
from maskloss.loss import InstanceLosses, MaskLoss
from maskloss.matches import Matches, wanted_classes
from maskloss.matching import HungarianMatcher, check_predictions
from maskloss.points import PointSampling, draw_seed


class CriterionOutput(NamedTuple):
    """What `MaskCriterion` returns; L decoder layers, the last of them final.

    Attributes:
        total: `[]`, the weighted sum of all terms of all layers.
        loss_class: `[L]`, classification, unweighted.
        loss_mask: `[L]`, cross-entropy of the masks, unweighted.
        loss_dice: `[L]`, Dice, unweighted.
        per_instance: both mask terms of every instance, in the order of `matches.index`.
        matches: which query goes with which target.
        seed: int64 `[]`, the seed of the points.
    """

    total: Tensor
    loss_class: Tensor
    loss_mask: Tensor
    loss_dice: Tensor
    per_instance: InstanceLosses
    matches: Matches
    seed: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        """Name the unweighted terms as Mask2Former does: loss_mask for the final layer, loss_mask_0 … before it."""
        terms = {"loss_class": self.loss_class, "loss_mask": self.loss_mask, "loss_dice": self.loss_dice}
        final = {name: values[-1] for name, values in terms.items()}
        layers = range(len(self.loss_class) - 1)
        return final | {f"{name}_{layer}": values[layer] for layer in layers for name, values in terms.items()}


class MaskCriterion(nn.Module):
    """The training loss of a query model: matching, classification and mask loss, for every decoder layer.

        total = sum over layers of class_weight * L_class + ce_weight * L_ce + dice_weight * L_dice

    `L_class` is the cross-entropy over C + 1 classes, in which unmatched queries have the class "no object" and the
    weight `no_object_weight`; it is divided by the sum of the weights. `L_ce` and `L_dice` are those of `MaskLoss`,
    over the matched instances, divided by their number over all ranks.

    Args:
        num_classes: C, without "no object".
        class_weight: weight of the classification, at least 0. Default 2.
        ce_weight: weight of the masks' cross-entropy. Default 5.
        dice_weight: weight of Dice. Default 5.
        no_object_weight: weight of "no object" in the classification, at least 0. Default 0.1.
        sampling: numbers of points; the default matcher takes `num_points` from it. Default `PointSampling()`.
        matcher: how to match. Default: `HungarianMatcher` with the weights and options given here.
        padding_mode: see `MaskLoss`.
        target_mode: see `MaskLoss`.
        focal_alpha: see `MaskLoss`.
        focal_gamma: see `MaskLoss`.
        backend: see `MaskLoss`.

    Raises:
        MaskLossError: an option outside its range.

    Source:
        Mask2Former (Cheng et al., 2022), section 3.2.2 and its weights. Differences: instances are counted as matched
        ones (it counts targets), the classification is normalised over all ranks (it is over one rank there), and
        the layers share the matcher's points.

    Example:
        >>> criterion = MaskCriterion(num_classes=3, sampling=PointSampling(num_points=64))
        >>> masks = torch.zeros(1, 32, 32, dtype=torch.bool)
        >>> masks[0, 8:24, 8:24] = True
        >>> targets = [{"masks": masks, "labels": torch.tensor([2])}]
        >>> class_logits, mask_logits = torch.zeros(1, 5, 4), torch.zeros(1, 5, 16, 16)
        >>> out = criterion(class_logits, mask_logits, targets, seed=0)
        >>> {name: round(value.item(), 4) for name, value in out.as_dict().items()}
        {'loss_class': 1.3863, 'loss_mask': 0.6931, 'loss_dice': 0.6575}
    """

    @reported("MaskCriterion")
    def __init__(
        self,
        num_classes: int,
        *,
        class_weight: float = _inputs.CLASS_WEIGHT,
        ce_weight: float = _inputs.CE_WEIGHT,
        dice_weight: float = _inputs.DICE_WEIGHT,
        no_object_weight: float = 0.1,
        sampling: PointSampling | None = None,
        matcher: HungarianMatcher | None = None,
        padding_mode: str = "zeros",
        target_mode: str = "bilinear",
        focal_alpha: float | None = None,
        focal_gamma: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise Cause("num_classes must be a positive integer", f"got {num_classes!r}", "do not count 'no object'")
        _inputs.check_weight("class_weight", class_weight)
        _inputs.check_weight("no_object_weight", no_object_weight)
        sampling = _inputs.check_sampling(sampling)
        options = {
            "padding_mode": padding_mode,
            "target_mode": target_mode,
            "focal_alpha": focal_alpha,
            "focal_gamma": focal_gamma,
            "backend": backend,
        }
        self.num_classes, self.class_weight = num_classes, float(class_weight)
        self.no_object_weight = float(no_object_weight)
        self.mask_loss = MaskLoss(ce_weight=ce_weight, dice_weight=dice_weight, sampling=sampling, **options)  # type: ignore[arg-type]
        if matcher is not None and matcher.classification != "softmax":
            raise Cause(
                'the matcher must have classification="softmax"',
                f"it has {matcher.classification!r}, and this criterion classifies with a softmax",
                "maskloss.integrations.detr has a criterion for classes with sigmoids",
            )
        self.matcher = matcher or HungarianMatcher(
            class_weight=class_weight,
            ce_weight=ce_weight,
            dice_weight=dice_weight,
            num_points=sampling.num_points,
            **options,  # type: ignore[arg-type]
        )

    @reported("MaskCriterion")
    def forward(
        self,
        class_logits: Tensor | Sequence[Tensor],
        mask_logits: Tensor | Sequence[Tensor],
        targets: Targets,
        *,
        totals: StepTotals | None = None,
        image_ids: Tensor | Sequence[int] | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> CriterionOutput:
        """Compute all losses of a step.

        Args:
            class_logits: `[B, Q, C + 1]`, or a sequence over decoder layers, the final one last.
            mask_logits: `[B, Q, h, w]`, or a sequence over decoder layers; h and w may differ by layer.
            targets: one dict per image: "labels" int64 `[T]` in [0, C), and "masks": a `MaskTargets` of the image,
                dense `[T, H, W]`, or a label map `[H, W]` along with "ids". Or, already collated, one dict with
                "masks": the `MaskTargets` of the batch, and "labels": a list of `[T]`.
            totals: the step's totals, for gradient accumulation (`step_totals`). Default: this batch over all ranks.
            image_ids: global numbers of the images, `[B]`, in [0, 2^32); points depend on them. Default: rank * B + b.
            seed: 64-bit seed of the points.
            generator: where to draw a seed from. Default: torch's default generator.

        Returns:
            The weighted total, the unweighted terms of each layer, and the matches. Gradients flow to both logits.

        Raises:
            MaskLossError: wrong rank, dtype or device, numbers that do not pair up, or labels outside the classes.
        """
        classes, logits = check_predictions(class_logits, mask_logits)
        batch, queries, outputs = classes[0].shape
        if outputs != self.num_classes + 1:
            raise Cause(
                f"class_logits must have num_classes + 1 = {self.num_classes + 1} entries",
                f"got {outputs}",
                "num_classes does not count 'no object', the class logits do",
            )
        packed, labels = collate(targets)
        _inputs.check_targets(packed, logits[0])
        _check_totals(totals)
        drawn = draw_seed(seed, generator, logits[0].device)
        numbers = distributed.image_numbers(image_ids, batch, logits[0].device)
        stacked = _inputs.stack(classes)
        stacked = stacked if stacked.dtype == torch.float64 else stacked.float()
        matches = self.matcher.match(stacked, logits, packed, labels, numbers, drawn)
        if totals is None:
            counts = [float(matches.layer_sizes[0]), float(batch * queries)]
            totals = StepTotals(*distributed.mean_over_ranks(counts, logits[0].device))
        losses = self.mask_loss.instance_losses(logits, matches, packed, numbers, drawn)
        divisor = distributed.at_least_one(totals.instances)
        # Both terms of all layers at once: on a GPU every small operation costs a launch.
        ce, dice = (_inputs.stack(losses).view(2, len(logits), -1).sum(2) / divisor).unbind()
        wanted = wanted_classes(matches, labels, packed.first_rows, stacked.shape[:3], self.num_classes)
        loss_class = self._classify(stacked, wanted, totals)
        weighted = torch.add(self.class_weight * loss_class, ce, alpha=self.mask_loss.ce_weight)
        total = torch.add(weighted, dice, alpha=self.mask_loss.dice_weight).sum()
        return CriterionOutput(total, loss_class, ce, dice, losses, matches, drawn)

    def _classify(self, class_logits: Tensor, wanted: Tensor, totals: StepTotals) -> Tensor:
        """Compute the classification of each layer, `[L]`, from `[L, B, Q, C + 1]` and the classes `[L, B, Q]`."""
        # Made here and not kept as a buffer, which `module.half()` would round.
        weights = pad(class_logits.new_ones(self.num_classes), (0, 1), value=self.no_object_weight)
        nll = cross_entropy(class_logits.flatten(0, 2), wanted.flatten(), weights, reduction="none")
        # The sum of the weights, known without asking the device: matched queries have 1, the others no_object_weight.
        weight = totals.instances + self.no_object_weight * (totals.queries - totals.instances)
        if isinstance(weight, Tensor):
            weight = weight.clamp(min=torch.finfo(weight.dtype).tiny)
        elif weight == 0:
            weight = 1.0
        return nll.view(len(class_logits), -1).sum(1) / weight

    def extra_repr(self) -> str:
        """Show the options in `print(module)`."""
        weights = f"class_weight={self.class_weight}, no_object_weight={self.no_object_weight}"
        return f"num_classes={self.num_classes}, {weights}"

    def describe(self, *, lang: str = "en", format: str = "text") -> str:  # noqa: A002
        """Write the paragraph that describes this in a paper; see `methods.describe`."""
        from maskloss import methods

        return methods.describe(self, lang=lang, format=format)


def _check_totals(totals: StepTotals | None) -> None:
    if totals is None:
        return
    if not isinstance(totals, StepTotals):
        raise Cause("totals must be a StepTotals", f"got {describe(totals)}", "step_totals makes them")
    for name, count in totals._asdict().items():
        if not isinstance(count, Tensor):
            _inputs.check_count(f"totals.{name}", count)
