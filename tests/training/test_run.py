"""A run: the same to the bit when repeated, complete in what it writes, and stopped early where it cannot work."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from maskloss import MaskLossError
from maskloss.training.config import TrainConfig
from maskloss.training.digits import DigitScenes
from maskloss.training.evaluate import predict
from maskloss.training.run import CHECKPOINT, Listener, Result, Session, evaluate_checkpoint, load, schedule, train

SHORT = {"steps": 6, "batch_size": 4, "held_out": 12, "evaluations": 2, "num_points": 64, "threads": 2}
SILENT = Listener(lambda _: None, lambda _: None, lambda _: None)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Result:
    return train(TrainConfig(**SHORT), tmp_path_factory.mktemp("run") / "new", SILENT)


def test_a_run_repeats_itself_to_the_bit(result, tmp_path):
    again = train(TrainConfig(**SHORT), tmp_path, SILENT)
    for name in (CHECKPOINT, "metrics.jsonl", "config.json"):
        assert (again.folder / name).read_bytes() == (result.folder / name).read_bytes(), name
    assert again.evaluation == result.evaluation


def test_another_seed_is_another_run(result, tmp_path):
    other = train(TrainConfig(**SHORT, seed=1), tmp_path, SILENT)
    for name in (CHECKPOINT, "metrics.jsonl"):
        assert (other.folder / name).read_bytes() != (result.folder / name).read_bytes(), name


def test_a_run_writes_everything_that_it_names(result):
    assert {path.name for path in result.files} == {
        "report.html",
        "overview.png",
        "curves.png",
        "predictions.png",
        "points.png",
        "model.safetensors",
        "metrics.jsonl",
        "summary.json",
        "config.json",
    }
    assert sorted(result.files) == sorted(result.folder.iterdir())
    for path in result.files:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 600 and len(image.convert("L").getcolors()) > 50


def test_metrics_hold_the_terms_of_every_layer_and_the_scores(result):
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    [losses] = [line for line in lines if "total" in line]
    assert losses["step"] == 6
    assert {f"loss_{term}{layer}" for term in ("class", "mask", "dice") for layer in ("", "_0", "_1")} <= set(losses)
    assert [line["step"] for line in lines if "held_out" in line] == [0, 3, 6]
    config = json.loads((result.folder / "config.json").read_text())
    assert TrainConfig.from_dict(config) == TrainConfig(**SHORT)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["evaluation"] == result.evaluation.as_dict()


def test_the_report_needs_no_other_file(result):
    page = (result.folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert "http" not in page and "$" not in page
    assert f"{result.evaluation.ap50:.3f}" in page


def test_the_loss_falls():
    """Forty steps on the same eight scenes."""
    source = DigitScenes(64, 4)
    fixed = source.batch(1, 8, 0)
    source.batch = lambda *_: fixed
    session = Session(TrainConfig(steps=40, batch_size=8, num_points=128, threads=2), source)
    totals = [float(session.step(step)["total"]) for step in range(1, 41)]
    assert sum(totals[-5:]) < 0.6 * sum(totals[:5])


def test_a_checkpoint_predicts_as_the_model_did(result):
    loaded = load(result.folder / CHECKPOINT)
    assert loaded.class_names == list("0123456789") and loaded.config == TrainConfig(**SHORT)
    _, _, evaluation = evaluate_checkpoint(result.folder / CHECKPOINT, None)
    assert evaluation.instances == result.evaluation.instances
    assert evaluation.ap == pytest.approx(result.evaluation.ap, abs=1e-6)


def test_predicting_leaves_the_model_in_training(result):
    model = load(result.folder / CHECKPOINT).model.train()
    state = {name: each.clone() for name, each in model.state_dict().items()}
    predict(model, DigitScenes(64, 3).held_out, torch.device("cpu"))
    assert model.training
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())


def test_a_run_on_a_folder(folder, tmp_path):
    config = TrainConfig(**SHORT | {"steps": 2, "size": 48, "data": str(folder.root)})
    result = train(config, tmp_path / "run", SILENT)
    assert result.evaluation.scenes == 1 and set(result.evaluation.class_ap50) == {"box", "disc"}
    assert "images of shapes" in (tmp_path / "run" / "report.html").read_text()
    folder.content["categories"][0]["name"] = "circle"
    folder.save()
    with pytest.raises(MaskLossError, match=r"classes of the checkpoint[\s\S]*knows box, disc"):
        evaluate_checkpoint(result.folder / CHECKPOINT, str(folder.root))


def test_a_folder_learns(folder):
    """On discs and boxes the class is soon clear: a check that labels, masks and images of a folder belong together."""
    from maskloss.training.run import open_source

    config = TrainConfig(data=str(folder.root), steps=60, size=32, batch_size=5, num_points=128, threads=2)
    session = Session(config, open_source(config))
    terms = [session.step(step) for step in range(1, 61)]
    assert float(terms[-1]["loss_class"]) < 0.25 and float(terms[-1]["loss_dice"]) < 0.25


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("results")
    with pytest.raises(MaskLossError, match="is in use"):
        train(TrainConfig(**SHORT), tmp_path, SILENT)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_more_instances_than_queries(tmp_path):
    with pytest.raises(MaskLossError, match=r"5 instances, and grid=2 makes 4 queries[\s\S]*--grid 4"):
        train(TrainConfig(**SHORT, grid=2), tmp_path / "run", SILENT)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(MaskLossError, match=r"it is nan at step 6[\s\S]*lower --lr"):
        train(TrainConfig(**SHORT, lr=1e30), tmp_path, SILENT)


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(MaskLossError, match="there is no file"):
        load(path)
    path.write_text("weights")
    with pytest.raises(MaskLossError, match="must be one of maskloss train"):
        load(path)


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(step / 100) for step in range(1, 101)]
    assert rates.index(max(rates)) == 4 and max(rates) == 1
    assert rates[-1] == pytest.approx(0, abs=1e-9) and all(rate >= 0 for rate in rates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 60}, "size must be a multiple of 16"),
        ({"steps": 0}, "steps must be an integer, at least 1"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"lr": 0.0}, "lr must be a finite number, above 0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number, at least 0"),
        ({"seed": -1}, "seed must be an integer, at least 0"),
        ({"seed": 2**31}, r"seed must be below 2\^31"),
        ({"threads": 0}, "threads must be an integer"),
        ({"device": "abacus"}, "device must be one that torch knows"),
        ({"device": "meta"}, "device must be cpu or cuda"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(MaskLossError, match=message):
        TrainConfig(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(MaskLossError, match="torch sees no CUDA device"):
        TrainConfig(device="cuda")


def test_an_unknown_option():
    with pytest.raises(MaskLossError, match="unknown: colour"):
        TrainConfig.from_dict({"colour": "red"})
