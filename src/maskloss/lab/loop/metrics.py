"""The lines of metrics.jsonl: what a run measures on its way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskloss._numbers import is_number
from maskloss.lab import files
from maskloss.lab.runfolder import METRICS


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
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    scores = line.get("held_out", {"ap": None, "ap50": None, "mean_iou": None})
    values = [value for name, value in line.items() if name != "held_out"]
    if not isinstance(scores, dict) or not {"ap", "ap50", "mean_iou"} <= set(scores):
        return None
    values += [scores[name] for name in ("ap", "ap50", "mean_iou")]
    return line if all(value is None or is_number(value) for value in values) else None
