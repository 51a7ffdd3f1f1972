"""The works that a text on the method can cite, read from `references.bib`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_NOTE = ",\n  note         = {VERSION}"


@cache
def entries() -> dict[str, str]:
    """Return the BibTeX entry of each work by its key; that of maskloss has a place for its version."""
    text = Path(__file__).with_name("references.bib").read_text(encoding="utf-8")
    return {key: entry for entry, key in re.findall(r"(^@\w+\{(\w+),.*?^\})", text, re.DOTALL | re.MULTILINE)}


def reference_entry(key: str, version: str | None) -> str:
    """Return a work's BibTeX entry; `version` is that of maskloss, None if it is not known."""
    return entries()[key].replace(_NOTE, _NOTE.replace("VERSION", f"Version {version}") if version else "")


def reference_line(key: str, version: str | None) -> str:
    """Return a work's line in a list of references: authors, title, and where it appeared."""
    entry = reference_entry(key, version).replace(r"{\'a}", "á")
    fields = re.findall(r"(\w+) += \{(.*?)\},?\n", entry, re.DOTALL)
    found = {name: re.sub(r"[{}]", "", value) for name, value in fields}
    authors = ", ".join(_with_initials(name) for name in re.split(r"\s+and\s+", found["author"]))
    if "howpublished" in found:
        where = [found[name] for name in ("note", "howpublished") if name in found]
    elif "journal" in found:
        where = [f"{found['journal']} {found['volume']}, {found['year']}"]
    else:
        where = [re.sub(r".*\((\w+)\)", r"\1", found["booktitle"]) + f" {found['year']}"]
    return ". ".join([authors, found["title"], *where]) + "."


def _with_initials(name: str) -> str:
    last, _, first = name.partition(", ")
    return " ".join([*(re.sub(r"(\w)[\w.]*", r"\1.", part) for part in first.split()), last])
