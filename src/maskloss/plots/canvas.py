"""What every picture is drawn on: figures, frames, images and outlines."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from maskloss._palette import CONFIDENCE, GRAY, INK, PALE
from maskloss.errors import Cause, describe, reported, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


P = ParamSpec("P")
R = TypeVar("R")

AXES, INSPECTION = "axes of matplotlib", "from inspect_points"


def drawing(**kinds: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a public drawing, whose arguments are told by name where they are swapped.

    Args:
        kinds: what an argument must be: AXES, INSPECTION, or the shape of a tensor, "[P, 2]" or "bool [T, H, W]".
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            for name, kind in kinds.items():
                left_out = signature.parameters[name].default is None and given.get(name) is None
                if not left_out and not _is(given[name], kind):
                    order = ", ".join(signature.parameters)
                    raise Cause(f"{name} must be {kind}", f"got {describe(given[name])}", f"the arguments are {order}")
            return function(*args, **kwargs)

        return reported(function.__name__)(call)

    return decorate


def _is(value: Any, kind: str) -> bool:
    if kind == AXES:
        return hasattr(value, "imshow")
    if kind == INSPECTION:
        return hasattr(value, "candidate_z")
    dtype, _, shape = kind.rpartition("[")
    sizes = shape.rstrip("]").split(", ")
    if not isinstance(value, Tensor) or value.ndim != len(sizes) or (dtype and value.dtype != torch.bool):
        return False
    return all(not size.isdigit() or int(size) == found for size, found in zip(sizes, value.shape, strict=True))


def rgb(color: str) -> np.ndarray[Any, Any]:
    """Return a color as three numbers in [0, 1].

    Args:
        color: a name of matplotlib's, or "#rrggbb".

    Returns:
        float64 `[3]`.
    """
    return np.array(require("matplotlib.colors", "plots").to_rgb(color))


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure in the style of these pictures, which no window shows.

    Args:
        width: in inches.
        height: in inches.

    Returns:
        A matplotlib figure with a constrained layout; `figure.subplots(...)` makes axes, `figure.savefig` writes it.

    Raises:
        MissingExtraError: matplotlib is not installed (extra `plots`).
    """
    layout = require("matplotlib.layout_engine", "plots").ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.07)
    figure: Figure = require("matplotlib.figure", "plots").Figure(
        figsize=(width, height), layout=layout, facecolor="white"
    )
    return figure


@drawing(axes=AXES, image="[3, h, w]")
def draw_image(axes: Axes, image: Tensor) -> None:
    """Draw an image, every pixel sharp.

    Args:
        axes: where to draw.
        image: `[3, h, w]` in [0, 1].
    """
    axes.imshow(image.cpu().permute(1, 2, 0).numpy(), extent=(0, 1, 1, 0), interpolation="nearest")
    frame(axes, image.shape[1] / image.shape[2])


@drawing(axes=AXES, image="[3, h, w]", masks="bool [T, H, W]")
def draw_instances(
    axes: Axes,
    image: Tensor,
    masks: Tensor,
    names: Sequence[str],
    colors: Sequence[str],
    *,
    text_size: float = 7.5,
) -> None:
    """Draw instances in color over a dimmed image, each with its name.

    Args:
        axes: where to draw.
        image: `[3, h, w]` in [0, 1].
        masks: bool `[T, H, W]`, of the same picture at any resolution; a later one lies on top.
        names: what to write on each instance; an empty name is left out.
        colors: of each instance.
        text_size: of the names, in typographic points. Default 7.5.
    """
    gray = image.mean(0, keepdim=True).expand(3, -1, -1)
    draw_image(axes, 0.16 + 0.45 * gray)
    for mask, color in zip(masks.cpu(), colors, strict=True):
        wash = np.zeros((*mask.shape, 4))
        wash[mask.numpy()] = [*rgb(color), 0.5]
        axes.imshow(wash, extent=(0, 1, 1, 0), interpolation="nearest", zorder=2)
        outline(axes, mask, color, 1.5, "-")
    for mask, name, color in zip(masks.cpu(), names, colors, strict=True):
        if name and mask.any():
            _tag(axes, mask, name, color, text_size)
    frame(axes, image.shape[1] / image.shape[2])


def frame(axes: Axes, aspect: float = 1.0) -> None:
    """Show [0, 1]^2 with y downward, without ticks, in a thin frame.

    Args:
        axes: what to frame.
        aspect: height over width of the picture. Default 1.
    """
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect=aspect)
    for spine in axes.spines.values():
        spine.set(color=PALE, linewidth=0.8)


@drawing(axes=AXES, mask="[H, W]")
def outline(axes: Axes, mask: Tensor, color: str, width: float, style: str) -> None:
    """Draw where a mask crosses one half, in [0, 1]^2.

    Args:
        axes: where to draw.
        mask: `[H, W]`, bool or float; beyond its edge it is 0, so that outlines are closed.
        color: of the line.
        width: of the line, in typographic points.
        style: of the line: "-", "--" or another of matplotlib's.
    """
    padded = torch.nn.functional.pad(mask.detach().float().cpu(), (1, 1, 1, 1)).numpy()
    if padded.max() <= 0.5:
        return
    height, width_in_pixels = mask.shape
    x = (np.arange(width_in_pixels + 2) - 0.5) / width_in_pixels
    y = (np.arange(height + 2) - 0.5) / height
    axes.contour(x, y, padded, levels=[0.5], colors=color, linewidths=width, linestyles=style, zorder=2.5)


def _tag(axes: Axes, mask: Tensor, name: str, color: str, text_size: float) -> None:
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
        bbox={"boxstyle": "round,pad=0.16", "facecolor": color, "edgecolor": "none"},
    )


def color_map(name: str, colors: Sequence[str]) -> Colormap:
    """Make a color map that runs through the given colors."""
    made: Colormap = require("matplotlib.colors", "plots").LinearSegmentedColormap.from_list(name, colors)
    return made


@drawing(axes=AXES, logits="[h, w]")
def draw_confidence(axes: Axes, logits: Tensor, alpha: float = 0.55) -> None:
    """Draw a prediction as probabilities, from white to teal, every pixel sharp.

    Args:
        axes: where to draw.
        logits: `[h, w]`, float.
        alpha: opacity, in [0, 1]. Default 0.55, which leaves points to be seen.
    """
    shown = logits.detach().float().sigmoid().cpu().numpy()
    colors = color_map("confidence", CONFIDENCE)
    axes.imshow(shown, cmap=colors, vmin=0, vmax=1, extent=(0, 1, 1, 0), interpolation="nearest", alpha=alpha)


def title(axes: Axes, text: str, note: str = "") -> None:
    """Write a title above axes, and a note below it in small gray letters."""
    axes.set_title(text, fontsize=11, fontweight="bold", color=INK, loc="left", pad=20 if note else 7)
    if note:
        axes.annotate(
            note, (0, 1), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=8.5, color=GRAY
        )
