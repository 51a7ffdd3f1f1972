"""What predictions are compared with: `MaskTargets`, how masks become them, and how a batch is collated."""

from typing import Any

from torch.serialization import add_safe_globals
from torch.utils.data._utils.collate import default_collate_fn_map

from maskloss.targets.mask_targets import MaskTargets

__all__ = ["MaskTargets"]


def _collate(batch: list[MaskTargets], **_: Any) -> MaskTargets:
    return MaskTargets.cat(batch)


# A `DataLoader` joins them by itself, and `torch.load(..., weights_only=True)` reads them.
default_collate_fn_map[MaskTargets] = _collate
add_safe_globals([MaskTargets])
