"""What the losses return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from maskloss.matches import Matches


class InstanceLosses(NamedTuple):
    """The losses of each instance, before anything is weighted or summed.

    Attributes:
        ce: cross-entropy `[N]`, the mean over an instance's points.
        dice: Dice `[N]`.
    """

    ce: Tensor
    dice: Tensor


class LayerTerms(NamedTuple):
    """The mask terms of decoder layers."""

    ce: Tensor  # `[L]`, the sums of each layer's cross-entropies, divided
    dice: Tensor  # `[L]`, the same for Dice
    per_instance: InstanceLosses  # both terms of every instance, not weighted


class MaskLossOutput(NamedTuple):
    """What `MaskLoss` returns.

    Attributes:
        total: `[]`, ce_weight * ce + dice_weight * dice.
        ce: `[]`, the sum of the instances' cross-entropies, divided by the number of instances.
        dice: `[]`, the same for Dice.
        per_instance: both terms of each instance, `[N]` each.
        seed: int64 `[]`, the seed of the points; passing it again draws them again.
        best: int64 `[N]`, which of the candidates counted, with `best_of`; else None.
    """

    total: Tensor
    ce: Tensor
    dice: Tensor
    per_instance: InstanceLosses
    seed: Tensor
    best: Tensor | None = None

    def __getitem__(self, key: Any) -> Any:
        """Return a term by its name, or a field by its number."""
        return _term_of(self, key, {"total": self.total, "ce": self.ce, "dice": self.dice})


class CriterionOutput(NamedTuple):
    """What `MaskCriterion` returns; L decoder layers, the last of them final.

    Attributes:
        total: `[]`, the weighted sum of all terms of all layers.
        loss_class: `[L]`, classification, unweighted.
        loss_mask: `[L]`, cross-entropy of the masks, unweighted.
        loss_dice: `[L]`, Dice, unweighted.
        per_instance: both mask terms of every instance, in the order of `matches.index`; weights of instances are not
            applied to them.
        matches: which query belongs to which target.
        seed: int64 `[]`, the seed of the points.
        weights: class_weight, mask_weight and dice_weight, by which `total` weighs the three terms.
        mask_layers: the numbers of the layers that have masks; the others' mask terms are 0, and `as_dict` leaves them
            out. `per_instance` has the instances of these layers.
    """

    total: Tensor
    loss_class: Tensor
    loss_mask: Tensor
    loss_dice: Tensor
    per_instance: InstanceLosses
    matches: Matches
    seed: Tensor
    weights: tuple[float, float, float]
    mask_layers: tuple[int, ...]

    def __getitem__(self, key: Any) -> Any:
        """Return a term by its name in `as_dict()`, or a field by its number."""
        return _term_of(self, key, {"total": self.total, **self.as_dict()} if isinstance(key, str) else {})

    def as_dict(self, *, weighted: bool = False) -> dict[str, Tensor]:
        """Name the terms of each layer: loss_class, loss_mask, loss_dice for the final one, loss_class_0 … before it.

        The names are this library's own: Mask2Former calls the classification loss_ce, Transformers
        loss_cross_entropy (`maskloss.integrations` has theirs).

        Args:
            weighted: multiply each term by its weight, so that the values add up to `total`. Default False.
        """
        terms = {"loss_class": self.loss_class, "loss_mask": self.loss_mask, "loss_dice": self.loss_dice}
        if weighted:
            terms = {name: weight * term for (name, term), weight in zip(terms.items(), self.weights, strict=True)}
        final = {name: values[-1] for name, values in terms.items()}
        last = len(self.loss_class) - 1
        named = final | {f"{name}_{layer}": values[layer] for layer in range(last) for name, values in terms.items()}
        for layer in set(range(last + 1)) - set(self.mask_layers):
            suffix = "" if layer == last else f"_{layer}"
            del named[f"loss_mask{suffix}"], named[f"loss_dice{suffix}"]
        return named


def _term_of(output: tuple[Any, ...], key: Any, terms: Mapping[str, Tensor]) -> Any:
    """Return a term of an output by its name, or a field of it by its number."""
    if not isinstance(key, str):
        return tuple.__getitem__(output, key)
    if key not in terms:
        raise KeyError(f"there is no {key!r}; the terms are {', '.join(terms)}")
    return terms[key]
