"""The whole picture of one instance: where the loss looked, what it found there, and what it adds up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor

from maskloss._palette import COLORS, GRAY, INK, ORANGE
from maskloss.errors import require
from maskloss.plots.canvas import (
    INSPECTION,
    draw_confidence,
    draw_image,
    draw_instances,
    drawing,
    frame,
    new_figure,
    outline,
    title,
)
from maskloss.plots.inspection import Inspection
from maskloss.plots.instances import (
    draw_candidates,
    draw_costs,
    draw_point_losses,
    draw_points,
    draw_terms,
    draw_uncertainty,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class Costs(NamedTuple):
    """The matching of an image.

    Attributes:
        matrix: costs `[Q, T]`.
        pairs: the matched queries and their targets, int64 `[K]` each.
        names: of the targets.
        chosen: the target that the picture is about.
    """

    matrix: Tensor
    pairs: tuple[Tensor, Tensor]
    names: Sequence[str]
    chosen: int


@drawing(found=INSPECTION, image="[3, h, w]")
def instance_figure(
    found: Inspection,
    *,
    image: Tensor | None = None,
    costs: Costs | None = None,
    name: str = "",
    heading: str = "",
) -> Figure:
    """Draw all about one instance: points, losses, the choice, the terms, and the matching where there is one.

    Args:
        found: from `inspect_points`.
        image: `[3, h, w]` in [0, 1]. Default: the prediction is shown in its place.
        costs: the matching of the image. Default: it is left out.
        name: of the instance.
        heading: of the picture.

    Returns:
        A matplotlib figure; `figure.savefig` writes PNG, SVG or PDF.

    Raises:
        MissingExtraError: matplotlib is not installed (extra `plots`).

    Example:
        >>> import torch
        >>> from maskloss.plots import inspect_points
        >>> [found] = inspect_points(torch.linspace(-4, 4, 32).repeat(1, 32, 1), torch.ones(1, 32, 32))
        >>> figure = instance_figure(found, name="half")
        >>> figure.savefig("half.png")  # doctest: +SKIP
    """
    # As high as four pictures side by side are, with their titles; the legend and what is below stay as they are.
    above = 0.95 + 3.3 * min(1.6, max(0.4, found.target.shape[0] / found.target.shape[1]))
    figure = new_figure(14.6, above + 3.7)
    upper, lower = cast("Sequence[SubFigure]", figure.subfigures(2, 1, height_ratios=[above, 3.3]))
    panels = upper.subplots(1, 4)
    _first_panel(panels[0], found, image, name)
    _draw_choice(panels[1], found)
    uniform = len(found.points) - found.num_uncertain
    draw_points(panels[2], found.logits, found.points, found.num_uncertain, target=found.target)
    title(panels[2], "Points of the loss", f"{found.num_uncertain:,} uncertain, {uniform:,} uniform")
    drawn = draw_point_losses(panels[3], found)
    title(panels[3], "Loss at each point", "over the truth; dark points cost most")
    bar = upper.colorbar(drawn, ax=panels[3], shrink=0.82, aspect=26, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=GRAY, labelsize=8.5, length=0)
    bottom = lower.subplots(1, 3, width_ratios=[1.25, 1, 1.25]) if costs is not None else lower.subplots(1, 2)
    draw_uncertainty(bottom[0], found)
    title(bottom[0], "How candidates were chosen", "by the size of their logit; orange: chosen")
    draw_terms(bottom[1], found)
    title(bottom[1], "What the instance costs", "weight × term")
    if costs is not None:
        draw_costs(bottom[2], costs.matrix, costs.pairs, names=costs.names, chosen=costs.chosen)
        title(bottom[2], "Matching costs", "framed: matched; orange: this instance")
    if heading:
        figure.suptitle(heading, x=0.008, ha="left", fontsize=14, fontweight="bold", color=INK)
    _legend(figure)
    return figure


def _first_panel(axes: Axes, found: Inspection, image: Tensor | None, name: str) -> None:
    height, width = found.target.shape
    if image is None:
        draw_confidence(axes, found.logits, alpha=1.0)
        outline(axes, found.target, INK, 1.3, "--")
        frame(axes, found.logits.shape[0] / found.logits.shape[1])
        title(axes, name or "The instance", f"σ(z), {' × '.join(map(str, found.logits.shape))}")
        return
    if found.target.max() > 0.5:
        draw_instances(axes, image, found.target[None] > 0.5, [name], [COLORS[0]])
    else:
        draw_image(axes, image)
    title(axes, "The instance", f"truth: {height} × {width}, prediction: {' × '.join(map(str, found.logits.shape))}")


def _draw_choice(axes: Axes, found: Inspection) -> None:
    if len(found.candidates):
        draw_candidates(axes, found)
        title(axes, "Candidates", f"{len(found.candidates):,} uniform, {found.num_uncertain:,} of them chosen")
        return
    draw_confidence(axes, found.logits)
    outline(axes, found.target, INK, 1.3, "--")
    frame(axes, found.logits.shape[0] / found.logits.shape[1])
    title(axes, "Prediction", "no candidates: all points are uniform")


def _legend(figure: Figure) -> None:
    lines = require("matplotlib.lines", "plots")
    entries = (
        (ORANGE, "o", "", "uncertain points"),
        (GRAY, "o", "", "uniform points, other candidates"),
        (INK, "", "--", "outline of the truth"),
    )
    handles = [
        lines.Line2D([], [], color=color, marker=marker, markersize=5, linestyle=style, label=label)
        for color, marker, style, label in entries
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
