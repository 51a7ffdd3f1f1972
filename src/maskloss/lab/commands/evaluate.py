"""`maskloss evaluate`: the scores of a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskloss.lab.commands.train import scores
from maskloss.lab.data.split import SCORED
from maskloss.lab.files import check_writable, write_json
from maskloss.lab.results.predict import evaluate_run
from maskloss.lab.terminal import Display, count, display, number, open_console

LESS_MEMORY = "close other programs, or score fewer images with --data"
EPILOG = """\
scores:
  AP is COCO's mask AP, by size as well; mean IoU is that of the pixels of each class. For label maps,
  TP / (TP + FP + FN) at IoU thresholds from 0.5 to 0.95 is the average precision of microscopy.

examples:
  maskloss evaluate runs/cells
  maskloss evaluate runs/cells --data other_cells --json scores.json
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
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda; default: cuda where there is a device")


def main(options: argparse.Namespace) -> int:
    """Score the model and print the scores."""
    if options.json is not None:
        check_writable(options.json, "--json")
    console = open_console()
    with display(console, "Loading the model") as shown:
        found, _, skipped = evaluate_run(
            options.run,
            options.data,
            split=options.split,
            device=options.device,
            note=shown.note,
            advance=shown.advance,
        )
    told = Display(console, None)
    told.print(*scores(found), f"  on {count(found.scenes, 'image')}")
    sizes = {"small": found.ap_small, "medium": found.ap_medium, "large": found.ap_large}
    told.print("AP by size  " + "  ".join(f"{name} {number(value)}" for name, value in sizes.items()))
    if found.matching:
        each = "  ".join(f"{threshold} {number(value)}" for threshold, value in found.matching.items())
        told.print(f"TP/(TP+FP+FN) by IoU  {each}")
    for text in skipped:
        told.print(f"left out: {text}")
    if options.json is not None:
        write_json(options.json, found.as_dict())
    return 0
