"""`maskloss bench`: time and memory of a training step, in tables, pictures and a file."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from maskloss.errors import Cause, reported, require
from maskloss.lab import files
from maskloss.lab.bench import plots, table, verify
from maskloss.lab.bench.arms import ARMS
from maskloss.lab.bench.cases import FAMILIES, PRESETS, choose, family
from maskloss.lab.bench.machine import default_threads, describe_machine, describe_software
from maskloss.lab.bench.model import MODELS, model_lines, model_table
from maskloss.lab.bench.runner import Say, Settings, run_case

# Defaults of options that are never None.
_USUAL = {"dtype": "float32", "seconds": 120.0, "seed": 0}
LESS_MEMORY = "take a smaller --preset"
DESCRIPTION = """\
Measure a training step (matching, classification and mask loss over all decoder layers, forward and backward).
Every arm runs in an ordinary process of its own, and the arms take turns. maskloss is given dense bool masks
and packs them within the step; transformers and dense get float masks. What others do is measured with both
of OpenMP's ways of waiting, and the faster counts. Before anything is timed, each arm must find the matches,
losses and gradients of maskloss from the same inputs and random numbers; with stratified points, those that
the reference backend finds.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    listed = {"presets": PRESETS, "models": MODELS}
    parser.epilog = "\n\n".join(
        f"{kind}:\n" + "\n".join(f"  {name:<17} {case.describe()}" for name, case in cases.items())  # type: ignore[attr-defined]
        for kind, cases in listed.items()
    )
    add = parser.add_argument
    names = ", ".join(PRESETS)
    add("--preset", nargs="+", choices=list(PRESETS), metavar="NAME", help=f"{names} (default: coco)")
    # fmt: off
    add("--scaling", choices=list(FAMILIES), nargs="*", metavar="FAMILY",
        help="measure how time and memory grow, instead of presets; each family is checked where it is smallest; "
        f"{', '.join(FAMILIES)} (default: all of them)")
    add("--model", choices=list(MODELS), nargs="+", metavar="NAME",
        help=f"train whole models instead of presets, {' or '.join(MODELS)}: unpatched, patched, and patched with "
        "masks as factors")
    add("--arms", choices=list(ARMS), nargs="+", metavar="ARM",
        help="maskloss; stratified, maskloss with stratified points; stratified/4, the same with a quarter of the "
        "points; factors, maskloss with masks as factors (presets with a head only); reference, its plain PyTorch "
        "backend; transformers, the loss of Hugging Face's Mask2Former or RF-DETR; rfdetr, that of RF-DETR's own "
        "package (its presets only); dense, for clips and volumes what copies of Mask2Former's criterion do (default: "
        "maskloss, factors, dense, and those of the two packages that are installed, or reference without "
        "Transformers)")
    add("--verify", action="store_true",
        help="for a machine with a GPU, within eight minutes: tests, races, unwritten memory, presets and models, on "
        "one page in --out; goes on if a part fails, and a second run does what is missing. With --device cpu: a "
        "rehearsal with small sizes, under Triton's interpreter")
    add("--stages", action="store_true", help="time the stages of the step as well")
    add("--steps", type=_positive, help="timed steps of each arm (default: 15; 5 with --scaling)")
    add("--seconds", type=float, default=_USUAL["seconds"],
        help="an arm that has used this much of a case's time, and has 3 steps, takes no more turns (default: 120)")
    add("--quick", action="store_true", help="3 steps: a first impression")
    add("--threads", type=_positive, help="CPU threads (default: one for each core)")
    add("--device", type=_device, default="cpu", help="cpu, or a CUDA device (default: cpu)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default=_USUAL["dtype"],
        help="dtype of the logits (default: float32)")
    # fmt: on
    add("--seed", type=int, default=_USUAL["seed"], help="seed of inputs and points (default: 0)")
    add("--out", type=Path, default=Path("runs/bench"), help="folder for results and pictures (default: runs/bench)")


def main(arguments: argparse.Namespace) -> int:
    """Run the benchmark, print tables, and write JSON and pictures."""
    # Before anything is measured, which takes minutes.
    files.unmake(files.make_folder(arguments.out, "--out"))
    console = require("rich.console", "bench").Console(highlight=False)
    if arguments.verify:
        return _verify(arguments, console)
    console.width = max(console.width, 124)  # narrower, the table would lose digits
    for module in ("matplotlib", "psutil"):
        require(module, "bench")
    settings = _settings(arguments)
    if "transformers" in settings.arms or arguments.model:
        require("transformers", "transformers")
    _check_package(settings.arms)
    families = [] if arguments.scaling is None else arguments.scaling or list(FAMILIES)
    presets = arguments.preset or ([] if families or arguments.model else ["coco"])
    report: dict[str, Any] = {
        "schema": 2,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(settings.device),
        "software": describe_software(),
        "settings": settings.as_dict(),
        "cases": [],
        "models": [],
    }
    console.print(table.heading(report), end="\n\n")
    try:
        with _sigterm_raises():
            smallest = {case.name for name in families for case in family(name)[:1]}
            for case in choose(presets, families):
                checked = case.name in smallest or case.name in PRESETS
                with _progress(console) as say:
                    report["cases"].append(run_case(case, settings, say, checked=checked))
                _print_case(console, report["cases"][-1])
            if report["cases"]:
                console.print(table.LEGEND)
            _print_families(console, report, families)
            for name in arguments.model or ():
                with _progress(console) as say:
                    report["models"].append(run_case(MODELS[name], settings, say))
                _print_model(console, report["models"][-1])
    finally:
        # What was measured before an interruption is not lost.
        if report["cases"] or report["models"]:
            for path in write_results(report, arguments.out):
                console.print(f"[dim]wrote[/] {path}")
    return int(any(_failed(case) for case in (*report["cases"], *report["models"])))


def write_results(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write the report, and the pictures that can be drawn from it."""
    folder.mkdir(parents=True, exist_ok=True)
    results, presets, families = (folder / name for name in ("bench.json", "bench.png", "scaling.png"))
    files.write_text(results, json.dumps(report, indent=1) + "\n")
    written = [results]
    if plots.plot_presets(report, presets):
        written.append(presets)
    if plots.plot_families(report, families):
        written.append(families)
    return written


@reported("maskloss bench --verify")
def _verify(arguments: argparse.Namespace, console: Any) -> int:
    """Verify a device; 1 unless every part has passed, or cannot run here."""
    ignored = ("preset", "scaling", "model", "arms", "stages", "steps", "quick", "threads")
    given = [f"--{name}" for name in ignored if getattr(arguments, name) not in (None, False)]
    given += [f"--{name}" for name, usual in _USUAL.items() if getattr(arguments, name) != usual]
    if given:
        raise Cause(
            "--verify decides what is run", f"it was given {', '.join(given)}", "--device and --out are its own"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with _sigterm_raises():
        report = verify.run(
            verify.Plan.on(arguments.device), arguments.out, lambda text: console.print(text, markup=False)
        )
    for name in (verify.RESULTS, verify.PAGE):
        console.print(f"[dim]wrote[/] {arguments.out / name}")
    return int(not all(verify.is_fine(part) for part in report["parts"].values()))


@reported("maskloss bench")
def _check_package(arms: tuple[str, ...]) -> None:
    if "rfdetr" in arms and find_spec("rfdetr") is None:
        raise Cause("the arm rfdetr needs RF-DETR's package", "it is not installed", "pip install 'rfdetr[train]'")


def _settings(arguments: argparse.Namespace) -> Settings:
    rival = "transformers" if find_spec("transformers") else "reference"
    others = ("rfdetr",) if find_spec("rfdetr") else ()
    chosen = dict.fromkeys(arguments.arms or ("maskloss", "factors", "dense", rival, *others))
    usual = 3 if arguments.quick else 15 if arguments.scaling is None else 5
    return Settings(
        arms=tuple(arm for arm in ARMS if arm in chosen),
        steps=arguments.steps or usual,
        seconds=arguments.seconds,
        threads=arguments.threads or default_threads(),
        device=arguments.device,
        dtype=arguments.dtype,
        seed=arguments.seed,
        stages=arguments.stages,
    )


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the worker processes are ended too."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(console: Any) -> Iterator[Say]:
    with console.status("[dim]starting[/]") as status:
        yield lambda text: status.update(f"[dim]{text}[/]")


def _print_case(console: Any, case: dict[str, Any]) -> None:
    _print_table(console, case, table.case_table)
    for line in (table.speed_line(case), table.waiting_line(case)):
        if line:
            console.print(line)
    console.print(table.check_line(case), end="\n\n")
    if any("stages" in found for found in case["arms"].values()):
        console.print(table.stage_table(case), end="\n\n")


def _print_model(console: Any, case: dict[str, Any]) -> None:
    _print_table(console, case, model_table)
    for line in model_lines(case):
        console.print(line, style="dim", markup=False)


def _print_table(console: Any, case: dict[str, Any], lay_out: Callable[[dict[str, Any]], Any]) -> None:
    """Print what was measured, what failed, and what could not be measured."""
    console.print(lay_out(case) if case["arms"] else f"[bold]{case['name']}[/]")
    for place, found in (("", case), *case["arms"].items()):
        if "failed" in found:
            console.print(f"{place}  {found['failed']}".strip(), style="red", markup=False)
            if found.get("details"):
                console.print("  the traceback is in bench.json", style="dim")
    reasons = {found["memory"]["not_measured"] for found in case["arms"].values() if "memory" in found} - {None}
    for reason in reasons:
        console.print(f"[dim]{reason}[/]")


def _print_families(console: Any, report: dict[str, Any], families: list[str]) -> None:
    for name in families:
        cases = [case for case in report["cases"] if case["name"].startswith(f"{name}=") and case["arms"]]
        if cases:
            console.print(table.family_table(name, cases), end="\n\n")


def _failed(case: dict[str, Any]) -> bool:
    return "failed" in case or any("failed" in found for found in case["arms"].values())


def _device(text: str) -> str:
    try:
        kind = torch.device(text).type
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).partition("\n")[0]) from None
    if kind not in {"cpu", "cuda"}:
        raise argparse.ArgumentTypeError(f"must be cpu or a CUDA device, got {text!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("PyTorch finds no CUDA device")
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
