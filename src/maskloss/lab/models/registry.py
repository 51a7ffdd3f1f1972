"""From a configuration to data and a model, and from the folder of a run back to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from maskloss import __version__
from maskloss.errors import Cause
from maskloss.lab.config import COMPACT, TrainConfig
from maskloss.lab.data.digits import DigitScenes
from maskloss.lab.data.folder import FolderScenes
from maskloss.lab.data.scenes import Source
from maskloss.lab.models.learners import Compact, Kind, Learner
from maskloss.lab.models.pretrained import Card
from maskloss.lab.models.weights import load_weights, read_tensors
from maskloss.lab.runfolder import Facts, kept_step, kept_weights

DIGIT_SIZE = 64


class Prepared(NamedTuple):
    """What a run begins with."""

    facts: Facts
    source: Source
    learner: Learner


def kind_of(config: TrainConfig) -> type[Kind]:
    """Return what is known of the kind of model that a configuration names."""
    return Compact if config.model == COMPACT else Card


def weights_path(folder: Path, config: TrainConfig) -> Path:
    """Return where a finished run keeps its weights; those of Transformers can be loaded by from_pretrained."""
    return folder / kind_of(config).weights_file


def open_source(
    config: TrainConfig, size: int | None = None, *, score: str | None = None, classes: Sequence[str] | None = None
) -> Source:
    """Open the scenes that a configuration names.

    Args:
        config: of a run.
        size: side of the square that the model sees, if the configuration leaves it open.
        score: "all", or the part of the data to score on; None: as the run divides them.
        classes: those of a trained model, which the data must have; None: any.

    Raises:
        Cause: a folder that cannot be used; the message says why.
    """
    if config.data is None:
        if score is not None:
            raise Cause("--split must be a part of data", "the digits of this run have none", "leave it out")
        return DigitScenes(config.size or size or DIGIT_SIZE, config.held_out)
    return FolderScenes(
        config.data,
        config.size or size,
        crop=config.crop,
        options=config.data_options,
        normalize=config.normalize,
        augment=config.augment,
        on_error=config.on_error,
        score=score,
        classes=classes,
    )


def prepare(config: TrainConfig, ranks: int = 1, folder: Path | None = None) -> Prepared:
    """Read the data and build the model; nothing is written.

    Args:
        config: of a run.
        ranks: number of processes.
        folder: of the run, if it has begun; its weights are not loaded.

    Raises:
        Cause: data, options and model that do not fit each other.
    """
    if config.batch_size % (config.accumulate * ranks):
        raise Cause(
            "--batch-size must be a multiple of --accumulate times the number of processes",
            f"got {config.batch_size}, {config.accumulate} and {ranks}",
            "it counts the images of a whole step",
        )
    kind = kind_of(config).read(config, folder)
    source = open_source(config, kind.size)
    config = kind.resolve(config.with_steps(source.num_training), source, ranks)
    learner = kind.build(config, source.class_names, source.channels, trained=folder is None)
    source.limit(learner.num_queries)
    reading = source.reading if isinstance(source, FolderScenes) else None
    size = reading.size if reading else config.size or DIGIT_SIZE
    facts = Facts(
        # Absolute, so that the run can be used from elsewhere.
        config=dataclasses.replace(config, size=size).anchored(),
        classes=list(source.class_names),
        category_ids=list(source.category_ids),
        channels=source.channels,
        percentile=bool(reading and reading.percentile),
        tile=config.crop or (source.largest if isinstance(source, FolderScenes) else size),
        one_class_maps=source.one_class_maps,
        ranks=ranks,
        version=__version__,
    )
    return Prepared(facts, source, learner)


def load_learner(folder: Path, facts: Facts, device: torch.device) -> Learner:
    """Build the model of a run, with the weights that it keeps, or would keep if it ended now.

    Raises:
        Cause: no weights, or weights that are damaged.
    """
    path = weights_path(folder, facts.config)
    if not path.is_file():
        step = kept_step(folder, facts.config)
        if step is None:
            raise Cause("a run must have weights", f"{folder} has no checkpoint yet", "wait for the first one")
        path = kept_weights(folder, step)
    kind = kind_of(facts.config).read(facts.config, folder)
    learner = kind.build(facts.config, facts.classes, facts.channels, trained=False)
    load_weights(learner.network, read_tensors(path), str(path))
    return learner.to(device)
