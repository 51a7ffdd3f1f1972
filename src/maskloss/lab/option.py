"""What is known of an option of `maskloss train` beside its type and its default."""

from __future__ import annotations

from typing import Any, NamedTuple

from maskloss._numbers import is_number
from maskloss.errors import Cause

HELP = "see maskloss train --help"


class Option(NamedTuple):
    """What is known of an option beside its type and its default."""

    group: str  # under which the help lists it
    metavar: str  # what stands for its value
    text: str  # what it does, and what None stands for
    least: float | None = None  # the smallest value
    most: float | None = None  # the largest. Beyond it, a machine would run out of memory or threads before it said so.
    above: float | None = None  # the value must be larger than this
    choices: tuple[str, ...] | None = None  # all that it may be

    def check(self, name: str, kind: type, value: Any) -> None:
        """Raise if a value is not of this kind or not within these bounds."""
        if kind is tuple:
            good = isinstance(value, tuple) and all(each in (self.choices or ()) for each in value)
            must = f"some of {', '.join(self.choices or ())}"
        elif self.choices is not None:
            good, must = value in self.choices, f"one of {', '.join(self.choices)}"
        elif kind is str:
            good, must = isinstance(value, str) and bool(value) and "\0" not in value, "a name"
        elif kind is bool:
            good, must = isinstance(value, bool), "true or false"
        else:
            fits = (int, float) if kind is float else int
            good = isinstance(value, fits) and is_number(value) and self._holds(value)
            must = f"a {'finite' if kind is float else 'whole'} number{self._bounds()}"
        if not good:
            raise Cause(f"{name} must be {must}", f"got {value!r}", HELP)

    def _holds(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
        )

    def _bounds(self) -> str:
        if self.least is not None and self.most is not None:
            return f" from {self.least:,} to {self.most:,}"
        return f", above {self.above:g}" if self.above is not None else f", at least {self.least:g}"


class Field(NamedTuple):
    """An option of a run, read off `TrainConfig`: its name there, its type, whether None is a value, its default."""

    name: str
    kind: type
    optional: bool
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """How the option is typed."""
        return ("--no-" if self.default is True else "--") + self.name.replace("_", "-")

    @property
    def back(self) -> str:
        """How an option without a value is typed to take it back."""
        return ("--" if self.default is True else "--no-") + self.name.replace("_", "-")
