"""Keep the Chinese pages in step with the English pages that they translate.

    python scripts/translations.py --check              exit with 1 and name the pages that have fallen behind
    python scripts/translations.py --stamp [PAGE ...]   after a review: record what the pages (or all) translate

The last line of a translation names its English page and the SHA-256 of that page's text. `--stamp` also puts the link
to the other language under the title of both pages.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_STAMP = re.compile(r"^<!-- translation of (\S+), sha256 ([0-9a-f]{16}) -->\n?\Z", re.MULTILINE)
_LINK = re.compile(r"^\[(?:中文|English)\]\(\S+\)\n", re.MULTILINE)
# A table of contents lists pages of its own language, so it has nothing to translate.
_TOCTREE = re.compile(r"^```\{toctree\}\n.*?^```\n", re.MULTILINE | re.DOTALL)


def translations(root: Path = ROOT) -> list[Path]:
    """List the Chinese pages."""
    return [*sorted(root.glob("README.zh.md")), *sorted(root.glob("docs/zh/*.md"))]


def original(page: Path) -> Path:
    """Return the English page of a Chinese one: docs/zh/concepts.md translates docs/concepts.md."""
    return page.with_name("README.md") if page.name == "README.zh.md" else page.parent.parent / page.name


def digest(page: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of what there is to translate in an English page."""
    text = _TOCTREE.sub("", _LINK.sub("", page.read_text(encoding="utf-8")))
    return hashlib.sha256(re.sub(r"\n{2,}", "\n\n", text).strip().encode()).hexdigest()[:16]


def links(page: Path) -> dict[Path, str]:
    """Write the lines under the titles of a Chinese page and its English one: each leads to the other."""

    def target(start: Path, end: Path) -> str:
        return Path(os.path.relpath(end, start.parent)).as_posix()

    english = original(page)
    return {page: f"[English]({target(page, english)})", english: f"[中文]({target(english, page)})"}


def problem(page: Path, root: Path = ROOT) -> str | None:
    """Say in one sentence what is wrong with a translation, or return None."""
    english = original(page)
    name, source = (path.relative_to(root).as_posix() for path in (page, english))
    if not english.exists():
        return f"{name} translates {source}, which does not exist"
    stamp = _STAMP.search(page.read_text(encoding="utf-8"))
    if not stamp or stamp[1] != source:
        return f"{name} does not end with the stamp of {source}: python scripts/translations.py --stamp {name}"
    if stamp[2] != digest(english):
        return f"{source} changed since its translation {name} was reviewed"
    for path, line in links(page).items():
        if not re.search(rf"^# .+\n\n{re.escape(line)}$", path.read_text(encoding="utf-8"), re.MULTILINE):
            return f"{path.relative_to(root).as_posix()} does not have {line} under its title"
    return None


def stamp(page: Path, root: Path = ROOT) -> None:
    """Write what a page translates into its last line, and the links between the languages."""
    for path, line in links(page).items():
        text = _LINK.sub("", path.read_text(encoding="utf-8"))
        path.write_text(
            re.sub(r"^(# .+\n)\n+", rf"\1\n{line}\n\n", text, count=1, flags=re.MULTILINE), encoding="utf-8"
        )
    english = original(page)
    text = _STAMP.sub("", page.read_text(encoding="utf-8")).rstrip()
    source = english.relative_to(root).as_posix()
    page.write_text(f"{text}\n\n<!-- translation of {source}, sha256 {digest(english)} -->\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--check", action="store_true", help="name the translations that have fallen behind")
    group.add_argument("--stamp", nargs="*", type=Path, metavar="PAGE", help="record what was reviewed")
    args = parser.parse_args(argv)
    if not args.check:
        for page in [page.resolve() for page in args.stamp] or translations():
            if page not in translations():
                parser.error(f"{page} is not a Chinese page")
            stamp(page)
    found = [text for text in map(problem, translations()) if text]
    sys.stderr.write("".join(f"{text}\n" for text in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
