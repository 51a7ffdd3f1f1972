"""Scenes that a report shows, kept while all of them are scored."""

from __future__ import annotations

from typing import NamedTuple

from maskloss.lab.data.scenes import Scene
from maskloss.lab.results.inference import Prediction

SHOWN = 8


class Shown(NamedTuple):
    """A scene, and what was found in it."""

    scene: Scene
    prediction: Prediction


class Gallery:
    """Keeps the first scenes with anything in them, never the ones that turned out best."""

    def __init__(self, most: int = SHOWN) -> None:
        self.most = most
        self._kept: dict[int, Shown] = {}

    def keep(self, number: int, scene: Scene, prediction: Prediction) -> None:
        """Look at a scene."""
        if len(self._kept) < self.most and len(scene.labels):
            self._kept[number] = Shown(scene, prediction)

    @property
    def shown(self) -> list[Shown]:
        """The scenes, in order."""
        return [self._kept[number] for number in sorted(self._kept)]
