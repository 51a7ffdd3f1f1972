"""Pictures of one instance: its points, their loss, how they were chosen, and what it adds up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from maskloss._palette import CONFIDENCE, GRAY, INK, LOSS, ORANGE, PALE, SOFT, TEAL
from maskloss.errors import require
from maskloss.plots.canvas import AXES, INSPECTION, color_map, draw_confidence, drawing, frame, new_figure, outline
from maskloss.plots.inspection import Inspection, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure


@drawing(axes=AXES, logits="[h, w]", points="[P, 2]", target="[H, W]")
def draw_points(
    axes: Axes,
    logits: Tensor,
    points: Tensor,
    num_uncertain: int,
    *,
    target: Tensor | None = None,
    size: float | None = None,
) -> None:
    """Draw the points of one instance over its prediction.

    The prediction is shown as probabilities, from white to teal; uncertain points are orange, uniform ones gray, and
    a dashed line is the target's outline.

    Args:
        axes: where to draw.
        logits: `[h, w]`, float.
        points: `[P, 2]`, (x, y) in [0, 1]^2, the uncertain ones first, as `functional.uncertain_points` gives them.
        num_uncertain: how many of them are uncertain: `sampling.num_uncertain`.
        target: `[H, W]`, bool or float; default: none is drawn.
        size: of a point, in square typographic points. Default: the smaller, the more there are.

    Raises:
        MissingExtraError: matplotlib is not installed (extra `plots`).
    """
    draw_confidence(axes, logits)
    if target is not None:
        outline(axes, target, INK, 1.3, "--")
    size = spread(points) if size is None else size
    _scatter(axes, points[num_uncertain:], size, GRAY)
    _scatter(axes, points[:num_uncertain], size, ORANGE)
    frame(axes, logits.shape[0] / logits.shape[1])


@drawing(axes=AXES, found=INSPECTION)
def draw_candidates(axes: Axes, found: Inspection, *, size: float | None = None) -> None:
    """Draw the candidates of one instance over its prediction: those that were chosen orange, the others gray.

    Args:
        axes: where to draw.
        found: from `inspect_points`.
        size: of a point, in square typographic points. Default: the smaller, the more there are.
    """
    draw_confidence(axes, found.logits)
    outline(axes, found.target, INK, 1.3, "--")
    size = spread(found.candidates) if size is None else size
    _scatter(axes, found.candidates, size, GRAY, 0.55)
    _scatter(axes, found.points[: found.num_uncertain], size, ORANGE)
    frame(axes, found.logits.shape[0] / found.logits.shape[1])


@drawing(axes=AXES, found=INSPECTION)
def draw_point_losses(axes: Axes, found: Inspection, *, size: float | None = None) -> PathCollection:
    """Draw the points of one instance over its target, colored by their loss; crosses mark points that weigh nothing.

    Args:
        axes: where to draw.
        found: from `inspect_points`.
        size: of a point, in square typographic points. Default: the smaller, the more there are.

    Returns:
        The points, for a color bar: `figure.colorbar(drawn, ax=axes)`.
    """
    height, width = found.target.shape
    wash = np.zeros((height, width, 4))
    wash[found.target.cpu().numpy() > 0.5] = [0.5, 0.55, 0.6, 0.28]
    axes.imshow(wash, extent=(0, 1, 1, 0), interpolation="nearest")
    outline(axes, found.target, INK, 1.3, "--")
    size = 1.4 * spread(found.points) if size is None else size
    counts = found.weight > 0
    # The largest on top: they are what one looks for.
    order = found.loss.argsort()
    order = order[counts[order]]
    where, value = found.points[order].cpu(), found.loss[order].cpu()
    drawn = axes.scatter(
        where[:, 0],
        where[:, 1],
        s=size,
        c=value,
        cmap=color_map("loss", LOSS),
        vmin=0,
        linewidths=0,
        zorder=3,
        rasterized=_many(where),
    )
    ignored = found.points[~counts].cpu()
    axes.scatter(ignored[:, 0], ignored[:, 1], s=2 * size, color=SOFT, marker="x", linewidths=0.6, zorder=2.8)
    frame(axes, height / width)
    return drawn


@drawing(axes=AXES, found=INSPECTION)
def draw_uncertainty(axes: Axes, found: Inspection, *, bins: int = 48) -> None:
    """Draw the histogram of |z| over the candidates, and the threshold below which they were chosen.

    Args:
        axes: where to draw.
        found: from `inspect_points`.
        bins: of the histogram. Default 48.
    """
    _bare(axes)
    if not len(found.candidates):
        axes.text(0.5, 0.5, "all points are uniform", ha="center", va="center", color=GRAY, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    size = found.candidate_z.abs().cpu().numpy()
    top = float(np.quantile(size, 0.995)) or 1.0
    # The threshold is the edge of a bin.
    below = max(1, round(bins * min(found.threshold / top, 1.0)))
    step = (found.threshold or top) / below
    edges = step * np.arange(below + max(0, int(np.ceil((top - found.threshold) / step - 1e-6))) + 1)
    counts, _ = np.histogram(size.clip(max=edges[-1]), edges)
    colors = [ORANGE] * below + [SOFT] * (len(counts) - below)
    axes.bar(edges[:-1], counts / len(size), step, align="edge", color=colors, linewidth=0)
    axes.set_ylim(0, 1.28 * counts.max() / len(size))
    axes.axvline(found.threshold, color=INK, linewidth=1.2)
    surely = 1 / (1 + np.exp(-found.threshold))
    # Beyond that only zeros and ones would be shown.
    range_of = f"\nσ(z) from {1 - surely:.3f} to {surely:.3f}" if surely < 0.9995 else ""
    left = found.threshold < 0.6 * top
    axes.annotate(
        f"chosen: |z| ≤ {found.threshold:.2f}{range_of}",
        (found.threshold, 1),
        xytext=(6 if left else -6, -4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="left" if left else "right",
        va="top",
        fontsize=9,
        color=INK,
    )
    axes.set_xlim(0, edges[-1])
    axes.set_yticks([])
    axes.set_xlabel("|z| of a candidate", color=GRAY, fontsize=9)


@drawing(axes=AXES, found=INSPECTION)
def draw_terms(axes: Axes, found: Inspection) -> None:
    """Draw the weighted terms of one instance as bars, the cross-entropy by kind of point.

    Args:
        axes: where to draw.
        found: from `inspect_points`.
    """
    _bare(axes)
    by_uncertain = found.ce_weight * found.ce_of_uncertain
    ce, dice = found.ce_weight * found.ce, found.dice_weight * found.dice
    axes.barh(0, by_uncertain, color=ORANGE, height=0.52)
    axes.barh(0, ce - by_uncertain, left=by_uncertain, color=GRAY, height=0.52)
    axes.barh(1, dice, color=TEAL, height=0.52)
    widest = max(ce, dice) or 1.0
    share = by_uncertain / ce if ce else 0.0
    kinds = f"{share:.0%} of it at uncertain points" if found.num_uncertain else ""
    rows = (
        (0, "cross-entropy", found.ce, found.ce_weight, ce),
        (1, "Dice", found.dice, found.dice_weight, dice),
    )
    axes.text(0, 0.31, kinds, fontsize=9, color=ORANGE, va="top")
    for row, name, value, weight, product in rows:
        axes.text(0, row - 0.31, name, fontsize=9.5, fontweight="bold", color=INK, va="bottom")
        axes.text(
            widest,
            row - 0.31,
            f"{weight:g} × {value:.3f} = {product:.3f}",
            fontsize=9.5,
            color=INK,
            ha="right",
            va="bottom",
        )
    axes.text(
        widest, 1.45, f"total  {found.total:.3f}", fontsize=11, fontweight="bold", color=INK, ha="right", va="top"
    )
    axes.set(xlim=(0, widest), ylim=(1.75, -0.6), xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)


@drawing(axes=AXES, costs="[Q, T]")
def draw_costs(
    axes: Axes,
    costs: Tensor,
    pairs: tuple[Tensor, Tensor],
    *,
    names: Sequence[str] | None = None,
    chosen: int | None = None,
    most: int = 10,
) -> None:
    """Draw the matching costs of one image, and frame the pairs that were matched.

    Args:
        axes: where to draw.
        costs: `[Q, T]`, float.
        pairs: the matched queries and their targets, int64 `[K]` each.
        names: of the targets. Default: their numbers.
        chosen: the target whose pair is framed in orange. Default: none.
        most: rows to show. Matched queries come first, in the order of their targets, then the cheapest of the others.
            Default 10.
    """
    queries, targets = (each.cpu() for each in pairs)
    order = queries[targets.argsort()].tolist()
    matrix = costs.detach().float().cpu()
    others = [query for query in matrix.amin(1).argsort().tolist() if query not in set(order)] if matrix.numel() else []
    rows = (order + others)[: max(most, 1)]
    shown = matrix[rows].numpy()
    finite = shown[np.isfinite(shown)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    colors = color_map("cost", CONFIDENCE[::-1])
    axes.imshow(shown, cmap=colors, vmin=low, vmax=high if high > low else low + 1, aspect="auto")
    dark = low + 0.3 * (high - low)
    if len(rows) * shown.shape[1] <= 120:
        for (row, column), value in np.ndenumerate(shown):
            ink = "white" if value < dark else INK
            axes.text(
                column,
                row,
                f"{round(float(value), 1) + 0.0:.1f}".replace("-", "−"),
                ha="center",
                va="center",
                fontsize=8,
                color=ink,
            )
    patches = require("matplotlib.patches", "plots")
    place = {query: row for row, query in enumerate(rows)}
    for query, target in zip(queries.tolist(), targets.tolist(), strict=True):
        if query in place:
            color, width = (ORANGE, 2.6) if target == chosen else (INK, 1.4)
            corner = (target - 0.5, place[query] - 0.5)
            axes.add_patch(
                patches.Rectangle(corner, 1, 1, fill=False, edgecolor=color, linewidth=width, clip_on=False, zorder=4)
            )
    count = shown.shape[1]
    axes.set_xticks(range(count), list(names or map(str, range(count))), fontsize=8.5, color=INK)
    axes.set_yticks(range(len(rows)), [f"query {query}" for query in rows], fontsize=8, color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_color(PALE)


@drawing(logits="[N, h, w]", points="[N, P, 2]", targets="[N, H, W]")
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
        >>> import torch
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


def _scatter(axes: Axes, points: Tensor, size: float, color: str, alpha: float = 1.0) -> None:
    where = points.detach().cpu().numpy()
    axes.scatter(
        where[:, 0], where[:, 1], s=size, color=color, alpha=alpha, linewidths=0, zorder=3, rasterized=_many(points)
    )


def _many(points: Tensor) -> bool:
    """Whether this many points are better drawn as pixels in a vector file."""
    return len(points) > 3000


def _bare(axes: Axes) -> None:
    """Take away what is no data."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
    axes.tick_params(colors=GRAY, labelsize=9, length=0)
