"""`maskloss evaluate`: the scores of a trained model."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from maskloss.errors import require
from maskloss.lab.commands.train import scores
from maskloss.lab.data.split import SCORED
from maskloss.lab.files import check_writable, write_json
from maskloss.lab.results.evaluate import Evaluation
from maskloss.lab.results.scoring import evaluate_run, unfinished
from maskloss.lab.terminal import Display, count, display, number, open_console, printable

SHOWN_RECALLS, MOST_CONFUSED = (0.1, 0.3, 0.5, 0.7, 0.9), 5
LESS_MEMORY = "close other programs, or score fewer images with --data"
EPILOG = """\
scores:
  AP is COCO's mask AP, by size and by class as well; mean IoU is that of the pixels of each class. The range behind
  AP50 is where it would lie on 95% of other images of the same kind, as far as these images can tell. Precision,
  recall and what is taken for what are of predictions that score at least 0.5, at IoU 0.5. For label maps,
  TP / (TP + FP + FN) at IoU thresholds from 0.5 to 0.95 is the average precision of microscopy.

writes, into the folder --out:
  scores.json              all scores, with the curves and what is taken for what
  predictions.json         COCO results with the data's own ids of images and classes, low scores too
  truth.json               the truth as COCO annotations, so that pycocotools loads both
  precision-recall.png     and confusion.png, where there are several classes
  pictures/                every image, the truth on the left and what was found on the right

examples:
  maskloss evaluate runs/cells
  maskloss evaluate runs/cells --data other_cells --json scores.json
  maskloss evaluate runs/coco --split test --out looked_at
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `maskloss evaluate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Score a trained model on the held-out images of its data, or on all images of other data with its classes."
    )
    parser.epilog = EPILOG
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that maskloss train wrote")
    parser.add_argument("--data", metavar="FOLDER", help="other data; default: those of the run")
    parser.add_argument(
        "--split", choices=SCORED, help="score on this part; default: what the run held out, or all of --data"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores to this file as well")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write pictures and predictions into this new folder"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or mps; default: cuda where there is a device")


def main(options: argparse.Namespace) -> int:
    """Score the model and print the scores."""
    if options.json is not None:
        check_writable(options.json, "--json")
    console = open_console()
    reached = unfinished(options.run)  # before the scoring, in which a run that goes on gets further
    with display(console, "Loading the model") as shown:
        found, _, skipped = evaluate_run(
            options.run,
            options.data,
            split=options.split,
            device=options.device,
            out=options.out,
            note=shown.note,
            advance=shown.advance,
            say=shown.print,
        )
    told = Display(console, None)
    if reached is not None:
        told.print((reached, "yellow"))
    told.print(*scores(found), f"  on {count(found.scenes, 'image')}")
    low, high = found.ap50_range
    if not math.isnan(low):
        told.print(f"AP50 on other such images  {number(low)} to {number(high)} (95%)")
    sizes = {"small": found.ap_small, "medium": found.ap_medium, "large": found.ap_large}
    told.print("AP by size  " + "  ".join(f"{name} {number(value)}" for name, value in sizes.items()))
    if found.matching:
        each = "  ".join(f"{threshold} {number(value)}" for threshold, value in found.matching.items())
        told.print(f"TP/(TP+FP+FN) by IoU  {each}")
    for row in by_class(found):
        told.print(*row)
    if found.curves:
        precision = np.mean(list(found.curves.values()), axis=0)
        at = "  ".join(f"{recall:.1f} {number(float(precision[round(100 * recall)]))}" for recall in SHOWN_RECALLS)
        told.print(f"precision at recall  {at}")
    if found.confused:
        listed = [f"{truth} for {other} {times:,} x" for times, truth, other in found.confused[:MOST_CONFUSED]]
        told.print(f"taken  {', '.join(listed)}")
    for text in found.cautions:
        told.print((f"caution: {text}", "yellow"))
    for text in skipped:
        told.print(f"left out: {text}")
    if options.json is not None:
        write_json(options.json, found.as_dict(whole=True))
    if options.out is not None:
        told.print(f"written to {options.out}")
    return 0


def by_class(found: Evaluation) -> list[list[str | tuple[str, str]]]:
    """Show a table, class by class: lines of texts and their styles."""
    width = require("rich.cells", "train").cell_len
    names = [printable(name) for name in found.by_class]
    side = max(map(width, ["class", *names]))
    heads = ("AP", "AP50", "precision", "recall", "images", "instances", "found")
    lines: list[list[str | tuple[str, str]]] = [
        [(f"{'class':<{side}}  " + "  ".join(f"{head:>{max(len(head), 5)}}" for head in heads), "dim")]
    ]
    for name, each in zip(names, found.by_class.values(), strict=True):
        scored = [number(value) for value in (each.ap, each.ap50, each.precision, each.recall)]
        cells = [*scored, *(f"{value:,}" for value in (each.images, each.instances, each.found))]
        padded = (f"{cell:>{max(len(head), 5)}}" for cell, head in zip(cells, heads, strict=True))
        lines.append([name + " " * (side - width(name)) + "  " + "  ".join(padded)])
    return lines
