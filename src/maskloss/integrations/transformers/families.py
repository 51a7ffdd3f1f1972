"""The model families of Transformers whose criterion maskloss takes over, and how each is changed and put back."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from maskloss.errors import Cause
from maskloss.integrations.transformers.rf_detr import rf_detr_loss
from maskloss.integrations.transformers.universal import PointCriterion, patched_class

Undo = Callable[[], None]

_WHY_NOT = {
    "MaskFormerForInstanceSegmentation": "MaskFormer's loss covers every pixel of the upsampled prediction: sampling "
    "points would train another model",
}


@dataclass(frozen=True)
class Family:
    """A model class, and the criterion that it builds.

    Attributes:
        name: as people write it.
        module: where Transformers has it, below `transformers.models`.
        model: name of the model's class.
        criterion: name of the criterion's class in that module; None: the model calls a loss function.
    """

    name: str
    module: str
    model: str
    criterion: str | None

    @property
    def path(self) -> str:
        """The module's full name."""
        return f"transformers.models.{self.module}"

    def is_installed(self) -> bool:
        """Tell whether the installed Transformers has this family; its module is not imported."""
        try:
            return importlib.util.find_spec(self.path) is not None
        except ModuleNotFoundError:
            return False

    def model_class(self) -> type[nn.Module]:
        """Import the model's class."""
        return cast("type[nn.Module]", getattr(importlib.import_module(self.path), self.model))

    def covers(self, module: nn.Module) -> bool:
        """Tell whether a module is a model of this family; a family that nobody imported has no models."""
        loaded = sys.modules.get(self.path)
        return loaded is not None and isinstance(module, getattr(loaded, self.model))

    def swap(self, model: nn.Module, backend: str | None) -> Undo:
        """Give a model maskloss's criterion; the result puts the old one back."""
        if self.criterion is None:
            return _swap_function(model, backend)
        original = getattr(importlib.import_module(self.path), self.criterion)
        return _swap_class(model, original, backend)


FAMILIES = (
    Family(
        "Mask2Former",
        "mask2former.modeling_mask2former",
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerLoss",
    ),
    Family("OneFormer", "oneformer.modeling_oneformer", "OneFormerForUniversalSegmentation", "OneFormerLoss"),
    Family("EoMT", "eomt.modeling_eomt", "EomtForUniversalSegmentation", "EomtLoss"),
    Family(
        "EoMT-DINOv3",
        "eomt_dinov3.modeling_eomt_dinov3",
        "EomtDinov3ForUniversalSegmentation",
        "EomtDinov3Loss",
    ),
    Family("VidEoMT", "videomt.modeling_videomt", "VideomtForUniversalSegmentation", "VideomtLoss"),
    Family("RF-DETR segmentation", "rf_detr.modeling_rf_detr", "RfDetrForInstanceSegmentation", None),
)


def supported() -> str:
    """List the supported models for a message."""
    return ", ".join(f"{family.name} ({family.model})" for family in FAMILIES)


def find(model: nn.Module) -> list[tuple[Family, nn.Module]]:
    """Find the models of all families in a module, however it is wrapped (DDP, Lightning, adapters)."""
    found = [(family, module) for module in model.modules() for family in FAMILIES if family.covers(module)]
    if found:
        return found
    inside = {type(module).__name__ for module in model.modules()}
    why = next((reason for name, reason in _WHY_NOT.items() if name in inside), f"got {type(model).__name__}")
    raise Cause("the model must be of a supported family", why, f"supported: {supported()}")


def _swap_class(model: nn.Module, original: type[nn.Module], backend: str | None) -> Undo:
    criterion = cast("nn.Module", model.criterion)
    if isinstance(criterion, PointCriterion):
        raise Cause("the model must not be patched already", f"its criterion is {type(criterion).__name__}", _UNDO)
    if type(criterion) is not original:
        raise Cause(
            f"the criterion must be Transformers' own {original.__name__}",
            f"it is {type(criterion).__module__}.{type(criterion).__qualname__}, whose changes would be lost",
            "patch the model before its criterion is replaced, or use maskloss.MaskCriterion in yours",
        )
    # The object stays, with its buffers, parameters and hooks; only its methods change.
    criterion.__class__ = patched_class(cast("Any", original))
    cast("PointCriterion", criterion).maskloss_backend = backend

    # Weakly: a patch that outlives a model must not keep it in memory.
    alive = weakref.ref(criterion)

    def undo() -> None:
        found = alive()
        if found is not None:
            found.__class__ = original
            vars(found).pop("maskloss_backend", None)

    return undo


def _swap_function(model: Any, backend: str | None) -> Undo:
    current = vars(model).get("_loss_function")
    if isinstance(current, functools.partial) and current.func is rf_detr_loss:
        raise Cause("the model must not be patched already", "its loss function is maskloss's", _UNDO)
    if current is not None:
        raise Cause(
            "the loss function must be Transformers' own",
            f"the model was given another one, {current!r}",
            "patch the model before its loss function is replaced",
        )
    model.loss_function = functools.partial(rf_detr_loss, backend=backend)

    alive = weakref.ref(model)

    def undo() -> None:
        found = alive()
        if found is not None:
            vars(found).pop("_loss_function", None)

    return undo


_UNDO = "call undo() on what patch() returned first"
