"""Your own tensors
================

The loss needs the logits of N masks and the N masks that they should be; their sizes may differ.
"""

# %%
# A prediction of 64 × 64 pixels, and its target of 512 × 512: a disk, and the same disk a little too small and to the
# right.

import torch

from maskloss import MaskLoss, PointSampling


def disk(size: int, x: float, radius: float) -> torch.Tensor:
    """Distance to the edge of a disk, in widths of the image, positive inside."""
    places = (torch.arange(size) + 0.5) / size
    return radius - ((places[None] - x) ** 2 + (places[:, None] - 0.5) ** 2).sqrt()


logits = (40 * disk(64, 0.55, 0.27))[None].requires_grad_()
masks = (disk(512, 0.5, 0.3) > 0)[None]

loss = MaskLoss(sampling=PointSampling(num_points=1024))
out = loss(logits, masks, seed=0)
print(f"cross-entropy {out.ce:.3f}, Dice {out.dice:.3f}, weighted sum {out.total:.3f}")

# %%
# The gradient of the sum lies where the points were.

out.total.backward()
share = float((logits.grad != 0).float().mean())
print(f"{share:.0%} of the pixels have a gradient")

# %%
# The same points again, and what each of them contributes: ``inspect_points`` computes the loss once more and keeps
# what it looked at.

from maskloss import plots

[found] = plots.inspect_points(logits.detach(), masks, loss=loss, seed=0)
figure = plots.new_figure(9, 3.4)
left, right = figure.subplots(1, 2)
plots.draw_candidates(left, found)
left.set_title("candidates, and the chosen ones")
plots.draw_point_losses(right, found)
right.set_title("points, colored by their loss")
