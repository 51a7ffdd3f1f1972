"""What a quarter of the points is worth in a training run, if they are stratified."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskloss.training.config import TrainConfig
from maskloss.training.run import Listener, train

SEEDS = range(5)
POINTS = 512
# Small scenes and few of them: a run takes some seconds, and its AP is far from what it starts with.
RUN = {"steps": 400, "size": 32, "batch_size": 8, "held_out": 200, "evaluations": 1, "device": "cpu"}


def mean_ap(folder: Path, num_points: int, layout: str) -> float:
    """Train once for each seed, and average the AP on held-out scenes."""
    found = []
    for seed in SEEDS:
        config = TrainConfig(**RUN, num_points=num_points, layout=layout, seed=seed)
        found.append(train(config, folder / f"{layout} {num_points} {seed}", Listener.silent()).evaluation.ap)
    return sum(found) / len(found)


@pytest.mark.slow
def test_a_quarter_of_the_points_trains_as_well_if_stratified(tmp_path: Path) -> None:
    """The same means over five seeds up to what seeds are worth, and more than a few points teach."""
    many, quarter = mean_ap(tmp_path, POINTS, "independent"), mean_ap(tmp_path, POINTS // 4, "stratified")
    few = mean_ap(tmp_path, POINTS // 64, "independent")
    assert quarter > many - 0.02
    assert quarter > few + 0.02
