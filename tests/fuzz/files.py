"""Bytes that are not what a reader expects: run lengths, polygons, data folders, run folders, configurations."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.arguments import assert_readable
from lab.conftest import reads_little, run_once
from lab.folders import CASES
from lab.test_hostile_folders import TEXTS, WRONG, paths
from maskloss import MaskLossError, MaskTargets
from maskloss.lab.cli import main
from maskloss.lab.data.folder import FolderScenes, HeldOut
from maskloss.lab.data.options import DataOptions
from maskloss.lab.terminal import explain_error, printable

# What a small file may take at most, in bytes.
MEMORY = 300_000_000
PIECES = (
    b"",
    b" ",
    b"nan",
    b"-1",
    b'"',
    b"\xff",
    b"1e99",
    b":",
    b"\n",
    b"<",
    b"{",
    b"]",
    b"\0",
    b"\x1b[31m",
    b"9" * 30,
)
FOLDERS = [name for name, case in CASES.items() if not case.refused]
CONFIGURATION = {
    "num_classes": 80,
    "class_weights": [1.0, 2.0],
    "sampling": {"num_points": 64, "layout": "stratified"},
    "matcher": {"class_weight": 2.0, "num_points": 32},
    "focal_gamma": 2.0,
    "classification": "focal",
}


def _filled(counts: list[int]) -> list[int]:
    """Add a last run up to 6 x 7 pixels."""
    return [*counts, 42 - sum(counts)]


NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3), st.integers(-5, 99))
POLYGON = st.lists(st.one_of(st.floats(-50, 50), NUMBERS), max_size=9)
RLE = st.fixed_dictionaries(
    {
        "size": st.one_of(st.just([6, 7]), st.just([6, 7]), st.just((6, 7)), st.lists(NUMBERS, max_size=3), NUMBERS),
        "counts": st.one_of(
            st.text(st.characters(min_codepoint=40, max_codepoint=115), max_size=12),
            st.binary(max_size=12),
            st.text(max_size=8),
            st.lists(st.one_of(st.integers(0, 42), NUMBERS), max_size=8),
            st.lists(st.integers(0, 9), max_size=6).map(_filled),
            NUMBERS,
        ),
    }
)
SEGMENTATIONS = st.lists(
    st.one_of(RLE, RLE, st.lists(POLYGON, max_size=3), st.dictionaries(st.text(), NUMBERS), NUMBERS), max_size=3
)


def check_segmentations(segmentations: Any) -> bool:
    """Read segmentations of 6 x 7 pixels; return whether they were rejected."""
    with reads_little(MEMORY):
        try:
            found = MaskTargets.from_coco(segmentations, 6, 7)
        except MaskLossError as error:
            parts = error.parts
        else:
            parts = None
    if parts is not None:
        assert_readable(parts)
        return True
    assert found.num_targets == (len(segmentations),) and found.dense().shape[1:] == (6, 7)
    return False


def damaged(content: bytes, suffix: str, drawn: random.Random) -> bytes:
    """Put a wrong value into JSON, or change, remove, repeat or insert some bytes of any file."""
    if suffix == ".json" and drawn.random() < 0.7:
        value = copy.deepcopy(json.loads(content))
        found = list(paths(value))
        for _ in range(drawn.randint(1, 2) if found else 0):
            *way, last = drawn.choice(found)
            place = value
            with contextlib.suppress(LookupError, TypeError):  # the first may have removed it
                for key in way:
                    place = place[key]
                place[last] = drawn.choice([*WRONG, "\x1b]0;own\x07\n", {"a": []}, "9" * 400])
        return json.dumps(value).encode()
    changed = bytearray(content)
    for _ in range(drawn.randint(1, 5)):
        where = drawn.randrange(len(changed) + 1)
        kind = drawn.random()
        if kind < 0.4 and where < len(changed):
            changed[where] ^= 1 << drawn.randrange(8)
        elif kind < 0.7:
            changed[where : where + drawn.randrange(3)] = drawn.choice(PIECES)
        elif kind < 0.85:
            del changed[where : where + drawn.randrange(40)]
        else:
            changed[where:where] = changed[: drawn.randrange(60)]
    return bytes(changed if drawn.random() < 0.95 else changed[: len(changed) // 2])


@contextlib.contextmanager
def one_damaged(root: Path, drawn: random.Random) -> Any:
    """Damage one file of a folder for a while, more often text than an image; tells its name."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    texts = [path for path in files if path.suffix in TEXTS]
    path = drawn.choice(texts if texts and drawn.random() < 0.5 else files)
    before = path.read_bytes()
    path.write_bytes(damaged(before, path.suffix, drawn))
    try:
        yield path.relative_to(root)
    finally:
        path.write_bytes(before)


class Folders:
    """Folders of data of all kinds, made once, one file of which is damaged at a time."""

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, dict[str, Path]()

    def check(self, name: str, seed: int) -> bool:
        """Read a damaged folder; return whether it was rejected."""
        case = CASES[name]
        if name not in self._made:
            self._made[name] = self._root / f"{len(self._made)}"
            case.make(self._made[name])
        root, drawn = self._made[name], random.Random(seed)
        given = {key: each.format(root=root) if isinstance(each, str) else each for key, each in case.options.items()}
        given.pop("on_error", None)
        with one_damaged(root, drawn), reads_little(MEMORY):
            try:
                options = DataOptions(**given)
                source = FolderScenes(str(root), 32, on_error=drawn.choice(["stop", "skip"]), options=options)
                count = len(source.found.train)
                assert len(source.batch(0, range(count), count, 0).images) == count
                assert len(list(HeldOut(source.found.held_out, source.reading))) == len(source.held_out)
            except MaskLossError as error:
                told = printable(explain_error(error, ""))
                assert 0 < len(told) < 2000, told
                return True
        return False


class Runs:
    """A run folder, one file of which is damaged at a time, and a configuration of `maskloss methods`."""

    def __init__(self, root: Path) -> None:
        from maskloss.lab.config import TrainConfig

        config = TrainConfig(steps=2, batch_size=2, held_out=2, evaluations=1, num_points=16, workers=0, device="cpu")
        self._root, self._run = root, run_once(config, root / "run")

    def check_run(self, command: str, seed: int) -> bool:
        """Use a damaged run; return whether it was rejected."""
        drawn = random.Random(seed)
        shutil.rmtree(self._root / "copy", ignore_errors=True)
        shutil.copytree(self._run, self._root / "copy")
        with one_damaged(self._root / "copy", drawn) as name:
            words = ["train", "--resume"] if command == "resume" else [command]
            return _rejected([*words, str(self._root / "copy")], f"{name}")

    def check_configuration(self, ending: str, seed: int) -> bool:
        """Describe a damaged configuration; return whether it was rejected."""
        path = self._root / f"options{ending}"
        path.write_bytes(damaged(json.dumps(CONFIGURATION).encode(), ending, random.Random(seed)))
        return _rejected(["methods", "--config", str(path)], "")


def _rejected(command: list[str], name: str) -> bool:
    """Run a command: it works, or ends with the status 2 and one line that a terminal can be shown."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), reads_little(MEMORY):
        status = main(command)
    assert status in {0, 2}, (name, status)
    if status == 2:
        lines = err.getvalue().splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        assert len(told) == 1 and told[0].isprintable() and len(told[0]) < 2000, (name, err.getvalue())
    return status == 2


def strategies(root: Path) -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], bool]]]:
    """The checks of this file by their names, with what they are given; they keep their files in `root`."""
    folders, seeds = Folders(root / "folders"), st.integers(0, 2**32 - 1)
    runs: list[Runs] = []

    def run() -> Runs:
        if not runs:
            (root / "runs").mkdir(parents=True)
            runs.append(Runs(root / "runs"))
        return runs[0]

    return {
        "segmentations": (SEGMENTATIONS, check_segmentations),
        "data folders": (st.tuples(st.sampled_from(FOLDERS), seeds), lambda drawn: folders.check(*drawn)),
        "run folders": (
            st.tuples(st.sampled_from(["evaluate", "methods", "resume"]), seeds),
            lambda drawn: run().check_run(*drawn),
        ),
        "configurations": (
            st.tuples(st.sampled_from([".json", ".yaml"]), seeds),
            lambda drawn: run().check_configuration(*drawn),
        ),
    }
