"""`maskloss check`: what training would see of a folder, before it starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskloss.errors import Cause
from maskloss.lab.commands.train import add_options, given
from maskloss.lab.config import TrainConfig, fields
from maskloss.lab.data.folder import FolderScenes
from maskloss.lab.data.problems import LOOK, STOP, SUSPICIOUS, Problems
from maskloss.lab.data.survey import class_table, part_table, survey
from maskloss.lab.files import check_file, check_writable
from maskloss.lab.results import checkpage
from maskloss.lab.terminal import Display, aligned, display, open_console

LESS_MEMORY = "close other programs"
# What says how data are read; the others say how they are used.
_CHECKED = tuple(
    field
    for field in fields()
    if field.option.group == "data" and field.name not in {"data", "augment", "held_out", "workers"}
)
# More classes than this are listed on the page only.
_CLASSES = 20
EPILOG = """\
exit status:
  0   the data can be trained on
  1   with --strict: something is suspicious or broken
  2   training would not start

examples:
  maskloss check photos
  maskloss check cells --crop 256 --queries 100 --out cells.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `maskloss check`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Look at every image of a folder as training would see it, say what is suspicious, and draw the masks\n"
        "as the loss reads them."
    )
    parser.epilog = EPILOG
    parser.add_argument("folder", metavar="FOLDER", help="images with annotations, as maskloss train --data takes them")
    add_options(parser, _CHECKED)
    more = parser.add_argument_group("check")
    more.add_argument("--queries", type=int, metavar="N", help="queries of the model you mean to train")
    more.add_argument(
        "--out", type=Path, default=Path("check.html"), metavar="FILE", help="the page (default: check.html)"
    )
    more.add_argument("--strict", action="store_true", help="exit with 1 where something is suspicious or broken")


def main(options: argparse.Namespace) -> int:
    """Look at the data, print what was found, and write the page."""
    config = TrainConfig(data=options.folder, **given(options, _CHECKED))
    if options.queries is not None and options.queries < 1:
        raise Cause("--queries must be a whole number, at least 1", f"got {options.queries}", "see --help")
    _check_out(options.out)
    console = open_console()
    with display(console, "Reading the data") as shown:
        source = FolderScenes(
            options.folder,
            config.size,
            crop=config.crop,
            options=config.data_options,
            normalize=config.normalize,
            on_error=LOOK,
        )
        if options.queries is not None:
            source.limit(options.queries)
        shown.note("Looking at every image")
        seen = survey(source, advance=shown.advance)
        shown.note("Drawing the page")
        checkpage.write(options.out, source, seen, config.command)
    told = Display(console, None)
    for text in source.found.how:
        told.print(text)
    classes = class_table(source, seen)
    for table in (part_table(source, seen), classes[: _CLASSES + 1]):
        told.print()
        for line in aligned(table):
            told.print(line)
    if len(classes) > _CLASSES + 1:
        told.print(f"and {len(classes) - _CLASSES - 1:,} more classes")
    told.print()
    for finding in source.findings:
        told.print((f"{finding.kind}  ", "bold red" if finding.kind == SUSPICIOUS else "bold"), str(finding))
    if not any(finding.kind == SUSPICIOUS for finding in source.findings):
        told.print("nothing is suspicious")
    told.print(("open ", "dim"), str(options.out))
    return _status(source.problems, config.on_error, strict=options.strict)


def _status(problems: Problems, on_error: str, *, strict: bool) -> int:
    """Return the exit status."""
    if problems.asked:
        raise problems.asked[0]
    if problems.skipped and on_error == STOP:
        count, first = len(problems.skipped), problems.skipped[0]
        raise Cause(
            "training stops at what is broken",
            f"{count} images or annotations are; the first: {first}",
            "mend them, or leave them out with --on-error skip",
        )
    suspicious = any(finding.kind == SUSPICIOUS for finding in problems.findings)
    return int(strict and (suspicious or bool(problems.skipped)))


def _check_out(path: Path) -> None:
    """Raise unless the page can be written without taking the place of anything else."""
    check_writable(path, "--out")
    if path.exists():
        check_file(path, "--out must be a file")
        with path.open("rb") as opened:
            if f'content="{checkpage.GENERATOR}"'.encode() not in opened.read(1024):
                raise Cause(
                    "--out must be a new file, or a page of an earlier check", f"{path} is neither", "name another"
                )
