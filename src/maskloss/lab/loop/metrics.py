"""The lines of metrics.jsonl: what a run measures on its way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskloss.lab import files
from maskloss.lab.runfolder import METRICS, read_lines


class Metrics:
    """The lines of metrics.jsonl, and the names of those that could not be read and are left out, `ruined`.

    `last` is the last step to keep of what is there, None for nothing; only a process that `writes` touches the file.
    """

    def __init__(self, folder: Path, last: int | None, writes: bool) -> None:
        self.path, self.writes = folder / METRICS, writes
        self.lines: list[dict[str, Any]] = []
        self.ruined: list[str] = []
        if last is not None:
            found = read_lines(folder)
            self.lines = [line for line in found if line is not None and line["step"] <= last]
            self.ruined = [f"line {number} of {METRICS}" for number, line in enumerate(found, 1) if line is None]
        if writes:
            files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line; the file is complete after each."""
        self.lines.append(dict(line))
        if self.writes:
            with self.path.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(line) + "\n")

    def has(self, step: int, key: str) -> bool:
        """Whether a step has a line with this key."""
        return any(line["step"] == step and key in line for line in self.lines)
