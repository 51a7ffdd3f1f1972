"""`maskloss show`: what each source gives, and that the numbers are those of the criterion."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

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
    from maskloss.lab.loop.progress import Listener
    from maskloss.lab.loop.run import train

    folder = tmp_path_factory.mktemp("show") / "digits"
    config = TrainConfig(steps=2, batch_size=2, held_out=6, evaluations=1, num_points=64, workers=0)
    train(config, folder, Listener.silent())
    return folder


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
    assert "has no annotations of b.png" in refused(capsys, *given, "b.png")


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
