"""Curves over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from maskloss._palette import GRAY, LINES, PALE
from maskloss.plots.canvas import AXES, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@drawing(axes=AXES)
def draw_curves(
    axes: Axes,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    colors: Sequence[str] = LINES,
    markers: bool = False,
) -> None:
    """Draw curves over training steps, each named at its end.

    Args:
        axes: where to draw.
        curves: name to (steps, values).
        title: of the picture.
        colors: of the curves, in order.
        markers: mark every value, for curves with few of them.
    """
    ends = []
    for (name, (steps, values)), color in zip(curves.items(), colors, strict=False):
        axes.plot(steps, values, color=color, linewidth=1.8, marker="o" if markers else "", markersize=4)
        ends.append((values[-1], steps[-1], name, color))
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=10)
    axes.set_xlabel("step", color=GRAY, fontsize=9)
    axes.tick_params(colors=GRAY, labelsize=9, length=0)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALE)
    _name_ends(axes, ends)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each curve's name beside its end, and push apart names that would overlap."""
    low, high = axes.get_ylim()
    gap, last = 0.1 * (high - low), float("-inf")
    for value, step, name, color in sorted(ends):
        last = max(value, last + gap)
        axes.annotate(
            name,
            xy=(step, last),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )
    axes.set_ylim(low, max(high, last + gap / 2))
