"""The folder of a run: what lies in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from maskloss.errors import Cause
from maskloss.lab import files
from maskloss.lab.config import COMPACT, TrainConfig
from maskloss.lab.files import read_json

RUN, METRICS, SUMMARY, REPORT = "run.json", "metrics.jsonl", "summary.json", "report.html"
WEIGHTS, MODEL, HELD_OUT = "model.safetensors", "model", "held_out.txt"
CHECKPOINTS, SNAPSHOTS, PICTURES, TENSORBOARD = "checkpoints", "snapshots", "pictures", "tensorboard"
# The name of a checkpoint and of a snapshot.
STEP = r"step-[0-9]{8,}"
SCHEMA = 1


class Facts(NamedTuple):
    """What `run.json` says: all that is needed to use a trained model, beside its weights.

    Attributes:
        config: the options, resolved.
        classes: names, in the order of the labels.
        category_ids: their numbers in COCO results.
        channels: of the images.
        percentile: whether 8-bit images are stretched between percentiles.
        tile: side of the squares into which larger images are cut, pixels.
        one_class_maps: whether the data are label maps of one class.
        ranks: processes that the run began with.
        version: of maskloss, that the run began with; None in older runs.
    """

    config: TrainConfig
    classes: list[str]
    category_ids: list[int]
    channels: int
    percentile: bool
    tile: int
    one_class_maps: bool
    ranks: int
    version: str | None = None

    def write(self, folder: Path) -> None:
        """Write run.json."""
        content = self._asdict() | {"config": self.config.as_dict(), "schema": SCHEMA}
        files.write_json(folder / RUN, content)


def read_facts(folder: Path) -> Facts:
    """Read run.json.

    Raises:
        Cause: no run in this folder, or a run of another version.
    """
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
        and isinstance(facts.version, (str, type(None)))
    )
    if not fits:
        raise Cause(rule, f"{folder / RUN} holds values of the wrong kind", "it was changed by hand")
    return facts


def weights_path(folder: Path, config: TrainConfig) -> Path:
    """Return where a finished run keeps its weights; those of Transformers can be loaded by from_pretrained."""
    return folder / WEIGHTS if config.model == COMPACT else folder / MODEL / WEIGHTS


def steps_of(folder: Path) -> list[int]:
    """List the steps of a run that have a checkpoint, oldest first."""
    names = [path.name for path in (folder / CHECKPOINTS).glob("step-*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if re.fullmatch(STEP, name))


def holds_work(folder: Path) -> bool:
    """Whether a run has come to anything worth keeping."""
    return bool(steps_of(folder)) or (folder / WEIGHTS).exists() or (folder / MODEL / WEIGHTS).exists()


class Metrics:
    """The lines of metrics.jsonl.

    Args:
        folder: of the run.
        last: the last step to keep of what is there; None: nothing is kept.
        writes: whether this process writes the file.

    Attributes:
        lines: that are there.
        ruined: names of lines that could not be read; they are left out.
    """

    def __init__(self, folder: Path, last: int | None, writes: bool) -> None:
        self.path, self.writes = folder / METRICS, writes
        self.lines: list[dict[str, Any]] = []
        self.ruined: list[str] = []
        if last is not None and self.path.is_file():
            found = [_read_line(text) for text in _complete_lines(self.path)]
            self.lines = [line for line in found if line is not None and line["step"] <= last]
            self.ruined = [f"line {number} of {METRICS}" for number, line in enumerate(found, 1) if line is None]
        if writes:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            files.write_whole(self.path, lambda partial: partial.write_text(text, encoding="utf-8"))

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line; the file is complete after each."""
        self.lines.append(dict(line))
        if self.writes:
            with self.path.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(line) + "\n")

    def has(self, step: int, key: str) -> bool:
        """Whether a step has a line with this key."""
        return any(line["step"] == step and key in line for line in self.lines)


def _complete_lines(path: Path) -> list[str]:
    """Read the lines that are complete: the last one may have been cut off."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return lines


def _read_line(text: str) -> dict[str, Any] | None:
    """Read a line; None for one that this command did not write."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not _is_whole(line.get("step")):
        return None
    scores = line.get("held_out", {"ap": None, "ap50": None, "mean_iou": None})
    values = [value for name, value in line.items() if name != "held_out"]
    if not isinstance(scores, dict) or not {"ap", "ap50", "mean_iou"} <= set(scores):
        return None
    values += [scores[name] for name in ("ap", "ap50", "mean_iou")]
    return line if all(value is None or _is_number(value) for value in values) else None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Whether a picture can be made of a value: also one that JSON has without end."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
