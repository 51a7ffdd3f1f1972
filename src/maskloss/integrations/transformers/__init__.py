"""Train the segmentation models of Hugging Face Transformers with maskloss: one call, which can be undone."""

from __future__ import annotations

import functools
import importlib
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from maskloss import _inputs
from maskloss._numbers import check_flags
from maskloss.errors import Cause, reported, require
from maskloss.integrations._undo import Undo
from maskloss.integrations.transformers.families import FAMILIES, Family, find, is_patched, supported
from maskloss.integrations.transformers.universal import Options
from maskloss.ops import BACKENDS
from maskloss.options import TargetRules
from maskloss.points import PointSampling

__all__ = ["Patch", "patch", "unpatch"]

# Which patch a model belongs to. Weakly: neither keeps the other in memory, and a model that is gone is not listed.
_OWNERS: WeakKeyDictionary[nn.Module, Patch] = WeakKeyDictionary()


class Patch(Undo):
    """What `patch` changed, and the way back. As a context manager it is undone at the end of the block.

    Attributes:
        families: the names of the model families of which something was changed so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.families: tuple[str, ...] = ()

    @property
    def is_on(self) -> bool:
        """Whether anything is changed, or will be in what is built from now on."""
        return bool(self.families or self._steps)

    def undo(self) -> None:
        """Put back all that was changed, in models built in the meantime too, but not in copies (see `unpatch`)."""
        super().undo()
        for model in [model for model, owner in list(_OWNERS.items()) if owner is self]:
            _restore(model)
        self.families = ()

    def __repr__(self) -> str:
        waiting = ["models and criteria built from now on"] if self._steps else []
        return f"Patch({', '.join([*self.families, *waiting]) or 'undone'})"

    def _swap(self, family: Family, model: nn.Module, options: Options) -> None:
        family.swap(model, options)
        _OWNERS[model] = self
        if family.name not in self.families:
            self.families = (*self.families, family.name)


@reported("patch")
def patch(
    model: nn.Module | None = None,
    *,
    backend: str | None = None,
    sampling: PointSampling | None = None,
    factors: bool = False,
    scale_by_ranks: bool = False,
    ignore_value: int | None = None,
    ignore_label: int | None = None,
    drop_empty: bool = False,
    no_object_label: str = "warn",
) -> Patch:
    """Let maskloss compute the loss of a model of Transformers, or of every model built from now on.

    On R ranks with Accelerate, the mask terms are about R times smaller than Transformers', which divides their divisor
    by R twice (RF-DETR's does not). `scale_by_ranks=True` keeps Transformers' scale.

    A module that holds only a criterion of Transformers, or of a subclass as in EoMT's own code and in lightly-train,
    is patched as well. What a subclass overrides is called; the matching and the mask terms that it inherits are
    computed here.

    Inputs, outputs, weights and checkpoints stay as they are; `mask_labels` may also be packed masks (`MaskTargets`) or
    pairs of a label map and its ids. Float masks, as Transformers' image processors make them, count as soft on a GPU,
    which takes twelve times the memory: give `masks > 0.5`, or pack them.

    Args:
        model: a model or a criterion of a supported family, or a module that contains some. Default None: models, and
            criteria of subclasses, are patched as they are built, until the patch is undone.
        backend: "reference", "cpu" or "gpu". Default: by device, or MASKLOSS_BACKEND.
        sampling: numbers and layout of the points of the loss; the matching takes `num_points` and `layout` from it.
            Default: what the model's configuration says, independent points.
        factors: let the model's mask head hand `MaskFactors` to the criterion while it trains with targets: then no
            masks are formed but those of the final layer, which the model returns. Default False.
        scale_by_ranks: multiply the mask terms by the number of ranks, for runs that were tuned with Transformers' own.
            Default False. A subclass whose `forward` divides by a number of its own keeps that number in both cases.
        ignore_value: the value of void pixels in `mask_labels`, 255 in many data sets: their points weigh nothing, in
            loss and matching. Default None: any value but 0 and 1 in integer masks is an error.
        ignore_label: the label of targets whose class is unknown, 255 or -1 for instance: they are matched by their
            masks, which are learned, and their queries have no classification. Default None.
        drop_empty: a target whose mask is empty has no mask terms, in loss and matching. Default False: an empty mask
            is learned, as Transformers does.
        no_object_label: what a target with the label "no object" (the number of labels) does. "allow": its mask is
            learned, and its query learns "no object", as in Transformers. "warn" (default): the same, and a warning
            says so, where labels are on a CPU. "error": it is rejected.

    Returns:
        The patch: `undo()` takes it back, and `with patch(model): ...` does at the end of the block.

    Raises:
        MaskLossError: a model of another family, one that is patched already, one whose criterion is not Transformers'
            own or overrides what would not be called, or factors for VidEoMT, whose forward takes no targets.
        MissingExtraError: Transformers is not installed (extra `transformers`).

    Source:
        Transformers' implementation of each model. The documentation lists the differences, page "Integrations".
    """
    require("transformers", "transformers")
    if backend is not None:
        _inputs.check_choice("backend", backend, BACKENDS)
    check_flags(factors=factors, scale_by_ranks=scale_by_ranks)
    checked = None if sampling is None else _inputs.check_sampling(sampling)
    rules = TargetRules(ignore_value, ignore_label, drop_empty, no_object_label)
    options = Options(backend, checked, factors, scale_by_ranks, rules)
    handle = Patch()
    if model is not None:
        try:
            for family, found in find(model):
                handle._swap(family, found, options)
        except Cause:
            handle.undo()
            raise
        return handle
    for family in FAMILIES:
        if family.is_installed():
            _patch_constructor(handle, family, options)
    if not handle.is_on:
        raise Cause(
            "Transformers must have a supported model family", "it has none of them", f"supported: {supported()}"
        )
    return handle


@reported("unpatch")
def unpatch(model: nn.Module) -> None:
    """Take the patch of a model back, whoever patched it: also of a copy, which no `Patch` knows.

    Args:
        model: a model of a supported family, or a module that contains some. One that is not patched stays as it is.

    Raises:
        MaskLossError: a model of another family.
    """
    for _, found in find(model):
        _restore(found)


def _restore(model: nn.Module) -> None:
    for family in FAMILIES:
        if family.covers(model) or family.supervises(model):
            family.restore(model)
    _OWNERS.pop(model, None)


def _patch_constructor(handle: Patch, family: Family, options: Options) -> None:
    """Let the constructor of a model's class swap the criterion when it is done, and that of a subclass's criterion."""
    model_class: Any = family.model_class()
    original = model_class.__init__
    # A wrapper that somebody put around ours has this too, and may be there for longer than our patch is on.
    earlier = getattr(original, "_maskloss_patch", None)
    if earlier is not None and earlier.is_on:
        handle.undo()
        raise Cause(
            "the models must not be patched already", f"{family.model} is", "call undo() on the other patch first"
        )

    @functools.wraps(original)
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if handle.is_on:
            _swap_built(handle, family, self, options)

    build._maskloss_patch = handle  # type: ignore[attr-defined]
    # A wrapper that somebody else puts on top stays; ours, below it, does nothing once it is undone.
    handle.replace(model_class, "__init__", build)
    if family.criterion is not None:
        _patch_subclasses(handle, family, getattr(importlib.import_module(family.path), family.criterion), options)


def _patch_subclasses(handle: Patch, family: Family, criterion: Any, options: Options) -> None:
    """Swap criteria of subclasses as they are built: with their matcher, whatever constructors they call."""

    def assign(self: nn.Module, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)
        if name == "matcher" and handle.is_on and type(self) is not criterion and not is_patched(self):
            _swap_built(handle, family, self, options)

    handle.replace(criterion, "__setattr__", assign)


@reported("patch")
def _swap_built(handle: Patch, family: Family, model: nn.Module, options: Options) -> None:
    handle._swap(family, model, options)
