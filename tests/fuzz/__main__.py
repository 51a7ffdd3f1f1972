"""`make fuzz`: many random cases, and a record of them.

python -m fuzz --examples 20000 --seed 1 --write docs/fuzz.json

The cases are drawn in parts, each from a seed of its own, and the record is written after each part: a run that is
ended early has a record of what it did. Files that hold a record of other backends keep it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARES = {
    "calls": 0.5,
    "arguments": 0.3,
    "segmentations": 0.1,
    "data folders": 0.05,
    "run folders": 0.01,
    "configurations": 0.04,
}
# So many cases that each kind has some, and so few that they are done within minutes.
PART = 1000
# Seconds after which a case hangs: the process ends with its traceback.
HANGS = 600


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description="Drive the public API with random calls and files.")
    parser.add_argument("--examples", type=int, default=2000, help="cases in all; default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--only", choices=SHARES, action="append", help="kinds of cases; default: all of them")
    parser.add_argument("--backends", nargs="+", default=["reference", "cpu"], choices=["reference", "cpu", "gpu"])
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no new part after this time")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write counts and largest errors there, as JSON")
    parser.add_argument("--resume", action="store_true", help="go on after the parts that FILE has of this seed")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when PyTorch is imported
    if "gpu" in options.backends:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import hypothesis
    import torch

    import maskloss
    from fuzz import arguments, cases, definition, files

    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # inside pycocotools
    record = definition.Record()

    def call(case: cases.Case) -> bool:
        # A case is small, and on a busy machine threads wait for one another: with two it takes eight times as long.
        torch.set_num_threads(1 if case.content_seed % 16 else 3)
        definition.check(case, options.backends, record)
        return False

    chosen = options.only or [*SHARES]
    done = _record(options.write, options.backends) if options.resume else {}
    if done:
        assert done["seed"] == options.seed and [*done["cases"]] == chosen, f"{options.write} has another run"
        record.cases, record.worst = done["checked_against_float64"], done["largest_errors"]
    tried = Counter({name: found["tried"] for name, found in done.get("cases", {}).items()})
    rejected = Counter({name: found["rejected"] for name, found in done.get("cases", {}).items()})
    began = time.monotonic() - 60 * done.get("minutes", 0)
    whole = sum(SHARES[name] for name in chosen)
    size = PART // 20 if "gpu" in options.backends else PART  # interpreted kernels are slow
    parts = -(-options.examples // size)
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, tuple[Any, Callable[[Any], bool]]] = {
            "calls": (cases.cases(16 if "gpu" in options.backends else 65), call),
            "arguments": (arguments.wrong_calls(), arguments.check),
            **files.strategies(Path(folder)),
        }
        for part in range(done.get("parts", 0), parts):
            if time.monotonic() - began > options.minutes * 60:
                break
            examples = min(size, options.examples - part * size)
            for name in chosen:
                torch.set_num_threads(1)
                share = max(1, round(examples * SHARES[name] / whole))
                more, wrong = _run(*kinds[name], share, f"{options.seed} {part}")
                tried[name] += more
                rejected[name] += wrong
            content = {
                "seed": options.seed,
                "parts": part + 1,
                "hypothesis": hypothesis.__version__,
                "torch": torch.__version__,
                "maskloss": maskloss.__version__,
                "minutes": round((time.monotonic() - began) / 60, 1),
                "backends": options.backends,
                "checked_against_float64": record.cases,
                "cases": {name: {"tried": tried[name], "rejected": rejected[name]} for name in chosen},
                "largest_errors": dict(sorted(record.worst.items())),
            }
            print(f"part {part + 1} of {parts}, {content['minutes']} minutes: {dict(tried)}", flush=True)
            if options.write is not None:
                _write(options.write, content)
    return 0


def _run(strategy: Any, check: Callable[[Any], bool], examples: int, seed: str) -> tuple[int, int]:
    """Check that many examples; return how many there were, and how many were rejected. What fails is raised."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    rejected: list[bool] = []

    @seeded(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(drawn: Any) -> None:
        faulthandler.dump_traceback_later(HANGS, exit=True)
        rejected.append(check(drawn))

    try:
        one()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return len(rejected), sum(rejected)


def _records(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _record(path: Path, backends: list[str]) -> dict[str, Any]:
    return next((each for each in _records(path) if each["backends"] == backends), {})


def _write(path: Path, content: dict[str, Any]) -> None:
    """Put a record in place of the one with the same backends."""
    others = [each for each in _records(path) if each["backends"] != content["backends"]]
    records = sorted([*others, content], key=lambda each: each["backends"], reverse=True)
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
