"""Print the tables of docs/benchmarks.md from what `maskloss bench --stages` wrote.

python scripts/bench_tables.py runs/bench/bench.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from maskloss.bench.runner import ratios
from maskloss.bench.table import STAGES, factor, memory, seconds


def row(*cells: str) -> str:
    """Write a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def steps(cases: list[dict[str, Any]]) -> list[str]:
    """Lay out the steps: times, ratios with packing within and before the step, memory, operations."""
    head = ("preset", "maskloss", "packed before", "Transformers", "the other waiting policy", "ratio", "packed before")
    lines = [row(*head, "memory, maskloss", "memory, Transformers", "operations"), row(*["---"] * 10)]
    for case in cases:
        mine, theirs = case["arms"]["maskloss"], case["arms"]["transformers"]
        both = [ratios(theirs["samples"], mine["samples"], packed=packed) for packed in (False, True)]
        other = theirs["other_waiting"]
        cells = [
            *(seconds(mine["summary"][kind]["median"]) for kind in ("step", "packed")),
            f"{seconds(theirs['summary']['step']['median'])} ({theirs['waiting']})",
            "failed" if other is None else seconds(other["median"]),
            *("" if found is None else factor(found["median"]) for found in both),
            *(memory(arm["memory"]["extra"]) for arm in (mine, theirs)),
            ", ".join(str(arm["counts"]["operations"]) for arm in (mine, theirs)),
        ]
        lines.append(row(f"`{case['name']}`", *cells))
    return lines


def stages(cases: list[dict[str, Any]]) -> list[str]:
    """Lay out where the steps of maskloss go."""
    found = {case["name"]: case["arms"]["maskloss"].get("stages", {}) for case in cases}
    lines = [row("stage", *(f"`{name}`" for name in found)), row(*["---"] * (1 + len(found)))]
    lines += [row(stage, *(seconds(each.get(stage, 0.0)) for each in found.values())) for stage in STAGES]
    whole = (seconds(sum(each.get(stage, 0.0) for stage in STAGES)) for each in found.values())
    return [*lines, row("all", *whole)]


def main() -> None:
    """Print both tables."""
    report = json.loads(Path(sys.argv[1]).read_text())
    cases = [case for case in report["cases"] if {"maskloss", "transformers"} <= case["arms"].keys()]
    print("\n".join([*steps(cases), "", *stages(cases)]))  # noqa: T201


if __name__ == "__main__":
    main()
