"""What is done about broken images and annotations, and what is told of the data: findings, counted, with examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from maskloss.errors import MaskLossError

STOP, SKIP = "stop", "skip"
ON_ERROR = (STOP, SKIP)
# Nothing is trained: what is broken is left out, and questions are kept.
LOOK = "look"
# Kinds of findings, in the order in which they are told: what may be wrong comes first.
SUSPICIOUS, DECIDED, LEFT_OUT, MENDED = "suspicious", "decided", "left out", "mended"
KINDS = (SUSPICIOUS, DECIDED, LEFT_OUT, MENDED)
_EXAMPLES = 3


class Finding(NamedTuple):
    """Something that a person should know of the data."""

    kind: str  # one of `KINDS`
    what: str  # what was found, and what was done about it
    times: int  # how often; 0: it is about the whole data set
    examples: tuple[str, ...]  # the first few

    def __str__(self) -> str:
        count = f": {self.times:,}" if self.times else ""
        such = f" ({'; '.join(self.examples)}{'; ...' if self.times > len(self.examples) else ''})"
        return self.what + count + (such if self.examples else "")


class Problems:
    """Collects what was left out, mended or decided."""

    def __init__(self, on_error: str = STOP) -> None:
        self.on_error = on_error
        self.skipped: list[str] = []
        self._told: set[str] = set()
        self.asked: list[MaskLossError] = []
        self._found: dict[tuple[str, str], tuple[int, list[str]]] = {}

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Leave the block at an error; with "skip", go on after it."""
        try:
            yield
        except MaskLossError as error:
            self.tolerate(error)

    def tolerate(self, error: MaskLossError) -> None:
        """Raise an error, or with "skip" keep its sentence."""
        if self.on_error == STOP:
            raise error
        told = sentence(error)
        if told not in self._told:
            self._told.add(told)
            self.skipped.append(told)

    def ask(self, error: MaskLossError) -> None:
        """Raise what only a person can decide; where nothing is trained, keep it and go on."""
        if self.on_error != LOOK:
            raise error
        self.asked.append(error)
        rule, cause, hint = error.parts or ("", str(error), "")
        self.note(SUSPICIOUS, f"training would not start: {cause} ({rule}; {hint})", count=0)

    def note(self, kind: str, what: str, example: str = "", count: int = 1) -> None:
        """Note a finding, or count one that was noted before.

        Args:
            kind: one of `KINDS`.
            what: the finding; equal texts are counted together.
            example: where; the first few are kept.
            count: how often; 0: the finding is about the whole data set.
        """
        before, examples = self._found.get((kind, what), (0, []))
        if example and example not in examples and len(examples) < _EXAMPLES:
            examples.append(example)
        self._found[kind, what] = (before + count, examples)

    @property
    def findings(self) -> list[Finding]:
        """What was found, the suspicious first."""
        found = [Finding(kind, what, count, tuple(such)) for (kind, what), (count, such) in self._found.items()]
        if self.skipped:
            broken = Finding(LEFT_OUT, "broken", len(self.skipped), tuple(self.skipped[:_EXAMPLES]))
            found.append(broken)
        return sorted(found, key=lambda each: KINDS.index(each.kind))


def by_kind(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """Return a line for each kind of finding."""
    found = list(findings)
    kinds = dict.fromkeys(each.kind for each in found)
    return [(kind, "; ".join(str(each) for each in found if each.kind == kind)) for kind in kinds]


def cause_of(error: MaskLossError) -> str:
    """Say what is wrong, without the rule."""
    return error.parts[1] if error.parts else str(error)


def sentence(error: MaskLossError) -> str:
    """Say in one line what is wrong."""
    if error.parts is None:
        return " ".join(str(error).split())
    rule, cause, _ = error.parts
    return f"{cause} ({rule})"
