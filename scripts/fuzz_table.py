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
SHOWN = {"gpu": "gpu, interpreted"}


def text(results: list[dict[str, Any]]) -> str:
    """Describe results in Markdown: a sentence on each run, and a row for each backend and dtype."""
    lines = [_run(result) for result in results]
    lines += ["", "| backend | dtype | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for result in results:
        errors = result["largest_errors"]
        for backend in result["backends"]:
            for dtype in DTYPES:
                found = [errors.get(f"{backend} {dtype} {column}") for column in COLUMNS]
                shown = ["" if error is None else f"{error:.1e}" for error in found]
                lines.append(f"| {SHOWN.get(backend, backend)} | {dtype} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _run(result: dict[str, Any]) -> str:
    cases = result["cases"]
    kinds = ", ".join(f"{found['tried']:,} {name}" for name, found in cases.items())
    whole = sum(found["tried"] for found in cases.values())
    told = f"{whole:,} cases: {kinds}" if len(cases) > 1 else kinds
    return (
        f"- Backends {' and '.join(SHOWN.get(name, name) for name in result['backends'])}, seed {result['seed']}, "
        f"PyTorch {result['torch']}, Hypothesis {result['hypothesis']}, {result['minutes']:.0f} minutes: {told}. "
        f"{result['checked_against_float64']:,} steps were compared with float64."
    )


def page_with(page: str, results: list[dict[str, Any]]) -> str:
    """Return the page with the table between its marks."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(page)) == 1, f"{PAGE} needs the marks {BEGIN} and {END} once"
    return pattern.sub(lambda _: f"{BEGIN}\n\n{text(results)}\n\n{END}", page)


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
