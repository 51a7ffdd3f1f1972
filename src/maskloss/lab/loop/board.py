"""Logs for TensorBoard, beside the metrics that every run writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from maskloss.errors import require
from maskloss.lab.loop.progress import Begin, Listener, Progress
from maskloss.lab.results.evaluate import Evaluation
from maskloss.lab.runfolder import TENSORBOARD


@contextmanager
def logging_for(listener: Listener) -> Iterator[Listener]:
    """Log loss terms, speed and scores into the folder of a run.

    Args:
        listener: whom to tell too.

    Raises:
        MissingExtraError: tensorboardX is not installed (extra `train`).
    """
    made = require("tensorboardX", "train").SummaryWriter
    writers: list[Any] = []

    def begin(at: Begin) -> None:
        # Not before the run holds its folder. What an interrupted run logged after its checkpoint is taken back.
        writers.append(made(str(at.folder / TENSORBOARD), purge_step=at.done + 1 if at.done else None))
        listener.begin(at)

    def step(progress: Progress) -> None:
        for name, value in progress.terms.items():
            writers[0].add_scalar(f"loss/{name}", value, progress.step)
        writers[0].add_scalar("speed/images per second", progress.speed, progress.step)
        listener.step(progress)

    def evaluation(at: tuple[int, Evaluation]) -> None:
        for name in ("ap", "ap50", "ap75", "mean_iou"):
            writers[0].add_scalar(f"held out/{name}", getattr(at[1], name), at[0])
        listener.evaluation(at)

    try:
        yield listener._replace(begin=begin, step=step, evaluation=evaluation)
    finally:
        for writer in writers:
            writer.close()
