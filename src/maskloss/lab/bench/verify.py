"""`maskloss bench --verify`: what a machine with a GPU has to say, in one command, one JSON and one page.

Every part is a process of its own with a limit in time. Whatever becomes of it, the next part runs; results are written
after each. A second run with the same folder does what is missing: parts that failed, were stopped, or had no time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import maskloss
from maskloss.errors import Cause, reported
from maskloss.lab import files
from maskloss.lab.bench import verify_page
from maskloss.lab.bench.machine import describe_machine, describe_software

# Of all parts together: the command ends within eight minutes.
SECONDS = 470.0
# What a part needs at least to be worth its start, and what a process that is told to stop may take.
_LEAST, _GRACE = 5.0, 5.0
_NO_TIME = "no time was left; run the command again"
RESULTS, PAGE = "verify.json", "verify.md"

Say = Callable[[str], None]
Read = Callable[[str, Path], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One part."""

    name: str  # its key in the JSON
    command: Sequence[str]  # what is run
    limit: float  # seconds after which it is stopped
    read: Read  # makes a result of its output and of the folder of the part: "passed" and whatever the page shows
    missing: str | None = None  # why it cannot run on this machine, or None
    environment: dict[str, str] = field(default_factory=dict)  # variables that it gets besides those of this process
    place: Path | None = None  # folder in which it runs; None: that of this process


@dataclass(frozen=True)
class Plan:
    """What is verified, and on what."""

    device: str  # a CUDA device, or "cpu": a rehearsal under Triton's interpreter, of sizes that it can bear
    # arguments of pytest, at the root of the repository
    tests: tuple[str, ...] = ("tests/gpu", "tests/lab/test_bench.py", "-m", "gpu")
    # of the hunt for races: case, repetitions and numbers of warps
    races: tuple[str, int, tuple[int, ...]] = ("small", 200, (1, 2, 4, 8))
    sanitized: str = "tiny-head"  # case that is run under compute-sanitizer
    presets: tuple[str, ...] = (
        "coco", "rf-detr", "small", "crowded", "cityscapes", "coco-head", "rf-detr-head", "crowded-head",
        "cityscapes-head",
    )  # fmt: skip
    models: tuple[str, ...] = ("mask2former", "eomt")
    steps: int = 20  # timed ones, of each case and model
    seconds: float = SECONDS  # for all parts
    patience: float = 1.0  # what the limits of the parts are multiplied by

    @staticmethod
    def on(device: str) -> Plan:
        """Make the plan of a device."""
        if device != "cpu":
            return Plan(device)
        tests = ("tests/gpu/test_assignment.py", "-k", "groups or without_labels")
        return Plan(
            device, tests, ("tiny-head", 2, (1, 2)), "tiny-head", ("tiny", "tiny-rf-detr-head"), (), 3, 3600.0, 8.0
        )


def parts(plan: Plan, folder: Path) -> list[Part]:
    """List the parts of a plan: first what must be right, then what takes how long."""
    python, interpreted = sys.executable, {"TRITON_INTERPRET": "1"} if plan.device == "cpu" else {}
    # On a path that does not go through `pip install` the processes must find this package too.
    interpreted["PYTHONPATH"] = os.pathsep.join(
        [str(Path(maskloss.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    kernels = [python, "-m", "maskloss.lab.bench.kernels"]
    case, repeats, warps = plan.races
    hunting = ["--case", case, "--repeats", str(repeats), "--warps", *map(str, warps)]
    hunting += ["--seconds", str(75 * plan.patience)]
    on = ["--device", plan.device]
    found = [
        Part("unwritten", [*kernels, "unwritten", *on], 60, _kernels, None, interpreted),
        Part("races", [*kernels, "races", *on, *hunting], 110, _kernels, None, interpreted),
        _tests(plan, interpreted),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    missing = None if sanitizer else "compute-sanitizer is not installed; it comes with the CUDA toolkit"
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer or "", "--tool", tool, "--error-exitcode", "9", *kernels, "once", *on]
        command += ["--case", plan.sanitized]
        found.append(Part(f"compute-sanitizer {tool}", command, 60, _sanitized, missing, interpreted))
    size = ["--megabytes", "8" if plan.device == "cpu" else "1024"]
    found.append(Part("bandwidth", [*kernels, "bandwidth", *on, *size], 30, _bandwidth, None, interpreted))
    for kind, names, limit in (("preset", plan.presets, 45), ("model", plan.models, 75)):
        for name in names:
            out = folder / f"{kind}-{name}"
            command = [python, "-m", "maskloss", "bench", f"--{kind}", name, *on, "--out", str(out)]
            command += ["--steps", str(plan.steps), "--seconds", "5"]
            path = {"PYTHONPATH": interpreted["PYTHONPATH"]}
            found.append(Part(f"{kind} {name}", command, limit, _benchmark, None, path))
    return found


def _tests(plan: Plan, environment: dict[str, str]) -> Part:
    """The tests of the repository, which are not installed along with the package."""
    root = Path(maskloss.__file__).parents[2]
    missing = None
    if not (root / "tests" / "gpu").is_dir():
        missing = "the tests are in the repository, not in the installed package: run it from a checkout"
    elif find_spec("pytest") is None:
        missing = "pytest is not installed: pip install 'maskloss[test]'"
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *plan.tests]
    if plan.device != "cpu" and find_spec("xdist") is not None:
        command += ["-n", "4"]  # kernels are compiled side by side
    return Part("tests", command, 150, _tested, missing, environment, root)


# ------------------------------------------------------------------------------------------------ what parts have found


def _last_json(output: str) -> Any:
    return json.loads(output.strip().splitlines()[-1])


def _kernels(output: str, _: Path) -> dict[str, Any]:
    found = _last_json(output)
    done = [each for each in found if "skipped" not in each]
    return {"passed": bool(done) and all(each["passed"] for each in done), "complete": done == found, "launches": found}


def _tested(output: str, _: Path) -> dict[str, Any]:
    words = [line.split() for line in output.splitlines() if "::" in line]
    counts = {kind: sum(kind.upper() in line for line in words) for kind in ("passed", "failed", "error", "skipped")}
    names = [next(word for word in line if "::" in word) for line in words if "FAILED" in line or "ERROR" in line]
    right = counts["passed"] > 0 and not counts["failed"] and not counts["error"]
    return {"passed": right, "counts": counts, "wrong": sorted(set(names))}


def _sanitized(output: str, _: Path) -> dict[str, Any]:
    return {"passed": True, "last": output.strip().splitlines()[-1:]}


def _bandwidth(output: str, _: Path) -> dict[str, Any]:
    return {"passed": True, **_last_json(output)}


def _benchmark(_: str, folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    found = [*report["cases"], *report["models"]]
    wrong = any("failed" in each or any("failed" in arm for arm in each["arms"].values()) for each in found)
    return {"passed": bool(found) and not wrong, "found": found}


# ------------------------------------------------------------------------------------------------------------- the run


@reported("maskloss bench --verify")
def run(plan: Plan, folder: Path, say: Say) -> dict[str, Any]:
    """Run the parts of a plan that are missing, write after each, and return the report.

    Returns:
        What the JSON has: "machine", "software", "device", and "parts" by name: "status" ("passed", "failed", "stopped"
        or "not run"), "seconds", "why", and "result".
    """
    report: dict[str, Any] = {
        "schema": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": plan.device,
        "machine": describe_machine(plan.device),
        "software": describe_software() | {"sources": _sources()},
        "parts": {},
    }
    earlier = folder / RESULTS
    if earlier.exists():
        report["parts"] = _resumed(json.loads(earlier.read_text(encoding="utf-8")), report, folder)
    deadline = time.monotonic() + plan.seconds
    for part in parts(plan, folder):
        if report["parts"].get(part.name, {}).get("status") == "passed":
            say(f"{part.name}: passed before")
            continue
        say(f"{part.name} …")
        left = deadline - time.monotonic()
        outcome = _outcome(part, folder, left, min(left, part.limit * plan.patience))
        report["parts"][part.name] = outcome
        say(f"{part.name}: {outcome['status']} {outcome.get('why', '')}".strip())
        _write(report, folder)
    _write(report, folder)
    return report


def _sources() -> str:
    """Return a digest of this package, so that no part counts as passed with a kernel that was edited since."""
    root, digest = Path(maskloss.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def is_fine(outcome: dict[str, Any]) -> bool:
    """Whether a part has passed, or needs what this machine lacks."""
    status: str = outcome["status"]
    return status == "passed" or (status == "not run" and outcome["why"] != _NO_TIME)


def _resumed(before: dict[str, Any], now: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the parts of an earlier run, if it was one of this machine."""
    same = ("device", "software")
    names = [name for name in same if before[name] != now[name]]
    if before["machine"].get("gpu") != now["machine"].get("gpu") or before["machine"]["cpu"] != now["machine"]["cpu"]:
        names.append("machine")
    if names:
        raise Cause(
            "a run can be resumed on the same machine, device and software only",
            f"{folder / RESULTS} is of another {', '.join(names)}",
            "give another --out",
        )
    found: dict[str, Any] = before["parts"]
    return found


def _outcome(part: Part, folder: Path, left: float, limit: float) -> dict[str, Any]:
    """Run a part, and say what became of it."""
    if part.missing is not None:
        return {"status": "not run", "why": part.missing}
    if left < _LEAST:
        return {"status": "not run", "why": _NO_TIME}
    own = folder / part.name.replace(" ", "-")
    own.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    status, output = _execute(part, own / "output.txt", limit)
    outcome: dict[str, Any] = {"status": "passed", "seconds": round(time.monotonic() - began, 1)}
    try:
        outcome["result"] = part.read(output, own)
    except (ValueError, LookupError, OSError) as error:
        # Not the output of a part that has come to its end.
        outcome["result"] = {"passed": False, "unreadable": f"{type(error).__name__}: {error}"}
    last = "\n".join(output.strip().splitlines()[-15:])
    if status is None:
        outcome |= {"status": "stopped", "why": f"after {limit:.0f} s", "last": last}
    elif status != 0 or not outcome["result"]["passed"]:
        outcome |= {"status": "failed", "why": f"exit status {status}", "last": last}
    elif not outcome["result"].get("complete", True):
        outcome |= {"status": "stopped", "why": "some launches were not repeated, for want of time"}
    return outcome


def _execute(part: Part, log: Path, limit: float) -> tuple[int | None, str]:
    """Run a part's command; its exit status, or None if it had to be stopped, and all that it wrote."""
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        child = subprocess.Popen(
            part.command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | part.environment,
            cwd=part.place,
            start_new_session=True,
        )
        try:
            status: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(child)
        output.seek(0)
        return status, output.read()


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _write(report: dict[str, Any], folder: Path) -> None:
    files.write_text(folder / RESULTS, json.dumps(report, indent=1) + "\n")
    files.write_text(folder / PAGE, verify_page.page(report))
