"""`maskloss predict`: what a trained model finds in images."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskloss.lab.data.problems import ON_ERROR
from maskloss.lab.results.inference import FOUND
from maskloss.lab.results.predict import predict_images
from maskloss.lab.terminal import Display, count, display, open_console

LESS_MEMORY = "take a smaller --tile"
EPILOG = """\
writes, into the folder --out:
  NAME_found.tif     a label map: 0 is background, every instance has a number
  NAME_overlay.png   the image with the instances
  predictions.json   COCO results with the category ids of the data: all instances, down to --least-score, and the
                     number of each in the label map, 0 for what the map does not show
  images.json        these images and categories as COCO lists them, and the files that were written

Images that are larger than those trained on are cut into overlapping tiles, and the instances of neighboring
tiles are merged.

examples:
  maskloss predict runs/cells plate1.tif plate2.tif
  maskloss predict runs/coco photos --threshold 0.7 --out found
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `maskloss predict`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Find instances in images, and write label maps, COCO results, and pictures of what was found."
    parser.epilog = EPILOG
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that maskloss train wrote")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="images, or folders of images")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("predictions"), help="default: predictions")
    # fmt: off
    parser.add_argument("--threshold", type=float, default=FOUND, metavar="SCORE",
        help=f"least score of what label maps and overlays show (default: {FOUND})")
    parser.add_argument("--least-score", type=float, default=0.0, metavar="SCORE",
        help="least score of what predictions.json lists (default: 0, as average precision needs low scores)")
    parser.add_argument("--ids", type=Path, metavar="FILE",
        help="annotations in COCO's form: images have the ids they have there, by file name; default: counted from 1")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="side of the tiles; default: as in training")
    parser.add_argument("--on-error", choices=ON_ERROR, default="stop",
        help="what to do at an image that cannot be read (default: stop)")
    # fmt: on
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or mps; default: cuda where there is a device")


def main(options: argparse.Namespace) -> int:
    """Find instances, and say how many in each image."""
    console = open_console()
    with display(console, "Looking at the images") as shown:
        _, skipped = predict_images(
            options.run,
            options.images,
            options.out,
            threshold=options.threshold,
            least=options.least_score,
            ids=options.ids,
            tile=options.tile,
            device=options.device,
            on_error=options.on_error,
            done=lambda path, found: shown.print(f"{path}: {count(found, 'instance')}"),
            advance=shown.advance,
            say=shown.print,
        )
    told = Display(console, None)
    for text in skipped:
        told.print(f"left out: {text}")
    told.print(f"written to {options.out}")
    return 0
