"""Check that a tag may be released: that package, changelog and citation name its version.

python scripts/release.py v0.1.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """List what does not fit to a tag, such as v0.1.0."""
    version = re.escape(tag.removeprefix("v"))
    wanted = {
        "src/maskloss/__init__.py": rf'^__version__ = "{version}"$',
        "CHANGELOG.md": rf"^## \[{version}\] - \d{{4}}-\d\d-\d\d$",
        "CITATION.cff": rf"^version: {version}$",
    }
    found = [] if re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag) else [f"a tag looks like v0.1.0, not like {tag!r}"]
    for name, pattern in wanted.items():
        if not re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE):
            found.append(f"{name} has no line that matches {pattern}")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1])) or 0)
