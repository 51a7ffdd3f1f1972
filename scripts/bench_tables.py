"""Print the tables of docs/benchmarks.md from what `maskloss bench --stages`, or `--scaling`, wrote.

python scripts/bench_tables.py runs/bench/bench.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskloss.lab.bench.cases import PEERS
from maskloss.lab.bench.runner import ratios
from maskloss.lab.bench.table import STAGES, factor, memory, seconds


def row(*cells: str) -> str:
    """Write a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def ours(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the arms of this library that were measured."""
    return {arm: found for arm, found in case["arms"].items() if arm not in PEERS and "summary" in found}


def rival(case: dict[str, Any]) -> dict[str, Any]:
    """Return what the tables compare with: the dense arm of clips and volumes, or Transformers."""
    found: dict[str, Any] = case["arms"].get("dense" if case["sizes"].get("unit") else "transformers", {})
    return found


def steps(cases: list[dict[str, Any]]) -> list[str]:
    """Lay out the steps, a row for each arm: times, ratios with packing within and before it, memory, operations."""
    head = ("preset", "arm", "step", "packed before", "theirs", "the other waiting policy", "ratio")
    lines = [row(*head, "packed before", "memory", "memory, theirs", "operations"), row(*["---"] * 11)]
    for case in cases:
        theirs = rival(case)
        other = theirs["other_waiting"]
        for arm, mine in ours(case).items():
            both = [ratios(theirs["samples"], mine["samples"], packed=packed) for packed in (False, True)]
            cells = [
                *(seconds(mine["summary"][kind]["median"]) for kind in ("step", "packed")),
                f"{seconds(theirs['summary']['step']['median'])} ({theirs['waiting']})",
                "failed" if other is None else seconds(other["median"]),
                *("" if found is None else factor(found["median"]) for found in both),
                *(memory(each["memory"]["extra"]) for each in (mine, theirs)),
                ", ".join(str(each["counts"]["operations"]) for each in (mine, theirs)),
            ]
            lines.append(row(f"`{case['name']}`", arm, *cells))
    return lines


def stages(cases: list[dict[str, Any]]) -> list[str]:
    """Lay out where the steps of this library go, a column for each preset and arm."""
    found = {(case["name"], arm): each.get("stages", {}) for case in cases for arm, each in ours(case).items()}
    names = (f"`{name}`" if arm == "maskloss" else f"`{name}`, {arm}" for name, arm in found)
    lines = [row("stage", *names), row(*["---"] * (1 + len(found)))]
    lines += [row(stage, *(seconds(each.get(stage, 0.0)) for each in found.values())) for stage in STAGES]
    whole = (seconds(sum(each.get(stage, 0.0) for stage in STAGES)) for each in found.values())
    return [*lines, row("all", *whole)]


def growth(cases: list[dict[str, Any]]) -> list[str]:
    """Lay out how the step grows, a table for each family and a column for each of its values."""
    families: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        families.setdefault(case["name"].partition("=")[0], []).append(case)
    lines = []
    for family, members in families.items():
        mine = [each["arms"]["maskloss"] for each in members]
        lines += [
            row(family, *(f"{int(each['name'].partition('=')[2]):,}" for each in members)),
            row(*["---"] * (1 + len(members))),
            row("step", *(seconds(each["summary"]["step"]["median"]) for each in mine)),
            row("packing in it", *(seconds(each["summary"]["targets"]["median"]) for each in mine)),
            row("memory¹", *(memory(each["memory"]["extra"]) for each in mine)),
            "",
        ]
    return lines


# Parts of a step that the implementations divide alike: boxes and classes are costs of the matching in all of them.
_MASKS = ("matching cost", "assignment", "mask loss")
PARTS = {
    "matching and mask terms, forward": _MASKS,
    "backward": ("backward",),
    "these two together": (*_MASKS, "backward"),
}


def packages(cases: list[dict[str, Any]]) -> list[str]:
    """Lay out the steps of RF-DETR beside both packages that have them, with stages and memory."""
    lines = [row("", "maskloss", "`rfdetr`", "ratio", "Transformers", "ratio"), row(*["---"] * 6)]
    for case in cases:
        arms = case["arms"]
        if "summary" not in arms.get("rfdetr", {}):
            continue
        mine, peers = ours(case), [arms["rfdetr"], arms["transformers"]]
        own, name = mine.get("factors") or mine["maskloss"], f"`{case['name']}`"
        cells = [seconds(own["summary"]["step"]["median"])]
        for each in peers:
            found = ratios(each["samples"], own["samples"])
            ratio = "" if found is None else f"**{factor(found['median'])}**"
            cells += [seconds(each["summary"]["step"]["median"]), ratio]
        lines.append(row(name, *cells))
        for part, names in PARTS.items() if all("stages" in each for each in (own, *peers)) else ():
            values = [sum(each["stages"].get(stage, 0.0) for stage in names) for each in (own, *peers)]
            lines.append(row(part, *_compared(values, seconds)))
        for what, key in (("memory¹", "extra"), ("memory with the gradients", "peak")):
            sizes = [each["memory"][key] for each in (own, *peers)]
            if None not in sizes:
                lines.append(row(f"{name}: {what}", *_compared(sizes, memory)))
    return lines if len(lines) > 2 else []


def _compared(values: list[Any], write: Callable[[Any], str]) -> list[str]:
    """Write the first of some values, and each of the others with what it is of the first."""
    own, *others = values
    cells = [write(own)]
    for each in others:
        cells += [write(each), factor(each / own) if own else ""]
    return cells


def main() -> None:
    """Print the tables."""
    report = json.loads(Path(sys.argv[1]).read_text())
    compared = [case for case in report["cases"] if "summary" in rival(case)]
    tables = (steps(compared), stages(compared), packages(compared)) if compared else (growth(report["cases"]),)
    print("\n\n".join("\n".join(lines) for lines in tables if lines))  # noqa: T201


if __name__ == "__main__":
    main()
