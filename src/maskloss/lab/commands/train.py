"""`maskloss train`: a run, its progress, and where it is found."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskloss.errors import Cause
from maskloss.lab.config import TrainConfig, fields
from maskloss.lab.files import read_mapping
from maskloss.lab.loop import run
from maskloss.lab.loop.progress import Begin, Interrupted, Listener, Progress
from maskloss.lab.option import Field
from maskloss.lab.results.evaluate import Evaluation
from maskloss.lab.terminal import Display, count, did_you_mean, display, number, open_console, say

_CHANGEABLE = ", ".join(f"--{name}" for name in run.CHANGEABLE)
LESS_MEMORY = "take a smaller --size, --batch-size, --grid or --num-points"
EPILOG = """\
data:
  A folder is recognized by what lies in it:
    images and any COCO JSON file                    COCO, Roboflow, CVAT, Label Studio, labelme, FiftyOne, ...
    images/ and labels/, data.yaml                   YOLO polygons
    images/ and masks/, x.tif and x_masks.tif        label maps: a number for each instance; Cellpose, StarDist
    what other tools and benchmarks leave            labelme, VIA, CVAT, Supervisely, Label Studio; COCO panoptic, VOC,
                                                     Cityscapes, ADE20K, Cell Tracking Challenge, DSB 2018
  The part val of the data is held out, else test, else one image in five; see --val.

examples:
  maskloss train                                         handwritten digits, two minutes on two cores
  maskloss train --data cells --crop 256                 label maps of large images
  maskloss train --data coco --model facebook/mask2former-swin-tiny-coco-instance --size 512
  torchrun --nproc-per-node 4 -m maskloss train --data coco --batch-size 64
  maskloss train --resume runs/2026-01-31_12-00-00       go on after Ctrl-C, or after a power cut
  maskloss train --resume runs/cells --steps 4000        go on past the end
  maskloss train --config runs/cells/run.json --seed 1   the same run with another seed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `maskloss train`: the options of a run, and where it is written."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "maskloss train [--data FOLDER] [--model NAME] [--out FOLDER] [options]"
    parser.description = "Train a query model on images with masks, score it on held-out images, and write a report."
    parser.epilog = EPILOG
    add_options(parser, fields())
    where = parser.add_argument_group("folder")
    where.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: runs/<time>")
    where.add_argument("--overwrite", action="store_true", help="replace a run that is in the folder")
    # fmt: off
    where.add_argument("--config", type=Path, metavar="FILE",
        help="options by name, as YAML or JSON, or the run.json of a run; the command line wins")
    where.add_argument("--resume", type=Path, metavar="RUN",
        help=f"go on with a run that was interrupted, or past its end with --steps; takes only {_CHANGEABLE}")
    # fmt: on


def add_options(parser: argparse.ArgumentParser, listed: Sequence[Field]) -> None:
    """Add options of a run to the arguments of a command."""
    groups = {field.option.group: parser.add_argument_group(field.option.group) for field in listed}
    for field in listed:
        add, option = groups[field.option.group].add_argument, field.option
        # Not given is not the same as the default: a run that is resumed, and a --config, have options of their own.
        if field.kind is bool:
            add(field.flag, action="store_const", const=not field.default, dest=field.name, help=option.text)
            # What a --config says can be taken back.
            add(field.back, action="store_const", const=field.default, dest=field.name, help=argparse.SUPPRESS)
        elif field.kind is tuple:
            add(field.flag, nargs="+", dest=field.name, metavar=option.metavar, help=option.text)
        else:
            shown = option.text if field.default is None else f"{option.text} (default: {field.default})"
            add(field.flag, type=field.kind, dest=field.name, metavar=option.metavar, help=shown)


def given(options: argparse.Namespace, listed: Sequence[Field]) -> dict[str, Any]:
    """Return the options of a run that were typed."""
    return {field.name: value for field in listed if (value := getattr(options, field.name)) is not None}


def main(options: argparse.Namespace) -> int:
    """Begin a run or go on with one."""
    typed = given(options, fields())
    other = options.out or options.overwrite or options.config or set(typed) - set(run.CHANGEABLE)
    if options.resume is not None and other:
        options.refuse(f"--resume takes no options but {_CHANGEABLE}: a run knows how it was begun")
    from_file = {} if options.config is None else read_options(options.config)
    for name, instead in (("steps", "epochs"), ("epochs", "steps")):
        if name in typed:
            from_file.pop(instead, None)
    config = TrainConfig(**from_file | typed)
    console = open_console()
    try:
        with display(console, "Reading the data") as shown:
            listener = _listening(shown)
            if options.resume is None:
                result = run.train(config, options.out, listener, overwrite=options.overwrite)
            else:
                result = run.resume(options.resume, listener, **typed)
    except Interrupted as stopped:
        if not console.quiet:
            say(stopped)
        return 128 + stopped.signal
    if result.files:  # else one of several processes, and not the one that reports
        last = Display(console, None)
        last.print()
        last.print(*scores(result.evaluation), f"  on {count(result.evaluation.scenes, 'held-out image')}")
        last.print(("kept ", "dim"), result.kept)
        last.print((f"{result.seconds:.0f} s in all; open ", "dim"), str(result.files[0]))
    return 0


def read_options(path: Path) -> dict[str, Any]:
    """Read options of a run by name from a YAML or JSON file, such as the `run.json` of a run."""
    content = read_mapping(path, "--config must be a file with options, as YAML or JSON", "train")
    if {"schema", "config", "classes"} <= set(content) and isinstance(content["config"], dict):
        content = content["config"]
    known = {field.name: field for field in fields()}
    options: dict[str, Any] = {}
    for typed, value in content.items():
        name = str(typed).replace("-", "_")
        if name not in known:
            raise Cause(
                "every name in a --config must be that of an option",
                f"{path}: there is no {typed}{did_you_mean(name, known)}",
                "maskloss train --help lists them, here without the leading dashes",
            )
        if value is not None:
            options[name] = _meant(known[name], value)
    return options


def _meant(field: Field, value: Any) -> Any:
    """Return what a person meant by a value of YAML, where 3e-4 is a text, and no is false."""
    if field.kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if field.kind is tuple and isinstance(value, str):
        return (value,)
    return "no" if value is False and "no" in (field.option.choices or ()) else value


def scores(evaluation: Evaluation) -> list[str | tuple[str, str]]:
    """Show the scores in one line: texts and their styles."""
    more = {"AP": evaluation.ap, "AP75": evaluation.ap75, "mean IoU": evaluation.mean_iou}
    others = "".join(f"  {name} {number(value)}" for name, value in more.items())
    return [(f"AP50 {number(evaluation.ap50)}", "bold"), others]


def _listening(shown: Display) -> Listener:
    """Show what the data are, the loss terms and the speed, and a line for each evaluation."""
    steps = [0]

    def on_facts(facts: list[tuple[str, str]]) -> None:
        width = max(len(name) for name, _ in facts)
        for name, value in facts:
            shown.print((f"{name:>{width}}  ", "dim"), value)
        shown.note("Training")

    def on_begin(at: Begin) -> None:
        steps[0] = at.steps
        shown.advance(at.done, at.steps)

    def on_step(progress: Progress) -> None:
        names = {"class": "loss_class", "mask": "loss_mask", "dice": "loss_dice"}
        terms = [f"{name} {progress.terms[key]:.3f}" for name, key in names.items() if key in progress.terms]
        shown.advance(progress.step, steps[0], "  ".join([*terms, f"{progress.speed:.3g} images/s"]))

    def on_evaluation(at: tuple[int, Evaluation]) -> None:
        shown.print(f"step {at[0]:>5}  ", *scores(at[1]))

    def on_skipped(text: str) -> None:
        shown.print(f"left out: {text}")

    def on_looked(at: tuple[int, int]) -> None:
        shown.advance(*at)

    return Listener(on_facts, on_begin, on_step, on_evaluation, on_looked, shown.note, on_skipped)
