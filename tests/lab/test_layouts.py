"""What a quarter of the points is worth in a training run, if they are stratified."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskloss.lab.config import TrainConfig
from maskloss.lab.loop.progress import Listener
from maskloss.lab.loop.run import train

SEEDS = range(5)
POINTS = 1024
# Two fifths of a usual run: AP is far from what it starts with, and still depends on everything.
RUN = {"steps": 400, "held_out": 200, "evaluations": 1, "device": "cpu"}


def mean_ap(folder: Path, num_points: int, layout: str) -> float:
    """Train once for each seed, and average the AP on held-out scenes."""
    found = []
    for seed in SEEDS:
        config = TrainConfig(**RUN, num_points=num_points, layout=layout, seed=seed)
        found.append(train(config, folder / f"{layout} {seed}", Listener.silent()).evaluation.ap)
    return sum(found) / len(found)


@pytest.mark.long
def test_a_quarter_of_the_points_trains_as_well_if_stratified(tmp_path: Path) -> None:
    """The same mean over five seeds, up to three times the error of the difference."""
    quarter = mean_ap(tmp_path, POINTS // 4, "stratified")
    assert quarter > mean_ap(tmp_path, POINTS, "independent") - 0.05
