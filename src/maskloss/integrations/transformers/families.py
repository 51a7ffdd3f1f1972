"""The model families of Transformers whose criterion maskloss takes over, and how each is changed and put back."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from maskloss.errors import Cause, describe
from maskloss.integrations.transformers import universal
from maskloss.integrations.transformers.forward_pass import hand_over_factors, is_watched, leave_alone, watch
from maskloss.integrations.transformers.rf_detr import rf_detr_loss
from maskloss.integrations.transformers.universal import Options, PointCriterion, describe_class, original_class

_WHY_NOT = {
    "MaskFormerForInstanceSegmentation": "MaskFormer's loss covers every pixel of the upsampled prediction: sampling "
    "points would train another model",
}


@dataclass(frozen=True)
class Family:
    """A model class, and the criterion that it builds."""

    name: str  # as people write it
    package: str  # where Transformers has it, below `transformers.models`
    model: str  # name of the model's class
    criterion: str | None  # name of the criterion's class in that module; None: the model calls a loss function
    # path in the model of the module that makes the embeddings of the masks; None: masks cannot stay factors
    head: str | None
    layerwise: bool = False  # whether the model calls its criterion once for each decoder layer
    product_since: tuple[int, int] = (0, 0)  # the first Transformers whose model computes its masks as one product

    @property
    def path(self) -> str:
        """The full name of the module."""
        return f"transformers.models.{self.package}.modeling_{self.package}"

    def is_installed(self) -> bool:
        """Whether the installed Transformers has this family; its module is not imported."""
        try:
            return importlib.util.find_spec(self.path) is not None
        except ModuleNotFoundError:
            return False

    def model_class(self) -> type[nn.Module]:
        """Import the model's class."""
        return cast("type[nn.Module]", getattr(importlib.import_module(self.path), self.model))

    def covers(self, module: nn.Module) -> bool:
        """Whether a module is a model of this family; a family that nobody imported has no models."""
        loaded = sys.modules.get(self.path)
        return loaded is not None and isinstance(module, getattr(loaded, self.model))

    def supervises(self, module: nn.Module) -> bool:
        """Whether a module is a criterion of this family, or of a subclass of its class."""
        original = original_class(type(module))
        return original is not None and (original.__module__, original.__name__) == (self.path, self.criterion)

    def swap(self, model: nn.Module, options: Options) -> None:
        """Give a model maskloss's criterion; on request its mask head hands factors to it."""
        if is_patched(model):
            raise Cause(
                "the model must not be patched already",
                f"this {type(model).__name__} is",
                "unpatch(model) takes a patch back, also from a copy",
            )
        if options.factors and self.head is None:
            raise Cause(
                "the masks of the model must be a product that its own forward gives to the criterion",
                f"{self.name}'s forward takes no targets and returns the masks, so that they have to be formed",
                "patch it without factors, or give MaskFactors to its get_loss_dict",
            )
        if not self.covers(model):
            if options.factors:
                raise Cause(
                    "with factors=True there must be a model of Transformers, whose mask head hands them over",
                    f"there is only its criterion, {describe_class(model)}",
                    "patch it without factors, or call it with MaskFactors",
                )
            universal.swap(model, options)
            return
        if options.factors and transformers_version() < self.product_since:
            found, wanted = (".".join(map(str, each)) for each in (transformers_version(), self.product_since))
            raise Cause(
                "with factors=True the model must compute its masks as one product",
                f"that of {self.name} in Transformers {found} adds channel by channel",
                f"take Transformers {wanted} or later, or patch without factors",
            )
        if self.criterion is None:
            _swap_function(model, options)
        else:
            _swap_criterion(model, self.criterion, options)
        if options.factors and self.head is not None:
            hand_over_factors(model.get_submodule(self.head))
        if options.factors or self.layerwise:
            watch(model)

    def restore(self, model: nn.Module) -> None:
        """Take back what `swap` did, as far as nobody has replaced it since."""
        criterion, function = _criterion_of(model), vars(model).get("_loss_function")
        if criterion is not None:
            universal.restore(criterion)
        if _is_ours(function):
            del vars(model)["_loss_function"]
        for module in model.modules():
            if is_watched(module):
                leave_alone(module)


_DECODER = "model.transformer_module.decoder"
_IN_MASK2FORMER, _IN_ONEFORMER = f"{_DECODER}.mask_predictor.mask_embedder", f"{_DECODER}.mask_embed"

FAMILIES = (
    Family(
        "Mask2Former",
        "mask2former",
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerLoss",
        _IN_MASK2FORMER,
        product_since=(4, 39),
    ),
    Family("OneFormer", "oneformer", "OneFormerForUniversalSegmentation", "OneFormerLoss", _IN_ONEFORMER),
    Family("EoMT", "eomt", "EomtForUniversalSegmentation", "EomtLoss", "mask_head", layerwise=True),
    Family(
        "EoMT-DINOv3",
        "eomt_dinov3",
        "EomtDinov3ForUniversalSegmentation",
        "EomtDinov3Loss",
        "mask_head",
        layerwise=True,
    ),
    Family("VidEoMT", "videomt", "VideomtForUniversalSegmentation", "VideomtLoss", None),
    Family("RF-DETR segmentation", "rf_detr", "RfDetrForInstanceSegmentation", None, "query_features_proj"),
)


def transformers_version() -> tuple[int, ...]:
    """Return the installed release, (4, 38) for instance."""
    return tuple(int(part) for part in sys.modules["transformers"].__version__.split(".")[:2])


def supported() -> str:
    """List the supported models for a message."""
    return ", ".join(f"{family.name} ({family.model})" for family in FAMILIES)


def find(module: Any) -> list[tuple[Family, nn.Module]]:
    """Find the models of all families in a module, however it is wrapped (DDP, Lightning, adapters).

    Criteria of these families that belong to no such model are found as well.
    """
    if not isinstance(module, nn.Module):
        built = isinstance(module, type) and issubclass(module, nn.Module)
        raise Cause(
            "the model must be a torch.nn.Module",
            f"got {describe(module)}",
            "patch() changes all that are built from now on" if built else "of a trainer, give its model",
        )
    found = [(family, each) for each in module.modules() for family in FAMILIES if family.covers(each)]
    owned = {id(_criterion_of(model)) for _, model in found}
    found += [
        (family, each)
        for each in module.modules()
        for family in FAMILIES
        if id(each) not in owned and family.supervises(each)
    ]
    if found:
        return found
    inside = {type(each).__name__ for each in module.modules()}
    why = next((reason for name, reason in _WHY_NOT.items() if name in inside), f"got {type(module).__name__}")
    raise Cause("the model must be of a supported family", why, f"supported: {supported()}")


def is_patched(model: nn.Module) -> bool:
    """Whether a model has maskloss's criterion, or a criterion its methods."""
    return isinstance(_criterion_of(model), PointCriterion) or _is_ours(vars(model).get("_loss_function"))


def _criterion_of(model: nn.Module) -> nn.Module | None:
    """Find the criterion of a model; a criterion is its own."""
    own = vars(model)["_modules"].get("criterion")
    return model if own is None and original_class(type(model)) is not None else cast("nn.Module | None", own)


def _swap_criterion(model: nn.Module, name: str, options: Options) -> None:
    criterion = cast("nn.Module", model.criterion)
    original = original_class(type(criterion))
    if original is None or original.__name__ != name:
        raise Cause(
            f"the criterion must be Transformers' own {name}, or of a subclass",
            f"it is {describe_class(criterion)}, whose changes would be lost",
            "patch the model before its criterion is replaced, or use maskloss.MaskCriterion in yours",
        )
    universal.swap(criterion, options)


def _swap_function(model: Any, options: Options) -> None:
    current = vars(model).get("_loss_function")
    if current is not None:
        raise Cause(
            "the loss function must be Transformers' own",
            f"the model was given another one, {current!r}",
            "patch the model before its loss function is replaced",
        )
    model.loss_function = functools.partial(
        rf_detr_loss, backend=options.backend, sampling=options.sampling, rules=options.rules
    )


def _is_ours(function: object) -> bool:
    return isinstance(function, functools.partial) and function.func is rf_detr_loss
