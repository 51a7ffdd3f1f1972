"""Docstrings are written to be read in an editor; this converts them to reStructuredText.

An indented block is code, `name` is code (`default_role` in conf.py), and |z| is an absolute value.
"""

from __future__ import annotations

import re
from typing import Any

_SECTION = re.compile(r"[A-Z]\w+:")
_COLON = "\ue000"  # a character that no text has
_LITERAL = re.compile(r"(``.*?``|`[^`]*`)")


def _mark_blocks(lines: list[str]) -> list[str]:
    """Put `::` before an indented block that follows a paragraph at the left margin."""
    marked: list[str] = []
    for number, line in enumerate(lines):
        marked.append(line)
        following = lines[number + 1] if number + 1 < len(lines) else ""
        before = lines[number - 1] if number else ""
        opens = not line.strip() and following.startswith("    ") and before and not before.startswith(" ")
        if opens and not _SECTION.fullmatch(before) and not following.lstrip().startswith(("- ", "* ", ">>>")):
            marked += ["::", ""]
    return marked


def _escape(line: str) -> str:
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = _LITERAL.split(line)
    return "".join(part if number % 2 else re.sub(r"(?<!\\)\|", r"\\|", part) for number, part in enumerate(parts))


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    in_block = False
    result = []
    for line in _mark_blocks(lines):
        if line == "::":
            in_block = True
        elif line.strip() and not line.startswith(" "):
            in_block = False
        result.append(line if in_block else _escape(line))
    if what in {"attribute", "property"}:
        # Napoleon takes what stands before a colon there for a type.
        result[0] = result[0].replace(":", _COLON)
    lines[:] = result


def restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples: their class documents them as attributes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", restore, priority=900)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
