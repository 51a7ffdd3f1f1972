"""Checkpoints: everything that decides how a run goes on, as safetensors and JSON, put in place in one move.

    checkpoints/step-00000250/
      model.safetensors       weights and buffers
      average.safetensors     their average, if the run keeps one
      optimizer.safetensors   moments of each weight
      random-0.safetensors    state of torch's generators of each process, and the terms that are not yet logged
      state.json              step, schedule, and what belongs to the files above

A checkpoint is written beside its place and renamed when all of it is on the disk: at any instant, the newest folder is
complete. Nothing is pickled, so that a checkpoint from elsewhere cannot run code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskloss._numbers import is_number
from maskloss.errors import Cause
from maskloss.lab import files
from maskloss.lab.loop.average import Average
from maskloss.lab.models.weights import load_weights, read_tensors, write_tensors
from maskloss.lab.runfolder import AVERAGE, WEIGHTS, best_of, kept_weights, path_of, read_lines, steps_of

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
KEPT = 2
SCHEMA = 1
_RULE = "a checkpoint must be one that maskloss train wrote"


class Position(NamedTuple):
    """Where a run is, besides its weights."""

    step: int  # steps taken
    seconds: float  # spent on them
    clock: dict[str, float]  # seconds of each part of the measured steps
    scaler: dict[str, Any]  # of mixed precision; empty if there is none
    # terms of the steps that are not yet logged, `[K, terms]`; None where they are not finite
    pending: list[list[float | None]]
    terms: list[str]  # their names
    ranks: int  # number of processes


def write(
    folder: Path,
    position: Position,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None = None,
    *,
    keep_best: bool = False,
    rank: int = 0,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint; called by every process, which waits for the others twice.

    Raises:
        Cause: it cannot be written; what was there before is left alone.
    """
    place = path_of(folder, position.step)
    partial = place.with_name(f".{place.name}{files.PARTIAL}")
    try:
        if rank == 0:
            for left in place.parent.glob(f".*{files.PARTIAL}"):
                files.remove(left)
            partial.mkdir(parents=True)
        wait()
        write_tensors(partial / f"random-{rank}.safetensors", _generators())
        wait()
        if rank == 0:
            write_tensors(partial / WEIGHTS, network.state_dict())
            if average is not None:
                with average.shown():
                    write_tensors(partial / AVERAGE, network.state_dict())
            tensors, groups = _flat(optimizer)
            write_tensors(partial / OPTIMIZER, tensors)
            sums = {path.name: _sum(path) for path in sorted(partial.iterdir())}
            state = {"schema": SCHEMA, **position._asdict(), "groups": groups, "sums": sums}
            files.write_json(partial / STATE, state)
            files.flush_folder(partial)
            files.remove(place)
            partial.rename(place)
            files.flush_folder(place.parent)
            for old in _superfluous(folder, keep_best):
                files.remove(path_of(folder, old))
    except OSError as error:
        _forget(partial)
        last = [step for step in steps_of(folder) if step < position.step]
        kept = f"go on from step {last[-1]:,} with: maskloss train --resume {folder}" if last else "nothing is left"
        raise Cause(
            "a checkpoint must be written", f"that of step {position.step:,} was not: {files.explain(error)}", kept
        ) from None


def _superfluous(folder: Path, keep_best: bool) -> list[int]:
    """List the checkpoints that are neither among the last ones, nor the best up to any of these.

    So the best one is there too for whoever has to go back to the last checkpoint but one.
    """
    steps = steps_of(folder)
    last = steps[-KEPT:]
    lines = read_lines(folder) if keep_best else []
    best = {best_of(lines, [step for step in steps if step <= end]) for end in last}
    return [step for step in steps if step not in last and step not in best]


def read(
    folder: Path,
    step: int,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None = None,
    *,
    rank: int = 0,
) -> Position:
    """Put a checkpoint into a model, an optimizer, an average of weights and torch's generators.

    Raises:
        Cause: files that are missing, damaged, or belong to another run; nothing is changed then.
    """
    place = path_of(folder, step)
    state = files.read_json(place / STATE, _RULE)
    if state.pop("schema", None) != SCHEMA:
        raise _broken(place, "it is of another version")
    try:
        sums, groups = state.pop("sums"), state.pop("groups")
        position = Position(**state)
        if position.step != step or not isinstance(sums, dict) or not isinstance(groups, list) or not _fits(position):
            raise TypeError("its description does not fit")
    except (KeyError, TypeError) as error:
        raise _broken(place, files.explain(error)) from None
    for name in (WEIGHTS, *([AVERAGE] if average else []), OPTIMIZER, f"random-{rank}.safetensors"):
        if not (place / name).is_file():
            raise _broken(place, f"there is no {name}; it was written by {position.ranks} process(es)")
        if _sum(place / name) != sums.get(name):
            raise _broken(place, f"{name} is not what was written")
    weights, moments = read_tensors(place / WEIGHTS), read_tensors(place / OPTIMIZER)
    generators = read_tensors(place / f"random-{rank}.safetensors")
    averaged = read_tensors(place / AVERAGE) if average else {}
    try:
        restored = _unflattened(optimizer, moments, groups)
        if average:
            with average.shown():
                load_weights(network, averaged, str(place / AVERAGE))
        load_weights(network, weights, str(place / WEIGHTS))
        optimizer.load_state_dict(restored)
    except Cause:
        raise
    except (KeyError, ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise _broken(place, files.explain(error)) from None
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    if "mps" in generators and torch.backends.mps.is_available():
        torch.mps.set_rng_state(generators["mps"])
    return position


def load_kept(folder: Path, step: int, network: nn.Module) -> None:
    """Put the weights of a checkpoint that are used, their average where there is one, into a model.

    Raises:
        Cause: files that are missing or damaged; nothing is changed then.
    """
    path = kept_weights(folder, step)
    sums = files.read_json(path.with_name(STATE), _RULE).get("sums")
    if not isinstance(sums, dict) or _sum(path) != sums.get(path.name):
        raise _broken(path.parent, f"{path.name} is not what was written")
    load_weights(network, read_tensors(path), str(path))


def _broken(place: Path, what: str) -> Cause:
    left = [each for each in steps_of(place.parents[1]) if path_of(place.parents[1], each) != place]
    hint = f"go on from step {left[-1]:,}" if left else "begin the run again"
    return Cause(_RULE, f"{place}: {what}", f"remove this folder, to {hint} with --resume")


def _fits(position: Position) -> bool:
    """Whether a position read from JSON has the types that it was written with."""
    pending, terms = position.pending, position.terms
    return (
        isinstance(position.clock, dict)
        and isinstance(position.scaler, dict)
        and all(map(is_number, (position.seconds, position.ranks, *position.clock.values(), *position.scaler.values())))
        and isinstance(terms, list)
        and all(isinstance(name, str) for name in terms)
        and isinstance(pending, list)
        # None: a loss that overflowed.
        and all(isinstance(row, list) and len(row) == len(terms) for row in pending)
        and all(value is None or is_number(value) for row in pending for value in row)
    )


def _alike(mine: object, other: object) -> bool:
    """Whether a setting of an optimizer has the type of another one; whole numbers may stand for others."""
    if isinstance(mine, tuple) and isinstance(other, tuple):
        return len(mine) == len(other) and all(map(_alike, mine, other))
    return type(mine) is type(other) or (is_number(mine) and is_number(other))


def _forget(partial: Path) -> None:
    try:
        files.remove(partial)
    except OSError:
        return


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _flat(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the tensors of an optimizer's state by name, and its groups as JSON can hold them."""
    state = optimizer.state_dict()
    tensors = {f"{number}.{name}": value for number, held in state["state"].items() for name, value in held.items()}
    return tensors, [dict(group) for group in state["param_groups"]]


def _unflattened(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the state that `_flat` has taken apart; a ValueError or the like if it is not that of the optimizer."""
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in own] != [group["params"] for group in groups]:
        raise ValueError("its optimizer has other weights")
    # JSON has lists where the optimizer has tuples.
    restored = [{name: tuple(value) if name == "betas" else value for name, value in group.items()} for group in groups]
    for mine, group in zip(own, restored, strict=True):
        odd = [name for name in mine if name in group and not _alike(mine[name], group[name])]
        if odd:
            raise ValueError(f"{odd[0]} of its optimizer is {group[odd[0]]!r}")
    held: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        held.setdefault(int(number), {})[key] = tensor
    return {"state": held, "param_groups": restored}
