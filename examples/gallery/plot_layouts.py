"""Stratified against independent points
=====================================

Stratified points do with a quarter of the points what independent ones do. See :doc:`/stratified` for why.
"""

# %%
# The loss of one instance, drawn 200 times in each layout, for several numbers of points.

import torch

from maskloss import MaskLoss, PointSampling, plots

places = (torch.arange(256) + 0.5) / 256
distance = 0.3 - ((places[None] - 0.5) ** 2 + (places[:, None] - 0.5) ** 2).sqrt()
masks = (distance > 0)[None]
logits = 30 * torch.nn.functional.avg_pool2d(distance[None] - 0.04 * torch.sin(12 * places), 2)

numbers = [64, 128, 256, 512, 1024]
noise = {}
for layout in ("independent", "stratified"):
    spread = []
    for number in numbers:
        loss = MaskLoss(sampling=PointSampling(number, layout=layout))
        draws = torch.stack([loss(logits, masks, seed=seed).total for seed in range(200)])
        spread.append(float(draws.std() / draws.mean()))
    noise[layout] = spread

for layout, spread in noise.items():
    print(layout, " ".join(f"{each:.3f}" for each in spread))

# %%
# Standard deviation over mean. The lower curve with 256 points lies about where the upper one has 1024.

figure = plots.new_figure(6, 3.4)
axes = figure.subplots()
for layout, spread in noise.items():
    axes.loglog(numbers, spread, "o-", label=layout, base=2)
axes.set_xlabel("points")
axes.set_ylabel("noise of the loss")
axes.set_xticks(numbers, numbers)
axes.legend(frameon=False)
