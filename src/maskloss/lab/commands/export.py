"""`maskloss export`: a trained model for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskloss.errors import Cause
from maskloss.lab.files import check_writable
from maskloss.lab.results.export import export_run
from maskloss.lab.terminal import Display, display, open_console

FORMATS = ("onnx",)
LESS_MEMORY = "close other programs"
EPILOG = """\
The file takes "images" [B, C, S, S], float32 in [0, 1], and returns "class_logits" [B, Q, classes + 1], with
"no object" last, and "mask_logits" [B, Q, h, w], which are above 0 inside. Its metadata name the classes and say how
images are scaled to [0, 1]. It is compared with the model in ONNX Runtime before it is put in place.

examples:
  maskloss export runs/cells
  maskloss export runs/cells --out cells.onnx
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `maskloss export`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Write the model of a run as a file for other programs."
    parser.epilog = EPILOG
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that maskloss train wrote")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="of the file (default: onnx)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: NAME.onnx, after the run")


def main(options: argparse.Namespace) -> int:
    """Write the file and say what is in it."""
    ending = f".{options.format}"
    out = options.out or Path(options.run.resolve().name + ending)
    if out.suffix != ending:
        raise Cause(f"--out must end in {ending}", f"got {out.name}", f"--out {out.stem}{ending}")
    check_writable(out, "--out")
    console = open_console()
    with display(console, "Loading the model") as shown:
        found = export_run(options.run, out, note=shown.note)
    Display(console, None).print(
        f"{found.path}: takes {found.channels} x {found.size} x {found.size} images; on {found.images} of them its "
        f"logits are those of the model within {found.largest:.1g} of the largest"
    )
    return 0
