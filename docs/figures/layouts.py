"""Draw docs/images/layouts.png: independent and stratified points, uniform ones and those of the loss."""

from __future__ import annotations

import itertools

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from point_sampling import CONFIDENCE, IMAGES, ORANGE, distance, frame, prediction

from maskloss import PointSampling, functional
from maskloss.points import Strata

POINTS = 500
LINE = {"color": "#adb5bd", "linewidth": 0.5, "zorder": 1.5}


def draw_cells(axes: Axes, count: int) -> None:
    strata = Strata.of(count)
    starts = [row * count // strata.rows for row in range(strata.rows + 1)]
    for first, beyond in itertools.pairwise(starts):
        axes.hlines(first / count, 0, 1, **LINE)
        for place in range(1, beyond - first):
            axes.vlines(place / (beyond - first), first / count, beyond / count, **LINE)


def main() -> None:
    mpl.rcParams["font.family"] = "DejaVu Sans"
    logits, target = prediction(), distance(512, bumps=0.05, shift=0.0)
    figure, grid = plt.subplots(2, 2, figsize=(9.4, 10.2), layout="constrained")
    notes = {
        0.0: "α = 0: uniform points alone",
        0.75: "α = 0.75: most points chosen from three times as many",
    }
    for row, (alpha, note) in zip(grid, notes.items(), strict=True):
        for axes, layout in zip(row, ("independent", "stratified"), strict=True):
            sampling = PointSampling(num_points=POINTS, importance_ratio=alpha, layout=layout)
            [points] = functional.uncertain_points(logits[None], sampling=sampling, seed=3, backend="reference")
            axes.imshow(logits.sigmoid(), cmap=CONFIDENCE, vmin=0, vmax=1, extent=(0, 1, 1, 0), alpha=0.35)
            if layout == "stratified" and alpha == 0:
                draw_cells(axes, POINTS)
            chosen = sampling.num_uncertain
            axes.scatter(*points[chosen:].T, s=8, color="#495057", linewidths=0, zorder=3)
            axes.scatter(*points[:chosen].T, s=8, color=ORANGE, linewidths=0, zorder=3)
            frame(axes, layout.capitalize(), note, target)
    path = IMAGES / "layouts.png"
    figure.savefig(path, dpi=110, facecolor="white", bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})


if __name__ == "__main__":
    main()
