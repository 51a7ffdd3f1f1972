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


def test_a_training_batch_of_each_folder(tmp_path):
    """What is read can be trained on: masks of the right classes, void and regions in the ignore region."""
    for name, case in CASES.items():
        if not case.refused:
            source = open_case(case, tmp_path / name)
            count = len(source.found.train)
            batch = source.batch(0, range(count), count, 0)
            assert len(batch.images) == count and torch.isfinite(batch.images).all(), name
            assert int(batch.labels.max()) < len(source.class_names) and int(batch.labels.min()) >= 0, name


def test_the_table_of_the_documentation():
    assert folders.of_page() == folders.table(), "run PYTHONPATH=tests python -m lab.folders"
