"""Who may write to the folder of a run, and what becomes of a run that was there.

A folder is a run's only if it holds a `run.json` of ours. Of what lies in it, the files that a run writes are removed,
by their names, and nothing else. A run that is replaced is moved aside first:

- its `run.json` is moved last, put back first and removed last. So a folder aside without one means a move that was cut
  off: everything goes back,
- a folder aside with one means that the files in place are the new run's. When that has a checkpoint, the old one is
  removed; if the new run gets nowhere, the old one takes its place again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from maskloss.errors import Cause
from maskloss.lab import files
from maskloss.lab.runfolder import (
    CHECKPOINTS,
    HELD_OUT,
    METRICS,
    MODEL,
    PICTURES,
    REPORT,
    RUN,
    SNAPSHOTS,
    STEP,
    SUMMARY,
    TENSORBOARD,
    WEIGHTS,
    holds_work,
)

RUNS, ASIDE = Path("runs"), ".maskloss-replaced"
_RULE = "--out must be a new folder, an empty one, or that of a run"
_FOLDERS = (MODEL, CHECKPOINTS, SNAPSHOTS, PICTURES, TENSORBOARD)
# Every file that a run writes, by its path in the folder.
_WRITTEN = re.compile(
    rf"({RUN}|{HELD_OUT}|{METRICS}|{SUMMARY}|{REPORT}|{WEIGHTS}"
    rf"|{MODEL}/(config\.json|preprocessor_config\.json|{WEIGHTS})"
    rf"|{CHECKPOINTS}/{STEP}/(state\.json|(model|average|optimizer|random-[0-9]+)\.safetensors)"
    rf"|{SNAPSHOTS}/{STEP}\.safetensors"
    rf"|{PICTURES}/((losses|scores|matching|overview|scene-[0-9]+-\w+|points-[0-9]+-[0-9]+|hard-[0-9]+-\w+)\.png|points\.gif)"
    rf"|{TENSORBOARD}/events\.out\.tfevents\..+)"
)
# What is not yet in its place: `.NAME.partial`, a file or a folder.
_UNFINISHED = re.compile(rf"(^|/)\.([^/]+){re.escape(files.PARTIAL)}(?=/|$)")


class Claim:
    """A folder that is held for a new run.

    Attributes:
        folder: where the run may write, once there is room.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.begun = folder, False

    def make_room(self) -> None:
        """Move a run that is there aside: the new one can begin."""
        if holds_work(self.folder):
            _move(self.folder, self.folder / ASIDE, _written(self.folder))
        else:
            clear(self.folder)
        self.begun = True


@contextlib.contextmanager
def claimed(folder: Path | None, *, overwrite: bool = False) -> Iterator[Claim]:
    """Hold a folder for a new run, by default one named by the time, and leave it as it was if the run gets nowhere."""
    if folder is None:
        folder, made = _new_folder()
    else:
        made = files.make_folder(folder, "--out")
    try:
        with files.locked(folder):
            _settle(folder)
            if (folder / ASIDE).is_dir() and not holds_work(folder):
                _take_back(folder)
            _check_room(folder, overwrite)
            claim = Claim(folder)
            try:
                yield claim
            except BaseException:
                _settle(folder)
                if claim.begun and not holds_work(folder):
                    _take_back(folder)
                raise
    finally:
        files.unmake(made)


@contextlib.contextmanager
def reopened(folder: Path) -> Iterator[None]:
    """Hold the folder of an interrupted run."""
    files.make_folder(folder, "--resume")
    with files.locked(folder):
        _settle(folder)
        yield


def drop_replaced(folder: Path) -> None:
    """Remove the run that another one has replaced; called when that has a checkpoint."""
    aside = folder / ASIDE
    if aside.is_dir():
        clear(aside)
        files.unmake([aside])


def clear(folder: Path) -> None:
    """Remove the files that a run writes, and the folders of a run that are empty then."""
    for path in _written(folder):
        (folder / path).unlink()
    _remove_empty(folder)


def _new_folder() -> tuple[Path, list[Path]]:
    """Make a folder named by the time; two runs that begin in one second get two."""
    made = files.make_folder(RUNS, "--out")
    name, number = datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), 1
    while True:
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder, [*made, folder]


def _check_room(folder: Path, overwrite: bool) -> None:
    foreign = sorted(path.name for path in folder.iterdir() if not _is_known(path))
    if not foreign and not _is_run(folder):
        # What a kill can leave before there is a `run.json`.
        left = {files.LOCK, f".{RUN}{files.PARTIAL}"}
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in left)
    if foreign:
        raise Cause(_RULE, f"{folder} is in use: it holds {foreign[0]}", "name another one with --out")
    if holds_work(folder) and not overwrite:
        raise Cause(
            _RULE,
            f"{folder} is in use: it holds a run",
            f"go on with --resume {folder}, take another folder, or replace it with --overwrite",
        )


def _is_run(folder: Path) -> bool:
    """Whether a folder holds a `run.json` that this command wrote, in whatever version."""
    path = folder / RUN
    if path.is_symlink() or not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"schema", "config", "classes"} <= set(content)


def _is_known(path: Path) -> bool:
    """Whether a run may have written this entry of its folder."""
    if path.name == files.LOCK:
        return True
    # A run makes no links: what is behind one is somebody else's.
    if path.is_symlink():
        return False
    return path.name in _FOLDERS if path.is_dir() else _is_written(path.name)


def _is_written(path: str) -> bool:
    return _WRITTEN.fullmatch(_UNFINISHED.sub(r"\1\2", path)) is not None


def _written(folder: Path) -> list[Path]:
    """List the files in a folder that a run writes, relative to it, `run.json` last."""
    found = []
    for base, folders, names in os.walk(folder):
        if Path(base) == folder:
            folders[:] = [name for name in folders if name in _FOLDERS]
        paths = ((Path(base) / name).relative_to(folder) for name in names)
        found += [path for path in paths if _is_written(path.as_posix()) and not (folder / path).is_symlink()]
    return sorted(found, key=lambda path: (path.name == RUN, path))


def _move(source: Path, target: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).replace(target / path)
    _remove_empty(source)


def _remove_empty(folder: Path) -> None:
    steps = [path for path in (folder / CHECKPOINTS).glob("*step-*") if path.is_dir()]
    for path in [*steps, *(folder / name for name in _FOLDERS)]:
        if not path.is_symlink() and path.is_dir():
            files.unmake([path])


def _settle(folder: Path) -> None:
    """Finish what was cut off while a run was being replaced."""
    aside = folder / ASIDE
    if aside.is_dir() and not (aside / RUN).is_file():
        _put_back(folder)
    elif holds_work(folder):
        drop_replaced(folder)


def _take_back(folder: Path) -> None:
    """Remove a run that has come to nothing, and put the one that it was to replace in its place."""
    clear(folder)
    _put_back(folder)


def _put_back(folder: Path) -> None:
    aside = folder / ASIDE
    if aside.is_dir():
        _move(aside, folder, reversed(_written(aside)))
        files.unmake([aside])
