"""RF-DETR's own package
=====================

Call ``patch`` before training: the criterion of the package ``rfdetr`` keeps its names, boxes and class losses, and its
masks and matching are computed here. (This page is not run when the documentation is built.)
"""

# %%
# The package, a segmentation model, and one line.

from rfdetr import RFDETRSegPreview

from maskloss.integrations import rf_detr

handle = rf_detr.patch()

model = RFDETRSegPreview()
model.train(dataset_dir="dataset", epochs=10, batch_size=4)

# %%
# To go back:

handle.undo()
