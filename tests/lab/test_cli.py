"""The commands: what they print, what they leave, and the one sentence in which every error ends."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from pycocotools import mask as codec
from pycocotools.coco import COCO

from lab.conftest import run_once, write_cells
from maskloss.lab.cli import main
from maskloss.lab.commands import train as train_command
from maskloss.lab.config import LOGGERS, TrainConfig, fields
from maskloss.lab.runfolder import read_facts

SHORT = {"--steps": 3, "--batch-size": 2, "--held-out": 4, "--evaluations": 1, "--num-points": 32, "--device": "cpu"}
pytestmark = pytest.mark.usefixtures("no_pictures")


def words(**more) -> list[str]:
    options = SHORT | {f"--{name.replace('_', '-')}": value for name, value in more.items()}
    return [str(part) for pair in options.items() for part in pair]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on label maps."""
    root = tmp_path_factory.mktemp("cli")
    write_cells(root / "cells")
    config = TrainConfig(
        data=str(root / "cells"), steps=3, batch_size=2, evaluations=1, num_points=32, workers=0, device="cpu"
    )
    return run_once(config, root / "run")


def test_a_run_says_what_it_does_how_good_it_is_and_where_it_is(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *words(out=out), "--log", "tensorboard"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^AP50 \d\.\d{3}  AP \d\.\d{3}  AP75 \d\.\d{3}  mean IoU \d\.\d{3}", printed, re.MULTILINE)
    assert re.search(r"model  the compact model, 16 queries", printed)
    assert str(out / "report.html") in printed
    [events] = (out / "tensorboard").iterdir()
    assert events.stat().st_size > 200


def test_a_logger_that_is_not_installed(tmp_path, capsys, monkeypatch):
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["tensorboard"])
    assert main(["train", *words(out=tmp_path / "run"), "--log", "tensorboard", "wandb"]) == 2
    assert one_sentence(capsys).strip().endswith("wandb is not installed (pip install wandb)")
    assert main(["train", "--log", "paper"]) == 2
    assert "--log must be some of tensorboard, wandb, mlflow" in one_sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_loggers_are_told_all_and_end_with_the_run(tmp_path, monkeypatch, capsys):
    import accelerate.tracking

    told = []

    class Tracker:
        requires_logging_directory = False

        def __init__(self, project, **options):
            told.append(("made", project, options))

        def start(self):
            told.append("start")

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step):
            told.append((step, sorted(values)))

        def finish(self):
            told.append("finish")

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["wandb"])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    out = tmp_path / "run"
    assert main(["train", *words(out=out), "--log", "wandb"]) == 0
    made, start, config, losses, scores, finish = told
    assert made == ("made", "maskloss", {"name": "run"}) and (start, finish) == ("start", "finish")
    assert config["steps"] == 3 and "data" not in config
    assert losses[0] == scores[0] == 3 and {"loss/total", "loss/loss_mask", "speed/images per second"} <= set(losses[1])
    assert scores[1] == ["held out/ap", "held out/ap50", "held out/ap75", "held out/mean_iou"]
    assert read_facts(out).config.log == ("wandb",)
    monkeypatch.setattr(Tracker, "start", lambda _: 1 / 0)
    capsys.readouterr()
    assert main(["train", *words(out=tmp_path / "other"), "--log", "wandb"]) == 2
    assert "a logger must be able to begin: wandb: division by zero" in one_sentence(capsys)
    assert not (tmp_path / "other").exists()


def test_without_out_a_run_goes_to_a_folder_named_after_the_time(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words(steps=1)]) == 0
    [made] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", made.name)


def test_evaluate(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--device", "cpu", "--json", str(tmp_path / "scores.json")]) == 0
    printed = capsys.readouterr().out
    assert "on 1 image" in printed and "AP by size  small" in printed and "TP/(TP+FP+FN) by IoU  0.50" in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == json.loads((run / "summary.json").read_text())["evaluation"]


def test_evaluate_on_other_data(run, tmp_path, capsys):
    write_cells(tmp_path / "other", 11)
    assert main(["evaluate", str(run), "--data", str(tmp_path / "other"), "--device", "cpu"]) == 0
    assert "on 11 images" in capsys.readouterr().out


def test_predict(run, tmp_path, capsys):
    """A file, a folder with one more of that name, and a large one that is cut."""
    tifffile.imwrite(tmp_path / "large.tif", np.random.default_rng(0).integers(0, 4000, (150, 110), dtype=np.uint16))
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photos" / "large.png")
    out = tmp_path / "out"
    paths = [str(tmp_path / "large.tif"), str(tmp_path / "photos")]
    assert main(["predict", str(run), *paths, "--out", str(out), "--threshold", "0", "--device", "cpu"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "large_found.tif",
        "large_overlay.png",
        "large-2_found.tif",
        "large-2_overlay.png",
        "predictions.json",
        "images.json",
    }
    labels = tifffile.imread(out / "large_found.tif")
    assert labels.shape == (150, 110) and labels.dtype == np.uint16
    with Image.open(out / "large_overlay.png") as overlay:
        assert overlay.height / overlay.width == pytest.approx(150 / 110, abs=0.01)
    results = json.loads((out / "predictions.json").read_text())
    assert {entry["image_id"] for entry in results} <= {1, 2} and results
    for entry in results[:5]:
        mask = codec.decode(entry["segmentation"])
        left, top, width, height = entry["bbox"]
        assert mask.sum() == mask[top : top + height, left : left + width].sum() > 0
        assert entry["category_id"] == 1 and 0 <= entry["score"] <= 1
    assert "large.tif: " in capsys.readouterr().out
    # COCO's own reader takes both files together.
    truth = COCO(str(out / "images.json"))
    assert len(truth.loadRes(str(out / "predictions.json")).getAnnIds()) == len(results)
    assert [each["label_map"] for each in truth.loadImgs([1, 2])] == ["large_found.tif", "large-2_found.tif"]


@pytest.fixture
def data(tmp_path, capsys):
    """Images with the truth beside them, and a function that predicts and says what it did to a folder."""
    return write_cells(tmp_path / "data", 3)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def predicted(run, out, *images) -> int:
    return main(["predict", str(run), *map(str, images), "--out", str(out), "--device", "cpu"])


def test_predict_writes_into_no_folder_of_data(run, data, capsys):
    """`x_masks.tif` beside `x.tif` is the truth, and a picture beside images is taken for one of them."""
    before = contents(data)
    assert predicted(run, data, data / "0.tif") == 2
    assert "--out must be a folder apart from images" in one_sentence(capsys)
    assert contents(data) == before
    learned_from = json.loads((run / "run.json").read_text())["config"]["data"]
    assert predicted(run, learned_from, data / "0.tif") == 2
    assert "--out must be a folder apart from data" in one_sentence(capsys)


@pytest.mark.parametrize("name", ["0_found.tif", "0_overlay.png", "predictions.json", "images.json"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_predict_writes_over_nothing_but_its_own_files(run, data, tmp_path, capsys, name, kind):
    out = tmp_path / "out"
    out.mkdir()
    if kind == "file":
        (out / name).write_text("precious")
    else:
        (tmp_path / "precious").write_text("precious")
        (out / name).symlink_to(tmp_path / "precious")
    assert predicted(run, out, data / "0.tif") == 2
    assert f"{out / name} is not one of them" in one_sentence(capsys)
    assert (out / name).read_text() == "precious" and len(contents(out)) == 1


def test_predict_knows_its_own_files(run, data, tmp_path, capsys, monkeypatch):
    """Of this call, of an earlier one, and of one that came to no end."""
    from maskloss.lab.results import predict as module

    out = tmp_path / "out"
    assert predicted(run, out, data / "0.tif") == 0
    assert predicted(run, out, data / "1.tif", data / "0.tif") == 0
    assert [each["file_name"] for each in json.loads((out / "images.json").read_text())["images"]] == ["1.tif", "0.tif"]

    def full(path, *_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "coco_results", full)
        assert predicted(run, out, data / "2.tif") == 2
    assert (out / "2_found.tif").is_file()
    assert predicted(run, out, data / "2.tif", data / "1.tif") == 0


def test_predict_takes_no_truth_for_an_image(run, data, tmp_path, capsys):
    assert predicted(run, tmp_path / "out", data) == 0
    printed = capsys.readouterr().out
    assert "left out: 3 label maps such as " in printed and len(contents(tmp_path / "out")) == 2 * 3 + 2


def test_evaluate_looks_at_its_file_before_it_scores(run, tmp_path, capsys, monkeypatch):
    from maskloss.lab.commands import evaluate as command

    monkeypatch.setattr(command, "evaluate_run", lambda *_, **__: pytest.fail("scored first"))
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("nowhere/a.json", "no such file"), ("", "is a folder"), ("pipe", "is a named pipe")):
        assert main(["evaluate", str(run), "--json", str(tmp_path / name)]) == 2
        assert message in one_sentence(capsys)


def test_predict_leaves_out_what_it_cannot_read(run, tmp_path, capsys):
    (tmp_path / "broken.png").write_text("no image")
    arguments = ["predict", str(run), str(tmp_path / "broken.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 2
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--on-error", "skip"]) == 0
    assert "left out: " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- errors


def one_sentence(capsys) -> str:
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ") and "Traceback" not in captured.err and "<" not in lines[0]
    return lines[0]


ERRORS = {
    "no folder of data": (["--data", "nowhere"], "there is no folder nowhere"),
    "a file as data": (["--data", "file"], "file is a file"),
    "an empty folder": (["--data", "empty"], "none was found in empty"),
    "a size": (["--size", "50"], "--size must be a multiple of 16: got 50"),
    "a large size": (["--size", "1000000016"], "--size must be a whole number"),
    "many threads": (["--threads", "5000"], "--threads must be a whole number"),
    "out is a file": (["--out", "file"], "file exists"),
    "out lies under a file": (["--out", "file/run"], "file exists"),
    "out is a dangling link": (["--out", "dangling"], "file exists"),
    "out is too long": (["--out", "a" * 300], "more than 255 characters"),
    "out is in use": (["--out", "full"], "it holds precious.txt"),
    "out cannot be written": (["--out", "/proc/run"], "--out must be a folder that can be written to"),
    "no model": (["--model", "empty", "--data", "empty"], "has no config.json"),
    "no such run": (["--resume", "nowhere"], "there is no folder nowhere"),
    "no run": (["--resume", "empty"], "empty has no run.json"),
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "lost")
    return tmp_path


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_train_are_one_sentence_and_leave_nothing(case, capsys, places):
    arguments, message = ERRORS[case]
    before = sorted(path.name for path in places.rglob("*"))
    assert main(["train", *arguments]) == 2
    assert message in one_sentence(capsys)
    assert sorted(path.name for path in places.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "there is no folder nowhere"),
        (["evaluate", "empty"], "has no run.json"),
        (["predict", "empty", "file"], "has no run.json"),
        (["predict", "empty", "lost.png"], "there is no file lost.png"),
        (["predict", "empty", "empty"], "a folder of images must hold some"),
        (["predict", "empty", "file", "--threshold", "7"], "--threshold must be a score from 0 to 1"),
    ],
)
def test_errors_of_the_others(arguments, message, capsys, places):
    assert main(arguments) == 2
    assert message in one_sentence(capsys)


def test_a_run_that_was_changed(run, tmp_path, capsys):
    facts = json.loads((run / "run.json").read_text())
    for changes, message in (
        ({"schema": 7}, "another version"),
        ({"classes": "abc"}, "of the wrong kind"),
        ({"channels": 10**30}, "of the wrong kind"),
        ({"config": {**facts["config"], "steps": -1}}, "--steps must be"),
        ({"config": 3}, "changed by hand"),
        ({"color": "red"}, "changed by hand"),
    ):
        (tmp_path / "run.json").write_text(json.dumps(facts | changes))
        assert main(["evaluate", str(tmp_path)]) == 2
        assert message in one_sentence(capsys)
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "no checkpoint yet" in one_sentence(capsys)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "must be a file of safetensors" in one_sentence(capsys)


def test_data_of_another_kind(run, capsys, folder):
    assert main(["evaluate", str(run), "--data", str(folder.root)]) == 2
    assert "the data must have the classes of the run" in one_sentence(capsys)


def test_a_full_disk(capsys, monkeypatch):
    from maskloss.lab.loop import run as module

    def full(*_, **__):
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr(module, "train", full)
    assert main(["train"]) == 2
    assert one_sentence(capsys) == "error: the disk is full: runs/x"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory(capsys, monkeypatch, error):
    from maskloss.lab.loop import run as module

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(module, "train", fails)
    assert main(["train"]) == 2
    assert "there is not enough memory" in one_sentence(capsys)


def test_what_should_never_happen_keeps_its_traceback(monkeypatch):
    from maskloss.lab.loop import run as module

    def fails(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(module, "train", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


def test_interrupted_anywhere(capsys, monkeypatch):
    from maskloss.lab.loop import run as module

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_options_that_do_not_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--color", "red"])
    assert stopped.value.code == 2 and "--color" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--lr", "0.1"], ["--out", "there"], ["--overwrite"], ["--no-augment"]])
def test_resuming_takes_no_options(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--resume", "run", *option])
    assert stopped.value.code == 2 and "--resume takes no options but --device" in capsys.readouterr().err


def test_a_missing_package_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert main(["train", *words(out=tmp_path)]) == 2
    assert "pip install 'maskloss[train]'" in one_sentence(capsys)


# --------------------------------------------------------------------------------------------------------------- help


def test_every_option_of_the_configuration_can_be_given():
    """Each option comes back as its own type, whatever it is called."""
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    nothing = parser.parse_args([])
    for name, kind, _, default, option in fields():
        assert getattr(nothing, name) is None and option.text
        value = {
            int: 32,
            float: 0.5,
            str: (option.choices or ("cpu",))[-1],
            bool: not default,
            tuple: (option.choices or ("cpu",))[:1],
        }[kind]
        flag = next(field.flag for field in fields() if field.name == name)
        typed = [] if kind is bool else value if kind is tuple else [str(value)]
        options = parser.parse_args([flag, *typed])
        assert kind(getattr(options, name)) == value and type(value) is kind
        assert getattr(TrainConfig(**{name: value, "batch_size": 32} | {name: value}), name) == value
    assert [field.name for field in dataclasses.fields(TrainConfig)] == [field.name for field in fields()]


def test_the_command_of_a_configuration_makes_it_again():
    config = TrainConfig(data="my cells", steps=7, lr=3e-4, augment=False, ema=True, log=LOGGERS[:2], device="cpu")
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    begun, command, *typed = shlex.split(config.command)
    assert (begun, command) == ("maskloss", "train")
    assert TrainConfig(**train_command.given(parser.parse_args(typed), fields())) == config


def test_the_documentation_lists_every_option():
    """The table in docs/training.md is this one: copy it from the failure where it differs."""
    rows = ["| option | default | what it does |", "| --- | --- | --- |"]
    for field in fields():
        value = f" {field.option.metavar}" if field.option.metavar else ""
        shown = "" if field.default is None or field.kind in {bool, tuple} else f"{field.default}"
        rows.append(f"| `{field.flag}{value}` | {shown} | {field.option.text} |")
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    table = "\n".join(rows)
    assert table in page, f"docs/training.md should have\n\n{table}\n"


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["predict"], ["bench"]])
def test_help_reads_well(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    printed = capsys.readouterr().out
    assert "None" not in printed and "TrainConfig" not in printed
    assert "examples:" in printed or command == ["bench"]
    assert max(len(line) for line in printed.splitlines()) <= 120
    if command == ["train"]:
        assert "(default: 16)" in printed and "label maps" in printed


def test_a_benchmark_looks_at_its_folder_before_it_measures(capsys, places):
    assert main(["bench", "--out", "file", "--quick"]) == 2
    assert "file exists" in one_sentence(capsys)


def test_options_from_a_file_and_the_command_line(tmp_path, capsys):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"epochs": 3, "lr": 1e-3, "augment": False, "ema": True}))
    given = ["--config", str(path), "--augment", "--no-ema"]
    # The command line wins: its steps over the file's epochs, too.
    assert main(["train", *words(out=tmp_path / "run", steps=2), *given]) == 0
    config = read_facts(tmp_path / "run").config
    assert (config.steps, config.epochs, config.lr, config.augment, config.ema) == (2, None, 1e-3, True, False)
    assert "kept the weights of step 2, the best of" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert read_facts(tmp_path / "run").config.steps == 3
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(tmp_path / "run"), *given])
    assert "takes no options but --device, --steps, --epochs, --patience" in capsys.readouterr().err
    path.write_text(json.dumps({"stepz": 3}))
    assert main(["train", "--config", str(path)]) == 2
    assert "there is no stepz, did you mean steps?" in one_sentence(capsys)


def test_a_run_can_be_used_from_elsewhere(tmp_path, monkeypatch, capsys):
    write_cells(tmp_path / "cells")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words(data="cells", out="run", workers=0, precision="bf16")]) == 0
    monkeypatch.chdir("/")
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "on 1 held-out image" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space", "report.html"), 2)])
def test_after_training_nothing_is_lost(capsys, monkeypatch, tmp_path, error, status):
    """Ctrl-C while the report is drawn, or a full disk."""
    from maskloss.lab.results import report

    def fails(*_):
        raise error

    monkeypatch.setattr(report, "write", fails)
    assert main(["train", *words(steps=1, out=tmp_path / "run")]) == status
    assert f"go on with: maskloss train --resume {tmp_path / 'run'}" in capsys.readouterr().err
    monkeypatch.setattr(report, "write", lambda folder, _: [folder / "report.html"])
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
