"""The command line, `maskloss <command>`: reading arguments and printing, nothing else."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from maskloss import __version__
from maskloss.errors import MaskLossError, MissingExtraError, require

if TYPE_CHECKING:
    from rich.console import Console

    from maskloss.lab.loop.run import Listener, Progress
    from maskloss.lab.results.evaluate import Evaluation

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLES = """\
examples:
  maskloss train                                  handwritten digits, two minutes on two cores
  maskloss train --data photos                    your own images, see maskloss train --help
  maskloss evaluate runs/2026-01-31_12-00-00      score a trained model
  maskloss predict runs/2026-01-31_12-00-00 *.png find instances in images
  maskloss bench                                  time and memory of the losses on this machine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 1 for a check that failed; 2 for input that does not work; 128 and the number of the signal
        for a command that was interrupted.
    """
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        _say("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="maskloss",
        description="Mask losses at sampled points: train, score and use query models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"maskloss {__version__}")
    commands: Commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for add in (_add_train, _add_evaluate, _add_predict, _add_show, _add_methods, _add_bench):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run_command(options)
    except (MaskLossError, MissingExtraError, OSError, MemoryError, RuntimeError) as error:
        told = _explain(error)
        if told is None:
            raise
        _say(f"error: {told}")
        return 2
    return status


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _explain(error: Exception) -> str | None:
    """Say in one sentence what went wrong; None for what should never happen, whose traceback is wanted."""
    if isinstance(error, MaskLossError):
        if error.parts is None:
            return " ".join(str(error).split())
        rule, cause, hint = error.parts
        return f"{rule}: {cause}" + (f" ({hint})" if hint else "")
    if isinstance(error, MissingExtraError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        from maskloss.lab.files import explain

        where = f": {error.filename}" if error.filename else ""
        return f"{explain(error)}{where}"
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "there is not enough memory (take a smaller --size, --batch-size, --grid or --num-points)"
    return None


# ---------------------------------------------------------------------------------------------------------------- train


def _add_train(commands: Commands) -> None:
    from maskloss.lab.options import add_train

    parser = commands.add_parser("train", help="train a query model and write a report")
    add_train(parser)
    parser.set_defaults(run_command=_train, refuse=parser.error)


def _train(options: argparse.Namespace) -> int:
    from maskloss.lab.loop.run import Interrupted, resume, train
    from maskloss.lab.loop.runfolder import holds_work
    from maskloss.lab.options import read_config

    config, given = read_config(options)
    if options.resume is not None and (options.out or options.overwrite or set(given) - {"device"}):
        options.refuse("--resume takes no options but --device: a run knows how it was begun")
    # Of several processes, the first one speaks.
    console = require("rich.console", "train").Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")
    folder = options.resume or options.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        with _progress(console) as listener, _tensorboard(options, folder, listener) as told:
            if options.resume is None:
                result = train(config, folder, told, overwrite=options.overwrite)
            else:
                result = resume(folder, told, device=options.device)
    except Interrupted as stopped:
        if not console.quiet:
            _say(str(stopped))
        return 128 + stopped.signal
    except KeyboardInterrupt:
        if not holds_work(folder):
            raise
        _say(f"interrupted; go on with: maskloss train --resume {folder}")
        return 128 + signal.SIGINT
    except OSError as error:
        if not holds_work(folder):
            raise
        raise MaskLossError(
            f"{_explain(error)}; nothing is lost, go on with: maskloss train --resume {folder}"
        ) from None
    if not result.files:
        return 0  # one of several processes, and not the one that reports
    console.print(f"\n{_scores(result.evaluation)}  on {result.evaluation.scenes:,} held-out images", soft_wrap=True)
    console.print(f"[dim]{result.seconds:.0f} s in all; open[/dim] ", end="")
    console.print(str(result.files[0]), soft_wrap=True, markup=False)
    return 0


def _scores(evaluation: Evaluation) -> str:
    ap = f"AP {_number(evaluation.ap)}  AP75 {_number(evaluation.ap75)}"
    return f"[bold]AP50 {_number(evaluation.ap50)}[/bold]  {ap}  mean IoU {_number(evaluation.mean_iou)}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


@contextmanager
def _progress(console: Console) -> Iterator[Listener]:
    """Show what the data are, a bar with the loss terms and the speed, and a line above it for each evaluation."""
    from maskloss.lab.loop.run import Listener

    rich = require("rich.progress", "train")
    columns = [
        rich.TextColumn("[bold]{task.description}"),
        rich.BarColumn(bar_width=20),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[terms]}"),
        rich.TimeRemainingColumn(compact=True),
    ]
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task("Reading the data", total=None, terms="")

        def on_facts(facts: list[tuple[str, str]]) -> None:
            width = max(len(name) for name, _ in facts)
            for name, value in facts:
                bar.console.print(f"[dim]{name:>{width}}[/dim]  ", end="")
                bar.console.print(value, markup=False, soft_wrap=True)
            bar.update(task, description="Training", terms="[dim]starting")

        def on_begin(steps: tuple[int, int]) -> None:
            bar.update(task, completed=steps[0], total=steps[1])

        def on_step(progress: Progress) -> None:
            names = {"class": "loss_class", "mask": "loss_mask", "dice": "loss_dice"}
            shown = "  ".join(
                f"{name} {progress.terms[key]:.3f}" for name, key in names.items() if key in progress.terms
            )
            bar.update(task, completed=progress.step, terms=f"{shown}  [cyan]{progress.speed:.3g} images/s")

        def on_evaluation(at: tuple[int, Evaluation]) -> None:
            step, scores = at
            bar.console.print(f"step {step:>5}  {_scores(scores)}")

        def on_skipped(text: str) -> None:
            bar.console.print(f"left out: {text}", markup=False, soft_wrap=True)

        yield Listener(
            on_facts,
            on_begin,
            on_step,
            on_evaluation,
            lambda text: bar.update(task, description=text, terms=""),
            on_skipped,
        )


@contextmanager
def _tensorboard(options: argparse.Namespace, folder: Path, listener: Listener) -> Iterator[Listener]:
    """Write what the listener is told for TensorBoard as well, if that was asked for."""
    if not options.tensorboard:
        yield listener
        return
    from maskloss.lab.loop.board import logging_to

    with logging_to(folder, listener) as told:
        yield told


# ---------------------------------------------------------------------------------------------------- evaluate, predict


def _add_evaluate(commands: Commands) -> None:
    from maskloss.lab.options import add_evaluate

    parser = commands.add_parser("evaluate", help="score a trained model on held-out images")
    add_evaluate(parser)
    parser.set_defaults(run_command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from maskloss.lab.files import write_json
    from maskloss.lab.results.predict import evaluate_run

    console = require("rich.console", "train").Console(highlight=False)
    if options.json is not None and not options.json.parent.is_dir():
        raise MaskLossError(
            f"--json must name a file in a folder that is there: there is no folder {options.json.parent}"
        )
    with console.status("Loading the model") as status:
        scores, _, skipped = evaluate_run(options.run, options.data, device=options.device, note=status.update)
    console.print(f"{_scores(scores)}  on {scores.scenes:,} held-out images", soft_wrap=True)
    sizes = {"small": scores.ap_small, "medium": scores.ap_medium, "large": scores.ap_large}
    console.print("AP by size  " + "  ".join(f"{name} {_number(value)}" for name, value in sizes.items()))
    if scores.matching:
        shown = "  ".join(f"{threshold} {_number(value)}" for threshold, value in scores.matching.items())
        console.print(f"TP/(TP+FP+FN) by IoU  {shown}", soft_wrap=True)
    for text in skipped:
        console.print(f"left out: {text}", markup=False, soft_wrap=True)
    if options.json is not None:
        write_json(options.json, scores.as_dict())
    return 0


def _add_predict(commands: Commands) -> None:
    from maskloss.lab.options import add_predict

    parser = commands.add_parser("predict", help="find instances in images with a trained model")
    add_predict(parser)
    parser.set_defaults(run_command=_predict)


def _predict(options: argparse.Namespace) -> int:
    from maskloss.lab.results.predict import predict_images

    console = require("rich.console", "train").Console(highlight=False)

    def done(path: Path, count: int) -> None:
        console.print(f"{path}: {count} instance{'s' * (count != 1)}", markup=False, soft_wrap=True)

    _, skipped = predict_images(
        options.run,
        options.images,
        options.out,
        threshold=options.threshold,
        tile=options.tile,
        device=options.device,
        on_error=options.on_error,
        done=done,
    )
    for text in skipped:
        console.print(f"left out: {text}", markup=False, soft_wrap=True)
    console.print(f"[dim]written to[/dim] {options.out}", soft_wrap=True)
    return 0


# ---------------------------------------------------------------------------------------------------------------- bench


def _add_bench(commands: Commands) -> None:
    from maskloss.lab.bench import DESCRIPTION, add_arguments, main

    parser = commands.add_parser("bench", help="measure time and memory of a training step", description=DESCRIPTION)
    add_arguments(parser)

    def run(options: argparse.Namespace) -> int:
        from maskloss.lab.files import make_folder, unmake

        # Before anything is measured, which takes minutes.
        unmake(make_folder(options.out, "--out"))
        return main(options)

    parser.set_defaults(run_command=run)


# -------------------------------------------------------------------------------------------------------- show, methods


def _add_show(commands: Commands) -> None:
    from maskloss.lab.commands.show import DESCRIPTION, add_arguments, main

    parser = commands.add_parser("show", help="draw what the loss looks at", description=DESCRIPTION)
    add_arguments(parser)
    parser.set_defaults(run_command=main)


def _add_methods(commands: Commands) -> None:
    from maskloss.lab.commands.methods import DESCRIPTION, add_arguments, main

    parser = commands.add_parser("methods", help="write the paragraph for the paper", description=DESCRIPTION)
    add_arguments(parser)
    parser.set_defaults(run_command=main)
