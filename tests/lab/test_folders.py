"""Every kind of folder that people have: read as it was meant, or refused with the true reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lab import folders
from lab.folders import CASES, Case
from maskloss import MaskLossError
from maskloss.lab.data.folder import FolderScenes, HeldOut
from maskloss.lab.data.options import DataOptions


def open_case(case: Case, root: Path) -> FolderScenes:
    case.make(root)
    options = {
        name: value.format(root=root) if isinstance(value, str) else value for name, value in case.options.items()
    }
    on_error = options.pop("on_error", "stop")
    return FolderScenes(str(root), 32, augment=False, on_error=on_error, options=DataOptions(**options))


def scenes(source: FolderScenes) -> list[Any]:
    return [scene for each in (source.found.train, source.found.held_out) for scene in HeldOut(each, source.reading)]


@pytest.mark.parametrize("name", CASES)
def test_folders(tmp_path, name):
    case = CASES[name]
    root = tmp_path / "data"
    if case.refused:
        with pytest.raises(MaskLossError, match=case.refused):
            open_case(case, root)
        assert not (root / "ran").exists()
        return
    source = open_case(case, root)
    assert tuple(source.class_names) == tuple(case.classes)
    assert (len(source.found.train), len(source.found.held_out)) == case.parts
    told = "\n".join(str(each) for each in source.findings)
    for text in case.told:
        assert re.search(text, told), told
    assert told or not case.told
    everything = scenes(source)
    if case.objects is not None:
        assert [len(scene.labels) for scene in everything] == [case.objects] * len(everything)
    assert sum(len(scene.crowd_labels) for scene in everything) == case.regions
    for scene in everything if case.aligned else []:
        bright = scene.image.mean(0) > 0.6
        assert scene.masks().flatten(1).any(1).all()
        known = scene.masks().any(0) | scene.crowd_masks().any(0)
        # All that is annotated is bright, up to a pixel at the edges of polygons and of JPEG.
        inside = scene.masks().any(0)
        assert (inside & bright).sum() > 0.9 * inside.sum(), scene.name
        assert (known & bright).sum() > 0.9 * bright.sum(), scene.name
    # What is read can be trained on: masks of the right classes.
    count = len(source.found.train)
    batch = source.batch(0, range(count), count, 0)
    assert len(batch.images) == count and torch.isfinite(batch.images).all()
    assert int(batch.labels.max()) < len(source.class_names) and int(batch.labels.min()) >= 0


def test_the_table_of_the_documentation():
    assert folders.of_page() == folders.table(), "run PYTHONPATH=tests python -m lab.folders"


def test_what_a_run_held_out_can_be_held_out_again(tmp_path, no_pictures):
    """And all of other data is scored, or a part of them."""
    from maskloss.lab.config import TrainConfig
    from maskloss.lab.loop.progress import Listener
    from maskloss.lab.loop.run import train
    from maskloss.lab.results.scoring import evaluate_run

    CASES["share"].make(tmp_path / "data")
    short = {"steps": 1, "batch_size": 2, "evaluations": 1, "num_points": 16, "size": 32, "workers": 0, "device": "cpu"}
    config = TrainConfig(**short, data=str(tmp_path / "data"), val="0.4")
    train(config, tmp_path / "one", Listener.silent())
    held_out = tmp_path / "one" / "held_out.txt"
    listed = held_out.read_text().splitlines()
    assert len(listed) == 2 and set(listed) < {f"images/{number}.png" for number in range(5)}
    again = FolderScenes(config.data or "", 32, options=DataOptions(val=str(held_out)))
    assert sorted(again.held_out_files) == sorted(listed)
    CASES["roboflow"].make(tmp_path / "other")
    for split, count in ((None, 6), ("all", 6), ("test", 2), ("val", 2)):
        scores, _, _ = evaluate_run(tmp_path / "one", str(tmp_path / "other"), split=split, device="cpu")
        assert scores.scenes == count
    CASES["voc"].make(tmp_path / "unlike")
    with pytest.raises(MaskLossError, match="the run knows nut; the data have class 3 as well"):
        evaluate_run(tmp_path / "one", str(tmp_path / "unlike"), device="cpu")
