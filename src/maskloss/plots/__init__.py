"""Pictures of points and losses, drawn with matplotlib onto axes of your own or as whole figures.

    [found, *_] = plots.inspect_points(mask_logits, masks)
    plots.draw_point_losses(axes, found)                      # onto axes of yours
    plots.instance_figure(found).savefig("instance.svg")      # all of it

Nothing here touches pyplot, so no window opens and no figure stays in memory.
"""

from maskloss._palette import COLORS, GRAY, INK, ORANGE, PALE, TEAL
from maskloss.plots.animation import animate_points
from maskloss.plots.canvas import draw_confidence, draw_image, draw_instances, frame, new_figure, outline, rgb
from maskloss.plots.curves import draw_curves
from maskloss.plots.inspection import Inspection, inspect_points
from maskloss.plots.instances import (
    draw_candidates,
    draw_costs,
    draw_point_losses,
    draw_points,
    draw_terms,
    draw_uncertainty,
    points_figure,
)
from maskloss.plots.overview import Costs, instance_figure

__all__ = [
    "COLORS", "GRAY", "INK", "ORANGE", "PALE", "TEAL", "Costs", "Inspection", "animate_points", "draw_candidates",
    "draw_confidence", "draw_costs", "draw_curves", "draw_image", "draw_instances", "draw_point_losses", "draw_points",
    "draw_terms", "draw_uncertainty", "frame", "inspect_points", "instance_figure", "new_figure", "outline",
    "points_figure", "rgb",
]  # fmt: skip
