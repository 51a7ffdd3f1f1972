"""The command line, `maskloss <command>`: reading arguments and printing, nothing else."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskloss import __version__
from maskloss.errors import MaskLossError, MissingExtraError, require

if TYPE_CHECKING:
    from rich.console import Console

    from maskloss.training.evaluate import Evaluation
    from maskloss.training.run import Listener, Progress

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


# Option of `maskloss train`: how to read it, and what it does. Defaults are those of TrainConfig.
_TRAIN_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "data": (str, "folder with images/ and COCO instances.json; default: scenes of handwritten digits"),
    "size": (int, "bring images to this many pixels a side, a multiple of 16"),
    "steps": (int, "optimiser steps"),
    "batch_size": (int, "scenes per step"),
    "lr": (float, "highest learning rate"),
    "weight_decay": (float, "weight decay"),
    "num_points": (int, "points per instance"),
    "grid": (int, "queries along each side of the image"),
    "class_weight": (float, "weight of the classification in the loss"),
    "no_object_weight": (float, "weight of 'no object' in the classification"),
    "evaluations": (int, "evaluations during training"),
    "held_out": (int, "held-out scenes of digits"),
    "seed": (int, "the same seed gives the same run, bit for bit on one machine"),
    "threads": (int, "CPU threads; default: torch's choice"),
    "device": (str, "cpu or cuda"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 2 for input that does not work, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="maskloss", description="Mask losses at sampled points.")
    parser.add_argument("--version", action="version", version=f"maskloss {__version__}")
    commands: Commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for add in (_add_train, _add_bench, _add_show, _add_methods):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (MaskLossError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


# ---------------------------------------------------------------------------------------------------------------- train


def _add_train(commands: Commands) -> None:
    from maskloss.training.config import TrainConfig

    parser = commands.add_parser(
        "train",
        help="train a small query model and write a report",
        description="Train a small query model with the losses, score it on held-out scenes, and write a report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for name, (kind, text) in _TRAIN_OPTIONS.items():
        default = defaults[name]
        shown = text if default is not None else f"{text}%(default).0s"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=shown, metavar="…")
    parser.add_argument("--out", type=Path, help="folder to write; default: runs/<time>%(default).0s", metavar="…")
    parser.add_argument(
        "--evaluate",
        type=Path,
        help="score this checkpoint instead of training; takes --data only%(default).0s",
        metavar="…",
    )
    parser.set_defaults(run=_train, refuse=parser.error)


def _train(options: argparse.Namespace) -> int:
    from maskloss.training.config import TrainConfig
    from maskloss.training.run import evaluate_checkpoint, train

    console = require("rich.console", "train").Console(highlight=False)
    if options.evaluate is not None:
        defaults = TrainConfig().as_dict() | {"data": options.data}
        if options.out or any(getattr(options, name) != default for name, default in defaults.items()):
            options.refuse("--evaluate goes with --data only: a checkpoint knows how it was trained")
        _, _, evaluation = evaluate_checkpoint(options.evaluate, options.data)
        console.print(f"{_scores(evaluation)}  on {evaluation.scenes} held-out scenes")
        return 0
    config = TrainConfig(**{name: getattr(options, name) for name in _TRAIN_OPTIONS})
    folder = options.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    with _progress(console, config.steps) as listener:
        result = train(config, folder, listener)
    console.print(f"\n{_scores(result.evaluation)}  on {result.evaluation.scenes} held-out scenes", soft_wrap=True)
    console.print(f"[dim]{result.seconds:.0f} s in all; written:[/dim]")
    for path in result.files:
        console.print(f"  {path}", soft_wrap=True, markup=False)
    return 0


def _scores(evaluation: Evaluation) -> str:
    ap = f"AP {evaluation.ap:.3f}  AP75 {evaluation.ap75:.3f}"
    return f"[bold]AP50 {evaluation.ap50:.3f}[/bold]  {ap}  mean IoU {evaluation.mean_iou:.3f}"


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Listener]:
    """Show a bar with the loss terms and the speed, and a line above it for each evaluation."""
    from maskloss.training.run import Listener

    rich = require("rich.progress", "train")
    columns = [
        rich.TextColumn("[bold]{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[terms]}"),
        rich.TimeRemainingColumn(compact=True),
    ]
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task("Training", total=steps, terms="[dim]starting")

        def on_step(progress: Progress) -> None:
            names = {"class": "loss_class", "mask": "loss_mask", "dice": "loss_dice"}
            shown = "  ".join(f"{name} {progress.terms[key]:.3f}" for name, key in names.items())
            bar.update(task, completed=progress.step, terms=f"{shown}  [cyan]{progress.speed:.0f} scenes/s")

        def on_evaluation(at: tuple[int, Evaluation]) -> None:
            step, scores = at
            bar.console.print(f"step {step:>5}  {_scores(scores)}")

        yield Listener(on_step, on_evaluation, lambda text: bar.update(task, description=text, terms=""))


# ---------------------------------------------------------------------------------------------------------------- bench


def _add_bench(commands: Commands) -> None:
    from maskloss.bench import DESCRIPTION, add_arguments, main

    parser = commands.add_parser("bench", help="measure time and memory of a training step", description=DESCRIPTION)
    add_arguments(parser)
    parser.set_defaults(run=main)


# -------------------------------------------------------------------------------------------------------- show, methods


def _add_show(commands: Commands) -> None:
    from maskloss.show import DESCRIPTION, add_arguments, main

    parser = commands.add_parser("show", help="draw what the loss looks at", description=DESCRIPTION)
    add_arguments(parser)
    parser.set_defaults(run=main)


def _add_methods(commands: Commands) -> None:
    from maskloss.methods.command import DESCRIPTION, add_arguments, main

    parser = commands.add_parser("methods", help="write the paragraph for the paper", description=DESCRIPTION)
    add_arguments(parser)
    parser.set_defaults(run=main)
