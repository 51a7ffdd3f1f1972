"""The tables that the benchmark prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskloss.errors import require
from maskloss.lab.bench.cases import PEERS, Case
from maskloss.lab.bench.runner import ratios

STAGES = ("packing", "matching cost", "assignment", "mask loss", "classification", "other forward", "backward")


def seconds(value: float) -> str:
    """Write a duration with three digits.

    Example:
        >>> seconds(2.514), seconds(0.0842), seconds(0.312)
        ('2.51 s', '84.2 ms', '312 ms')
    """
    return f"{_digits(value)} s" if value >= 0.9995 else f"{_digits(1000 * value)} ms"


def memory(value: float | None) -> str:
    """Write a number of bytes with three digits.

    Example:
        >>> memory(340_400_000), memory(2_300_000_000), memory(None)
        ('340 MB', '2.30 GB', 'not measured')
    """
    if value is None:
        return "not measured"
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= 0.9995 * size:
            return f"{_digits(value / size)} {unit}"
    return f"{_digits(value / 1e3)} kB" if value else "0"


def factor(value: float) -> str:
    """Write a ratio with two or three digits.

    Example:
        >>> factor(8.31), factor(0.5), factor(52.3)
        ('8.3 ×', '0.50 ×', '52 ×')
    """
    return f"{value:.2f} ×" if value < 2 else f"{value:.1f} ×" if value < 10 else f"{value:.0f} ×"


def range_of(spread: dict[str, float]) -> str:
    """Write the 10% and 90% quantiles, in the unit of the median, with rich's markup."""
    scale = 1 if spread["median"] >= 0.9995 else 1000
    return f"[not bold dim]{_digits(scale * spread['low'])}–{_digits(scale * spread['high'])}[/]"


LEGEND = """\
[dim]step      forward and backward, median; maskloss packs bool masks within it, others get float masks
packed    the step with targets packed before it; for others, how it compares with that of maskloss
relative  compared with the step of maskloss        targets   making them from bool masks, on its own
peak      memory above the inputs                   extra     the same without the gradients at the end
ops       tensor operations, without packing        waits     of the host for a GPU, counted on a CPU too[/]
"""


def versions(software: dict[str, str]) -> str:
    """Name the versions that matter most."""
    return ", ".join(f"{name} {software[name]}" for name in ("maskloss", "torch", "transformers") if name in software)


def heading(report: dict[str, Any]) -> str:
    """Describe machine, versions and settings in two lines."""
    machine, software, settings = report["machine"], report["software"], report["settings"]
    place = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    cores = f"{settings['threads']} threads on {machine['cores']} cores"
    return (
        f"[bold]{place}[/], {cores}, {settings['device']}, {settings['dtype']}\n"
        f"[dim]{versions(software)}, Python {software['python']}; load before: {machine['load_before']:.1f}[/]"
    )


def case_table(case: dict[str, Any]) -> Any:
    """Lay out what was measured for one case."""
    table = new_table()
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    best = _fastest(case)
    for arm, found in case["arms"].items():
        if "failed" in found:
            table.add_row(arm, "[red]failed[/]")
            continue
        table.add_row(*_row(arm, found, case), style="bold" if arm == best else "")
    return titled(case["name"], Case.from_dict(case["sizes"]).describe(), table)


_COLUMNS = (
    "step", "10–90%", "forward", "backward", "targets", "peak", "extra", "ops", "waits", "relative", "packed"
)  # fmt: skip


def _row(arm: str, found: dict[str, Any], case: dict[str, Any]) -> list[str]:
    summary, counts = found["summary"], found["counts"]
    step = summary["step"]
    return [
        arm,
        seconds(step["median"]),
        range_of(step),
        *(seconds(summary[part]["median"]) for part in ("forward", "backward", "targets")),
        memory(found["memory"]["peak"]),
        memory(found["memory"]["extra"]),
        f"{counts['operations']:,}",
        f"{counts['transfers']:,}",
        _relative(arm, case["arms"]),
        seconds(summary["packed"]["median"]) if "packed" in summary else _relative(arm, case["arms"], packed=True),
    ]


def _relative(arm: str, arms: dict[str, Any], *, packed: bool = False) -> str:
    """Compare the step of an arm with that of `maskloss`: the median of the ratio."""
    base = arms.get("maskloss", {})
    found = ratios(arms[arm]["samples"], base["samples"], packed=packed) if "summary" in base else None
    if found is None:
        return ""
    return "1" if arm == "maskloss" else factor(found["median"])


def waiting_line(case: dict[str, Any]) -> str:
    """Say with which of OpenMP's ways of waiting each peer was measured."""
    policies = {"default": "the default policy", "passive": "OMP_WAIT_POLICY=PASSIVE"}
    lines = []
    for arm, found in case["arms"].items():
        if "waiting" not in found:
            continue
        other = next(policy for policy in policies if policy != found["waiting"])
        slower = found["other_waiting"]
        took = "failed" if slower is None else seconds(slower["median"])
        lines.append(f"[dim]{arm}: faster with {policies[found['waiting']]}; with {policies[other]} {took}[/]")
    return "\n".join(lines)


def speed_line(case: dict[str, Any]) -> str:
    """Say how many times as fast as each peer the other arms are: the median of the ratio.

    Returns:
        One line for each peer, with rich's markup; empty where the column "relative" says it.
    """
    samples = {arm: found["samples"] for arm, found in case["arms"].items() if "summary" in found}
    ours = [arm for arm in samples if arm not in PEERS]
    if set(ours) <= {"maskloss"}:
        return ""
    lines = []
    for peer in (arm for arm in samples if arm in PEERS):
        speeds: list[str] = []
        for arm in ours:
            both = (ratios(samples[peer], samples[arm], packed=packed) for packed in (False, True))
            step, packed = ("" if found is None else factor(found["median"]) for found in both)
            speeds.append(f"{arm} [bold]{step}[/] ({'' if speeds else 'packed '}{packed})")
        lines.append(f"speed versus {peer}: {', '.join(speeds)}")
    return "\n".join(lines)


def check_line(case: dict[str, Any]) -> str:
    """Say what the check of a case found."""
    lines = []
    for check in case.get("checks", ()):
        gradient = max(check["mask_gradient"], check["class_gradient"])
        mark = "[green]✓[/]" if check["passed"] else "[red]✗[/]"
        how = "from the same random numbers" if check["base"] == "maskloss" else f"against {check['base']}"
        lines.append(
            f"{mark} [dim]{check['other']}, {how}: {check['pairs_equal']} of {check['pairs']} matches, "
            f"losses within {check['loss']:.0e}, gradients within {gradient:.0e}[/]"
        )
    return "\n".join(lines)


def stage_table(case: dict[str, Any]) -> Any:
    """Lay out how the time of a step divides into stages."""
    table = new_table()
    arms = {arm: found["stages"] for arm, found in case["arms"].items() if "stages" in found}
    for arm in arms:
        table.add_column(arm, justify="right")
        table.add_column("", justify="right", style="dim")
    for stage in STAGES:
        cells = []
        for stages in arms.values():
            whole = sum(stages.get(name, 0.0) for name in STAGES)
            cells += [seconds(stages.get(stage, 0.0)), f"{100 * stages.get(stage, 0.0) / whole:.0f}%"]
        table.add_row(stage, *cells)
    table.add_section()
    sums = [cell for stages in arms.values() for cell in (seconds(sum(stages.get(name, 0.0) for name in STAGES)), "")]
    table.add_row("all", *sums, style="bold")
    return titled(f"{case['name']}: stages", "medians; each stage without the others that it calls", table)


def family_table(name: str, cases: Sequence[dict[str, Any]]) -> Any:
    """Lay out how time and memory grow."""
    base = Case.from_dict(cases[0]["sizes"])
    table = new_table()
    arms = list(dict.fromkeys(arm for case in cases for arm in case["arms"]))
    for arm in arms:
        table.add_column(arm, justify="right")
        table.add_column("peak", justify="right", style="dim")
        if arm != "maskloss":
            table.add_column("relative", justify="right")
    for case in cases:
        cells = []
        for arm in arms:
            found = case["arms"].get(arm, {})
            done = "summary" in found
            cells += [
                seconds(found["summary"]["step"]["median"]) if done else "[red]failed[/]",
                memory(found["memory"]["peak"]) if done else "",
            ]
            if arm != "maskloss":
                cells.append(_relative(arm, case["arms"]) if done else "")
        table.add_row(case["name"].partition("=")[2], *cells)
    return titled(f"scaling: {name}", f"step, and peak memory above the inputs; {base.describe()}", table)


def new_table() -> Any:
    """Make a table whose first column names the rows."""
    box, tables = require("rich.box", "bench"), require("rich.table", "bench")
    table = tables.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("", no_wrap=True)
    return table


def titled(title: str, note: str, table: Any) -> Any:
    """Put a line above a table; its own title would be wrapped at its width."""
    return require("rich.console", "bench").Group(f"[bold]{title}[/]  [dim]{note}[/]", table)


def _fastest(case: dict[str, Any]) -> str | None:
    times = {arm: found["summary"]["step"]["median"] for arm, found in case["arms"].items() if "summary" in found}
    return min(times, key=lambda arm: times[arm]) if times else None


def _digits(value: float) -> str:
    """Write a number below 1000 with three significant digits, and never with an exponent."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
