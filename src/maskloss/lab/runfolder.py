"""The folder of a run: what lies in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskloss._numbers import is_number
from maskloss.errors import Cause
from maskloss.lab import files
from maskloss.lab.config import BEST, TrainConfig
from maskloss.lab.data.tiff import MOST_CHANNELS
from maskloss.lab.files import read_json

RUN, METRICS, SUMMARY, REPORT = "run.json", "metrics.jsonl", "summary.json", "report.html"
WEIGHTS, MODEL, HELD_OUT = "model.safetensors", "model", "held_out.txt"
# In a checkpoint: the average of the weights, which is what is scored and kept.
AVERAGE = "average.safetensors"
CHECKPOINTS, SNAPSHOTS, PICTURES, TENSORBOARD = "checkpoints", "snapshots", "pictures", "tensorboard"
# The name of a checkpoint and of a snapshot.
STEP = r"step-[0-9]{8,}"
SCHEMA = 1


class Facts(NamedTuple):
    """What `run.json` says: all that is needed to use a trained model, beside its weights."""

    config: TrainConfig  # the options, resolved
    classes: list[str]  # names, in the order of the labels
    category_ids: list[int]  # their numbers in COCO results
    channels: int  # of the images
    percentile: bool  # whether 8-bit images are stretched between percentiles
    tile: int  # side of the squares into which larger images are cut, pixels
    one_class_maps: bool  # whether the data are label maps of one class
    ranks: int  # processes that the run began with
    version: str | None = None  # of maskloss, that the run began with; None in older runs
    class_weights: list[float] | None = None  # of the classes in the classification; None: all weigh alike

    def write(self, folder: Path) -> None:
        """Write run.json."""
        content = self._asdict() | {"config": self.config.as_dict(), "schema": SCHEMA}
        files.write_json(folder / RUN, content)


def read_facts(folder: Path) -> Facts:
    """Read run.json."""
    rule = "a run must be a folder that maskloss train wrote"
    if not (folder / RUN).is_file():
        raise Cause(rule, f"{folder} has no {RUN}" if folder.is_dir() else f"there is no folder {folder}", "check it")
    content = read_json(folder / RUN, rule)
    if content.pop("schema", None) != SCHEMA:
        raise Cause(rule, f"{folder / RUN} is of another version", "train again, or use that version")
    try:
        config = TrainConfig.from_dict(content.pop("config"))
        # Where a model was trained is not where it has to be used.
        facts = Facts(config, **content)
    except (TypeError, KeyError, AttributeError) as error:
        raise Cause(rule, f"{folder / RUN}: {files.explain(error)}", "it was changed by hand") from None
    fits = (
        isinstance(facts.classes, list)
        and facts.classes
        and all(isinstance(name, str) for name in facts.classes)
        and isinstance(facts.category_ids, list)
        and len(facts.category_ids) == len(facts.classes)
        and all(isinstance(number, int) and number > 0 for number in (facts.channels, facts.tile, facts.ranks))
        and facts.channels <= MOST_CHANNELS
        and isinstance(facts.version, (str, type(None)))
        and (facts.class_weights is None or _are_weights(facts.class_weights, len(facts.classes)))
    )
    if not fits:
        raise Cause(rule, f"{folder / RUN} holds values of the wrong kind", "it was changed by hand")
    return facts


def _are_weights(weights: object, count: int) -> bool:
    return (
        isinstance(weights, list) and len(weights) == count and all(is_number(each) and each >= 0 for each in weights)
    )


def steps_of(folder: Path) -> list[int]:
    """List the steps of a run that have a checkpoint, oldest first."""
    names = [path.name for path in (folder / CHECKPOINTS).glob("step-*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if re.fullmatch(STEP, name))


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / CHECKPOINTS / f"step-{step:08d}"


def holds_work(folder: Path) -> bool:
    """Whether a run has come to anything worth keeping."""
    return bool(steps_of(folder)) or (folder / WEIGHTS).exists() or (folder / MODEL / WEIGHTS).exists()


def read_lines(folder: Path) -> list[dict[str, Any] | None]:
    """Read metrics.jsonl; None for a line that a run did not write. A last line that was cut off is left out."""
    path = folder / METRICS
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_read_line(text) for text in lines]


def _read_line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    scores = line.get("held_out", {"ap": None, "ap50": None, "mean_iou": None})
    values = [value for name, value in line.items() if name != "held_out"]
    if not isinstance(scores, dict) or not {"ap", "ap50", "mean_iou"} <= set(scores):
        return None
    values += [scores[name] for name in ("ap", "ap50", "mean_iou")]
    return line if all(value is None or is_number(value) for value in values) else None


def scores_of(lines: Iterable[Mapping[str, Any] | None]) -> dict[int, float]:
    """Return the AP on held-out images of each step that was scored after training had begun, in order."""
    scored = (line for line in lines if line is not None and "held_out" in line and line["step"] > 0)
    found = {line["step"]: line["held_out"]["ap"] for line in scored}
    return {step: ap for step, ap in found.items() if ap is not None}


def since_best(lines: Iterable[Mapping[str, Any] | None]) -> int:
    """Count the evaluations since the one that reached the highest AP first."""
    scores = list(scores_of(lines).values())
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0


def best_of(lines: Iterable[Mapping[str, Any] | None], steps: Sequence[int]) -> int | None:
    """Return the one of some steps with the highest AP on held-out images, the last of equals; None: none has one."""
    scores = {step: ap for step, ap in scores_of(lines).items() if step in steps}
    return max(scores, key=lambda step: (scores[step], step)) if scores else None


def kept_step(folder: Path, config: TrainConfig) -> int | None:
    """Return the step whose checkpoint holds the weights that a run keeps; None: there is no checkpoint."""
    steps = steps_of(folder)
    best = best_of(read_lines(folder), steps) if config.keep == BEST else None
    return best or (steps[-1] if steps else None)


def kept_weights(folder: Path, step: int) -> Path:
    """Return the file in a checkpoint with the weights that are used: their average, where there is one."""
    average = path_of(folder, step) / AVERAGE
    return average if average.is_file() else path_of(folder, step) / WEIGHTS
