"""The way back from a patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typing_extensions import Self


class Undo:
    """What a patch changed in classes, and the way back. As a context manager it is undone at the end of the block."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Put back all that was changed. A second call does nothing."""
        while self._steps:
            self._steps.pop()()

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Set an attribute of a class, until the patch is undone; what somebody else puts on top of it stays."""
        before = vars(owner).get(name)

        def back() -> None:
            if vars(owner).get(name) is not new:
                return
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        setattr(owner, name, new)
        self._steps.append(back)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patch({'on' if self._steps else 'undone'})"
