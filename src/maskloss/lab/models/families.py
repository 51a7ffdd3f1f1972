"""The families of Transformers' models that are trained: what is known of each beside its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol


class Described(Protocol):
    """A model as it is described: where it came from, its configuration, and its image processor's settings."""

    @property
    def name(self) -> str:
        """Where it came from."""

    @property
    def config(self) -> Any:
        """Of Transformers."""

    @property
    def processor(self) -> dict[str, Any]:
        """Empty if it has none."""


class Family(NamedTuple):
    """A family of models."""

    backbone: tuple[str, ...]  # beginnings of the names of the weights of the pretrained backbone
    class_layers: tuple[str, ...]  # those of the weights whose number depends on the classes
    # of the learning rate, for the backbone. Less than 1 where only what comes after it makes masks.
    share: float = 0.1
    fixed_size: bool = False  # whether its models take images of one size only


_ENCODER = ("model.pixel_level_module.encoder.",)
_EOMT = Family(("embeddings.", "layers."), ("class_predictor.",), share=1.0, fixed_size=True)
FAMILIES = {
    "mask2former": Family(_ENCODER, ("class_predictor.",)),
    "oneformer": Family(_ENCODER, ("model.transformer_module.decoder.class_embed.",)),
    # Its queries go through the blocks of the backbone: there is no decoder.
    "eomt": _EOMT,
    "eomt_dinov3": _EOMT,
    "rf_detr": Family(("model.model.backbone.backbone.",), ("model.class_embed.", "model.model.enc_out_class_embed.")),
}
RF_DETR = "rf_detr"
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?|stages)\.(\d+)(?=\.)")


def backbone_shares(names: Iterable[str], family: Family, share: float, decay: float) -> dict[str, float]:
    """Return the share of the learning rate of each weight.

    The last block of the backbone, and what comes after it, has `share`; each block before it has `decay` times the
    share of the next one, and so have the embeddings before the first. What is no part of the backbone has 1.
    """
    listed = list(names)
    inside = [name for name in listed if name.startswith(family.backbone)]
    numbers = {name: tuple(_BLOCK.findall(name)) for name in inside}
    deepest = max((len(each) for each in numbers.values()), default=0)
    order = list(dict.fromkeys(each for each in numbers.values() if deepest and len(each) == deepest))
    shares = dict.fromkeys(listed, 1.0)
    before = 0  # blocks that the data have gone through
    for name in inside:
        if numbers[name] in order:
            before = order.index(numbers[name]) + 1
        elif deepest and not numbers[name]:
            before = 0 if "embed" in name or before == 0 else len(order)
        shares[name] = share * decay ** (len(order) - before)
    return shares
