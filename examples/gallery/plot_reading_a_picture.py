"""Reading the picture of a loss
=============================

``maskloss show`` draws all that the loss looks at in one instance. This is how to read it.
"""

# %%
# A prediction that is right in most places and misses a corner.

import torch

from maskloss import MaskLoss, PointSampling, plots

masks = torch.zeros(1, 256, 256, dtype=torch.bool)
masks[0, 60:200, 50:210] = True
confidence = torch.full((1, 64, 64), -6.0)
confidence[0, 15:50, 13:52] = 6.0
confidence[0, 15:26, 40:52] = -2.0  # missed, and not sure of it
logits = torch.nn.functional.avg_pool2d(confidence, 3, 1, 1)

[found] = plots.inspect_points(logits, masks, loss=MaskLoss(sampling=PointSampling(1024)), seed=0)
figure = plots.instance_figure(found, name="a box", heading="A corner is missed")

# %%
# - **Points.** Orange ones are the 768 most uncertain of 3072 candidates. They lie along the edge of the prediction and
#   in the corner, where the network is least sure. Gray ones are uniform.
# - **Losses.** Nearly all of the loss comes from the corner: the prediction says no, with some doubt, and the target
#   says yes.
# - **The choice.** The histogram has the :math:`|z|` of all candidates; left of the threshold they are chosen.
# - **Terms.** The weighted cross-entropy, divided by kind of point, and Dice.

print(f"cross-entropy {found.ce:.3f}, Dice {found.dice:.3f}, candidates below |z| = {found.threshold:.2f}")
