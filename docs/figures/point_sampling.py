"""Draw docs/images/point_sampling.png: a prediction, uniform points, and the points that the loss uses."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from maskloss import PointSampling, _palette, functional
from maskloss._palette import GRAY, INK, ORANGE

IMAGES = Path(__file__).parent.parent / "images"
SIZE = 64  # of the prediction; the target is sharper
POINTS = 1500
CONFIDENCE = LinearSegmentedColormap.from_list("confidence", _palette.CONFIDENCE)


def distance(size: int, *, bumps: float, shift: float) -> Tensor:
    """Return how far inside a lobed shape each pixel lies, in units of the image."""
    center = (torch.arange(size) + 0.5) / size - 0.5
    y, x = torch.meshgrid(center, center - shift, indexing="ij")
    angle = torch.atan2(y, x)
    edge = 0.30 + bumps * torch.cos(3 * angle + 0.6) + 0.03 * torch.sin(2 * angle)
    return edge - torch.hypot(x, y)


def prediction() -> Tensor:
    """Return logits that are right in the middle, blunt at the edge, and uncertain in one corner."""
    logits = 42 * distance(SIZE, bumps=0.03, shift=0.01)
    grid = (torch.arange(SIZE) + 0.5) / SIZE
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    doubt = torch.exp(-((x - 0.74) ** 2 + (y - 0.42) ** 2) / 0.012)
    return logits * (1 - 0.85 * doubt) + 0.4 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def frame(axes: Axes, title: str, note: str, target: Tensor) -> None:
    axes.contour(target, levels=[0], colors=INK, linewidths=1.6, linestyles="--", extent=(0, 1, 0, 1))
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=14, color=INK, pad=10, fontweight="bold")
    axes.text(0.5, -0.055, note, transform=axes.transAxes, ha="center", va="top", fontsize=11, color=INK)
    for spine in axes.spines.values():
        spine.set(color="#ced4da", linewidth=1)


def main() -> None:
    mpl.rcParams["font.family"] = "DejaVu Sans"
    logits, target = prediction(), distance(512, bumps=0.05, shift=0.0)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.9), layout="constrained")

    for axes in (left, middle, right):
        axes.imshow(
            logits.sigmoid(),
            cmap=CONFIDENCE,
            vmin=0,
            vmax=1,
            extent=(0, 1, 1, 0),
            alpha=1 if axes is left else 0.35,
        )
    frame(left, "Prediction and target", f"σ(z), {SIZE} × {SIZE}; dashed: the target's edge", target)
    choices = (
        (middle, 0.0, "Uniform points", "α = 0: most points are easy"),
        (right, 0.75, "The points of the loss", "α = 0.75, k = 3: most points are hard"),
    )
    for axes, ratio, title, note in choices:
        sampling = PointSampling(num_points=POINTS, importance_ratio=ratio)
        [points] = functional.uncertain_points(logits[None], sampling=sampling, seed=3, backend="reference")
        chosen = sampling.num_uncertain
        axes.scatter(*points[chosen:].T, s=3.5, color=GRAY, linewidths=0)
        axes.scatter(*points[:chosen].T, s=3.5, color=ORANGE, linewidths=0)
        unsure = functional.point_sample(logits[None], points[None], backend="reference").abs().lt(math.log(9)).float()
        frame(axes, title, f"{note}\n{100 * unsure.mean():.0f}% lie where 0.1 < σ(z) < 0.9", target)
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / "point_sampling.png"
    figure.savefig(path, dpi=144, facecolor="white", bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})


if __name__ == "__main__":
    main()
