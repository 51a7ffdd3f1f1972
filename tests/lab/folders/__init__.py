"""Folders as labeling tools, converters, microscopes and phones leave them, with what becomes of each.

The table "What is read, what is mended, what is refused" of docs/data.md is made from this list:

    PYTHONPATH=src:tests python -m lab.folders
"""

from __future__ import annotations

from pathlib import Path

from lab.folders import of_json, of_maps, of_others, of_public, of_tools
from lab.folders.pieces import CASES, Case

__all__ = ["CASES", "Case", "of_json", "of_maps", "of_others", "of_page", "of_public", "of_tools", "table"]

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
BEGIN, END = "<!-- made by tests/lab/folders -->\n", "<!-- until here -->"


def table() -> str:
    """Return the table of the documentation."""
    lines: list[str] = []
    for group in dict.fromkeys(each.group for each in CASES.values()):
        lines += ["", f"### {group}", "", "| what people have | what becomes of it |", "| --- | --- |"]
        lines += [f"| {each.what} | {each.outcome} |" for each in CASES.values() if each.group == group]
    return "\n".join(lines).strip() + "\n"


def of_page() -> str:
    """Return the table that the documentation has."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def write_page() -> None:
    """Put the table into the documentation."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
