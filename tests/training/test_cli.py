"""`maskloss train` from end to end."""

from __future__ import annotations

import re

import pytest

from maskloss.cli import main

SHORT = ["--steps", "4", "--batch-size", "2", "--held-out", "6", "--evaluations", "1", "--num-points", "32"]


def test_a_run_says_how_good_it_is_and_where_it_is(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *SHORT, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^AP50 \d\.\d{3}  AP \d\.\d{3}  AP75 \d\.\d{3}  mean IoU \d\.\d{3}", printed, re.MULTILINE)
    for path in out.iterdir():
        assert str(path) in printed
    assert main(["train", "--evaluate", str(out / "model.safetensors")]) == 0
    assert "on 6 held-out scenes" in capsys.readouterr().out


def test_without_out_a_run_goes_to_a_folder_named_after_the_time(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SHORT]) == 0
    [run] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)


def test_a_folder_of_ones_own(folder, tmp_path, capsys):
    assert main(["train", *SHORT, "--size", "32", "--data", str(folder.root), "--out", str(tmp_path / "run")]) == 0
    assert "AP50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "there is no folder nowhere"),
        (["--size", "50"], "size must be a multiple of 16"),
        (["--evaluate", "nothing.safetensors"], "there is no file nothing.safetensors"),
    ],
)
def test_input_that_does_not_work(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert not list(tmp_path.iterdir())


def test_an_option_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--colour", "red"])
    assert stopped.value.code == 2 and "--colour" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--steps", "5"], ["--out", "there"]])
def test_evaluating_takes_no_options_of_training(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--evaluate", "model.safetensors", *option])
    assert stopped.value.code == 2 and "--evaluate goes with --data only" in capsys.readouterr().err


def test_a_missing_package_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert main(["train", *SHORT, "--out", str(tmp_path)]) == 2
    assert "pip install 'maskloss[train]'" in capsys.readouterr().err


def test_every_option_of_the_configuration_can_be_given():
    import dataclasses

    from maskloss.cli import _TRAIN_OPTIONS
    from maskloss.training.config import TrainConfig

    assert list(_TRAIN_OPTIONS) == [field.name for field in dataclasses.fields(TrainConfig)]


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "(default: 64)" in printed and "None" not in printed
