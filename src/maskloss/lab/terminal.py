"""What reaches a terminal: text that is safe to show, errors of one line, and progress with and without a terminal."""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from maskloss.errors import MaskLossError, MissingExtraError, require
from maskloss.lab.files import explain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Seconds between two lines of progress where there is no terminal to draw a bar in.
LINE_EVERY = 30.0
# Control characters, which a terminal obeys; marks that turn the direction of writing; bytes that are no text.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Return text that a terminal shows and does not obey.

    Names of files, categories and folders come from others. What is in them that is no text is shown as its code, so
    that an escape sequence changes nothing, and one line stays one line.

    Example:
        >>> print(printable("a\x1b[2Jb\n.png"))
        a\x1b[2Jb\n.png
    """
    return _UNSAFE.sub(_code, str(text))


def _code(found: re.Match[str]) -> str:
    character = found.group()
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def say(text: object) -> None:
    """Print one line for people, beside the output."""
    print(printable(text), file=sys.stderr)


def tell(text: object = "") -> None:
    """Print one line of output."""
    print(printable(text))


def explain_error(error: Exception, less_memory: str) -> str | None:
    """Say in one sentence what went wrong; None for what should never happen, whose traceback is wanted."""
    if isinstance(error, MaskLossError) and error.parts is not None:
        rule, cause, hint = error.parts
        return f"{rule}: {cause}" + (f" ({hint})" if hint else "")
    if isinstance(error, (MaskLossError, MissingExtraError)):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{explain(error)}{where}"
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"there is not enough memory ({less_memory})"
    return None


def number(value: float) -> str:
    """Show a score."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def count(how_many: int, what: str) -> str:
    """Count things: "1 image", "2 images"."""
    return f"{how_many:,} {what}{'s' * (how_many != 1)}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a table: the first column to the left, the others to the right. A wide character takes two places."""
    cells = require("rich.cells", "train")
    texts = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cells.cell_len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row in texts:
        gaps = [" " * (width - cells.cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        rest = "".join(f"  {gap}{cell}" for gap, cell in zip(gaps[1:], row[1:], strict=True))
        lines.append(f"{row[0]}{gaps[0]}{rest}".rstrip())
    return lines


def quiet_libraries() -> None:
    """Keep the log lines of libraries that read and draw files to themselves: we say what is wrong, in our words."""
    for name in ("tifffile", "matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


class Parser(argparse.ArgumentParser):
    """Answers a mistake with the usage of the command, and one line that is safe to show."""

    def error(self, message: str) -> NoReturn:
        """Print both and exit."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def unknown(self, typed: str) -> NoReturn:
        """Say that there is no such argument, and which may have been meant."""
        if typed.startswith("-"):
            name = typed.partition("=")[0]
            self.error(f"there is no option {name}{did_you_mean(name, self._option_string_actions)}")
        self.error(f"one argument too many: {typed}")


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """Return ", did you mean ...?" with the closest of the known names, or nothing."""
    close = difflib.get_close_matches(typed, list(known), 1)
    return f", did you mean {close[0]}?" if close else ""


def open_console() -> Console:
    """Open the console of a command. Of several processes, the first one speaks."""
    quiet = os.environ.get("RANK", "0") != "0"
    console: Console = require("rich.console", "train").Console(highlight=False, quiet=quiet)
    return console


class Display:
    """What a command is doing: a bar in a terminal, elsewhere a line from time to time.

    Args:
        console: to print to.
        bar: of rich, with one task; None: there is no terminal.
    """

    def __init__(self, console: Console, bar: Progress | None) -> None:
        self._console, self._bar = console, bar
        # When, and at which number, how fast it goes began to be measured; and how often was said how far it is.
        self._begun, self._count = (0.0, 0), 0
        self._told = time.monotonic()

    def print(self, *parts: str | tuple[str, str]) -> None:
        """Print a line that stays, in one piece: the bar would erase what is printed without the end of its line."""
        styled = [(part, "") if isinstance(part, str) else part for part in parts]
        text = require("rich.text", "train").Text
        self._console.print(text.assemble(*((printable(part), style) for part, style in styled)), soft_wrap=True)
        self._told = time.monotonic()

    def note(self, text: str) -> None:
        """Say what is being done."""
        self._count = 0
        if self._bar is None:
            self.print(text)
        else:
            self._bar.reset(self._bar.task_ids[0], description=printable(text), text="")
            # `reset` takes None for the total that there was.
            self._bar.tasks[0].total = None

    def advance(self, done: int, total: int, text: str = "") -> None:
        """Say how far it is, with a few words more."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, text=text)
            return
        now = time.monotonic()
        self._count += 1
        if self._count <= 2:  # until the first has been done kernels are compiled, and files are found
            self._begun = now, done
        elif now - self._told >= LINE_EVERY and done > self._begun[1]:
            left = (now - self._begun[0]) / (done - self._begun[1]) * (total - done)
            self.print(f"{done:,} of {total:,}  {text}  {_duration(left)} left".replace("    ", "  "))


@contextmanager
def display(console: Console, text: str) -> Iterator[Display]:
    """Show what is being done until the block ends, and leave nothing of the bar behind."""
    if not console.is_terminal or console.quiet:
        shown = Display(console, None)
        shown.note(text)
        yield shown
        return
    rich = require("rich.progress", "train")
    columns = [
        rich.TextColumn("{task.description}", style="bold", markup=False),
        rich.BarColumn(bar_width=20),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[text]}", markup=False),
        rich.TimeRemainingColumn(compact=True),
    ]
    with rich.Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(printable(text), total=None, text="")
        yield Display(console, bar)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
