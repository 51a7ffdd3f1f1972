"""A run: the same to the bit when repeated or interrupted, complete in what it writes, stopped early where it must."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from lab.conftest import run_once
from maskloss import MaskLossError, methods
from maskloss.lab import files
from maskloss.lab.commands.methods import settings_of_run
from maskloss.lab.commands.train import read_options
from maskloss.lab.config import TrainConfig
from maskloss.lab.data import scenes
from maskloss.lab.loop import checkpoint, engine, signals
from maskloss.lab.loop.engine import schedule
from maskloss.lab.loop.progress import Interrupted, Listener
from maskloss.lab.loop.run import Result, resume, train
from maskloss.lab.models.registry import open_source
from maskloss.lab.models.weights import read_tensors
from maskloss.lab.results.scoring import evaluate_run
from maskloss.lab.runfolder import kept_step, path_of, read_facts, steps_of

SHORT = {
    "steps": 6, "batch_size": 4, "held_out": 6, "evaluations": 2, "num_points": 32, "size": 32, "threads": 1,
    "device": "cpu",
}  # fmt: skip
# The run of the module's fixture is drawn; the others are compared with it.
pytestmark = pytest.mark.usefixtures("no_pictures")
SAME = ("model.safetensors", "metrics.jsonl")


def quiet(**told) -> Listener:
    return Listener.silent()._replace(**told)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Result:
    return train(TrainConfig(**SHORT), tmp_path_factory.mktemp("run") / "new", quiet())


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """The same run, with a line of metrics for every step; not drawn."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "LOG_EVERY", 1)
        return run_once(TrainConfig(**SHORT), tmp_path_factory.mktemp("run") / "logged")


def assert_same(folder: Path, other: Path) -> None:
    for name in SAME:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_a_run_repeats_itself_to_the_bit(result, tmp_path):
    again = train(TrainConfig(**SHORT), tmp_path, quiet())
    assert_same(again.folder, result.folder)
    assert again.evaluation.as_dict() == result.evaluation.as_dict()


def test_another_seed_is_another_run(result, tmp_path):
    other = train(TrainConfig(**SHORT, seed=1), tmp_path, quiet())
    for name in SAME:
        assert (other.folder / name).read_bytes() != (result.folder / name).read_bytes(), name


def test_a_run_writes_everything_that_it_names(result):
    names = {path.name for path in result.folder.iterdir()}
    assert names == {
        "report.html",
        "pictures",
        "snapshots",
        "checkpoints",
        "model.safetensors",
        "metrics.jsonl",
        "summary.json",
        "run.json",
    }
    assert result.files[0].name == "report.html" and all(path.is_file() for path in result.files)
    for path in (result.folder / "pictures").iterdir():
        with Image.open(path) as image:
            assert image.width > 300 and len(image.convert("L").getcolors()) > 20


def test_metrics_hold_the_terms_of_every_layer_and_the_scores(result):
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    [losses] = [line for line in lines if "total" in line]
    assert losses["step"] == 6
    assert {f"loss_{term}{layer}" for term in ("class", "mask", "dice") for layer in ("", "_0", "_1")} <= set(losses)
    assert [line["step"] for line in lines if "held_out" in line] == [0, 3, 6]
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["evaluation"] == result.evaluation.as_dict(whole=True)


def test_the_configuration_is_kept_with_what_was_chosen(result):
    config = read_facts(result.folder).config
    assert (config.grid, config.norm, config.lr, config.size) == (4, "batch", 3e-3, 32)
    chosen = {"grid": None, "norm": None, "lr": None, "class_weight": None, "no_object_weight": None}
    assert dataclasses.replace(config, **chosen) == TrainConfig(**SHORT)


def test_the_folder_is_all_that_evaluation_needs(result, tmp_path):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for name in ("run.json", "model.safetensors"):
        (copy / name).write_bytes((result.folder / name).read_bytes())
    scores, _, skipped = evaluate_run(copy, device="cpu")
    assert scores.as_dict() == result.evaluation.as_dict() and not skipped


# --------------------------------------------------------------------------------------------------------- interrupted


class Stop:
    """Sends a signal, or fails, when a step is reported."""

    def __init__(self, at: int, number: int = signal.SIGINT) -> None:
        self.at, self.number = at, number

    def __call__(self, progress) -> None:
        if progress.step == self.at:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(engine, "LOG_EVERY", 1)


OTHER_SIGNALS = [pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGHUP, signal.SIGUSR1)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *OTHER_SIGNALS])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on_from_it(tmp_path, every_step_is_logged, logged, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"stopped at step 2 of 6; go on with: maskloss train --resume") as stopped:
        train(TrainConfig(**SHORT), tmp_path / "run", quiet(step=Stop(2, number)))
    assert stopped.value.signal == number and signal.getsignal(number) is before
    assert steps_of(tmp_path / "run") == [2]
    again = resume(tmp_path / "run", quiet())
    assert_same(again.folder, logged)
    with pytest.raises(MaskLossError, match="is finished"):
        resume(tmp_path / "run", quiet())


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, every_step_is_logged, logged):
    config = TrainConfig(**SHORT)
    for begin in (train, lambda _, folder, told: resume(folder, told)):
        # The first time in the last step, the second time in the evaluation after it.
        told = quiet(step=Stop(6)) if begin is train else quiet(begin=lambda at: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match="stopped at step 6 of 6"):
            begin(config, tmp_path / "run", told)
    assert_same(resume(tmp_path / "run", quiet()).folder, logged)


class StopTwice(Stop):
    """Sends a signal twice at once, as a terminal that closes and torchrun do."""

    def __call__(self, progress) -> None:
        super().__call__(progress)
        super().__call__(progress)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_twice_at_once_leaves_a_checkpoint(tmp_path, every_step_is_logged, monkeypatch, number):
    monkeypatch.setattr(signals, "AGAIN", 3600.0)  # however slow the machine
    with pytest.raises(Interrupted, match="stopped at step 2 of 6"):
        train(TrainConfig(**SHORT), tmp_path, quiet(step=StopTwice(2, number)))


def test_a_second_interrupt_ends_the_run_at_once(tmp_path, every_step_is_logged, monkeypatch):
    """It goes on from the checkpoint before, of which the message tells."""
    monkeypatch.setattr(signals, "AGAIN", -1.0)
    config = TrainConfig(**SHORT, checkpoint_every=2, keep="last")
    with pytest.raises(Interrupted, match="stopped at step 2 of 6") as stopped:
        train(config, tmp_path / "run", quiet(step=StopTwice(4)))
    assert stopped.value.signal == signal.SIGINT and steps_of(tmp_path / "run") == [2]
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**SHORT, keep="last"), tmp_path / "other", quiet(step=StopTwice(4)))
    assert not (tmp_path / "other").exists()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, every_step_is_logged, result):
    """As by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        finished = train(TrainConfig(**SHORT), tmp_path, quiet(step=Stop(2, signal.SIGHUP)))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert finished.evaluation.as_dict() == result.evaluation.as_dict()


def test_a_clock_that_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: 5.0)
    told = []
    train(TrainConfig(**SHORT | {"steps": 10}), tmp_path, quiet(step=told.append))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert math.isnan(told[0].speed) and summary["images_per_second"] is None and not summary["time_shares"]


def test_what_is_ruined_of_the_pictures_keeps_no_run_from_finishing(tmp_path, every_step_is_logged, monkeypatch):
    monkeypatch.undo()  # the report is drawn
    monkeypatch.setattr(engine, "LOG_EVERY", 1)
    with pytest.raises(Interrupted):
        train(TrainConfig(**SHORT), tmp_path, quiet(step=Stop(3)))
    [first, *_] = sorted((tmp_path / "snapshots").iterdir())
    first.write_bytes(b"junk")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], '{"step": 1, "total": "low"}', *lines[2:]]) + "\n")
    told = []
    resume(tmp_path, quiet(skipped=told.append))
    assert len(told) == 2 and first.name in told[0] and told[1] == "line 2 of metrics.jsonl"
    assert json.loads((tmp_path / "summary.json").read_text())["skipped"] == told
    assert all(text in (tmp_path / "report.html").read_text() for text in told)


def test_terms_that_were_not_yet_logged_are_not_lost(tmp_path, result):
    """Metrics average several steps; an interruption between two lines must not change them."""

    class Killed(Exception):
        pass

    def dies(self, step, micro, original=engine.Engine._step):
        if step == 5:
            raise Killed
        return original(self, step, micro)

    config = dataclasses.replace(TrainConfig(**SHORT), checkpoint_every=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine.Engine, "_step", dies)
        with pytest.raises(Killed):
            train(config, tmp_path / "run", quiet())
    assert steps_of(tmp_path / "run") == [3, 4]  # the third was the best so far
    again = resume(tmp_path / "run", quiet())
    assert_same(again.folder, result.folder)


class Scores:
    """Takes the place of scoring: gives the next AP of a list, and each evaluation the rest of a true one."""

    def __init__(self, aps: list[float]) -> None:
        self.aps = iter(aps)

    def __call__(self, *arguments, original=engine.evaluate, **options):
        found = original(*arguments, **options)
        return None if found is None else dataclasses.replace(found, ap=next(self.aps))


@pytest.mark.parametrize(("keep", "ema", "aps", "kept"), [
    ("best", True, [0.9, 0.5, 0.2], 3),  # step 0 is not a trained model
    ("best", False, [0.9, 0.5, 0.2], 3),
    ("best", True, [0.0, 0.2, 0.2], 6),  # the last of equals
    ("best", False, [0.0, math.nan, math.nan], 6),
    ("last", True, [0.0, 0.5, 0.2], 6),
])  # fmt: skip
def test_the_weights_that_are_kept(tmp_path, monkeypatch, keep, ema, aps, kept):
    monkeypatch.setattr(engine, "evaluate", Scores([*aps, 0.7]))
    finished = train(TrainConfig(**SHORT, keep=keep, ema=ema), tmp_path, quiet())
    name = "average.safetensors" if ema else "model.safetensors"
    ours = read_tensors(tmp_path / "model.safetensors")
    for step in steps_of(tmp_path):
        theirs = read_tensors(path_of(tmp_path, step) / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours) == (step == kept)
    assert json.loads((tmp_path / "summary.json").read_text())["kept_step"] == kept
    assert steps_of(tmp_path) == ([3, 6] if keep == "best" and not math.isnan(aps[1]) else [6])
    # What is used later is what was scored: that of the checkpoints, too, before a run is finished.
    monkeypatch.undo()
    before = evaluate_run(tmp_path, device="cpu")[0]
    assert dataclasses.replace(before, ap=0.7) == finished.evaluation
    (tmp_path / "model.safetensors").unlink()
    assert kept_step(tmp_path, read_facts(tmp_path).config) == kept
    assert evaluate_run(tmp_path, device="cpu")[0] == before


def test_the_best_checkpoint_stays_and_an_interruption_changes_nothing(tmp_path, every_step_is_logged, monkeypatch):
    """Six evaluations, the best of them the second; a kill after it, and before the next checkpoint."""
    aps = [0.0, 0.1, 0.6, 0.3, 0.2, 0.4, 0.5]
    config = TrainConfig(**SHORT | {"evaluations": 6}, checkpoint_every=3, ema=True)
    monkeypatch.setattr(engine, "evaluate", Scores([*aps, 0.7]))
    whole = train(config, tmp_path / "whole", quiet())
    assert steps_of(tmp_path / "whole") == [2, 3, 6]
    monkeypatch.setattr(engine, "evaluate", Scores(aps[:5]))
    monkeypatch.setattr(signals, "AGAIN", -1.0)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        train(config, tmp_path / "run", quiet(step=StopTwice(4)))
    assert kept_step(tmp_path / "run", config) == 2
    monkeypatch.setattr(engine, "evaluate", Scores([*aps[4:], 0.7]))
    assert_same(resume(tmp_path / "run", quiet()).folder, whole.folder)


def test_a_run_that_failed_before_its_first_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(MaskLossError, match=r"predicts nan or infinity[\s\S]*lower --lr"):
        train(TrainConfig(**SHORT, lr=1e30), tmp_path / "deep" / "run", quiet())
    assert not (tmp_path / "deep").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(MaskLossError, match="lower --lr"):
        train(TrainConfig(**SHORT, lr=1e30), tmp_path / "run", quiet())
    assert not list((tmp_path / "run").iterdir())


def test_what_a_killed_run_left_without_a_checkpoint_is_in_nobodys_way(result, tmp_path):
    """As after SIGKILL: no cleaning up."""
    (tmp_path / "run.json").write_bytes((result.folder / "run.json").read_bytes())
    for name in ("metrics.jsonl", ".report.html.partial"):
        (tmp_path / name).write_text("half")
    (tmp_path / files.LOCK).touch()
    (tmp_path / "checkpoints" / ".step-00000002.partial").mkdir(parents=True)
    assert_same(train(TrainConfig(**SHORT), tmp_path, quiet()).folder, result.folder)


def test_a_folder_in_use_is_left_alone(tmp_path, result):
    (tmp_path / "precious.txt").write_text("results")
    for overwrite in (False, True):
        with pytest.raises(MaskLossError, match=r"is in use: it holds precious\.txt"):
            train(TrainConfig(**SHORT), tmp_path, quiet(), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(MaskLossError, match="it holds a run"):
        train(TrainConfig(**SHORT), result.folder, quiet())
    assert (result.folder / "report.html").is_file()


def test_a_folder_of_a_running_run(tmp_path):
    with files.locked(tmp_path), pytest.raises(MaskLossError, match="can be used by one run at a time"):
        train(TrainConfig(**SHORT), tmp_path, quiet())


def test_a_run_can_be_replaced(tmp_path, result, logged):
    shutil.copytree(logged, tmp_path, dirs_exist_ok=True)
    assert_same(train(TrainConfig(**SHORT), tmp_path, quiet(), overwrite=True).folder, result.folder)


def test_a_run_that_is_replaced_by_one_that_fails_comes_back(tmp_path, result):
    shutil.copytree(result.folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(MaskLossError, match="lower --lr"):
        train(TrainConfig(**SHORT, lr=1e30), tmp_path, quiet(), overwrite=True)
    assert_same(tmp_path, result.folder)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in result.folder.iterdir()}


def test_a_full_disk_during_a_checkpoint(tmp_path, monkeypatch):
    original, calls = checkpoint.write_tensors, []

    def full(path, tensors):
        calls.append(path)
        if "step-00000004" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(b"part")
            raise OSError(28, "No space left on device", str(path))
        original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    config = TrainConfig(**SHORT, checkpoint_every=2, keep="last")
    with pytest.raises(
        MaskLossError, match=r"step 4 was not: the disk is full[\s\S]*go on from step 2 with: .*--resume"
    ):
        train(config, tmp_path / "run", quiet())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setattr(checkpoint, "write_tensors", original)
    whole = train(TrainConfig(**SHORT, keep="last"), tmp_path / "whole", quiet())
    assert_same(resume(tmp_path / "run", quiet()).folder, whole.folder)


def test_a_failure_while_the_report_is_drawn_costs_no_training(tmp_path, monkeypatch, result):
    from maskloss.lab.results import report

    def full(*_):
        raise OSError(28, "No space left on device", "report.html")

    with monkeypatch.context() as patched:
        patched.setattr(report, "write", full)
        with pytest.raises(MaskLossError, match=r"the disk is full: report.html[\s\S]*nothing is lost, go on with"):
            train(TrainConfig(**SHORT), tmp_path / "run", quiet())
    monkeypatch.setattr(engine.Engine, "_step", None)
    assert_same(resume(tmp_path / "run", quiet()).folder, result.folder)


# -------------------------------------------------------------------------------------------------- how long a run is


def test_a_run_goes_on_past_its_end(tmp_path, result):
    """The rate of each step is that of a longer run; what was finished is finished anew."""
    copy = tmp_path / "run"
    shutil.copytree(result.folder, copy)
    told = []
    longer = resume(copy, quiet(facts=told.append), steps=9)
    assert "9 steps" in dict(told[0])["run"] and read_facts(copy).config.num_steps == 9
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "total" in line] == [6, 9]
    # At step 6, schedule(6 / 6); at step 9, schedule(9 / 9); in between, step 7 of 9.
    assert json.loads((copy / "summary.json").read_text())["steps"] == 9 and longer.evaluation.scenes == 6
    state = read_tensors(path_of(copy, 9) / "model.safetensors")
    before = read_tensors(path_of(copy, 6) / "model.safetensors")
    assert not torch.equal(state["born.weight"], before["born.weight"])
    for changes, message in (
        ({}, "is finished[\\s\\S]*go on past its end with --steps"),
        ({"steps": 9}, "9 are taken of 9"),
        ({"steps": 4}, "9 are taken of 4"),
        ({"epochs": 3}, "scenes of digits have no end"),
    ):
        with pytest.raises(MaskLossError, match=message):
            resume(copy, quiet(), **changes)
    assert (copy / "summary.json").is_file() and (copy / "report.html").is_file()


def test_without_a_checkpoint_a_finished_run_stays_as_it_is(tmp_path, result):
    copy = tmp_path / "run"
    shutil.copytree(result.folder, copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(MaskLossError, match=r"has none left\n.*begin another one with its weights: --model "):
        resume(copy, quiet(), steps=9)
    assert_same(copy, result.folder)
    assert (copy / "summary.json").is_file() and (copy / "report.html").is_file()


def test_to_go_on_past_the_end_can_be_interrupted(tmp_path, result, every_step_is_logged):
    for name in ("whole", "run"):
        shutil.copytree(result.folder, tmp_path / name)
    whole = resume(tmp_path / "whole", quiet(), steps=9)
    with pytest.raises(Interrupted, match="stopped at step 8 of 9"):
        resume(tmp_path / "run", quiet(step=Stop(8)), steps=9)
    assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "report.html").exists()
    again = resume(tmp_path / "run", quiet())
    assert (again.folder / SAME[0]).read_bytes() == (whole.folder / SAME[0]).read_bytes()


def test_epochs(cells, tmp_path):
    config = TrainConfig(**SHORT | {"data": str(cells), "workers": 0, "steps": None, "epochs": 3})
    told = []
    finished = train(config, tmp_path / "run", quiet(facts=told.append))
    # Five images to train on, four in a step.
    assert (read_facts(finished.folder).config.steps, read_facts(finished.folder).config.epochs) == (4, None)
    assert dict(told[0])["run"].startswith("4 steps of 4 images (3.2 epochs)")
    with pytest.raises(MaskLossError, match="--epochs needs a number of images"):
        train(TrainConfig(epochs=1, device="cpu"), tmp_path / "other", quiet())
    with pytest.raises(MaskLossError, match="--steps and --epochs exclude each other"):
        TrainConfig(epochs=1, steps=1)


def test_patience(tmp_path, monkeypatch, every_step_is_logged):
    """Six evaluations; the second is the best, and two more without a better one are enough."""
    aps = [0.9, 0.1, 0.6, 0.6, 0.2, 0.7, 0.8]
    config = TrainConfig(**SHORT | {"evaluations": 6}, patience=2, ema=True)
    monkeypatch.setattr(engine, "evaluate", Scores([*aps[:5], 0.7]))
    stopped = train(config, tmp_path / "run", quiet())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["kept_step"], stopped.kept) == (
        4,
        3,  # the last of equals
        "the averaged weights of step 3, the best of 4 evaluations; ended at step 4 of 6, as no score has been higher"
        " since",
    )
    text = " ".join(methods.describe(settings_of_run(tmp_path / "run")).split())
    for part in (
        "for 4 steps with",
        "planned for 6 steps; training ended early, at step 4",
        "with a decay of at most 0.999",
        "with the highest AP on held-out images during training (step 3)",
    ):
        assert part in text, part
    # A failure while the report is drawn costs no step more, and does not take one.
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr(engine, "evaluate", Scores([0.7]))
    assert resume(tmp_path / "run", quiet()).kept == stopped.kept
    with pytest.raises(MaskLossError, match=r"2 evaluations without a higher AP[\s\S]*add a larger --patience"):
        resume(tmp_path / "run", quiet(), steps=6)
    # With more patience, it reaches what it would have reached.
    monkeypatch.setattr(engine, "evaluate", Scores([*aps[5:], 0.7]))
    again = resume(tmp_path / "run", quiet(), steps=6, patience=0)
    monkeypatch.setattr(engine, "evaluate", Scores([*aps, 0.7]))
    whole = train(dataclasses.replace(config, patience=0), tmp_path / "whole", quiet())
    assert_same(again.folder, whole.folder)


def test_a_signal_in_the_evaluation_that_ends_a_run_changes_nothing(tmp_path, monkeypatch, every_step_is_logged):
    aps = [0.9, 0.1, 0.6, 0.6, 0.2]
    config = TrainConfig(**SHORT | {"evaluations": 6}, patience=2)
    monkeypatch.setattr(engine, "evaluate", Scores([*aps, 0.7]))
    whole = train(config, tmp_path / "whole", quiet())
    monkeypatch.setattr(engine, "evaluate", Scores(aps[:4]))
    with pytest.raises(Interrupted, match="stopped at step 4 of 6"):
        train(config, tmp_path / "run", quiet(step=Stop(4)))
    monkeypatch.setattr(engine, "evaluate", Scores([aps[4], 0.7]))
    again = resume(tmp_path / "run", quiet())
    assert_same(again.folder, whole.folder)
    assert again.kept == whole.kept
    names = [{path.name for path in (folder / "snapshots").iterdir()} for folder in (again.folder, whole.folder)]
    assert names[0] == names[1]


# ---------------------------------------------------------------------------------------------- from another run


def on_shapes(folder, **options) -> TrainConfig:
    return TrainConfig(**SHORT | {"steps": 2, "size": 48, "data": str(folder.root), "workers": 0} | options)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "model.safetensors")


def test_a_run_begins_with_the_weights_of_another(folder, tmp_path):
    first = train(on_shapes(folder), tmp_path / "first", quiet())
    told = []
    # The rate is too small to move a weight: what it begins with is what it ends with.
    options = {"lr": 1e-30, "model": str(first.folder), "weight_decay": 0.0}
    second = train(on_shapes(folder, **options, size=None), tmp_path / "second", quiet(facts=told.append))
    assert dict(told[0])["begins from"] == f"the weights of {first.folder}"
    assert read_facts(second.folder).config.size == 48
    ours, theirs = weights_of(second.folder), weights_of(first.folder)
    learned = [name for name in ours if "running" not in name and "num_batches" not in name]
    assert learned and all(torch.equal(ours[name], theirs[name]) for name in learned)
    # Other classes, as many: the numbers of the old ones mean nothing.
    folder.content["categories"] = [{"id": 7, "name": "coin"}, {"id": 3, "name": "card"}]
    folder.save()
    told.clear()
    third = train(on_shapes(folder, **options), tmp_path / "third", quiet(facts=told.append))
    assert dict(told[0])["begins from"].endswith(", with a new classification: its classes are 2: box, disc")
    other = {
        name for name, tensor in weights_of(third.folder).items() if name in learned and (tensor != theirs[name]).any()
    }
    assert other == {f"head.{part}.2.{kind}" for part in ("label", "classes") for kind in ("weight", "bias")}
    # It is its own, whatever becomes of the other: evaluated, and gone on with.
    shutil.rmtree(first.folder)
    assert evaluate_run(third.folder, device="cpu")[0] == third.evaluation
    resume(third.folder, quiet(), steps=4)


def test_runs_that_do_not_fit_each_other(folder, cells, tmp_path):
    first = train(on_shapes(folder), tmp_path / "first", quiet())
    for number in range(6):
        image = tifffile.imread(cells / f"{number}.tif")
        tifffile.imwrite(cells / f"{number}.tif", np.stack([image] * 5, axis=-1))
    for options, message in (
        ({"norm": "group"}, f"--norm must be that of the weights[\\s\\S]*{first.folder} has batch"),
        ({"data": str(cells)}, "these have 5, those of .* had 3"),
    ):
        with pytest.raises(MaskLossError, match=message):
            train(on_shapes(folder, **options, model=str(first.folder)), tmp_path / "second", quiet())
    assert not (tmp_path / "second").exists()


def test_rare_classes_weigh_more(folder, tmp_path):
    """Weights are 1 / sqrt(n), and 1 on average over the instances; a step in parts is the whole step."""
    box = folder.content["annotations"][1]
    more = [{**box, "id": 100 + number, "image_id": 100 + number % 6} for number in range(18)]
    folder.content["annotations"] += more
    folder.save()
    told = []
    config = on_shapes(folder, balance=True, norm="group", lr=3e-4, augment=False)
    whole = train(config, tmp_path / "whole", quiet(facts=told.append))
    weights = read_facts(whole.folder).class_weights
    source = open_source(config)
    counts = source.class_counts
    assert source.class_names == ["box", "disc"] and counts[0] > 3 * counts[1]
    assert weights[1] / weights[0] == pytest.approx(math.sqrt(counts[0] / counts[1]))
    assert sum(w * n for w, n in zip(weights, counts, strict=True)) == pytest.approx(sum(counts))
    plain = train(dataclasses.replace(config, balance=False), tmp_path / "plain", quiet())
    halves = train(dataclasses.replace(config, accumulate=2), tmp_path / "halves", quiet())
    moved = apart = 0.0
    for name, tensor in weights_of(whole.folder).items():
        torch.testing.assert_close(weights_of(halves.folder)[name], tensor, atol=1e-5, rtol=0)
        moved += float((tensor - weights_of(plain.folder)[name]).abs().sum())
        apart += float((tensor - weights_of(halves.folder)[name]).abs().sum())
    assert apart < 0.01 * moved
    with pytest.raises(MaskLossError, match="--balance needs classes that differ in number"):
        train(TrainConfig(**SHORT, balance=True), tmp_path / "digits", quiet())


# ------------------------------------------------------------------------------------------------ options from a file


def test_options_from_a_file(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("steps: 7\nlr: 3e-4\nnum-points: 32\nprecision: no\naugment: false\ngrid: null\nlog: wandb\n")
    expected = {"steps": 7, "lr": 3e-4, "num_points": 32, "precision": "no", "augment": False, "log": ("wandb",)}
    assert read_options(path) == expected
    TrainConfig(**read_options(path))
    for text, message in (
        ("stepz: 7", r"there is no stepz, did you mean steps\?"),
        ("- 7", "holds a list"),
        ("steps: [", "expected the node content"),
        ("7: 8", "there is no 7"),
    ):
        path.write_text(text)
        with pytest.raises(MaskLossError, match=message):
            read_options(path)
    path.write_text("steps: many")
    with pytest.raises(MaskLossError, match="--steps must be a whole number"):
        TrainConfig(**read_options(path))


def test_the_file_of_a_run_repeats_it(result, tmp_path):
    options = read_options(result.folder / "run.json")
    assert_same(train(TrainConfig(**options), tmp_path, quiet()).folder, result.folder)


# -------------------------------------------------------------------------------------------------------- lost workers


def readers(cells: Path) -> TrainConfig:
    return TrainConfig(**SHORT | {"steps": 30, "data": str(cells), "workers": 1, "checkpoint_every": 2})


class ToReader:
    """Sends a signal to the process that reads images."""

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number = at, number

    def __call__(self, progress) -> None:
        if progress.step == self.at:
            for child in multiprocessing.active_children():
                os.kill(child.pid, self.number)
                if self.number == signal.SIGKILL:
                    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # no step is taken before it is dead


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_reader_ends_a_run_with_one_sentence(cells, tmp_path, every_step_is_logged, at):
    hint = rf"go on with: maskloss train --resume {tmp_path}/run" if at > 2 else "no checkpoint yet: begin again"
    with pytest.raises(MaskLossError, match=rf"one that reads images has ended: [\s\S]*{hint}"):
        train(readers(cells), tmp_path / "run", quiet(step=ToReader(at, signal.SIGKILL)))
    assert (tmp_path / "run").exists() == (at > 2) and not multiprocessing.active_children()


def test_a_stopped_reader_is_not_waited_for_for_ever(cells, tmp_path, every_step_is_logged, monkeypatch):

    def stop(progress) -> None:
        ToReader(3, signal.SIGSTOP)(progress)
        if progress.step == 3:
            monkeypatch.setattr(scenes, "PATIENCE", -1)  # and a second for each of the four images

    with pytest.raises(MaskLossError, match=r"must keep all of its processes[\s\S]*read.* images ha[\s\S]*--resume"):
        train(readers(cells), tmp_path / "run", quiet(step=stop))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_readers_outlive_a_signal_to_all_processes(cells, tmp_path, every_step_is_logged, number):
    """As a terminal, systemd and Slurm send it: the main process ends its step, and needs them for that."""

    def to_all(progress) -> None:
        ToReader(3, number)(progress)
        Stop(4, number)(progress)

    with pytest.raises(Interrupted, match="stopped at step 4"):
        train(readers(cells), tmp_path / "run", quiet(step=to_all))
    assert not multiprocessing.active_children()


# ----------------------------------------------------------------------------------------------------------- a folder


def test_a_run_on_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.undo()  # this one is drawn
    # A name that would begin a formula, and one in a script that the font may lack.
    folder.content["categories"] = [{"id": 7, "name": "$a_{$"}, {"id": 3, "name": "箱 <b>"}]
    folder.save()
    config = TrainConfig(**SHORT | {"steps": 2, "size": 48, "data": str(folder.root), "workers": 0})
    told = []
    finished = train(config, tmp_path / "run", quiet(facts=told.append))
    assert finished.evaluation.scenes == 1 and set(finished.evaluation.by_class) == {"$a_{$", "箱 <b>"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "images of shapes" in page and "<b>box" not in page and "箱 &lt;b&gt;" in page
    assert dict(told[0])["images"] == "5 for training, 1 held out"
    folder.content["categories"][0]["name"] = "circle"
    folder.save()
    with pytest.raises(MaskLossError, match=r"classes of the run[\s\S]*the data have"):
        evaluate_run(tmp_path / "run", str(folder.root), device="cpu")


def test_a_folder_learns(folder):
    """On discs and boxes the class is soon clear: a check that labels, masks and images of a folder belong together."""
    from maskloss.distributed import step_totals
    from maskloss.lab.models.learners import Compact
    from maskloss.lab.models.registry import open_source

    config = TrainConfig(data=str(folder.root), size=32, batch_size=5, num_points=128, augment=False)
    source = open_source(config)
    learner = Compact().build(Compact().resolve(config, source, 1), source.class_names, 3, trained=True)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    for step in range(60):
        batch = source.batch(step, range(5), 5, 0)
        losses = learner(batch, step_totals([batch.masks.num_targets], learner.num_queries), step)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert float(losses.terms["loss_class"]) < 0.3 and float(losses.terms["loss_dice"]) < 0.3


def test_label_maps_with_workers_accumulation_and_a_crop(cells, tmp_path):
    config = TrainConfig(
        **SHORT | {"steps": 4, "data": str(cells), "crop": 32, "workers": 2, "accumulate": 2, "batch_size": 4}
    )
    one = train(config, tmp_path / "one", quiet())
    assert one.evaluation.matching and read_facts(one.folder).config.norm == "group"
    other = train(dataclasses.replace(config, workers=0), tmp_path / "other", quiet())
    assert_same(one.folder, other.folder)
    [name] = (one.folder / "held_out.txt").read_text().split()
    assert (cells / name).is_file()
    again = dataclasses.replace(config, val=str(one.folder / "held_out.txt"))
    assert [Path(each).name for each in open_source(again).held_out_files] == [Path(name).name]


def test_a_broken_image_is_left_out_of_a_run_and_named(cells, tmp_path):
    broken = cells / "0.tif"
    broken.write_bytes(broken.read_bytes()[:200])
    config = TrainConfig(**SHORT | {"steps": 1, "data": str(cells), "workers": 0})
    with pytest.raises(MaskLossError, match=r"0\.tif"):
        train(config, tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()
    told = []
    train(dataclasses.replace(config, on_error="skip"), tmp_path / "run", quiet(facts=told.append))
    assert "0.tif" in dict(told[0])["left out"]


def test_micro_batches_add_up_to_the_step(cells, tmp_path):
    """With groups for normalization, the gradient of two micro-batches is that of the whole step."""
    states = []
    for accumulate in (1, 2):
        config = TrainConfig(
            # AdamW divides a gradient by its own size, so where it is all but zero, its rounding counts.
            **SHORT | {"steps": 3, "data": str(cells), "workers": 0, "norm": "group", "accumulate": accumulate},
            lr=3e-4,
        )
        finished = train(config, tmp_path / str(accumulate), quiet())
        states.append(read_tensors(finished.folder / "model.safetensors"))
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- options


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(step / 100) for step in range(1, 101)]
    assert rates.index(max(rates)) == 4 and max(rates) == 1
    assert rates[-1] == pytest.approx(0, abs=1e-9) and all(rate >= 0 for rate in rates)
    assert schedule(0.5, "constant") == schedule(1, "constant") == 1
    assert schedule(0.525, "linear", 0.05) == pytest.approx(0.5) and schedule(1, "linear") == 0
    assert schedule(0.01, warmup=0) > 0.99 and schedule(1, "constant", 1) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1000000016}, "--size must be a whole number from 16 to 4,096"),
        ({"num_points": 10**11}, "--num-points must be a whole number from 1 to 1,000,000"),
        ({"grid": 1000}, "--grid must be a whole number from 1 to 64"),
        ({"threads": 5000}, "--threads must be a whole number from 1 to"),
        ({"steps": 0}, "--steps must be a whole number"),
        ({"batch_size": 2.5}, "--batch-size must be a whole number"),
        ({"batch_size": 5, "accumulate": 2}, "--batch-size must be a multiple of --accumulate"),
        ({"lr": 0.0}, "--lr must be a finite number, above 0"),
        ({"lr": float("nan")}, "--lr must be a finite number"),
        ({"weight_decay": -1.0}, "--weight-decay must be a finite number, at least 0"),
        ({"warmup": 1.5}, "--warmup must be a finite number from 0 to 1"),
        ({"schedule": "steps"}, "--schedule must be one of cosine, linear, constant"),
        ({"on_error": "ignore"}, "--on-error must be one of"),
        ({"data": ""}, "--data must be a name"),
        ({"log": 5}, r"--log must be some of [\s\S]*got 5"),
        ({"log": [{"a": 1}]}, "--log must be some of"),
        ({"seed": -1}, "--seed must be a whole number"),
        ({"seed": 2**31}, "--seed must be a whole number from 0"),
        ({"threads": 0}, "--threads must be a whole number"),
        ({"device": "abacus"}, "--device must be one that torch knows"),
        ({"device": "meta"}, "--device must be one of cpu, cuda, mps"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(MaskLossError, match=message):
        TrainConfig(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(MaskLossError, match="torch sees no CUDA device"):
        TrainConfig(device="cuda")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is a GPU of Apple")
def test_a_device_of_apple_that_is_not_there():
    with pytest.raises(MaskLossError, match=r"torch sees no GPU of Apple[\s\S]*take --device cpu"):
        TrainConfig(device="mps")


def test_an_unknown_option():
    with pytest.raises(MaskLossError, match="there is no color"):
        TrainConfig.from_dict({"color": "red"})


def test_a_size_that_the_compact_model_cannot_halve(tmp_path):
    """Said before the data are read."""
    with pytest.raises(MaskLossError, match="--size must be a multiple of 16"):
        train(TrainConfig(size=60, data=str(tmp_path / "nowhere"), device="cpu"), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_more_instances_than_queries(tmp_path):
    with pytest.raises(MaskLossError, match=r"a scene has up to 5, the model 4[\s\S]*--grid 4"):
        train(TrainConfig(**SHORT, grid=2), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_a_report_says_what_the_run_was(result):
    page = (result.folder / "report.html").read_text()
    assert "http" not in page and "$" not in page
    assert f"{result.evaluation.ap50:.3f}" in page and page.count('src="data:image/png;base64,') > 20
    for heading in ("What was learned from", "Where the loss looked", "What is hardest", "AP by size"):
        assert heading in page
    assert re.search(r"<dt>image sizes</dt><dd>32 x 32</dd>", page)
