"""What is done about broken images and annotations: stop at the first one, or leave it out and say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from maskloss.errors import MaskLossError

STOP, SKIP = "stop", "skip"
ON_ERROR = (STOP, SKIP)


class Problems:
    """Collects what was left out.

    Args:
        on_error: "stop" or "skip".
    """

    def __init__(self, on_error: str = STOP) -> None:
        self.on_error = on_error
        self.skipped: list[str] = []

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Leave the block at an error; with "skip", go on after it."""
        try:
            yield
        except MaskLossError as error:
            if self.on_error != SKIP:
                raise
            self.skipped.append(sentence(error))


def sentence(error: MaskLossError) -> str:
    """Say in one line what is wrong."""
    if error.parts is None:
        return " ".join(str(error).split())
    rule, cause, _ = error.parts
    return f"{cause} ({rule})"
