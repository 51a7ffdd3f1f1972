"""Which images are trained on, which are scored on, and which are left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from maskloss.errors import Cause
from maskloss.lab.data.catalog import Entry
from maskloss.lab.data.problems import LEFT_OUT, SUSPICIOUS, Problems
from maskloss.lab.data.tiff import window_of
from maskloss.lab.data.tree import TEST, TRAIN, VAL, folded
from maskloss.lab.files import check_file, explain

ALL = "all"
SCORED = (ALL, TRAIN, VAL, TEST)
# The split is the same in every run, so that runs can be compared.
_SEED = 20
_SHARE = 0.2

Parts = Mapping[str, list[Entry]]
Divided = tuple[list[Entry], list[Entry], list[str]]


def is_place(val: str) -> bool:
    """Whether what --val says is another folder or another file of annotations."""
    path = Path(val)
    return path.is_dir() or (path.is_file() and path.suffix.lower() != ".txt")


def chosen(parts: Parts, score: str, folder: Path) -> tuple[list[Entry], list[str]]:
    """Return the images of a part, or all."""
    names = [name for name in parts if score in (ALL, name)]
    if not names:
        known = ", ".join(name for name in parts if name) or "none"
        raise Cause("--split must name a part of the data", f"{folder} has no part {score!r}", f"its parts: {known}")
    entries = [entry for name in names for entry in parts[name]]
    return entries, [f"all {len(entries)} images" if score == ALL else f"the part {score}"]


def divide(parts: Parts, val: str | None, folder: Path, problems: Problems, *, alone: bool = False) -> Divided:
    """Divide images into those to train on and those to score on.

    Args:
        parts: as the source divides them.
        val: a share, or a text file with names of images; None: as the source says, else one image in five.
        folder: for messages.
        problems: told which images are left alone.
        alone: whether others are scored on: then all but val and test is trained on.
    """
    trained = [entry for name in (TRAIN, "") for entry in parts.get(name, [])]
    valid, test = parts.get(VAL, []), parts.get(TEST, [])
    if alone:
        _leave(problems, VAL, valid)
        _leave(problems, TEST, test)
        return trained or valid or test, [], []
    if not trained:
        # A folder of one part, whatever it is called, is all there is.
        trained, valid, test = (valid, [], test) if valid else (test, [], [])
    if val is not None:
        _leave(problems, TEST, test)
        pool = [*trained, *valid]
        share = _share(val)
        return _listed(pool, Path(val), folder) if share is None else _random(pool, share, folder, problems)
    if valid:
        _leave(problems, TEST, test)
        return trained, valid, [f"the part {VAL} held out"]
    if test:
        return trained, test, [f"the part {TEST} held out"]
    return _random(trained, _SHARE, folder, problems)


def _leave(problems: Problems, name: str, entries: Sequence[Entry]) -> None:
    if entries:
        problems.note(LEFT_OUT, f"images of the part {name} left alone", entries[0].name, len(entries))


def _share(val: str) -> float | None:
    try:
        share = float(val)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise Cause("--val must be a share between 0 and 1, a folder, or a file", f"got {val}", "as in --val 0.2")
    return share


def _random(entries: list[Entry], share: float, folder: Path, problems: Problems) -> Divided:
    if len(entries) < 2:
        found = f"{folder} has {len(entries)} that can be used"
        problems.ask(Cause("there must be at least two images", found, "one is held out"))
        return entries, [], []
    # The pieces of a large image are much alike: they belong to one part.
    images: dict[Path, list[Entry]] = {}
    for entry in entries:
        images.setdefault(window_of(Path(entry.file))[0], []).append(entry)
    whole = list(images.values())
    if len(whole) == 1:
        what = "pieces of one image in both parts: scores are those of the image that was trained on"
        problems.note(SUSPICIOUS, what, entries[0].name, 0)
        # Those held out lie side by side, so that few objects are in both.
        count = max(1, int(len(entries) * share + 1e-9))
        return entries[:-count], entries[-count:], [f"the last {count} pieces held out"]
    count = min(len(whole) - 1, max(1, int(len(whole) * share + 1e-9)))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(_SEED)).tolist()
    # Images without an object score nothing: they are held out only in their share.
    is_full = [any(entry.objects for entry in some) for some in whole]
    full, empty = ([i for i in order if is_full[i] == wanted] for wanted in (True, False))
    of_full = min(count, max(1, round(count * len(full) / len(whole))))
    held_out = {*full[:of_full], *empty[: count - of_full]}
    which = (
        "one image in five is held out" if share == _SHARE else f"{count} images held out at random (--val {share:g})"
    )
    parts = [[entry for i in order if (i in held_out) == each for entry in whole[i]] for each in (False, True)]
    return parts[0], parts[1], [which]


def _listed(entries: list[Entry], path: Path, folder: Path) -> Divided:
    """Hold out the images that a text file names, one in each line."""
    rule = "--val must be a share between 0 and 1, a folder, a file of annotations, or a text file with names of images"
    check_file(path, rule)
    try:
        lines = [line.strip().replace("\\", "/") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise Cause(rule, f"{path}: {explain(error)}", "one name in each line") from None
    wanted = {folded(line) for line in lines if line}
    used: set[str] = set()
    train: list[Entry] = []
    held_out: list[Entry] = []
    for entry in entries:
        names = _names(entry, folder) & wanted
        used |= names
        (held_out if names else train).append(entry)
    missing = sorted(wanted - used)
    if missing:
        raise Cause(
            "every name in the list of --val must be an image", f"{path}: {missing[0]!r} is none", "check the list"
        )
    return train, held_out, [f"{len(held_out)} images held out as {path.name} lists them"]


def relative(path: Path, folder: Path) -> str:
    """Return the path of an image relative to its folder, which is how lists name it."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _names(entry: Entry, folder: Path) -> set[str]:
    path = Path(entry.file)
    # The name of a large image means all of its pieces.
    return {
        folded(each)
        for one in {path, window_of(path)[0]}
        for each in (relative(one, folder), str(one), one.name, one.stem)
    }
