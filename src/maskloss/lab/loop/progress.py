"""What a run tells while it goes on, and whom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from maskloss.lab.results.evaluate import Evaluation


class Begin(NamedTuple):
    """Where a run begins: its folder, the steps that are taken already, and those of the whole run."""

    folder: Path
    done: int
    steps: int


class Progress(NamedTuple):
    """What a step reports: its number from 1, its loss terms, and images a second since the last report."""

    step: int
    terms: dict[str, float]
    speed: float


class Listener(NamedTuple):
    """Whom a run tells what happens; each is called with one argument."""

    facts: Callable[[list[tuple[str, str]]], None]  # what the data and the model are, before training starts
    begin: Callable[[Begin], None]  # where the run begins
    step: Callable[[Progress], None]  # a step's progress
    evaluation: Callable[[tuple[int, Evaluation]], None]  # a step, and the scores after it
    # how many images of the last evaluation were looked at, and how many there are
    looked: Callable[[tuple[int, int]], None]
    note: Callable[[str], None]  # what is being done
    skipped: Callable[[str], None]  # a broken image or picture that was left out

    @staticmethod
    def silent() -> Listener:
        """Return one that does nothing."""
        return Listener(*[lambda _: None] * len(Listener._fields))


class Interrupted(Exception):
    """A signal ended a run that has a checkpoint: `signal` is its number, `step` that of the checkpoint."""

    def __init__(self, folder: Path, step: int, steps: int, number: int) -> None:
        super().__init__(f"stopped at step {step:,} of {steps:,}; go on with: maskloss train --resume {folder}")
        self.step, self.signal = step, number
