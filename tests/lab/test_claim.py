"""The folder of a run: nothing of a user's is removed, and a run that is replaced comes back if the new one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maskloss import MaskLossError
from maskloss.lab import files
from maskloss.lab.config import TrainConfig
from maskloss.lab.loop import claim as module
from maskloss.lab.loop.claim import ASIDE, claimed, drop_replaced, reopened
from maskloss.lab.loop.progress import Listener
from maskloss.lab.loop.run import train

FACTS = json.dumps({"schema": 1, "config": {}, "classes": ["a"]})
NEW_FACTS = json.dumps({"schema": 1, "config": {}, "classes": ["b"]})
# Everything that a run writes, and what it had not finished.
OURS = {
    "run.json": FACTS,
    "metrics.jsonl": "old",
    "summary.json": "{}",
    "report.html": "old",
    "model.safetensors": "old",
    "model/config.json": "{}",
    "checkpoints/step-00000002/model.safetensors": "old",
    "checkpoints/step-00000002/random-0.safetensors": "old",
    "checkpoints/step-00000002/state.json": "{}",
    "checkpoints/.step-00000004.partial/optimizer.safetensors": "half",
    "snapshots/step-00000001.safetensors": "old",
    "snapshots/.step-00000002.safetensors.partial": "half",
    "pictures/overview.png": "old",
    "pictures/scene-0-truth.png": "old",
    "pictures/points-1-2.png": "old",
    "pictures/points.gif": "old",
    "tensorboard/events.out.tfevents.123.host": "old",
    ".report.html.partial": "half",
}
THEIRS = {
    "pictures/holiday.jpg": "precious",
    "pictures/overview of 2025.png": "precious",
    "model/pytorch_model.bin": "precious",
    "checkpoints/epoch=3.ckpt": "precious",
    "checkpoints/step-2/model.safetensors": "precious",
    "snapshots/home/step-00000001.safetensors": "precious",
    "tensorboard/notes.txt": "precious",
}


def fill(folder: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def held(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != files.LOCK
    }


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", [*THEIRS, "report.html", "run.json", "model.safetensors", ".lock", ".probe", "notes"])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, name, overwrite):
    """Whatever it holds is the user's, also under the names that a run uses."""
    fill(tmp_path, {name: "precious"})
    with (
        pytest.raises(MaskLossError, match=r"is in use: it holds"),
        claimed(tmp_path, overwrite=overwrite) as claim,
    ):
        claim.make_room()
    assert held(tmp_path) == {name: "precious"}


def test_nothing_is_removed_before_the_run_can_begin(tmp_path):
    """The data do not exist."""
    before = held(fill(tmp_path / "run", OURS))
    config = TrainConfig(data=str(tmp_path / "nowhere"), device="cpu")
    with pytest.raises(MaskLossError, match="nowhere"):
        train(config, tmp_path / "run", Listener.silent(), overwrite=True)
    assert held(tmp_path / "run") == before
    fill(tmp_path / "project", {"pictures/a.jpg": "precious", "report.html": "precious"})
    with pytest.raises(MaskLossError, match=r"it holds pictures"):
        train(config, tmp_path / "project", Listener.silent())
    assert len(held(tmp_path / "project")) == 2


def begin(folder: Path) -> None:
    """Write what a run begins with."""
    fill(folder, {"run.json": NEW_FACTS, "metrics.jsonl": "new"})


def test_a_replaced_run_goes_when_the_new_one_has_a_checkpoint(tmp_path):
    fill(tmp_path, OURS | THEIRS)
    with claimed(tmp_path, overwrite=True) as claim:
        assert held(tmp_path) == OURS | THEIRS
        claim.make_room()
        assert held(tmp_path) == {f"{ASIDE}/{name}": text for name, text in OURS.items()} | THEIRS
        begin(tmp_path)
        fill(tmp_path, {"checkpoints/step-00000001/state.json": "{}"})
        drop_replaced(tmp_path)
    assert held(tmp_path) == THEIRS | {
        "run.json": NEW_FACTS,
        "metrics.jsonl": "new",
        "checkpoints/step-00000001/state.json": "{}",
    }
    assert not (tmp_path / ASIDE).exists() and not (tmp_path / files.LOCK).exists()


@pytest.mark.parametrize("error", [MaskLossError, OSError, KeyboardInterrupt, SystemExit])
def test_a_replaced_run_comes_back_if_the_new_one_gets_nowhere(tmp_path, error):
    fill(tmp_path, OURS | THEIRS)

    def fails(claim: module.Claim) -> None:
        claim.make_room()
        begin(tmp_path)
        raise error

    with pytest.raises(error), claimed(tmp_path, overwrite=True) as claim:
        fails(claim)
    assert held(tmp_path) == OURS | THEIRS and not (tmp_path / ASIDE).exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(len(OURS)))
@pytest.mark.parametrize("kind", ["moved aside", "put back", "removed"])
def test_a_kill_between_any_two_files_loses_no_run(tmp_path, monkeypatch, kind, after):
    """As after SIGKILL: nothing cleans up, and the next command finds what is there."""
    fill(tmp_path, OURS)
    calls = []

    def dies(self, *others, original):
        if len(calls) == after:
            raise Killed
        calls.append(self)
        return original(self, *others)

    def dying() -> None:
        name = "unlink" if kind == "removed" else "replace"
        original = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda *given: dies(*given, original=original))

    claim = module.Claim(tmp_path)
    if kind == "moved aside":
        dying()
        with pytest.raises(Killed):
            claim.make_room()
    else:
        claim.make_room()
        begin(tmp_path)
        if kind == "removed":
            fill(tmp_path, {"checkpoints/step-00000001/state.json": "{}"})
        else:
            module.clear(tmp_path)
        dying()
        with pytest.raises(Killed):
            drop_replaced(tmp_path) if kind == "removed" else module._put_back(tmp_path)
    monkeypatch.undo()
    if kind == "removed":
        with reopened(tmp_path):
            pass
        assert not (tmp_path / ASIDE).exists() and held(tmp_path)["metrics.jsonl"] == "new"
    else:
        with pytest.raises(MaskLossError, match="it holds a run"), claimed(tmp_path):
            raise AssertionError
        assert held(tmp_path) == OURS and not (tmp_path / ASIDE).exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_gives_way(tmp_path):
    fill(tmp_path, OURS)
    module.Claim(tmp_path).make_room()
    begin(tmp_path)  # and killed
    with pytest.raises(MaskLossError, match="it holds a run"), claimed(tmp_path):
        raise AssertionError
    assert held(tmp_path) == OURS


@pytest.mark.parametrize("name", ["run.json", "pictures", "checkpoints"])
def test_links_are_not_followed(tmp_path, name):
    """A run makes none; behind one of a user's lies what is the user's."""
    elsewhere = fill(tmp_path / "elsewhere", {**OURS, "overview.png": "precious"})
    run = fill(tmp_path / "run", {"metrics.jsonl": "old"} if name == "run.json" else {"run.json": FACTS})
    (run / name).symlink_to(elsewhere / name)
    with pytest.raises(MaskLossError, match=f"it holds {name}"), claimed(run, overwrite=True):
        raise AssertionError
    assert len(held(elsewhere)) == len(OURS) + 1 and (run / name).is_symlink()


def test_a_lock_dies_with_the_process_that_took_it(tmp_path):
    """Not with its children, such as those that read images, which live on for some seconds."""
    script = (
        "import os, sys, time; from pathlib import Path; from maskloss.lab import files\n"
        "with files.locked(Path(sys.argv[1])):\n"
        "    if not os.fork():\n"
        "        print(os.getpid(), flush=True)  # once it has let go of what it inherited\n"
        "    time.sleep(300)\n"
    )
    sources = str(Path(module.__file__).parents[3])
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": sources},
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    try:
        with pytest.raises(MaskLossError, match="is in use"), files.locked(tmp_path):
            raise AssertionError
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # it is there
        with files.locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_two_runs_that_begin_in_one_second_get_two_folders(tmp_path, monkeypatch):
    class Clock:
        @staticmethod
        def now():
            return Clock()

        def strftime(self, _):
            return "2026-01-31_12-00-00"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "datetime", Clock)
    with claimed(None) as one, claimed(None) as two:
        names = {one.folder.as_posix(), two.folder.as_posix()}
        (two.folder / "kept").touch()
    assert names == {"runs/2026-01-31_12-00-00", "runs/2026-01-31_12-00-00-2"}
    # The first one came to nothing.
    assert os.listdir("runs") == ["2026-01-31_12-00-00-2"]


def test_a_run_that_fails_leaves_no_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MaskLossError, match="nowhere"):
        train(TrainConfig(data="nowhere", device="cpu"), None, Listener.silent())
    assert not list(tmp_path.iterdir())
