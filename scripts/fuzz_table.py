"""Write the results of `make fuzz` into the page on numerics, from docs/fuzz.json.

python scripts/fuzz_table.py           # write
python scripts/fuzz_table.py --check   # fail where the page is out of date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE = ROOT / "docs" / "fuzz.json", ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- begin: scripts/fuzz_table.py -->", "<!-- end: scripts/fuzz_table.py -->"
COLUMNS = ("cross-entropy", "Dice", "classification", "total", "gradient of masks", "gradient of classes")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def text(result: dict[str, Any]) -> str:
    """Describe a result in Markdown: a sentence on what was run, and a row for each backend and dtype."""
    tried = {name: f"{found['tried']:,}" for name, found in result["cases"].items()}
    told = ", ".join(f"{count} {name}" for name, count in tried.items())
    errors = result["largest_errors"]
    lines = [
        f"One run with the seed {result['seed']}, PyTorch {result['torch']}, {result['minutes']:.0f} minutes: {told}.",
        f"{result['checked_against_float64']:,} steps were compared with float64.",
        "",
        "| backend | dtype | " + " | ".join(COLUMNS) + " |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    for backend in result["backends"]:
        for dtype in DTYPES:
            found = [errors.get(f"{backend} {dtype} {column}") for column in COLUMNS]
            shown = ["" if error is None else f"{error:.1e}" for error in found]
            lines.append(f"| {backend} | {dtype} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def page_with(page: str, result: dict[str, Any]) -> str:
    """Return the page with the table between its marks."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(page)) == 1, f"{PAGE} needs the marks {BEGIN} and {END} once"
    return pattern.sub(lambda _: f"{BEGIN}\n\n{text(result)}\n\n{END}", page)


def main(arguments: list[str]) -> str | None:
    """Write the page, or check it; return what is wrong."""
    before = PAGE.read_text(encoding="utf-8")
    after = page_with(before, json.loads(RESULT.read_text(encoding="utf-8")))
    if arguments == ["--check"]:
        return None if before == after else "docs/numerics.md is out of date: python scripts/fuzz_table.py"
    PAGE.write_text(after, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
