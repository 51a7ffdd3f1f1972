"""The model of a run: from Python, and what `evaluate` and `predict` write."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pycocotools import mask as codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lab.conftest import CocoFolder, run_once
from maskloss import MaskLossError
from maskloss.lab import load_run
from maskloss.lab.cli import main
from maskloss.lab.commands import evaluate as evaluate_command
from maskloss.lab.config import TrainConfig
from maskloss.lab.results.predict import _known_ids, predict_images
from maskloss.lab.results.scoring import evaluate_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps on photographs with two classes."""
    root = tmp_path_factory.mktemp("trained")
    folder = CocoFolder(root / "shapes")
    config = TrainConfig(data=str(folder.root), steps=2, batch_size=2, size=32, evaluations=1, device="cpu", workers=0)
    return run_once(config, root / "run")


def test_predict_gives_arrays(run):
    loaded = load_run(run, device="cpu")
    assert loaded.classes == ["box", "disc"] and "the compact model" in repr(loaded)
    path = run.parent / "shapes" / "images" / "0.png"
    found = loaded.predict(path, threshold=0)
    count = len(found)
    assert count and found.masks.shape == (count, 40, 60) and found.masks.dtype == bool
    assert found.scores.shape == (count,) and (np.diff(found.scores) <= 0).all()
    assert found.classes.tolist() == [loaded.classes[label] for label in found.labels]
    assert found.label_map().shape == (40, 60)
    for mask, box, rle in zip(found.masks, found.boxes, found.rle(), strict=True):
        left, top, right, bottom = box
        assert mask.sum() == mask[top:bottom, left:right].sum() and np.array_equal(codec.decode(rle), mask)
    kept = loaded.predict(path, threshold=float(found.scores[0]))
    assert kept.scores.tolist() == [score for score in found.scores if score >= found.scores[0]]
    nothing = loaded.predict(path, threshold=1.0)
    assert len(nothing) == 0 and nothing.masks.shape == (0, 40, 60) and nothing.boxes.shape == (0, 4)


def test_a_path_an_array_a_tensor_and_an_image_of_pillow_are_one(run):
    loaded = load_run(run, device="cpu")
    path = run.parent / "shapes" / "images" / "0.png"
    with Image.open(path) as opened:
        image = opened.copy()
    pixels = np.asarray(image)
    for same in (str(path), image, pixels, image.convert("RGBA")):
        assert torch.equal(loaded.read(same), loaded.read(path))
    gray = loaded.read(pixels[..., 0])
    assert gray.shape == (3, 40, 60) and torch.equal(gray[0], gray[2])
    floats = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(loaded.read(floats), loaded.read(floats.permute(1, 2, 0).numpy()))
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    assert loaded.read(turned).shape == (3, 60, 40)


def test_the_same_as_on_the_command_line(run, tmp_path):
    path = run.parent / "shapes" / "images" / "3.png"
    predict_images(run, [path], tmp_path / "out", device="cpu", threshold=0.01)
    listed = json.loads((tmp_path / "out" / "predictions.json").read_text())
    found = load_run(run, device="cpu").predict(path, threshold=0)
    assert [entry["score"] for entry in listed] == found.scores.tolist()
    assert [entry["category_id"] for entry in listed] == [(3, 7)[label] for label in found.labels]
    # The number in the label map is where its mask has it, or 0.
    labels = tifffile.imread(tmp_path / "out" / "3_found.tif")
    numbers = [entry["label_map_number"] for entry in listed]
    assert sorted(number for number in numbers if number) == list(range(1, labels.max() + 1))
    for number, mask in zip(numbers, found.masks, strict=True):
        assert not number or mask[labels == number].all()
    assert all(entry["label_map_number"] == 0 for entry in listed if entry["score"] < 0.01)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "nowhere.png: no such file"),
        (np.zeros((4, 5, 7), np.uint8), "the image has 7, the data set has 3"),
        (np.zeros((2, 3, 4, 5)), "an image must have one plane"),
        (np.array([["a"]]), "an image must be a path, an array or a tensor"),
        (np.full((4, 4), np.nan), "not finite"),
        (None, "an image must be a path, an array or a tensor"),
    ],
)
def test_what_is_no_image(run, image, message):
    with pytest.raises(MaskLossError, match=message):
        load_run(run, device="cpu").predict(image)


def test_what_is_no_run(tmp_path):
    with pytest.raises(MaskLossError, match=r"load_run: a run must be a folder[\s\S]*has no run\.json"):
        load_run(tmp_path)


def test_tiles_are_cut_where_asked(run):
    assert load_run(run, device="cpu", tile=32).predictor.tiles(64, 40) != load_run(run).predictor.tiles(64, 40)
    with pytest.raises(MaskLossError, match="at least 16"):
        load_run(run, tile=8)


def test_evaluate_writes_what_pycocotools_scores_alike(run, tmp_path, capsys):
    """The ids are those of the annotations: the predictions load with them too."""
    out, annotations = tmp_path / "out", run.parent / "shapes" / "instances.json"
    words = ["evaluate", str(run), "--data", str(run.parent / "shapes"), "--device", "cpu", "--out", str(out)]
    assert main(words) == 0
    scores = json.loads((out / "scores.json").read_text())
    for truth in (out / "truth.json", annotations):
        loaded = COCO(str(truth))
        for entry in loaded.anns.values():
            entry["area"] = int(loaded.annToMask(entry).sum())
        judge = COCOeval(loaded, loaded.loadRes(str(out / "predictions.json")), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert judge.stats[:3] == pytest.approx([scores["ap"], scores["ap50"], scores["ap75"]])
    assert {entry["image_id"] for entry in json.loads((out / "predictions.json").read_text())} == set(range(100, 106))
    assert {path.name for path in (out / "pictures").iterdir()} == {f"{number}.png" for number in range(6)}
    with Image.open(out / "pictures" / "0.png") as picture:
        assert picture.size == (2 * 540 + 8, 360)
    assert {path.name for path in out.iterdir()} == {
        *("scores.json", "predictions.json", "truth.json", "pictures"),
        *("precision-recall.png", "confusion.png"),
    }
    capsys.readouterr()
    assert main(words) == 2
    assert "--out must be a new folder" in capsys.readouterr().err


def test_evaluate_shows_a_table_by_class_and_a_word_of_caution(run, capsys):
    assert main(["evaluate", str(run), "--data", str(run.parent / "shapes"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^class +AP +AP50 +precision +recall +images +instances +found$", printed, re.MULTILINE)
    for name in ("box ", "disc"):
        assert re.search(rf"^{name}  [0-9. –]+ 6 +6 +\d+$", printed, re.MULTILINE), printed
    assert "AP50 on other such images" in printed and "precision at recall  0.1 " in printed
    assert "caution: all scores rest on 6 images" in printed and "not finished" not in printed


def test_evaluate_says_how_far_a_run_is_that_goes_on(run, tmp_path, capsys, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"

    def score(*arguments, **options):
        found = evaluate_run(*arguments, **options)
        shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000003")
        return found

    monkeypatch.setattr(evaluate_command, "evaluate_run", score)
    for name in ("summary.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "not finished, at step 2 of 2: these are the scores of step 2" in capsys.readouterr().out


def test_predict_takes_ids_from_annotations(run, tmp_path, capsys):
    images, annotations = run.parent / "shapes" / "images", run.parent / "shapes" / "instances.json"
    words = ["predict", str(run), str(images / "3.png"), str(images / "1.png"), "--device", "cpu"]
    assert main([*words, "--ids", str(annotations), "--out", str(tmp_path / "out")]) == 0
    assert {entry["image_id"] for entry in json.loads((tmp_path / "out" / "predictions.json").read_text())} == {
        103,
        101,
    }
    truth = COCO(str(annotations))
    assert truth.loadRes(str(tmp_path / "out" / "predictions.json")).getImgIds()
    every = [entry["score"] for entry in json.loads((tmp_path / "out" / "predictions.json").read_text())]
    least = sorted(every)[len(every) // 2]
    assert main([*words, "--least-score", str(least), "--out", str(tmp_path / "few")]) == 0
    scores = [entry["score"] for entry in json.loads((tmp_path / "few" / "predictions.json").read_text())]
    assert scores == [score for score in every if score >= least] and len(scores) < len(every)
    capsys.readouterr()
    content = json.loads(annotations.read_text())
    content["images"] = [each for each in content["images"] if each["id"] != 101]
    (tmp_path / "fewer.json").write_text(json.dumps(content))
    assert main([*words, "--ids", str(tmp_path / "fewer.json"), "--out", str(tmp_path / "none")]) == 2
    assert "has no images of the name 1.png" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_ids_of_images_of_one_name_are_told_apart_by_their_folders(tmp_path):
    listed = [{"file_name": name, "id": number} for number, name in enumerate(["a/x.png", "b\\x.png", "y.png"])]
    (tmp_path / "ids.json").write_text(json.dumps({"images": listed}))
    images = [tmp_path / "b" / "x.png", Path("y.png"), tmp_path / "a" / "x.png"]
    assert _known_ids(tmp_path / "ids.json", images) == [1, 2, 0]
    for wrong in ([tmp_path / "x.png"], [Path("y.png"), tmp_path / "y.png"]):
        with pytest.raises(MaskLossError, match="--ids must be annotations"):
            _known_ids(tmp_path / "ids.json", wrong)


def test_the_example_of_the_documentation(run, tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs" / "training.md"
    block = re.compile(r"^```python\n(from maskloss\.lab import load_run.*?)^```$", re.MULTILINE | re.DOTALL)
    [code] = block.findall(page.read_text())
    shutil.copytree(run, tmp_path / "runs" / "cells")
    shutil.copy(run.parent / "shapes" / "images" / "0.png", tmp_path / "plate.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code.replace("threshold=0.5", "threshold=0.0"), str(page), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(names["found"]) > 0 and names["labels"].shape == (40, 60)
    assert all(re.fullmatch(r"(box|disc): 0\.\d\d, \d+ pixels", line) for line in printed)
