"""Loggers of experiments, beside the metrics that every run writes: those that Accelerate has trackers for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from maskloss.errors import Cause, require
from maskloss.lab.files import explain
from maskloss.lab.loop.progress import Begin, Listener, Progress
from maskloss.lab.results.evaluate import Evaluation
from maskloss.lab.runfolder import TENSORBOARD, Facts

PROJECT = "maskloss"


def check_loggers(names: Sequence[str]) -> None:
    """Raise unless all of these loggers are installed; asked before anything is read."""
    known = [str(each) for each in require("accelerate.tracking", "train").get_available_trackers()]
    for name in names:
        if name not in known:
            raise Cause(f"--log {name} needs that logger", f"{name} is not installed", f"pip install {name}")


@contextmanager
def logging_for(facts: Facts, listener: Listener) -> Iterator[Listener]:
    """Log loss terms, speed and scores of a run. Only the process that tells does that."""
    begun: list[Any] = []

    def log(values: dict[str, float], step: int) -> None:
        for tracker in begun:
            tracker.log(values, step=step)

    def begin(at: Begin) -> None:
        # Not before the run holds its folder.
        begun.extend(_begin(name, at, facts) for name in facts.config.log)
        listener.begin(at)

    def step(progress: Progress) -> None:
        terms = {f"loss/{name}": value for name, value in progress.terms.items()}
        log({**terms, "speed/images per second": progress.speed}, progress.step)
        listener.step(progress)

    def evaluation(at: tuple[int, Evaluation]) -> None:
        log({f"held out/{name}": getattr(at[1], name) for name in ("ap", "ap50", "ap75", "mean_iou")}, at[0])
        listener.evaluation(at)

    try:
        yield listener._replace(begin=begin, step=step, evaluation=evaluation)
    finally:
        for tracker in begun:
            tracker.finish()


def _begin(name: str, at: Begin, facts: Facts) -> Any:
    """Start a tracker. TensorBoard's files are the run's; what else a logger keeps lies where it keeps it."""
    made = require("accelerate.tracking", "train").LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # What an interrupted run logged after its checkpoint is taken back.
        tracker = made(TENSORBOARD, logging_dir=at.folder, purge_step=at.done + 1 if at.done else None)
    elif name in {"wandb", "trackio"}:
        tracker = made(PROJECT, name=at.folder.name)
    elif name == "mlflow":
        tracker = made(PROJECT, run_name=at.folder.name)
    else:
        tracker = made(PROJECT, **({"logging_dir": "."} if made.requires_logging_directory else {}))
    try:
        tracker.start()
        if name != "tensorboard":
            options = facts.config.as_dict().items()
            tracker.store_init_configuration({key: value for key, value in options if value not in {None, ()}})
    except Exception as error:
        raise Cause("a logger must be able to begin", f"{name}: {explain(error)}", "leave it out of --log") from error
    return tracker
