"""Label maps, polygons, run lengths
=================================

Masks need not be dense. Whatever your annotations are, :class:`~maskloss.MaskTargets` keeps them small.
"""

# %%
# A label map has one number per pixel: 0 where nothing is, k where instance k is. 255 may mean "ignore".

import numpy as np
import torch

from maskloss import MaskLoss, MaskTargets

height, width = 600, 800
rows, columns = np.mgrid[:height, :width]
labels = np.zeros((height, width), np.uint16)
for number, (y, x, radius) in enumerate(((150, 200, 90), (300, 500, 140), (480, 150, 70)), start=1):
    labels[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = number

from_map = MaskTargets.from_label_map(torch.from_numpy(labels.astype(np.int32)), ids=[1, 2, 3])
print(from_map)

# %%
# COCO annotations are polygons or run lengths. Here, the same three disks as polygons with 60 corners.

turns = np.linspace(0, 2 * np.pi, 60, endpoint=False)
annotations = [
    {"segmentation": [np.stack([x + radius * np.cos(turns), y + radius * np.sin(turns)], 1).ravel().tolist()]}
    for y, x, radius in ((150, 200, 90), (300, 500, 140), (480, 150, 70))
]
from_polygons = MaskTargets.from_coco([each["segmentation"] for each in annotations], height=height, width=width)
print(from_polygons)

# %%
# Dense masks are packed to one bit per pixel, cropped to where they are not empty.

dense = torch.stack([torch.from_numpy(labels == number) for number in (1, 2, 3)])
packed = MaskTargets.from_masks(dense)
print(f"as float32 {dense.numel() * 4 / 1e6:.1f} MB, packed {packed.nbytes / 1e3:.0f} kB")

# %%
# All of them give the same loss, up to the corners of the polygons.

torch.manual_seed(0)
logits = torch.randn(3, 150, 200)
for name, targets in (("label map", from_map), ("polygons", from_polygons), ("packed", packed)):
    print(f"{name:10} {float(MaskLoss()(logits, targets, seed=0).total):.5f}")

# %%
# The targets, as the loss reads them.

from maskloss import plots

figure = plots.new_figure(5, 3.6)
colors = ["#0b7285", "#e8590c", "#4c74e6"]
image = torch.full((3, height, width), 0.6)
axes = figure.subplots()
plots.draw_instances(axes, image, from_polygons.dense() > 0.5, ["1", "2", "3"], colors)
axes.set_title("three targets of 600 × 800 pixels")
