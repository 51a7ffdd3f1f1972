"""The criterion that Mask2Former, OneFormer, EoMT, EoMT-DINOv3 and VidEoMT share, computed by maskloss.

Transformers has one copy of it in each model's file. `swap` derives a class from the copy that a model uses, with
another `forward`: buffers, parameters, hooks, names in a checkpoint and what `isinstance` says all stay.

A subclass of such a criterion, as EoMT's own code has it, keeps what it overrides. Its `forward` is called; what
Transformers' methods did below it, the matching and the mask terms of one layer, is computed by maskloss.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from maskloss import _inputs, distributed, ops
from maskloss._classification import partial_of, softmax_loss
from maskloss.errors import Cause, reported
from maskloss.integrations import _targets
from maskloss.integrations.layerwise import layer_loss
from maskloss.integrations.transformers import forward_pass
from maskloss.layers import Layer
from maskloss.loss import MaskLoss
from maskloss.matcher import HungarianMatcher, check_predictions
from maskloss.matches import Pairs
from maskloss.options import TargetRules
from maskloss.points import PointSampling
from maskloss.step import Step, check_whole, masks_that_count
from maskloss.targets import MaskTargets

_OPERATION = "maskloss in Transformers"
# What the library's own checks call the arguments.
_NAMES = {"class_logits": "class_queries_logits", "mask_logits": "masks_queries_logits"}


class Options(NamedTuple):
    """What `patch` was told (see there)."""

    backend: str | None
    sampling: PointSampling | None
    factors: bool
    scale_by_ranks: bool
    rules: TargetRules


class PointCriterion(nn.Module):
    """What is mixed into a criterion of Transformers; all other options are read where Transformers keeps them."""

    maskloss_options: Options
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
        mask_logits: Layer,
        class_logits: Tensor,
        others: Sequence[Mapping[str, Any]] | None,
        mask_labels: Any,
        class_labels: Sequence[Tensor],
        more: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Compute the unweighted terms of the final layer, and with "_0" ... of `others`, which hold the same by name.

        `mask_labels` are what `pack_masks` takes; a target of class C is matched by its mask, and its query learns "no
        object". `more` are other terms of the final layer. All are in Transformers' order, and tensors of their own:
        the models multiply them by the weights in place.
        """
        layers = [*(others or ()), {"masks_queries_logits": mask_logits, "class_queries_logits": class_logits}]
        if not torch.compiler.is_compiling():
            _reject_methods_of(self)
        names = ("masks_queries_logits", "class_queries_logits")
        logits = [[layer[name] for layer in layers] for name in names]
        classes, masks, step = _begin(self, logits[0], logits[1], mask_labels, class_labels, classifies=True)
        no_object = classes.shape[3] - 1
        matcher = _matcher_of(self.matcher, self.maskloss_options)
        matches = matcher.match(classes, masks, step)
        count = step.divisor(float(step.targets.num_masks))
        if self.maskloss_options.scale_by_ranks:
            # Transformers divides the mean over the ranks by their number once more.
            count = distributed.at_least_one(count / distributed.world_size(step.group))
        ce_weight, dice_weight = (self.weight_dict.get(name, 1.0) for name in ("loss_mask", "loss_dice"))
        shown = step.mask_weights(matches, None, classes.dtype)
        terms = self._mask_loss().layer_terms(masks, matches, step, ops.Reduction(ce_weight, dice_weight, count, shown))
        wanted = step.wanted_classes(matches, classes.shape[:3], no_object)
        partial = partial_of(step, masks, no_object, matcher.num_points, matcher.layout, softmax=True)
        by_class = softmax_loss(classes, wanted, self.empty_weight, step.query_weight(self.empty_weight), partial)
        found: dict[str, Tensor] = {}
        for layer, suffix in [(-1, ""), *((layer, f"_{layer}") for layer in range(len(masks) - 1))]:
            found[f"loss_mask{suffix}"] = terms.ce[layer].clone().reshape(self.count_shape)
            found[f"loss_dice{suffix}"] = terms.dice[layer].clone().reshape(self.count_shape)
            found[f"loss_cross_entropy{suffix}"] = by_class[layer].clone()
            found |= more if layer == -1 else {}
        return found

    def _mask_loss(self) -> MaskLoss:
        own = (self.num_points, self.oversample_ratio, self.importance_sample_ratio)
        options = self.maskloss_options
        return MaskLoss(sampling=options.sampling or PointSampling(*own), backend=options.backend)


class UniversalCriterion(PointCriterion):
    """`forward` of `Mask2FormerLoss` and `VideomtLoss`, and of the next class's."""

    @reported(_OPERATION, _NAMES)
    def forward(
        self,
        masks_queries_logits: Layer,
        class_queries_logits: Tensor,
        mask_labels: Any,
        class_labels: Sequence[Tensor],
        auxiliary_predictions: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Tensor]:
        """Match all layers and compute their losses (see `layer_losses`)."""
        layers = masks_queries_logits, class_queries_logits, auxiliary_predictions
        return self.layer_losses(*layers, mask_labels, class_labels, {})


class LayerwiseCriterion(UniversalCriterion):
    """`UniversalCriterion` for models that call it once for each decoder layer: EoMT and EoMT-DINOv3."""

    remembers_masks = True


class LayerMethods(PointCriterion):
    """`loss_masks` of the criteria, for subclasses: their `forward`, or Transformers', calls it for each layer."""

    @reported(_OPERATION, _NAMES)
    def loss_masks(
        self, masks_queries_logits: Layer, mask_labels: Any, indices: Pairs, num_masks: float | Tensor
    ) -> dict[str, Tensor]:
        """Compute the mask terms of one layer, divided by `num_masks`."""
        check_whole()
        masks = _packed(self, mask_labels, masks_queries_logits.device)
        has_mask = masks_that_count(masks, None, self.maskloss_options.rules)
        ce, dice = layer_loss(self._mask_loss(), masks_queries_logits, masks, indices, num_masks, has_mask)
        return {"loss_mask": ce.reshape(self.count_shape), "loss_dice": dice.reshape(self.count_shape)}


class Scope(nn.Module):
    """What comes before a subclass: the masks that its `forward` is given are packed once."""

    matcher: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the subclass's `forward`."""
        with forward_pass.opened(self, self.matcher):
            return super().forward(*args, **kwargs)


class PointMatcher(nn.Module):
    """`forward` of Transformers' matchers, for criteria that call them layer by layer."""

    maskloss_options: Options

    @reported(_OPERATION, _NAMES)
    def forward(
        self,
        masks_queries_logits: Layer,
        class_queries_logits: Tensor,
        mask_labels: Any,
        class_labels: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Match one layer: (queries, targets) of each image, on the CPU."""
        given = masks_queries_logits, class_queries_logits, mask_labels, class_labels
        classes, masks, step = _begin(self, *given, classifies=False)
        return _matcher_of(self, self.maskloss_options).match(classes, masks, step).to("cpu").pairs()


def _begin(
    module: PointCriterion | PointMatcher,
    mask_logits: Any,
    class_logits: Any,
    mask_labels: Any,
    class_labels: Sequence[Tensor],
    *,
    classifies: bool,
) -> tuple[Tensor, list[Layer], Step]:
    """Check the predictions of all layers, and begin a step with their targets."""
    classes, masks = check_predictions(class_logits, mask_logits)
    packed, predictions = _packed(module, mask_labels, masks[0].device), [*masks, classes]
    given = packed, class_labels, predictions, module.maskloss_options.rules
    return classes, masks, _targets.begin(*given, no_object=classes.shape[3] - 1, classifies=classifies)


def _packed(module: PointCriterion | PointMatcher, masks: Any, device: torch.device) -> MaskTargets:
    found, void = forward_pass.current(module), module.maskloss_options.rules.ignore_value
    return _targets.pack_masks(masks, device, void) if found is None else found.pack(masks, device, void)


def _matcher_of(theirs: Any, options: Options) -> HungarianMatcher:
    """Make our matcher with the weights of theirs."""
    points = options.sampling or PointSampling(theirs.num_points)
    return HungarianMatcher(
        class_weight=theirs.cost_class,
        mask_weight=theirs.cost_mask,
        dice_weight=theirs.cost_dice,
        num_points=points.num_points,
        layout=points.layout,
        backend=options.backend,
    )


class OneFormerCriterion(PointCriterion):
    """`forward` of `OneFormerLoss`; the contrastive term, which has no masks, stays that of Transformers."""

    count_shape = (1,)
    loss_contrastive: Any

    @reported(_OPERATION, _NAMES)
    def forward(
        self,
        masks_queries_logits: Layer,
        class_queries_logits: Tensor,
        contrastive_queries_logits: Tensor,
        mask_labels: Any,
        class_labels: Sequence[Tensor],
        text_queries: Tensor,
        auxiliary_predictions: Sequence[Mapping[str, Any]] | None = None,
        calculate_contrastive_loss: bool = True,
    ) -> dict[str, Tensor]:
        """Match all layers and compute their losses, and on request the contrastive one."""
        more = {}
        if calculate_contrastive_loss:
            # In float32 like the other operand, which Transformers upcasts itself.
            more = self.loss_contrastive(contrastive_queries_logits, _inputs.accumulated(text_queries))
        layers = masks_queries_logits, class_queries_logits, auxiliary_predictions
        return self.layer_losses(*layers, mask_labels, class_labels, more)


# By the class that Transformers has.
_MIXINS: dict[str, type[PointCriterion]] = {
    "mask2former.modeling_mask2former.Mask2FormerLoss": UniversalCriterion,
    "oneformer.modeling_oneformer.OneFormerLoss": OneFormerCriterion,
    "eomt.modeling_eomt.EomtLoss": LayerwiseCriterion,
    "eomt_dinov3.modeling_eomt_dinov3.EomtDinov3Loss": LayerwiseCriterion,
    "videomt.modeling_videomt.VideomtLoss": UniversalCriterion,
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


def swap(criterion: nn.Module, options: Options) -> None:
    """Give a criterion of Transformers, or of a subclass, maskloss's methods; `restore` takes them back.

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
    if not at_once and options.rules.ignore_label is not None:
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


def _swap_class(module: Any, kind: type[Any], options: Options) -> None:
    # The object stays, with its buffers, parameters and hooks; only its methods change.
    module.__class__, module.maskloss_options = kind, options


def restore(criterion: nn.Module) -> None:
    """Give a criterion and its matcher their own classes back."""
    for module in (criterion, vars(criterion)["_modules"].get("matcher")):
        if isinstance(module, (PointCriterion, PointMatcher)):
            module.__class__ = type(module).maskloss_original  # type: ignore[union-attr]
            del module.maskloss_options


@functools.cache
def _derived(kind: Any, at_once: bool) -> Any:
    """Derive from a criterion's class one with maskloss's methods; `isinstance` still finds the original."""
    original: Any = original_class(kind)
    mixin = _MIXINS[_path(original)]
    if at_once:
        return _make(kind, (mixin, kind))
    # Between the subclass and Transformers' class: what the subclass calls by `super()` is ours.
    own = {"count_shape": mixin.count_shape}
    below = type(f"PointSampled{original.__name__}", (LayerMethods, original), own)
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
