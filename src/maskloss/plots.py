"""Pictures of points and losses, drawn with matplotlib onto axes of your own or as whole figures.

    figure = plots.points_figure(logits, points, sampling.num_uncertain, targets=masks)
    figure.savefig("points.png")

Nothing here touches pyplot, so no window opens and no figure stays in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maskloss.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["draw_curves", "draw_instances", "draw_points", "points_figure"]

INK, GREY, PALE = "#343a40", "#868e96", "#dee2e6"
TEAL, ORANGE = "#0b7285", "#e8590c"
# Bright enough for dark pictures, dark enough for white paper.
COLOURS = (
    "#ff6b6b",
    "#fab005",
    "#51cf66",
    "#22b8cf",
    "#748ffc",
    "#e599f7",
    "#ff922b",
    "#94d82d",
    "#38d9a9",
    "#faa2c1",
)


def rgb(colour: str) -> np.ndarray[Any, Any]:
    """Return a colour as three numbers in [0, 1]."""
    return np.array(require("matplotlib.colors", "plots").to_rgb(colour))


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure in the style of these pictures; sizes in inches.

    Raises:
        MissingExtraError: matplotlib is not installed (extra `plots`).
    """
    layout = require("matplotlib.layout_engine", "plots").ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.07)
    figure: Figure = require("matplotlib.figure", "plots").Figure(
        figsize=(width, height), layout=layout, facecolor="white"
    )
    return figure


def draw_points(
    axes: Axes,
    logits: Tensor,
    points: Tensor,
    num_uncertain: int,
    *,
    target: Tensor | None = None,
    size: float = 6.0,
) -> None:
    """Draw the points of one instance over its prediction.

    The prediction is shown as probabilities, from white to teal; uncertain points are orange, uniform ones grey, and
    a dashed line is the target's outline.

    Args:
        axes: where to draw.
        logits: `[h, w]`, float.
        points: `[P, 2]`, (x, y) in [0, 1]^2, the uncertain ones first, as `functional.uncertain_points` gives them.
        num_uncertain: how many of them are uncertain: `sampling.num_uncertain`.
        target: `[H, W]`, bool or float; default: none is drawn.
        size: of a point, in square typographic points. Default 6.

    Raises:
        MissingExtraError: matplotlib is not installed (extra `plots`).
    """
    shown = logits.detach().float().sigmoid().cpu().numpy()
    axes.imshow(shown, cmap=_confidence(), vmin=0, vmax=1, extent=(0, 1, 1, 0), interpolation="nearest", alpha=0.55)
    if target is not None:
        _outline(axes, target, INK, 1.3, "--")
    where = points.detach().cpu().numpy()
    for part, colour in ((where[num_uncertain:], GREY), (where[:num_uncertain], ORANGE)):
        axes.scatter(part[:, 0], part[:, 1], s=size, color=colour, linewidths=0, zorder=3)
    frame(axes)


def draw_image(axes: Axes, image: Tensor) -> None:
    """Draw an image `[3, h, w]` in [0, 1], every pixel sharp."""
    axes.imshow(image.cpu().permute(1, 2, 0).numpy(), extent=(0, 1, 1, 0), interpolation="nearest")
    frame(axes, image.shape[1] / image.shape[2])


def draw_instances(
    axes: Axes,
    image: Tensor,
    masks: Tensor,
    names: Sequence[str],
    colours: Sequence[str],
    *,
    text_size: float = 7.5,
) -> None:
    """Draw instances in colour over a dimmed image, each with its name.

    Args:
        axes: where to draw.
        image: `[3, h, w]` in [0, 1].
        masks: bool `[T, H, W]`, of the same picture at any resolution; a later one lies on top.
        names: what to write on each instance; an empty name is left out.
        colours: of each instance.
        text_size: of the names, in typographic points. Default 7.5.
    """
    grey = image.mean(0, keepdim=True).expand(3, -1, -1)
    draw_image(axes, 0.16 + 0.45 * grey)
    for mask, colour in zip(masks.cpu(), colours, strict=True):
        wash = np.zeros((*mask.shape, 4))
        wash[mask.numpy()] = [*rgb(colour), 0.5]
        axes.imshow(wash, extent=(0, 1, 1, 0), interpolation="nearest", zorder=2)
        _outline(axes, mask, colour, 1.5, "-")
    for mask, name, colour in zip(masks.cpu(), names, colours, strict=True):
        if name and mask.any():
            _tag(axes, mask, name, colour, text_size)
    frame(axes, image.shape[1] / image.shape[2])


def draw_curves(
    axes: Axes,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    colours: Sequence[str] = (TEAL, ORANGE, "#5f3dc4", "#2b8a3e", GREY),
    markers: bool = False,
) -> None:
    """Draw curves over training steps, each named at its end.

    Args:
        axes: where to draw.
        curves: name to (steps, values).
        title: of the picture.
        colours: of the curves, in order.
        markers: mark every value, for curves with few of them.
    """
    ends = []
    for (name, (steps, values)), colour in zip(curves.items(), colours, strict=False):
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o" if markers else "", markersize=4)
        ends.append((values[-1], steps[-1], name, colour))
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=10)
    axes.set_xlabel("step", color=GREY, fontsize=9)
    axes.tick_params(colors=GREY, labelsize=9, length=0)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALE)
    _name_ends(axes, ends)


def points_figure(
    logits: Tensor,
    points: Tensor,
    num_uncertain: int,
    *,
    targets: Tensor | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 4,
) -> Figure:
    """Draw the points of several instances, each over its prediction.

    Args:
        logits: `[N, h, w]`, float.
        points: `[N, P, 2]`, (x, y) in [0, 1]^2, the uncertain ones first.
        num_uncertain: how many points of an instance are uncertain.
        targets: `[N, H, W]`, bool or float; default: none are drawn.
        titles: one per instance; default: none.
        columns: pictures in a row. Default 4.

    Returns:
        A matplotlib figure; `figure.savefig` writes it.

    Raises:
        MissingExtraError: matplotlib is not installed (extra `plots`).

    Example:
        >>> from maskloss import PointSampling, functional
        >>> logits, sampling = torch.linspace(-4, 4, 64).repeat(2, 64, 1), PointSampling(num_points=100)
        >>> points = functional.uncertain_points(logits, sampling=sampling, seed=0)
        >>> len(points_figure(logits, points, sampling.num_uncertain).axes)
        2
    """
    count = len(logits)
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(3 * columns, 3.15 * rows)
    for place in range(count):
        axes = figure.add_subplot(rows, columns, place + 1)
        target = None if targets is None else targets[place]
        draw_points(axes, logits[place], points[place], num_uncertain, target=target)
        if titles is not None:
            axes.set_title(titles[place], fontsize=10)
    return figure


def frame(axes: Axes, aspect: float = 1.0) -> None:
    """Show [0, 1]^2 with y downward, without ticks, in a thin frame; `aspect` is height over width."""
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect=aspect)
    for spine in axes.spines.values():
        spine.set(color=PALE, linewidth=0.8)


def _outline(axes: Axes, mask: Tensor, colour: str, width: float, style: str) -> None:
    """Draw where a mask crosses one half, in [0, 1]^2; a border of zeros closes outlines at the edge."""
    padded = torch.nn.functional.pad(mask.detach().float().cpu(), (1, 1, 1, 1)).numpy()
    if padded.max() <= 0.5:
        return
    height, width_in_pixels = mask.shape
    x = (np.arange(width_in_pixels + 2) - 0.5) / width_in_pixels
    y = (np.arange(height + 2) - 0.5) / height
    axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=width, linestyles=style, zorder=2.5)


def _tag(axes: Axes, mask: Tensor, name: str, colour: str, text_size: float) -> None:
    """Write a name above the topmost pixel of a mask, or below its lowest one where there is no room above."""
    height, width = mask.shape
    rows = mask.any(1).nonzero().flatten()
    above = int(rows[0]) > 0.09 * height
    row = int(rows[0] if above else rows[-1])
    column = float(mask[row].nonzero().float().mean()) + 0.5
    axes.text(
        min(max(column / width, 0.05), 0.95),
        row / height - 0.02 if above else (row + 1) / height + 0.02,
        name,
        ha="center",
        va="bottom" if above else "top",
        fontsize=text_size,
        fontweight="bold",
        color="#212529",
        clip_on=True,
        zorder=5,
        bbox={"boxstyle": "round,pad=0.16", "facecolor": colour, "edgecolor": "none"},
    )


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each curve's name beside its end, and push apart names that would overlap."""
    low, high = axes.get_ylim()
    gap, last = 0.1 * (high - low), float("-inf")
    for value, step, name, colour in sorted(ends):
        last = max(value, last + gap)
        axes.annotate(
            name,
            xy=(step, last),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
    axes.set_ylim(low, max(high, last + gap / 2))


def _confidence() -> Colormap:
    made: Colormap = require("matplotlib.colors", "plots").LinearSegmentedColormap.from_list(
        "confidence", ["#ffffff", "#c5e9ef", "#3bb0c4", TEAL]
    )
    return made
