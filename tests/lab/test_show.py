"""`maskloss show`: what each source gives, and that the numbers are those of the criterion."""

from __future__ import annotations

import argparse
import json
import os
import re

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from lab.conftest import run_once, write_cells
from maskloss import MaskCriterion, PointSampling
from maskloss.lab.cli import main
from maskloss.lab.commands import show


def options(*arguments):
    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    return parser.parse_args([str(each) for each in arguments])


def shown(capsys, *arguments):
    assert main(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    assert main(["show", *map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def scene():
    """Five predictions of three instances, in another order, and the classes of both."""
    generator = torch.Generator().manual_seed(3)
    masks = torch.zeros(3, 40, 60, dtype=torch.bool)
    masks[0, 4:20, 5:25], masks[1, 18:38, 30:58], masks[2, 2:12, 40:52] = True, True, True
    small = torch.nn.functional.avg_pool2d(masks[:, None].float(), 2)[:, 0]
    logits = torch.cat([10 * (small - 0.5), torch.full((2, 20, 30), -3.0)])[[4, 2, 0, 3, 1]]
    labels = torch.tensor([1, 0, 1])
    return {
        "mask_logits": logits + 0.3 * torch.randn(logits.shape, generator=generator),
        "class_logits": torch.randn(5, 3, generator=generator),
        "masks": masks,
        "labels": labels,
    }


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    from maskloss.lab.config import TrainConfig

    config = TrainConfig(steps=2, batch_size=2, held_out=6, evaluations=1, num_points=64, workers=0)
    return run_once(config, tmp_path_factory.mktemp("show") / "digits")


def test_from_nothing(capsys, tmp_path):
    out = shown(capsys, "--out", tmp_path / "digits.png", "--dpi", 60)
    assert re.match(r"\d( \(\d\))? \(instance \d, query \d\): cross-entropy 0\.\d{4}, Dice 0\.\d{4}, total", out)
    with Image.open(tmp_path / "digits.png") as image:
        assert image.size[0] > 800 and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_the_same_command_writes_the_same_file(capsys, tmp_path):
    for name in ("a", "b"):
        shown(capsys, "--out", tmp_path / f"{name}.svg", "--num-points", 200, "--seed", 3)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_run_and_one_of_its_scenes(capsys, run_folder, tmp_path):
    subject = show.gather(options(run_folder, "--image", 3))
    assert subject.criterion.mask_loss.sampling.num_points == 64 and len(subject.masks) == len(subject.labels)
    _, found, text = show.draw(subject, 1, seed=8)
    truth = [{"masks": subject.masks, "labels": subject.labels}]
    out = subject.criterion(subject.class_logits[None], subject.mask_logits[None], truth, seed=8)
    [(_, targets)] = out.matches.pairs()
    place = targets.tolist().index(1)
    assert found.ce == pytest.approx(float(out.per_instance.ce[place]), rel=1e-5)
    assert found.dice == pytest.approx(float(out.per_instance.dice[place]), rel=1e-5)
    assert "(instance 1, " in text
    shown(capsys, run_folder, "--image", "scene 2", "--out", tmp_path / "run.pdf")
    assert (tmp_path / "run.pdf").read_bytes().startswith(b"%PDF")
    assert "there are 6" in refused(capsys, run_folder, "--image", "seven")


@pytest.mark.parametrize("form", ["pt", "npy"])
def test_a_prediction_and_its_truth(capsys, scene, tmp_path, form):
    prediction, target = tmp_path / f"prediction.{form}", tmp_path / f"target.{form}"
    for path, value in ((prediction, scene["mask_logits"]), (target, scene["masks"])):
        if form == "pt":
            torch.save(value, path)
        else:
            np.save(path, value.numpy())
    out = shown(capsys, "--prediction", prediction, "--target", target, "--out", tmp_path / "p.png", "--dpi", 50)
    # Without classes the masks alone decide, and they are clear; the largest instance is shown.
    assert out.startswith("target 1 (instance 1, query 4)")


def test_a_file_that_holds_everything(scene, tmp_path):
    torch.save({name: value[None] if "logits" in name else value for name, value in scene.items()}, tmp_path / "all.pt")
    subject = show.gather(options("--prediction", tmp_path / "all.pt", "--num-points", 500))
    figure, found, _ = show.draw(subject, 2, seed=4)
    criterion = MaskCriterion(2, sampling=PointSampling(num_points=500), backend="reference")
    truth = [{"masks": scene["masks"], "labels": scene["labels"]}]
    out = criterion(scene["class_logits"][None], scene["mask_logits"][None], truth, seed=4)
    [(queries, targets)] = out.matches.pairs()
    assert found.ce == pytest.approx(float(out.per_instance.ce[targets.tolist().index(2)]), rel=1e-5)
    rows = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert rows[:3] == [f"query {queries[targets.tolist().index(n)]}" for n in range(3)]


def test_a_label_map_is_a_truth_too(scene, tmp_path):
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    for number, mask in enumerate(scene["masks"]):
        labels[mask] = 3 * number + 5
    Image.fromarray(labels.numpy()).save(tmp_path / "labels.png")
    np.save(tmp_path / "prediction.npy", scene["mask_logits"].numpy())
    subject = show.gather(options("--prediction", tmp_path / "prediction.npy", "--target", tmp_path / "labels.png"))
    assert torch.equal(subject.masks, scene["masks"])


@pytest.fixture
def folder(tmp_path, scene):
    """A folder with COCO annotations: three instances, and a crowd."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (60, 40), (10, 120, 200)).save(tmp_path / "data" / "images" / "a.png")
    boxes = [(5, 4, 25, 20), (30, 18, 58, 38), (40, 2, 52, 12), (26, 0, 38, 10)]
    annotations = [
        {
            "id": number,
            "image_id": 7,
            "category_id": 20 - number % 2,
            "iscrowd": int(number == 3),
            "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        }
        for number, (x0, y0, x1, y1) in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": annotations,
        "categories": [{"id": 20, "name": "cat"}, {"id": 19, "name": "dog"}],
    }
    (tmp_path / "data" / "instances.json").write_text(json.dumps(content))
    np.save(tmp_path / "prediction.npy", scene["mask_logits"].numpy())
    return tmp_path


def test_an_image_of_a_folder(capsys, folder, scene):
    given = ("--prediction", folder / "prediction.npy", "--data", folder / "data", "--image")
    subject = show.gather(options(*given, "a.png"))
    assert torch.equal(subject.masks, scene["masks"]) and subject.names == ["cat", "dog", "cat (2)"]
    assert subject.ignore[:10, 26:38].all() and int(subject.ignore.sum()) == 120
    _, found, _ = show.draw(subject, None, seed=0)
    assert 0 < float((found.weight == 0).sum()) < 12544
    assert shown(capsys, *given, "a.png", "--out", folder / "a.png", "--dpi", 50).startswith("dog (instance 1")
    assert "has no annotated images of the name b.png" in refused(capsys, *given, "b.png")


def test_a_class_that_no_font_can_write_is_shown_by_its_number(capsys, folder, monkeypatch):
    from maskloss.lab.results import lettering

    usual = lettering._fonts_for(frozenset("cat"))[0]
    monkeypatch.setattr(lettering, "_fonts_for", lambda letters: (usual, frozenset("猫") & letters))
    annotations = folder / "data" / "instances.json"
    annotations.write_text(annotations.read_text().replace('"cat"', '"猫"'))
    given = ("--prediction", folder / "prediction.npy", "--data", folder / "data", "--image", "a.png")
    assert show.gather(options(*given)).names == ["class 20", "dog", "class 20 (2)"]
    arguments = [str(each) for each in (*given, "--out", folder / "a.png", "--dpi", 50)]
    assert main(["show", *arguments]) == 0
    assert (
        capsys.readouterr().err.count("no font of this machine has the letters of 猫: pictures show the numbers") == 1
    )


def test_a_run_on_a_folder(folder, tmp_path):
    """What is drawn is the square that the model saw, with the loss of the run."""
    from maskloss.lab.config import TrainConfig
    from maskloss.lab.loop.progress import Listener
    from maskloss.lab.loop.run import train

    content = json.loads((folder / "data" / "instances.json").read_text())
    content["images"].append({"id": 8, "file_name": "b.png", "height": 40, "width": 60})
    content["annotations"] += [{**each, "id": 10 + each["id"], "image_id": 8} for each in content["annotations"]]
    (folder / "data" / "instances.json").write_text(json.dumps(content))
    Image.new("RGB", (60, 40), (200, 120, 10)).save(folder / "data" / "images" / "b.png")
    config = TrainConfig(
        data=str(folder / "data"), size=32, steps=1, batch_size=2, evaluations=1, num_points=200, workers=0
    )
    train(config, tmp_path / "run", Listener.silent())
    subject = show.gather(options(tmp_path / "run"))
    _, found, _ = show.draw(subject, 0, seed=6)
    truth = [{"masks": subject.masks, "labels": subject.labels}]
    out = subject.criterion(subject.class_logits[None], subject.mask_logits[None], truth, seed=6)
    place = out.matches.pairs()[0][1].tolist().index(0)
    assert found.ce == pytest.approx(float(out.per_instance.ce[place]), rel=1e-4)


def test_nothing_in_a_file_is_run(capsys, tmp_path):
    np.save(tmp_path / "objects.npy", np.array([print], dtype=object), allow_pickle=True)
    assert "must hold an array" in refused(capsys, "--prediction", tmp_path / "objects.npy")
    torch.save(argparse.Namespace(a=1), tmp_path / "objects.pt")
    assert "must hold nothing but tensors" in refused(capsys, "--prediction", tmp_path / "objects.pt")


def test_a_target_without_a_query_is_named(scene, tmp_path):
    torch.save({**scene, "mask_logits": scene["mask_logits"][:2]}, tmp_path / "few.pt")
    subject = show.gather(options("--prediction", tmp_path / "few.pt"))
    subject.class_logits = None
    left = {0, 1, 2} - set(show._match(subject, 0)[1][1].tolist())
    with pytest.raises(show.Cause, match="was not matched"):
        show.draw(subject, left.pop(), seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["mask_logits", "class_logits"])
def test_a_prediction_that_is_not_finite_is_described(capsys, scene, tmp_path, name, value):
    """People whose loss is NaN come here."""
    logits = scene[name].clone()
    logits[3].flatten()[:2] = value
    torch.save({**scene, name: logits}, tmp_path / "nan.pt")
    told = refused(capsys, "--prediction", tmp_path / "nan.pt", "--out", tmp_path / "nan.png")
    assert f"{name} must be finite: the loss of anything else is NaN: 1 of 5 queries hold other values" in told
    assert f"query 3 has {value} in 2 of" in told and "The loss is NaN" in told
    assert not (tmp_path / "nan.png").exists()


ODD = {
    "a word": {"mask_logits": "logits"},
    "a list": {"mask_logits": [[1.0]]},
    "complex": {"mask_logits": torch.zeros(2, 4, 4, dtype=torch.complex64)},
    "sparse": {"mask_logits": torch.zeros(2, 4, 4).to_sparse()},
    "on no device": {"mask_logits": torch.zeros(2, 4, 4, device="meta")},
    "other names": {3: torch.zeros(2, 4, 4)},
    "nothing": {},
    "a plane": {"mask_logits": torch.zeros(4, 4)},
    "no query": {"mask_logits": torch.zeros(0, 4, 4)},
    "no pixel": {"mask_logits": torch.zeros(2, 0, 4)},
    "masks of words": {"mask_logits": torch.zeros(2, 4, 4), "masks": ["a"]},
    "masks with NaN": {"mask_logits": torch.zeros(2, 4, 4), "masks": torch.full((1, 4, 4), float("nan"))},
    "masks of no pixel": {"mask_logits": torch.zeros(2, 4, 4), "masks": torch.zeros(1, 0, 0)},
    "no mask": {"mask_logits": torch.zeros(2, 4, 4), "masks": torch.zeros(0, 4, 4)},
    "labels beyond": {
        "mask_logits": torch.zeros(2, 4, 4),
        "masks": torch.ones(1, 4, 4),
        "labels": torch.tensor([7]),
        "class_logits": torch.zeros(2, 3),
    },
    "many labels": {
        "mask_logits": torch.zeros(2, 4, 4),
        "masks": torch.ones(1, 4, 4),
        "labels": torch.tensor([0, 1]),
        "class_logits": torch.zeros(2, 3),
    },
    "few classes": {
        "mask_logits": torch.zeros(2, 4, 4),
        "masks": torch.ones(1, 4, 4),
        "labels": torch.tensor([0]),
        "class_logits": torch.zeros(1, 3),
    },
    "ignore of another size": {
        "mask_logits": torch.zeros(2, 4, 4),
        "masks": torch.ones(1, 4, 4),
        "ignore": torch.zeros(5, 5),
    },
}


@pytest.mark.parametrize("case", ODD)
def test_odd_files_get_one_sentence(capsys, tmp_path, case):
    torch.save(ODD[case], tmp_path / "odd.pt")
    np.save(tmp_path / "truth.npy", np.ones((1, 4, 4), np.uint8))
    truth = [] if "masks" in ODD[case] else ["--target", tmp_path / "truth.npy"]
    lines = refused(capsys, "--prediction", tmp_path / "odd.pt", *truth, "--out", tmp_path / "o.png").splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


def test_pipes_devices_and_damage_are_not_waited_for(capsys, tmp_path, scene, folder):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "torn.npy").write_bytes((folder / "prediction.npy").read_bytes()[:200])
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 and no more")
    for name in (tmp_path / "pipe.pt", "/dev/zero", tmp_path / "torn.npy", tmp_path / "torn.pt", tmp_path):
        assert len(refused(capsys, "--prediction", name).splitlines()) == 1
        assert len(refused(capsys, "--prediction", folder / "prediction.npy", "--target", name).splitlines()) == 1
    given = ("--prediction", folder / "prediction.npy", "--data", folder / "data", "--image", "a.png")
    (folder / "data" / "instances.json").unlink()
    os.mkfifo(folder / "data" / "instances.json")
    assert "is a named pipe" in refused(capsys, *given)


def test_any_data_that_training_reads(capsys, tmp_path):
    """Label maps beside deep images."""
    cells = write_cells(tmp_path / "cells", 3)
    truth = tifffile.imread(cells / "1_masks.tif")
    np.save(tmp_path / "p.npy", np.where(truth > 0, 4.0, -4.0)[None].astype(np.float32))
    subject = show.gather(options("--prediction", tmp_path / "p.npy", "--data", cells, "--image", "1.tif"))
    expected = [truth == number for number in np.unique(truth) if number]
    assert np.array_equal(subject.masks.numpy(), np.stack(expected))
    assert subject.image.shape == (3, 64, 64) and 0 <= subject.image.min() < subject.image.max() <= 1


def test_the_criterion_of_the_caller_stays_as_it_is(run_folder, monkeypatch):
    from maskloss.lab.models.learners import CompactLearner

    held = []
    original = CompactLearner.mask_criterion

    def kept(learner):
        held.append(original(learner))
        return held[0]

    monkeypatch.setattr(CompactLearner, "mask_criterion", kept)
    subject = show.gather(options(run_folder, "--num-points", 50))
    subject.class_logits = None
    show.draw(subject, None, seed=0)
    assert held[0].mask_loss.sampling.num_points == 64 == held[0].matcher.num_points
    assert held[0].matcher.class_weight == MaskCriterion(2).matcher.class_weight
    assert {held[0].mask_loss.options.backend, held[0].matcher.options.backend} == {None}
    assert subject.criterion.mask_loss.sampling.num_points == 50


def test_a_picture_is_there_whole_or_not_at_all(capsys, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "show.png").write_bytes(b"the picture of yesterday")
    monkeypatch.setattr(Figure, "savefig", full)
    assert refused(capsys, "--out", tmp_path / "show.png") == f"error: the disk is full: {tmp_path / 'show.png'}\n"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the picture of yesterday"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dpi", 0), "--dpi must be an integer in"),
        (("--dpi", 10**9), "--dpi must be an integer in"),
        (("--seed", -1), "--seed must be an integer in"),
        (("--seed", 2**70), "--seed must be an integer in"),
        (("--num-points", 0), "num_points must be"),
        (("--instance", 99), "instance must be in 0"),
        (("--out", "nowhere/a.png"), "--out must be a file that can be written"),
        (("--out", "a.gif"), "--out must end in"),
    ],
)
def test_options_out_of_range(capsys, arguments, message):
    told = refused(capsys, *arguments)
    assert message in told and len(told.splitlines()) == 1
