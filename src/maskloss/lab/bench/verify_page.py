"""The page that `maskloss bench --verify` writes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from maskloss.lab.bench.cases import PEERS, Case
from maskloss.lab.bench.runner import ratios
from maskloss.lab.bench.table import factor, memory, seconds


def page(report: dict[str, Any]) -> str:
    """Write what was found as a page of Markdown."""
    machine, software, parts = report["machine"], report["software"], report["parts"]
    gpu = machine.get("gpu")
    place = f"{gpu['name']} (CUDA {gpu['cuda']}, driver {gpu.get('driver', 'unknown')})" if gpu else "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in software.items())
    kinds = {kind: sum(part["status"] == kind for part in parts.values()) for kind in _STATUS}
    counted = ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
    lines = [f"# Verification: {place}", ""]
    if gpu is None:
        lines += [
            "**A rehearsal without a GPU: kernels ran under Triton's interpreter, and times are those of a CPU.**",
            "",
        ]
    lines += [f"{report['date']}, {machine['cpu']}, {machine['system']}; {versions}.", "", f"Parts: {counted}.", ""]
    rows = [[name, part["status"], f"{part.get('seconds', '')}", _note(part)] for name, part in parts.items()]
    lines += [*_table(("part", "", "seconds", ""), rows), ""]
    for title, made in (
        ("Steps of the loss", _steps(parts)),
        ("Whole models", _models(parts)),
        ("Kernels launched again and again", _launches(parts.get("races", {}))),
        ("Memory full of NaN", _unwritten(parts.get("unwritten", {}))),
    ):
        if made:
            lines += [f"## {title}", "", *made, ""]
    return "\n".join(lines).rstrip() + "\n"


_STATUS = ("passed", "failed", "stopped", "not run")


def _note(part: dict[str, Any]) -> str:
    result = part.get("result", {})
    notes = [part["why"]] if "why" in part else []
    if "counts" in result:
        notes.append(", ".join(f"{number} {kind}" for kind, number in result["counts"].items() if number))
        notes += result["wrong"][:5]
    if "bytes_per_second" in result:
        notes.append(f"{result['bytes_per_second'] / 1e9:.0f} GB/s")
    notes += [each["failed"] for each in result.get("found", ()) if "failed" in each]
    return "; ".join(filter(None, notes)).replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(each)} |" for each in lines]


def _found(parts: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    named = [part for name, part in parts.items() if name.startswith(f"{kind} ")]
    return [each for part in named for each in part.get("result", {}).get("found", ())]


def _steps(parts: dict[str, Any]) -> list[str]:
    """Lay out the presets; the bound is what no algorithm with these inputs can do without."""
    speed = parts.get("bandwidth", {}).get("result", {}).get("bytes_per_second")
    rows = []
    for case in _found(parts, "preset"):
        arms = {name: found for name, found in case["arms"].items() if "summary" in found}
        for name, found in arms.items():
            step, counts = found["summary"]["step"]["median"], found["counts"]
            launched = found.get("launches") or {}
            least = Case.from_dict(case["sizes"]).least_bytes(4)
            against = [
                f"{factor(compared['median'])} {peer}"
                for peer in PEERS
                if peer in arms and name not in PEERS
                and (compared := ratios(arms[peer]["samples"], found["samples"])) is not None
            ]  # fmt: skip
            rows.append([
                f"`{case['name']}`", name, seconds(step), f"{launched.get('kernels', '')}",
                f"{launched.get('to host', counts['transfers'])}", memory(found["memory"]["peak"]),
                memory(found["memory"]["extra"]), memory(least),
                f"{100 * least / speed / step:.0f}%" if speed else "", ", ".join(against),
            ])  # fmt: skip
    head = (
        "preset", "arm", "step", "launches", "copies to the host", "peak", "beyond gradients", "least traffic",
        "of the step at full bandwidth", "faster than",
    )  # fmt: skip
    return _table(head, rows) if rows else []


def _models(parts: dict[str, Any]) -> list[str]:
    rows = []
    for case in _found(parts, "model"):
        arms = {name: found for name, found in case["arms"].items() if "summary" in found}
        for name, found in arms.items():
            shares = [each["criterion"] / each["forward"] for each in found["samples"] if "criterion" in each]
            compared = ratios(arms["unpatched"]["samples"], found["samples"]) if "unpatched" in arms else None
            rows.append([
                f"`{case['name']}`", name, seconds(found["summary"]["step"]["median"]),
                f"{100 * median(shares):.0f}%" if shares else "", memory(found["memory"]["peak"]),
                "" if compared is None else factor(compared["median"]),
            ])  # fmt: skip
    head = ("model", "arm", "step", "share of the criterion in the forward pass", "peak", "unpatched / arm")
    return _table(head, rows) if rows else []


def _launches(part: dict[str, Any]) -> list[str]:
    rows = [
        [each["kernel"], str(each["warps"]), str(each["repeats"]), *(
            ("", "no time") if "skipped" in each else
            (f"{each['difference']:.1e}", "equal" if each["equal"] else "**differs**")
        ), "" if each.get("passed", True) else "**failed**"]
        for each in part.get("result", {}).get("launches", ())
    ]  # fmt: skip
    return _table(("kernel", "warps", "launches", "from the usual warps", "bits", ""), rows) if rows else []


def _unwritten(part: dict[str, Any]) -> list[str]:
    rows = [
        [each["operation"], f"{each['difference']:.1e}", "" if each["passed"] else "**failed**"]
        for each in part.get("result", {}).get("launches", ())
    ]
    return _table(("operation", "from the definition", ""), rows) if rows else []
