"""The criterion that Mask2Former, OneFormer, EoMT, EoMT-DINOv3 and VidEoMT share, computed by maskloss.

Transformers has one copy of it in each model's file. `swap` derives a class from the copy that a model uses, with
another `forward`: buffers, parameters, hooks, names in a checkpoint and what `isinstance` says all stay.

A subclass of such a criterion, as EoMT's own code has it, keeps what it overrides. Its `forward` is called; what
Transformers' methods did below it, the matching and the mask terms of one layer, is computed by maskloss.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskloss import _inputs, distributed, ops
from maskloss._classification import partial_of, softmax_loss
from maskloss.errors import Cause, reported
from maskloss.factors import MaskFactors
from maskloss.integrations import _targets
from maskloss.integrations.layerwise import layer_loss
from maskloss.integrations.transformers import forward_pass
from maskloss.loss import MaskLoss
from maskloss.matcher import HungarianMatcher, check_predictions
from maskloss.matches import Pairs
from maskloss.options import TargetRules
from maskloss.points import PointSampling
from maskloss.step import check_whole, masks_that_count
from maskloss.targets import MaskTargets

_OPERATION = "maskloss in Transformers"
# What the library's own checks call the arguments.
_NAMES = {"class_logits": "class_queries_logits", "mask_logits": "masks_queries_logits"}


class PointCriterion(nn.Module):
    """What is mixed into a criterion of Transformers; all options are read where Transformers keeps them."""

    maskloss_backend: str | None  # "reference", "cpu" or "gpu"; None: by device
    maskloss_sampling: PointSampling | None  # instead of the numbers that Transformers keeps; None: these
    maskloss_scale_by_ranks: bool  # whether the mask terms are those of Transformers under data parallelism
    maskloss_rules: TargetRules  # how targets are understood
    # shape of the number of masks, and so of the mask terms: OneFormer has `[1]`, the others `[]`
    count_shape: tuple[int, ...] = ()
    # whether the model calls its criterion several times in one forward pass, with the same masks
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
        """Compute the unweighted terms of each decoder layer, from `[B, Q, h, w]` or factors, and `[B, Q, C + 1]`.

        `mask_labels` are what `pack_masks` takes; a target of class C is matched by its mask, and its query learns "no
        object". The terms are in Transformers' order, and tensors of their own: the models multiply them by the weights
        in place.
        """
        if not torch.compiler.is_compiling():
            _reject_methods_of(self)
        classes, masks = check_predictions(class_logits, mask_logits)
        no_object = classes.shape[3] - 1
        packed = _packed(self, mask_labels, masks[0].device)
        given = packed, class_labels, [*masks, classes], self.maskloss_rules
        step = _targets.begin(*given, no_object=no_object, classifies=True)
        matcher = _matcher_of(self.matcher, self)
        found = matcher.match(classes, masks, step)
        count = step.divisor(float(step.targets.num_masks))
        if self.maskloss_scale_by_ranks:
            # Transformers divides the mean over the ranks by their number once more.
            count = distributed.at_least_one(count / distributed.world_size(step.group))
        ce_weight, dice_weight = (self.weight_dict.get(name, 1.0) for name in ("loss_mask", "loss_dice"))
        shown = step.mask_weights(found, None, classes.dtype)
        terms = self._mask_loss().layer_terms(masks, found, step, ops.Reduction(ce_weight, dice_weight, count, shown))
        wanted = step.wanted_classes(found, classes.shape[:3], no_object)
        partial = partial_of(step, masks, no_object, matcher.num_points, matcher.layout, softmax=True)
        by_class = softmax_loss(classes, wanted, self.empty_weight, step.query_weight(self.empty_weight), partial)
        return [
            {
                "loss_mask": terms.ce[layer].clone().reshape(self.count_shape),
                "loss_dice": terms.dice[layer].clone().reshape(self.count_shape),
                "loss_cross_entropy": by_class[layer].clone(),
            }
            for layer in range(len(masks))
        ]

    def _mask_loss(self) -> MaskLoss:
        own = (self.num_points, self.oversample_ratio, self.importance_sample_ratio)
        return MaskLoss(sampling=self.maskloss_sampling or PointSampling(*own), backend=self.maskloss_backend)


class UniversalCriterion(PointCriterion):
    """`forward` of `Mask2FormerLoss` and `VideomtLoss`, and of the next class's."""

    @reported(_OPERATION, _NAMES)
    def forward(
        self,
        masks_queries_logits: Tensor | MaskFactors,
        class_queries_logits: Tensor,
        mask_labels: Any,
        class_labels: Sequence[Tensor],
        auxiliary_predictions: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Tensor]:
        """Match all layers and compute their losses: those of the final one, and with "_0" ... those of the others.

        `auxiliary_predictions` are the others', under the names of the first two arguments.
        """
        layers = [*(auxiliary_predictions or ()), _named(masks_queries_logits, class_queries_logits)]
        return _join(self.layer_losses(*_columns(layers), mask_labels, class_labels))


class LayerwiseCriterion(UniversalCriterion):
    """`UniversalCriterion` for models that call it once for each decoder layer: EoMT and EoMT-DINOv3."""

    remembers_masks = True


class LayerMethods(PointCriterion):
    """`loss_masks` of the criteria, for subclasses: their `forward`, or Transformers', calls it for each layer."""

    @reported(_OPERATION, _NAMES)
    def loss_masks(
        self,
        masks_queries_logits: Tensor | MaskFactors,
        mask_labels: Any,
        indices: Pairs,
        num_masks: float | Tensor,
    ) -> dict[str, Tensor]:
        """Compute the mask terms of one layer, divided by `num_masks`."""
        check_whole()
        masks = _packed(self, mask_labels, masks_queries_logits.device)
        has_mask = masks_that_count(masks, None, self.maskloss_rules)
        ce, dice = layer_loss(self._mask_loss(), masks_queries_logits, masks, indices, num_masks, has_mask)
        return {"loss_mask": ce.reshape(self.count_shape), "loss_dice": dice.reshape(self.count_shape)}


class OneFormerMethods(LayerMethods):
    """`LayerMethods` for `OneFormerLoss`."""

    count_shape = (1,)


class Scope(nn.Module):
    """What comes before a subclass: the masks that its `forward` is given are packed once."""

    matcher: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the subclass's `forward`."""
        with forward_pass.opened(self, self.matcher):
            return super().forward(*args, **kwargs)


class PointMatcher(nn.Module):
    """`forward` of Transformers' matchers, for criteria that call them layer by layer."""

    maskloss_backend: str | None
    maskloss_sampling: PointSampling | None
    maskloss_rules: TargetRules

    @reported(_OPERATION, _NAMES)
    def forward(
        self,
        masks_queries_logits: Tensor | MaskFactors,
        class_queries_logits: Tensor,
        mask_labels: Any,
        class_labels: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Match one layer: (queries, targets) of each image, on the CPU."""
        classes, masks = check_predictions(class_queries_logits, masks_queries_logits)
        targets = _packed(self, mask_labels, masks[0].device)
        no_object = classes.shape[3] - 1
        step = _targets.begin(targets, class_labels, [*masks, classes], self.maskloss_rules, no_object=no_object)
        return _matcher_of(self, self).match(classes, masks, step).to("cpu").pairs()


def _packed(module: Any, masks: Any, device: torch.device) -> MaskTargets:
    found, void = forward_pass.current(module), module.maskloss_rules.ignore_value
    return _targets.pack_masks(masks, device, void) if found is None else found.pack(masks, device, void)


def _matcher_of(theirs: Any, options: PointCriterion | PointMatcher) -> HungarianMatcher:
    """Make our matcher with the weights of theirs."""
    sampling = options.maskloss_sampling
    return HungarianMatcher(
        class_weight=theirs.cost_class,
        mask_weight=theirs.cost_mask,
        dice_weight=theirs.cost_dice,
        num_points=theirs.num_points if sampling is None else sampling.num_points,
        layout=PointSampling.layout if sampling is None else sampling.layout,
        backend=options.maskloss_backend,
    )


class OneFormerCriterion(PointCriterion):
    """`forward` of `OneFormerLoss`; the contrastive term, which has no masks, stays that of Transformers."""

    count_shape = (1,)
    loss_contrastive: Any

    @reported(_OPERATION, _NAMES)
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
        """Match all layers and compute their losses, and on request the contrastive one."""
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


# By the class that Transformers has: with all layers at once, and layer by layer under a subclass.
_MIXINS = {
    "mask2former.modeling_mask2former.Mask2FormerLoss": (UniversalCriterion, LayerMethods),
    "oneformer.modeling_oneformer.OneFormerLoss": (OneFormerCriterion, OneFormerMethods),
    "eomt.modeling_eomt.EomtLoss": (LayerwiseCriterion, LayerMethods),
    "eomt_dinov3.modeling_eomt_dinov3.EomtDinov3Loss": (LayerwiseCriterion, LayerMethods),
    "videomt.modeling_videomt.VideomtLoss": (UniversalCriterion, LayerMethods),
}
# What `loss_masks` of Transformers calls and ours does not.
_NOT_CALLED = ("sample_points_using_uncertainty", "calculate_uncertainty", "_pad_images_to_max_in_batch")


def _path(kind: type[Any]) -> str:
    return f"{kind.__module__.removeprefix('transformers.models.')}.{kind.__name__}"


def original_class(kind: type[Any]) -> type[Any] | None:
    """Find the criterion of Transformers that a class is, or derives from."""
    return next((each for each in kind.__mro__ if _path(each) in _MIXINS), None)


def _overridden(module: nn.Module, original: type[Any]) -> list[str]:
    """List what a subclass, or the object itself, has in place of methods of Transformers' class."""
    kind = type(module)
    above = [*(vars(each) for each in kind.__mro__[: kind.__mro__.index(original)]), vars(module)]
    return sorted(
        name for name, value in vars(original).items() if callable(value) and any(name in each for each in above)
    )


def _original_matcher(matcher: object) -> type[Any] | None:
    theirs = {path.replace("Loss", "HungarianMatcher") for path in _MIXINS}
    return next((each for each in type(matcher).__mro__ if _path(each) in theirs), None)


def swap(criterion: nn.Module, options: Mapping[str, Any]) -> None:
    """Give a criterion of Transformers, or of a subclass, maskloss's methods; `restore` takes them back.

    Args:
        criterion: it.
        options: values of `backend`, `sampling` and `scale_by_ranks`.

    Raises:
        Cause: a subclass overrides what would not be called any more, or neither its matching nor its mask terms would
            be computed here.
    """
    kind: Any = type(criterion)
    original: Any = original_class(kind)
    overridden = [name for name in _overridden(criterion, original) if name != "__init__"]
    matcher: Any = vars(criterion)["_modules"].get("matcher")
    same_matcher = type(matcher) is _original_matcher(matcher)
    at_once = not overridden and same_matcher
    name = describe_class(criterion)
    ignored = [each for each in overridden if each in _NOT_CALLED]
    if ignored:
        raise Cause(
            "a subclass must not override what is not called any more",
            f"{name} has {', '.join(ignored)}",
            "sampling= of patch says how points are drawn",
        )
    if not at_once and options["rules"].ignore_label is not None:
        raise Cause(
            "ignore_label needs the classification to be computed here",
            f"{name} overrides {', '.join(overridden) or 'the matcher'}, and so Transformers computes it",
            "give such targets a class, or leave them out",
        )
    if not same_matcher and "loss_masks" in overridden and not _calls_super(criterion.loss_masks):
        raise Cause(
            "matching or mask terms of a subclass must be Transformers' own",
            f"{name} has loss_masks, and its matcher is {describe_class(matcher)}: nothing is left to compute",
            "LayerMasks of maskloss.integrations.layerwise can take the place of loss_masks",
        )
    _swap_class(criterion, _derived(kind, at_once), options)
    if not at_once and same_matcher:
        _swap_class(matcher, _derived_matcher(cast("Any", type(matcher))), options)


def _reject_methods_of(criterion: PointCriterion) -> None:
    """Raise if an object was given methods after it was patched: all layers are computed at once, without them."""
    given = [name for name in vars(criterion) if name != "forward" and callable(getattr(type(criterion), name, None))]
    if given:
        raise Cause(
            "methods must be replaced before the criterion is patched",
            f"{', '.join(given)} would not be called",
            "unpatch, replace, and patch again",
        )


def _calls_super(method: Any) -> bool:
    return "__class__" in getattr(getattr(method, "__code__", None), "co_freevars", ())


def describe_class(value: object) -> str:
    """Name the class of an object in full."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _swap_class(module: Any, kind: type[Any], options: Mapping[str, Any]) -> None:
    # The object stays, with its buffers, parameters and hooks; only its methods change.
    module.__class__ = kind
    for name, value in options.items():
        setattr(module, f"maskloss_{name}", value)


def restore(criterion: nn.Module) -> None:
    """Give a criterion and its matcher their own classes back."""
    for module in (criterion, vars(criterion)["_modules"].get("matcher")):
        if isinstance(module, (PointCriterion, PointMatcher)):
            module.__class__ = type(module).maskloss_original  # type: ignore[union-attr]
            for name in [each for each in vars(module) if each.startswith("maskloss_")]:
                delattr(module, name)


@functools.cache
def _derived(kind: Any, at_once: bool) -> Any:
    """Derive from a criterion's class one with maskloss's methods; `isinstance` still finds the original."""
    original: Any = original_class(kind)
    fused, layerwise = _MIXINS[_path(original)]
    if at_once:
        return _make(kind, (fused, kind))
    # Between the subclass and Transformers' class: what the subclass calls by `super()` is ours.
    below = type(f"PointSampled{original.__name__}", (layerwise, original), {})
    return _make(kind, (Scope, below) if kind is original else (Scope, kind, below))


@functools.cache
def _derived_matcher(kind: Any) -> Any:
    return _make(kind, (PointMatcher, kind))


def _make(kind: type[Any], bases: tuple[type[Any], ...]) -> type[Any]:
    name = f"PointSampled{kind.__name__}"
    namespace = {"__module__": __name__, "__qualname__": name, "__doc__": f"`{kind.__name__}`, by maskloss."}
    return type(name, bases, namespace | {"maskloss_original": kind, "__reduce_ex__": _reduce})


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the class that can be imported; the derived one is made again."""
    state: Any = nn.Module.__reduce_ex__(self, protocol)[2:]
    return (_empty, (type(self).maskloss_original, Scope not in type(self).__mro__), *state)


def _empty(kind: Any, at_once: bool) -> Any:
    derived = _derived_matcher(kind) if original_class(kind) is None else _derived(kind, at_once)
    return derived.__new__(derived)
