"""Outputs of a decoder layer as DETR's code bases have them: a dict of "pred_logits", "pred_masks", "pred_boxes"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskloss import _inputs
from maskloss import matcher as core
from maskloss.errors import Cause, describe
from maskloss.factors import MaskFactors
from maskloss.integrations import _targets
from maskloss.layers import Layer
from maskloss.options import TargetRules
from maskloss.step import Step
from maskloss.targets.collate import Entries

Outputs = Mapping[str, Any]

# What the library's own checks call these code bases' entries.
NAMES = {"class_logits": "pred_logits", "mask_logits": "pred_masks"}


def reject_overrides(owner: Any, names: Sequence[str], hint: str) -> None:
    """Raise if a subclass, or an object, has methods of the code bases that would not be called."""
    ignored = [name for name in names if hasattr(owner, name)]
    if ignored:
        kind = owner if isinstance(owner, type) else type(owner)
        cause = f"{kind.__name__} has {', '.join(ignored)}, but all layers are computed together"
        raise Cause("a subclass must not override what is not called here", cause, hint)


def holds_layers(value: Any) -> bool:
    """Whether an entry of the outputs is the outputs of a layer, or a list of them."""
    entries = value if is_list(value) else [value]
    return any(isinstance(entry, Mapping) and "pred_logits" in entry for entry in entries)


def is_list(value: object) -> bool:
    """Whether something is a sequence, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def begin(outputs: Outputs, targets: Entries, rules: TargetRules, no_object: int | None = None) -> Step:
    """Pack the targets of a step, and check that they fit."""
    logits = find_masks(outputs)
    others = [each for each in outputs.values() if isinstance(each, (Tensor, MaskFactors))]
    return _targets.begin_entries(targets, "labels", [logits, *others], rules, no_object=no_object, classifies=True)


def _checked(outputs: Any) -> Outputs:
    if not isinstance(outputs, Mapping):
        hint = 'give {"pred_logits": [B, Q, C + 1], "pred_masks": [B, Q, h, w]}'
        raise Cause("the outputs of a layer must be a dict", f"got {describe(outputs)}", hint)
    return outputs


def _entry(outputs: Outputs, name: str, layer: int = 0) -> Tensor:
    found = _checked(outputs).get(name)
    if not isinstance(found, Tensor) or found.ndim < 3:
        where = f"entry {layer - 1} of the other layers has" if layer else "those of the final layer have"
        hint = "give it in every layer" if name != "pred_masks" or layer else "only other layers may come without masks"
        if found is None:
            raise Cause(f'outputs must have "{name}"', f"{where} {', '.join(map(str, outputs))}", hint)
        raise Cause(
            f'"{name}" must be a tensor [B, Q, ...]', f"got {describe(found)}", "torch.as_tensor converts arrays"
        )
    return found


def predicted_boxes(layers: Sequence[Outputs]) -> Tensor:
    """Stack the boxes of each layer: `[L, B, Q, 4]`, float32 or float64."""
    boxes = [_entry(layer, "pred_boxes", number) for number, layer in enumerate(layers)]
    for each in boxes:
        if each.shape != (*boxes[0].shape[:2], 4):
            raise Cause('"pred_boxes" must be [B, Q, 4]', f"got {describe(each)}", "(cx, cy, w, h) of every query")
    return _inputs.accumulated(torch.stack(boxes))


def find_masks(outputs: Outputs) -> Layer:
    """Find the mask logits of a layer, dense or as factors."""
    found = _checked(outputs).get("pred_masks")
    if isinstance(found, Mapping):
        return MaskFactors.from_dict(found)
    return found if isinstance(found, MaskFactors) else _entry(outputs, "pred_masks")


def predictions(layers: Sequence[Outputs], *, no_object: bool) -> tuple[Tensor, list[Layer | None]]:
    """Check the class logits, and the masks of those layers that have some; the first must have them."""
    classes = [_entry(layer, "pred_logits", number) for number, layer in enumerate(layers)]
    masks = [None if n and layer.get("pred_masks") is None else find_masks(layer) for n, layer in enumerate(layers)]
    return core.check_layers_of_masks(classes, masks, no_object=no_object)
