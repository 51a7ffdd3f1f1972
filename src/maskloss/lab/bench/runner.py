"""Running cases: one process for each arm, taking turns, behind a check that they agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from maskloss.errors import require
from maskloss.lab.bench.cases import PEERS, STRATIFIED, Subject

# A median and its spread need more than one look.
_FEWEST = 3
# What tells OpenMP threads how to wait; workers do not inherit it.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Threads that spin after a step have gone to sleep by then, and leave the cores to the next arm.
_PAUSE = 0.03
Say = Callable[[str], None]


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the message is its own."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details

    def as_dict(self) -> dict[str, str]:
        """Return what a report keeps."""
        return {"failed": str(self), "details": self.details}


@dataclass(frozen=True)
class Settings:
    """How cases are run."""

    arms: tuple[str, ...]  # names of the arms, in the order of the tables
    steps: int  # timed steps of each arm
    seconds: float  # an arm that has used this much time, and has three steps, takes no more turns
    threads: int  # CPU threads of each worker
    device: str  # "cpu", or a CUDA device
    dtype: str  # of the logits, by its name in torch
    seed: int = 0  # of inputs and points
    stages: bool = False  # time the stages of the step as well

    @property
    def environment(self) -> dict[str, str]:
        """Variables set for every worker. How OpenMP threads wait is left to its default, as users have it."""
        threads = str(self.threads)
        return {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "NUMBA_NUM_THREADS": threads,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"environment": self.environment}


class Process:
    """A worker in a process of its own; leaving the `with` block ends it.

    `module` is what it runs, see `Subject.worker`; `passive` lets waiting OpenMP threads sleep, which spin by default.
    """

    def __init__(self, settings: Settings, module: str, *, passive: bool = False) -> None:
        dropped = {"MASKLOSS_BACKEND", *_WAITING}  # the arms say which backend they are
        environment = {key: value for key, value in os.environ.items() if key not in dropped} | settings.environment
        if passive:
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in __exit__)
        self.child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def __enter__(self) -> Process:  # noqa: PYI034 (Self is newer than Python 3.10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        if error is not None:
            self.child.kill()
        else:
            with suppress(BrokenPipeError):  # what a worker that has died did not read
                self.child.stdin.close()
        self.child.wait()
        self.child.stdout.close()
        self.log.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a command and wait for its result.

        Raises:
            WorkerError: the method raised, or the process died.
        """
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            self.child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the worker died with exit status {self.child.wait()}", self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], answer["traceback"])
        return answer["result"]

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()[-15:]
        return "\n".join(lines)


def run_case(case: Subject, settings: Settings, say: Say, *, checked: bool = True) -> dict[str, Any]:
    """Check and measure one case; the check may be left out where it takes most of the time.

    Returns:
        What JSON keeps of the case: "checks", and for each arm "samples", "summary", "memory" and what else its worker
        found when it began, or "failed"; a peer has "waiting" and "other_waiting" as well, see `better_waiting`. If the
        check failed, or the machine is too small, there is a "failed" for the whole case and no arm.
    """
    report: dict[str, Any] = {"name": case.name, "sizes": case.as_dict(), "arms": {}}
    arms = case.arms(settings.arms)
    if not arms:
        return report | {"failed": f"has none of the arms {', '.join(settings.arms)}"}
    refusal = _too_large(case, arms, settings)
    if refusal is not None:
        return report | {"failed": refusal}
    report["checks"] = []
    if checked:
        try:
            report |= _check(case, arms, settings, say)
        except WorkerError as error:
            return report | error.as_dict()
        wrong = [f"{check['base']} and {check['other']}" for check in report["checks"] if not check["passed"]]
        if wrong:
            return report | {"failed": f"{', '.join(wrong)} do not agree; nothing was timed"}
    report["arms"] = _measure(case, arms, settings, report.get("digest"), say)
    return report


def _check(case: Subject, arms: Sequence[str], settings: Settings, say: Say) -> dict[str, Any]:
    others = [arm for arm in arms if arm != case.base]
    if set(others) <= STRATIFIED.keys():
        # Those are checked against a backend, not against maskloss, which would then not be checked at all.
        others.append("reference")
    say(f"{case.name}: checking {', '.join(others)}")
    with Process(settings, case.worker) as process:
        answer: dict[str, Any] = process.ask("check", others=others, **_inputs(case, settings))
    return answer


def _measure(
    case: Subject, arms: Sequence[str], settings: Settings, digest: str | None, say: Say
) -> dict[str, dict[str, Any]]:
    names = _entries(arms, settings)
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(Process(settings, case.worker, passive=name.endswith(_PASSIVE))) for name in names
        }
        for name, arm in names.items():
            say(f"{case.name}: first step of {name}")
            _attempt(found[name], partial(_begin, processes[name], case, arm, settings, digest))
        _take_turns(found, processes, settings, lambda text: say(f"{case.name}: {text}"))
        for arm in _alive(found) if settings.stages else ():
            say(f"{case.name}: stages of {arm}")
            _attempt(found[arm], partial(_stages, processes[arm], len(found[arm]["samples"]), settings))
    for arm in _alive(found):
        found[arm]["summary"] = summarise(found[arm]["samples"])
    return better_waiting(found)


# What is added to the name of a peer whose waiting threads sleep.
_PASSIVE = ", passive"


def _entries(arms: Sequence[str], settings: Settings) -> dict[str, str]:
    """Name what takes turns, and the arm that each is: a peer is there twice on a CPU, with both ways of waiting."""
    twice = PEERS if settings.device == "cpu" else ()
    return {arm + way: arm for arm in arms for way in (("", _PASSIVE) if arm in twice else ("",))}


def better_waiting(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keep of each peer the process that was faster: whoever uses it may have set OpenMP's policy or not.

    The name of a peer whose threads sleep ends in ", passive".

    Returns:
        The results without these. A peer has "waiting", "default" or "passive", which is the policy that it was faster
        with, and "other_waiting": median and quantiles of the step with the other one, or None where that failed.
    """
    kept = {name: results for name, results in found.items() if not name.endswith(_PASSIVE)}
    for name, passive in found.items():
        if not name.endswith(_PASSIVE):
            continue
        arm = name.removesuffix(_PASSIVE)
        pair = [("default", found[arm]), ("passive", passive)]
        pair.sort(key=lambda way: way[1]["summary"]["step"]["median"] if "summary" in way[1] else float("inf"))
        (waiting, best), (_, other) = pair
        slower = other["summary"]["step"] if "summary" in other else None
        kept[arm] = {**best, "waiting": waiting, "other_waiting": slower}
    return kept


def _attempt(found: dict[str, Any], action: Callable[[], dict[str, Any]]) -> None:
    """Add what an action finds; if its worker fails, say so in the report, and leave the other arms alone."""
    try:
        found.update(action())
    except WorkerError as error:
        found |= error.as_dict()


def _alive(found: dict[str, dict[str, Any]]) -> list[str]:
    return [arm for arm, results in found.items() if "failed" not in results]


def _begin(process: Process, case: Subject, arm: str, settings: Settings, digest: str | None) -> dict[str, Any]:
    answer: dict[str, Any] = process.ask("setup", arm=arm, **_inputs(case, settings))
    if answer.pop("digest") != digest and digest is not None:
        raise WorkerError("the inputs are not those of the check")
    return answer | {"samples": []}


def _take_turns(found: dict[str, dict[str, Any]], processes: dict[str, Process], settings: Settings, say: Say) -> None:
    """Let the arms take a step each, round after round, each round in another order."""
    for turn in range(settings.steps):
        ready = [arm for arm in _alive(found) if turn < _FEWEST or _used(found[arm]) < settings.seconds]
        first = turn % max(len(ready), 1)
        for arm in (*ready[first:], *ready[:first]):
            say(f"step {turn + 1} of {settings.steps}, {arm}")
            time.sleep(_PAUSE)
            _attempt(found[arm], partial(_one_step, processes[arm], found[arm]["samples"], turn, settings))


def _used(found: dict[str, Any]) -> float:
    """Return the seconds that an arm has had so far."""
    times = (value for sample in found["samples"] for name, value in sample.items() if name.endswith(_TIMES))
    return float(sum(times))


_TIMES = ("targets", "forward", "backward")


def _one_step(process: Process, samples: list[dict[str, float]], turn: int, settings: Settings) -> dict[str, Any]:
    return {"samples": [*samples, {"round": turn, **process.ask("step", seed=settings.seed + 1 + turn)}]}


def _stages(process: Process, steps: int, settings: Settings) -> dict[str, Any]:
    samples: list[dict[str, float]] = process.ask("stages", seed=settings.seed + 1, steps=steps)
    names = list(dict.fromkeys(name for sample in samples for name in sample))
    return {"stages": {name: float(np.median([sample.get(name, 0.0) for sample in samples])) for name in names}}


def _inputs(case: Subject, settings: Settings) -> dict[str, Any]:
    return {"case": case.as_dict(), "device": settings.device, "dtype": settings.dtype, "seed": settings.seed}


def summarise(samples: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Reduce samples to median, 10% and 90% quantile, seconds.

    Args:
        samples: with "forward" and "backward" each; of a step of the loss with "targets" as well, and of an arm that
            takes bool masks with "packed_forward" and "packed_backward".

    Returns:
        "median", "low" and "high" of the first three, of "step" (forward and backward) and of "packed" (the step with
        targets that were packed before), as far as they were measured.
    """
    parts = {name: np.array([sample[name] for sample in samples]) for name in _TIMES if name in samples[0]}
    parts["step"] = parts["forward"] + parts["backward"]
    if "packed_forward" in samples[0]:
        parts["packed"] = np.array([_step(sample, packed=True) for sample in samples])
    return {name: _spread(values) for name, values in parts.items()}


def _step(sample: dict[str, float], *, packed: bool = False) -> float:
    kind = "packed_" if packed else ""
    return sample[f"{kind}forward"] + sample[f"{kind}backward"]


def ratios(
    samples: Iterable[dict[str, float]], base: Iterable[dict[str, float]], *, packed: bool = False
) -> dict[str, float] | None:
    """Compare two arms round by round, so that what disturbs the machine for a while disturbs both.

    `packed` takes those steps of `base` to which packed targets were given.

    Returns:
        Median and quantiles of the ratio of their steps, over the rounds in which both took a turn; None without any.
    """
    by_round = {sample["round"]: _step(sample, packed=packed) for sample in base}
    found = [_step(sample) / by_round[sample["round"]] for sample in samples if sample["round"] in by_round]
    return _spread(np.array(found)) if found else None


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
    return {"median": float(median), "low": float(low), "high": float(high)}


def _too_large(case: Subject, arms: Sequence[str], settings: Settings) -> str | None:
    """Say why a case should not be tried on this machine: running out of memory may end processes that are not ours."""
    if settings.device != "cpu":
        return None
    item_size = 2 if "16" in settings.dtype else 4
    needs = [case.working_set(arm, item_size) for arm in _entries(arms, settings).values()]
    # All arms at once; or the check, which keeps the gradients of one arm while it runs another.
    together = max(sum(needs), 3 * max(needs) // 2) + len(needs) * 500_000_000
    free = require("psutil", "bench").virtual_memory().available
    if together <= free:
        return None
    return f"needs about {together / 1e9:.0f} GB of memory, but {free / 1e9:.0f} GB are free"
