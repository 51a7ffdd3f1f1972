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
from maskloss.lab.models.cards import Card
from maskloss.lab.models.learners import Compact, Kind, Learner
from maskloss.lab.models.pretrained import MODEL_FILE
from maskloss.lab.models.weights import load_weights, read_tensors
from maskloss.lab.runfolder import MODEL, RUN, Facts, kept_step, kept_weights, read_facts

DIGIT_SIZE = 64


class Prepared(NamedTuple):
    """What a run begins with."""

    facts: Facts  # of the run
    source: Source  # of the scenes
    learner: Learner  # what is trained
    told: list[tuple[str, str]]  # what a person should know of the model's weights: names and values to show


def kind_of(config: TrainConfig, folder: Path | None = None) -> type[Kind]:
    """Return what is known of the kind of model that a configuration names.

    `folder` is that of a run that has begun: it knows itself, also where it began with the weights of another one.
    """
    if config.model == COMPACT:
        return Compact
    if folder is None and is_run(config.model):
        folder = Path(config.model)
        return kind_of(read_facts(folder).config, folder)
    return Card if folder is None or (folder / MODEL / MODEL_FILE).is_file() else Compact


def is_run(model: str) -> bool:
    """Whether --model is the folder of a run."""
    return (Path(model) / RUN).is_file()


def weights_path(folder: Path, config: TrainConfig) -> Path:
    """Return where a finished run keeps its weights; those of Transformers can be loaded by from_pretrained."""
    return folder / kind_of(config, folder).weights_file


def open_source(
    config: TrainConfig, size: int | None = None, *, score: str | None = None, classes: Sequence[str] | None = None
) -> Source:
    """Open the scenes that a configuration names; `size` is for one that leaves it open.

    With `score`, "all" or a part of the data, only these are scored on. `classes` are those of a trained model, which
    the data must have.
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
    """Read the data and build the model; nothing is written. `folder` is that of the run, if it has begun."""
    if config.batch_size % (config.accumulate * ranks):
        raise Cause(
            "--batch-size must be a multiple of --accumulate times the number of processes",
            f"got {config.batch_size}, {config.accumulate} and {ranks}",
            "it counts the images of a whole step",
        )
    base = Base.of(config) if folder is None and is_run(config.model) else None
    if base is not None:
        config = base.completed(config)
    kind = kind_of(config, folder).read(config, base.folder if base else folder)
    source = open_source(config, kind.size)
    config = kind.resolve(config.with_steps(source.num_training), source, ranks)
    weights = _balanced(source.class_counts) if config.balance else None
    new = folder is None and base is None
    learner = kind.build(config, source.class_names, source.channels, class_weights=weights, trained=new)
    told = [] if base is None else [("begins from", base.give(learner, source))]
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
        class_weights=weights,
    )
    return Prepared(facts, source, learner, told)


def _balanced(counts: Sequence[int] | None) -> list[float]:
    """Weigh classes by 1 / sqrt(n), so that instances weigh 1 on average; a class without instances counts as one."""
    if counts is None:
        raise Cause("--balance needs classes that differ in number", "digits are drawn alike", "leave it out")
    weights = [max(1, count) ** -0.5 for count in counts]
    mean = sum(weight * count for weight, count in zip(weights, counts, strict=True)) / max(1, sum(counts))
    return [weight / mean for weight in weights]


def load_learner(folder: Path, facts: Facts, device: torch.device) -> Learner:
    """Build the model of a run, with the weights that it keeps, or would keep if it ended now."""
    path = find_weights(folder, facts.config)
    kind = kind_of(facts.config, folder).read(facts.config, folder)
    weights = facts.class_weights
    learner = kind.build(facts.config, facts.classes, facts.channels, class_weights=weights, trained=False)
    load_weights(learner.network, read_tensors(path), str(path))
    return learner.to(device)


def find_weights(folder: Path, config: TrainConfig) -> Path:
    """Return the file with the weights that a run keeps, or would keep if it ended now."""
    path = weights_path(folder, config)
    if path.is_file():
        return path
    step = kept_step(folder, config)
    if step is None:
        raise Cause("a run must have weights", f"{folder} has no checkpoint yet", "wait for the first one")
    return kept_weights(folder, step)


class Base(NamedTuple):
    """A run whose weights another one begins with."""

    folder: Path  # of the run
    facts: Facts  # of it

    @classmethod
    def of(cls, config: TrainConfig) -> Base:
        """Read what is known of the run that --model names."""
        folder = Path(config.model).absolute()
        return cls(folder, read_facts(folder))

    def completed(self, config: TrainConfig) -> TrainConfig:
        """Choose what decides how the weights are used, as far as it was left open."""
        mine = self.facts.config
        if config.norm not in {None, mine.norm}:
            raise Cause("--norm must be that of the weights", f"{self.folder} has {mine.norm}", "leave it out")
        return dataclasses.replace(config, model=str(self.folder), norm=mine.norm, size=config.size or mine.size)

    def give(self, learner: Learner, source: Source) -> str:
        """Put the weights into a model, whose classification stays new where the classes are others; say how."""
        if source.channels != self.facts.channels:
            raise Cause(
                "the images must have as many channels as those that the weights of --model were trained on",
                f"these have {source.channels}, those of {self.folder} had {self.facts.channels}",
                "convert them",
            )
        path = find_weights(self.folder, self.facts.config)
        theirs = self.facts.classes
        same = list(source.class_names) == theirs
        # With as many classes, the weights of others would fit too.
        own = learner.settings if same else (*learner.settings, *learner.class_layers)
        new = {name: each for name, each in learner.network.state_dict().items() if name.startswith(own)}
        load_weights(learner.network, read_tensors(path) | new, str(path))
        told = f"the weights of {self.folder}"
        return told if same else f"{told}, with a new classification: its classes are {_some(theirs)}"


def _some(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
