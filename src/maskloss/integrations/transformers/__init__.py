"""Train the segmentation models of Hugging Face Transformers with maskloss: one call, which can be undone."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

from torch import nn

from maskloss import _inputs
from maskloss.errors import Cause, reported, require
from maskloss.integrations.transformers.families import FAMILIES, Family, Undo, find, supported
from maskloss.ops import BACKENDS

__all__ = ["Patch", "patch"]


class Patch:
    """What `patch` changed, and the way back. As a context manager it is undone at the end of the block.

    Attributes:
        families: the names of the model families that are patched.
    """

    def __init__(self) -> None:
        self.families: tuple[str, ...] = ()
        self._undo: list[Undo] = []

    def undo(self) -> None:
        """Put back all that was changed, in models built in the meantime too. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self.families = ()

    def __enter__(self) -> Patch:  # noqa: PYI034 (typing.Self is newer than Python 3.10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patch({', '.join(self.families) or 'undone'})"

    def _swap(self, family: Family, model: nn.Module, backend: str | None) -> None:
        self._undo.append(family.swap(model, backend))
        if family.name not in self.families:
            self.families = (*self.families, family.name)


@reported("patch")
def patch(model: nn.Module | None = None, *, backend: str | None = None) -> Patch:
    """Let maskloss compute the loss of a model of Transformers, or of every model built from now on.

    Inputs, names of outputs, weights and what they mean stay as they are; `mask_labels` may also be packed masks
    (`MaskTargets`) or pairs of a label map and its ids. A checkpoint saved before or after loads into both.

    Transformers' image processors return binary masks as floats. On a GPU nobody may look at them without stalling it,
    so they are taken for soft values, which cost four times the memory of bits between forward and backward pass. Give
    bool masks (`masks > 0.5`), or pack them: `MaskTargets.from_masks(masks, soft=False)`.

    Args:
        model: a model of a supported family, or a module that contains some. Default None: models are patched as
            they are built, until the patch is undone.
        backend: "reference", "cpu" or "gpu". Default: by device, or MASKLOSS_BACKEND.

    Returns:
        The patch: `undo()` takes it back, and `with patch(model): ...` does at the end of the block.

    Raises:
        MaskLossError: a model of another family (the message lists the supported ones), one that is patched already,
            one whose criterion is not Transformers' own, or an unknown backend.
        MissingExtraError: Transformers is not installed (extra `transformers`).

    Source:
        Transformers' implementation of each model. The differences are listed in the documentation, page
        "Integrations".
    """
    require("transformers", "transformers")
    if backend is not None:
        _inputs.check_choice("backend", backend, BACKENDS)
    handle = Patch()
    if model is not None:
        for family, found in find(model):
            handle._swap(family, found, backend)
        return handle
    for family in FAMILIES:
        if family.is_installed():
            _patch_constructor(handle, family, backend)
    if not handle.families:
        raise Cause(
            "Transformers must have a supported model family", "it has none of them", f"supported: {supported()}"
        )
    return handle


def _patch_constructor(handle: Patch, family: Family, backend: str | None) -> None:
    """Let the constructor of a model's class swap the criterion when it is done."""
    model_class: Any = family.model_class()
    original = model_class.__init__
    if hasattr(original, "_maskloss_patch"):
        handle.undo()
        raise Cause(
            "the models must not be patched already", f"{family.model} is", "call undo() on the other patch first"
        )

    @functools.wraps(original)
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        handle._swap(family, self, backend)

    build._maskloss_patch = handle  # type: ignore[attr-defined]
    model_class.__init__ = build

    def undo() -> None:
        model_class.__init__ = original

    handle._undo.append(undo)
    handle.families = (*handle.families, family.name)
