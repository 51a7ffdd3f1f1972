"""The command line, `maskloss <command>`: a table of commands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from maskloss import __version__
from maskloss.errors import MaskLossError, MissingExtraError
from maskloss.lab.terminal import Parser, did_you_mean, explain_error, quiet_libraries, say

# A command is the file of its name in `commands`, imported when it is asked for. It has `add_arguments(parser)`,
# `main(options)`, which returns the exit status, and LESS_MEMORY, what to do where there is too little of it.
COMMANDS = {
    "check": "look at a folder of data as training would see it",
    "train": "train a query model and write a report",
    "evaluate": "score a trained model on held-out images",
    "predict": "find instances in images with a trained model",
    "export": "write a trained model for other programs (ONNX)",
    "show": "draw what the loss looks at",
    "methods": "write the paragraph for the paper",
    "bench": "measure time and memory of a training step",
    "doctor": "check this installation, for bug reports too",
}
EXAMPLES = """\
examples:
  maskloss train                                  handwritten digits, two minutes on two cores
  maskloss check photos                           look at your own images before training
  maskloss train --data photos                    train on them; see maskloss train --help
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
    quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows few characters is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="maskloss",
        description="Mask losses at sampled points: train, score and use query models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"maskloss {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    parsers = {name: commands.add_parser(name, help=text) for name, text in COMMANDS.items()}
    asked = next((each for each in arguments if not each.startswith("-")), None)
    if asked is None:
        parser.parse_args(arguments)  # help, the version, or a mistake
    if asked not in COMMANDS:
        parser.error(f"there is no command {asked}{did_you_mean(str(asked), COMMANDS)}")
    command: Any = importlib.import_module(f"maskloss.lab.commands.{asked}")
    command.add_arguments(parsers[asked])
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parsers[asked].unknown(unknown[0])
    options.refuse = parsers[asked].error
    try:
        status: int = command.main(options)
    except (MaskLossError, MissingExtraError, OSError, MemoryError, RuntimeError) as error:
        told = explain_error(error, command.LESS_MEMORY)
        if told is None:
            raise
        say(f"error: {told}")
        return 2
    return status
