"""What the tests run in processes of their own: importable there, unlike the test files."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from maskloss import MaskTargets


class Images(Dataset[MaskTargets]):
    """Images of different sizes with 0 to 5 masks, packed where they are loaded."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> MaskTargets:
        masks = torch.arange(number * 8 * (9 + number)).view(number, 8, 9 + number) % (number + 2) == 0
        return MaskTargets.from_masks(masks, canvas=(16, 16))
