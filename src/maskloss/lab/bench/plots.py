"""The pictures that the benchmark leaves on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskloss import _palette
from maskloss._palette import GRAY, INK, PALE, SOFT
from maskloss.errors import require
from maskloss.lab.bench import table
from maskloss.lab.bench.cases import Case
from maskloss.lab.bench.runner import ratios
from maskloss.lab.bench.table import factor, memory, seconds
from maskloss.lab.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# For each arm a strong color (forward, memory) and a soft one (backward).
_COLORS = {
    "maskloss": (_palette.TEAL, _palette.TEAL_SOFT),
    "stratified": (_palette.VIOLET, _palette.VIOLET_SOFT),
    "stratified/4": (_palette.ORANGE, _palette.ORANGE_SOFT),
    "factors": (_palette.WINE, _palette.WINE_SOFT),
    "reference": (_palette.SAND, _palette.SAND_SOFT),
    "transformers": (GRAY, SOFT),
    "rfdetr": (_palette.NAVY, _palette.NAVY_SOFT),
    "dense": (_palette.PINK, _palette.PINK_SOFT),
}
# Height of the two lines at the end of a curve, as a share of the axes.
_LABEL = 0.16


def plot_presets(report: dict[str, Any], path: Path) -> bool:
    """Draw time and memory of every preset as bars."""
    cases = [case for case in report["cases"] if "=" not in case["name"] and _measured(case)]
    if not cases:
        return False
    figure, all_axes = _figure(len(cases), 0.65 + 0.44 * max(len(_measured(case)) for case in cases))
    for case, (left, right) in zip(cases, all_axes, strict=True):
        _draw_times(left, case)
        _draw_memory(right, case)
        _title(left, case["name"], Case.from_dict(case["sizes"]).describe())
    time = "Time of a step: forward (dark) and backward; line: 10 to 90%; compared with maskloss"
    _finish(figure, (time, "Peak memory above the inputs; dark, and second: without the gradient"), report, path)
    return True


def plot_families(report: dict[str, Any], path: Path) -> bool:
    """Draw how time and memory grow, one row for each family."""
    families: dict[str, list[dict[str, Any]]] = {}
    for case in report["cases"]:
        name, equals, _ = case["name"].partition("=")
        if equals and _measured(case):
            families.setdefault(name, []).append(case)
    if not families:
        return False
    figure, all_axes = _figure(len(families), 2.7)
    for (name, cases), (left, right) in zip(families.items(), all_axes, strict=True):
        _draw_growth(left, cases, lambda found: found["summary"]["step"]["median"], seconds)
        _draw_growth(right, cases, lambda found: found["memory"]["peak"], memory)
        base = Case.from_dict(cases[0]["sizes"]).describe()
        _title(left, name, base)
    _finish(figure, ("Time of a step", "Peak memory above the inputs"), report, path)
    return True


def _measured(case: dict[str, Any]) -> dict[str, Any]:
    return {arm: found for arm, found in case["arms"].items() if "summary" in found}


def _figure(rows: int, row_height: float) -> tuple[Figure, Any]:
    """Make a figure with two columns, with room for a line at the top and one at the bottom."""
    figures, layout = (require(f"matplotlib.{name}", "bench") for name in ("figure", "layout_engine"))
    height = 0.75 + rows * row_height
    room = layout.ConstrainedLayoutEngine(rect=(0, 0.3 / height, 1, 1 - 0.65 / height), wspace=0.06, hspace=0.08)
    figure: Figure = figures.Figure(figsize=(11, height), layout=room)
    return figure, figure.subplots(rows, 2, squeeze=False)


def _draw_times(axes: Axes, case: dict[str, Any]) -> None:
    arms = _measured(case)
    limit = max(found["summary"]["step"]["high"] for found in arms.values())
    for row, (arm, found) in enumerate(arms.items()):
        strong, soft = _COLORS[arm]
        summary = found["summary"]
        step, forward = summary["step"]["median"], summary["forward"]["median"]
        share = forward / (forward + summary["backward"]["median"])
        axes.barh(row, step, height=0.62, color=soft)
        axes.barh(row, share * step, height=0.62, color=strong)
        low, high = summary["step"]["low"], summary["step"]["high"]
        axes.plot([low, high], [row, row], color=INK, linewidth=1, alpha=0.55, solid_capstyle="butt")
        relative = ratios(found["samples"], case["arms"].get("maskloss", {}).get("samples", ()))
        text = seconds(step)
        if relative is not None and arm != "maskloss":
            text += f"   {factor(relative['median'])}"
        axes.text(max(high, step) + 0.015 * limit, row, text, va="center", fontsize=10, color=INK)
    _bars(axes, list(arms), limit)


def _draw_memory(axes: Axes, case: dict[str, Any]) -> None:
    arms = _measured(case)
    limit = max(found["memory"]["peak"] or 0 for found in arms.values()) or 1
    for row, (arm, found) in enumerate(arms.items()):
        strong, soft = _COLORS[arm]
        peak, extra = found["memory"]["peak"], found["memory"]["extra"]
        axes.barh(row, peak or 0, height=0.62, color=soft)
        axes.barh(row, extra or 0, height=0.62, color=strong)
        text = f"{memory(peak)}   {memory(extra)}" if peak is not None else memory(peak)
        axes.text((peak or 0) + 0.015 * limit, row, text, va="center", fontsize=10, color=INK)
    _bars(axes, [""] * len(arms), limit)


def _bars(axes: Axes, names: Sequence[str], limit: float) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=10, color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.4 * limit)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(SOFT)


def _draw_growth(axes: Axes, cases: Sequence[dict[str, Any]], value: Any, write: Any) -> None:
    arms = list(dict.fromkeys(arm for case in cases for arm in _measured(case)))
    names = [case["name"].partition("=")[2] for case in cases]
    ends = {}
    for arm in arms:
        points = [
            (float(name), value(case["arms"][arm]))
            for name, case in zip(names, cases, strict=True)
            if "summary" in case["arms"].get(arm, {})
        ]
        points = [(x, y) for x, y in points if y]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), "o-", color=_COLORS[arm][0], linewidth=2, markersize=4.5)
        ends[arm] = points[-1]
    _scales(axes, [float(name) for name in names], names, write)
    _label_ends(axes, ends, write)


def _label_ends(axes: Axes, ends: dict[str, tuple[float, float]], write: Any) -> None:
    """Write beside the end of each curve what it is and how high; where ends are close, labels move apart."""
    arms = sorted(ends, key=lambda arm: ends[arm][1])
    to_axes = axes.transData - axes.transAxes
    for arm, height in zip(arms, _apart([to_axes.transform(ends[arm])[1] for arm in arms], _LABEL), strict=True):
        axes.annotate(
            f"{arm}\n{write(ends[arm][1])}",
            (ends[arm][0], height),
            xycoords=axes.get_xaxis_transform(),
            xytext=(8, 0),
            textcoords="offset points",
            fontsize=9,
            color=_COLORS[arm][0],
            va="center",
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Raise ascending numbers until each is `gap` above the one before; half a gap remains between the last and 1."""
    steps = gap * np.arange(len(heights))
    raised = np.maximum.accumulate(np.array(heights) - steps) + steps
    lowered: list[float] = np.minimum(raised, 1 - gap / 2 - steps[::-1]).tolist()
    return lowered


def _scales(axes: Axes, values: Sequence[float], names: Sequence[str], write: Any) -> None:
    ticker = require("matplotlib.ticker", "bench")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(values, names, fontsize=9, color=INK)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if _decades(axes) < 1.7 else (1,)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: write(y).replace(".00", "").replace(".0 ", " "))
    axes.tick_params(axis="y", labelsize=9, labelcolor=INK)
    axes.tick_params(length=0, which="both")
    axes.set_xlim(values[0] * 0.85, values[-1] * (values[-1] / values[0]) ** 0.28)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _decades(axes: Axes) -> float:
    """Widen the range of a logarithmic y axis a little, to a factor of 4 at least, and return it in decades."""
    low, high = (math.log10(end) for end in axes.get_ylim())
    room = max(math.log10(4) - (high - low), 0) / 2 + 0.05
    axes.set_ylim(10 ** (low - room), 10 ** (high + room))
    return high - low + 2 * room


def _title(axes: Axes, name: str, note: str) -> None:
    axes.set_title(name, loc="left", fontsize=12, fontweight="bold", color=INK, pad=20)
    style: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(note, (0, 1), xytext=(0, 6), fontsize=8, color=GRAY, in_layout=False, **style)


def _finish(figure: Figure, notes: tuple[str, str], report: dict[str, Any], path: Path) -> None:
    """Say above the columns what they show and below everything where it was measured, and write the picture."""
    for x, note in zip((0.012, 0.53), notes, strict=True):
        figure.text(x, 1 - 0.08 / figure.get_figheight(), note, fontsize=9, color=INK, va="top")
    machine, settings = report["machine"], report["settings"]
    place = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {settings['threads']} threads"
    text = f"{place}, {settings['dtype']}; {table.versions(report['software'])}; {report['date'][:10]}"
    figure.text(0.01, 0.06 / figure.get_figheight(), text, fontsize=8, color=GRAY, va="bottom")
    style: dict[str, Any] = {"dpi": 144, "facecolor": "white", "metadata": {"Software": None}}
    style["format"] = path.suffix[1:]  # not that of the temporary file
    write_whole(path, lambda partial: figure.savefig(partial, **style))
