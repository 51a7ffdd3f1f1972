"""A model of Transformers
=======================

One call replaces the loss of a Mask2Former. Inputs, outputs and checkpoints stay what they were.
"""

# %%
# A tiny Mask2Former with random weights; yours comes from ``from_pretrained``.

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from maskloss.integrations.transformers import patch

stages = ["stage1", "stage2", "stage3", "stage4"]
backbone = SwinConfig(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], image_size=128, out_features=stages)
torch.manual_seed(0)
model = Mask2FormerForUniversalSegmentation(
    Mask2FormerConfig(backbone_config=backbone, feature_size=32, hidden_dim=32, num_attention_heads=2, num_labels=5)
)

images = torch.randn(2, 3, 128, 128)
masks = [torch.zeros(6, 128, 128), torch.zeros(3, 128, 128)]
for each in masks:
    for number, mask in enumerate(each):
        mask[15 * number : 15 * number + 40, 10 * number : 10 * number + 50] = 1
batch = {
    "pixel_values": images,
    "mask_labels": masks,
    "class_labels": [torch.arange(len(each)) % 5 for each in masks],
}

# %%
# Its loss before and after. Both draw new points in every call, so the values differ a little.

print(f"Transformers {model(**batch).loss:.2f}")
handle = patch(model)
print(f"patched      {model(**batch).loss:.2f}")
model(**batch).loss.backward()

# %%
# Masks may also be bool, packed or label maps; and the patch can be undone.

from maskloss import MaskTargets

batch["mask_labels"] = [MaskTargets.from_masks(each > 0.5) for each in masks]
print(f"packed       {model(**batch).loss:.2f}")
handle.undo()

# %%
# :doc:`/integrations` says what differs on purpose, what else can be patched, and how to train with the ``Trainer``.
