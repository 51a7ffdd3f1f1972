"""The criterion that Mask2Former, OneFormer, EoMT, EoMT-DINOv3 and VidEoMT share, computed by maskloss.

Transformers has one copy of it in each model's file. `patched_class` derives a class from the copy that a model
uses, with another `forward`: buffers, parameters, hooks, names in a checkpoint and what `isinstance` says all stay.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskloss import _inputs, ops
from maskloss._classification import softmax_loss
from maskloss.errors import reported
from maskloss.factors import MaskFactors
from maskloss.integrations import _targets
from maskloss.integrations.transformers import forward_pass
from maskloss.loss import MaskLoss
from maskloss.matcher import HungarianMatcher, check_predictions
from maskloss.points import PointSampling

_OPERATION = "maskloss in Transformers"


class PointCriterion(nn.Module):
    """What is mixed into a criterion of Transformers; all options are read where Transformers keeps them.

    Attributes:
        maskloss_backend: "reference", "cpu" or "gpu"; None: by device.
        maskloss_sampling: instead of the numbers that Transformers keeps; None: these.
        count_shape: shape of the number of masks, and so of the mask terms: OneFormer has `[1]`, the others `[]`.
        remembers_masks: whether the model calls its criterion several times in one forward pass, with the same masks.
    """

    maskloss_backend: str | None
    maskloss_sampling: PointSampling | None
    count_shape: tuple[int, ...] = ()
    remembers_masks: bool = False
    matcher: Any
    num_points: int
    oversample_ratio: float
    importance_sample_ratio: float
    empty_weight: Tensor
    weight_dict: dict[str, float]

    def layer_losses(
        self,
        mask_logits: Sequence[Tensor | MaskFactors],
        class_logits: Sequence[Tensor],
        mask_labels: Any,
        class_labels: Sequence[Tensor],
    ) -> list[dict[str, Tensor]]:
        """Compute the unweighted terms of each decoder layer.

        Args:
            mask_logits: one `[B, Q, h, w]`, or its factors, per layer.
            class_logits: one `[B, Q, C + 1]` per layer.
            mask_labels: see `pack_masks`.
            class_labels: int64 `[T]` of each image, in [0, C]: a target of class C is matched by its mask, and its
                query learns "no object".

        Returns:
            For each layer "loss_mask", "loss_dice", "loss_cross_entropy", in Transformers' order. All of them are
            tensors of their own: the models multiply them by the weights in place.
        """
        classes, masks = check_predictions(class_logits, mask_logits)
        no_object = classes.shape[3] - 1
        step = _targets.begin(self._packed(mask_labels, masks[0].device), class_labels, [*masks, classes])
        found = self._matcher().match(classes, masks, step, no_object_labels=True)
        count = step.divisor(float(step.targets.num_masks))
        ce_weight, dice_weight = (self.weight_dict.get(name, 1.0) for name in ("loss_mask", "loss_dice"))
        terms = self._mask_loss().layer_terms(masks, found, step, ops.Reduction(ce_weight, dice_weight, count))
        wanted = step.wanted_classes(found, classes.shape[:3], no_object)
        by_class = softmax_loss(classes, wanted, self.empty_weight, step.query_weight(self.empty_weight))
        return [
            {
                "loss_mask": terms.ce[layer].clone().reshape(self.count_shape),
                "loss_dice": terms.dice[layer].clone().reshape(self.count_shape),
                "loss_cross_entropy": by_class[layer].clone(),
            }
            for layer in range(len(masks))
        ]

    def _packed(self, masks: Any, device: torch.device) -> Any:
        """Pack the masks if several calls in one forward pass of the model share them."""
        found = forward_pass.current(self) if self.remembers_masks else None
        return masks if found is None else found.pack(masks, device)

    def _matcher(self) -> HungarianMatcher:
        return HungarianMatcher(
            class_weight=self.matcher.cost_class,
            mask_weight=self.matcher.cost_mask,
            dice_weight=self.matcher.cost_dice,
            num_points=self.matcher.num_points if self.maskloss_sampling is None else self.maskloss_sampling.num_points,
            layout=PointSampling.layout if self.maskloss_sampling is None else self.maskloss_sampling.layout,
            backend=self.maskloss_backend,
        )

    def _mask_loss(self) -> MaskLoss:
        own = (self.num_points, self.oversample_ratio, self.importance_sample_ratio)
        return MaskLoss(sampling=self.maskloss_sampling or PointSampling(*own), backend=self.maskloss_backend)


class UniversalCriterion(PointCriterion):
    """`forward` of `Mask2FormerLoss` and `VideomtLoss`, and of the next class's."""

    @reported(_OPERATION)
    def forward(
        self,
        masks_queries_logits: Tensor | MaskFactors,
        class_queries_logits: Tensor,
        mask_labels: Any,
        class_labels: Sequence[Tensor],
        auxiliary_predictions: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Tensor]:
        """Match all layers and compute their losses.

        Args:
            masks_queries_logits: `[B, Q, h, w]`, or its factors, of the final layer.
            class_queries_logits: `[B, Q, C + 1]`, of the final layer.
            mask_labels: dense `[T, H, W]` of each image, or `MaskTargets` of each image or of the batch, or a pair
                (label map, ids) of each image.
            class_labels: int64 `[T]` of each image, in [0, C].
            auxiliary_predictions: the other layers', under the names of the first two arguments.

        Returns:
            "loss_mask", "loss_dice", "loss_cross_entropy" of the final layer, the same with "_0" ... of the others.
        """
        layers = [*(auxiliary_predictions or ()), _named(masks_queries_logits, class_queries_logits)]
        return _join(self.layer_losses(*_columns(layers), mask_labels, class_labels))


class LayerwiseCriterion(UniversalCriterion):
    """`UniversalCriterion` for models that call it once for each decoder layer: EoMT and EoMT-DINOv3."""

    remembers_masks = True


class OneFormerCriterion(PointCriterion):
    """`forward` of `OneFormerLoss`; the contrastive term, which has no masks, stays that of Transformers."""

    count_shape = (1,)
    loss_contrastive: Any

    @reported(_OPERATION)
    def forward(
        self,
        masks_queries_logits: Tensor | MaskFactors,
        class_queries_logits: Tensor,
        contrastive_queries_logits: Tensor,
        mask_labels: Any,
        class_labels: Sequence[Tensor],
        text_queries: Tensor,
        auxiliary_predictions: Sequence[Mapping[str, Any]] | None = None,
        calculate_contrastive_loss: bool = True,
    ) -> dict[str, Tensor]:
        """Match all layers and compute their losses; arguments as in `UniversalCriterion`, and the contrastive term's.

        Returns:
            What `UniversalCriterion` returns, and "loss_contrastive" if asked for.
        """
        layers = [*(auxiliary_predictions or ()), _named(masks_queries_logits, class_queries_logits)]
        *others, final = self.layer_losses(*_columns(layers), mask_labels, class_labels)
        if calculate_contrastive_loss:
            # In float32 like the other operand, which Transformers upcasts itself.
            final |= self.loss_contrastive(contrastive_queries_logits, _inputs.accumulated(text_queries))
        return _join([*others, final])


def _named(masks: Tensor | MaskFactors, classes: Tensor) -> dict[str, Any]:
    return {"masks_queries_logits": masks, "class_queries_logits": classes}


def _columns(layers: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor | MaskFactors], list[Tensor]]:
    names = ("masks_queries_logits", "class_queries_logits")
    masks, classes = ([layer[name] for layer in layers] for name in names)
    return masks, classes


def _join(layers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    *others, final = layers
    return final | {f"{name}_{i}": value for i, layer in enumerate(others) for name, value in layer.items()}


_MIXINS = {
    "mask2former.modeling_mask2former.Mask2FormerLoss": UniversalCriterion,
    "oneformer.modeling_oneformer.OneFormerLoss": OneFormerCriterion,
    "eomt.modeling_eomt.EomtLoss": LayerwiseCriterion,
    "eomt_dinov3.modeling_eomt_dinov3.EomtDinov3Loss": LayerwiseCriterion,
    "videomt.modeling_videomt.VideomtLoss": UniversalCriterion,
}


@functools.cache
def patched_class(original: type[Any]) -> type[PointCriterion]:
    """Derive from a criterion's class one whose `forward` is maskloss's; `isinstance` still finds the original."""
    path = f"{original.__module__.removeprefix('transformers.models.')}.{original.__name__}"
    name = f"PointSampled{original.__name__}"
    namespace = {"__module__": __name__, "__qualname__": name, "__doc__": f"`{original.__name__}`, by maskloss."}
    return type(name, (_MIXINS[path], original), namespace)


def __getattr__(name: str) -> type[PointCriterion]:
    """Find a derived class by its name, which is how a pickled model finds it in another process."""
    for path in _MIXINS:
        module, _, criterion = path.rpartition(".")
        if name == f"PointSampled{criterion}":
            return patched_class(getattr(importlib.import_module(f"transformers.models.{module}"), criterion))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
