"""`make fuzz`: many random cases, and a record of them.

python -m fuzz --examples 20000 --seed 1 --write docs/fuzz.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
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


class _TimeIsUp(BaseException):
    """Ends a run of Hypothesis, which catches exceptions that are errors."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description="Drive the public API with random calls and files.")
    parser.add_argument("--examples", type=int, default=2000, help="cases in all; default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--only", choices=SHARES, action="append", help="kinds of cases; default: all of them")
    parser.add_argument("--backends", nargs="+", default=["reference", "cpu"], choices=["reference", "cpu", "gpu"])
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin no new case of a kind after its share of this time"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write counts and largest errors there, as JSON")
    options = parser.parse_args()
    if "gpu" in options.backends:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import hypothesis
    import torch

    import maskloss
    from fuzz import arguments, cases, definition, files
    from fuzz.interpreted import interpreted

    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # inside pycocotools
    record, counts = definition.Record(), dict[str, list[int]]()

    def call(case: cases.Case) -> bool:
        for backend in options.backends:
            with interpreted(backend):
                definition.check(case, backend, record)
        return False

    largest = 16 if "gpu" in options.backends else 65
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, tuple[Any, Callable[[Any], bool]]] = {
            "calls": (cases.cases(largest), call),
            "arguments": (arguments.wrong_calls(), arguments.check),
            **files.strategies(Path(folder)),
        }
        chosen = options.only or [*SHARES]
        whole = sum(SHARES[name] for name in chosen)
        began = time.monotonic()
        for name in chosen:
            share = SHARES[name] / whole
            counts[name] = _run(*kinds[name], int(options.examples * share), options.seed, options.minutes * 60 * share)
            print(f"{name}: {counts[name][0]:,} cases, {counts[name][1]:,} rejected", flush=True)
    content = {
        "seed": options.seed,
        "hypothesis": hypothesis.__version__,
        "torch": torch.__version__,
        "maskloss": maskloss.__version__,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "backends": options.backends,
        "checked_against_float64": record.cases,
        "cases": {name: {"tried": tried, "rejected": rejected} for name, (tried, rejected) in counts.items()},
        "largest_errors": dict(sorted(record.worst.items())),
    }
    print(json.dumps(content, indent=1))
    if options.write is not None:
        options.write.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _run(strategy: Any, check: Callable[[Any], bool], examples: int, seed: int, seconds: float) -> list[int]:
    """Check that many examples; return how many there were, and how many were rejected. What fails is raised."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    counts, end = [0, 0], time.monotonic() + seconds

    @seeded(seed)
    @settings(
        max_examples=max(1, examples),
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(drawn: Any) -> None:
        if time.monotonic() > end:
            raise _TimeIsUp
        counts[1] += check(drawn)
        counts[0] += 1

    with suppress(_TimeIsUp):
        one()
    return counts


if __name__ == "__main__":
    sys.exit(main())
