"""Small data sets on disk, to train on in tests: discs and boxes on noise."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from pycocotools import mask as codec

# Landscape, portrait, and square.
SIZES = ((40, 60), (60, 40), (48, 48), (33, 57), (64, 64), (50, 51))


# A package that tests import; collected for doctests it would be imported a second time, in another order.
collect_ignore = ["folders"]


class CocoFolder:
    """A folder with images, and annotations that a test may change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = _write_images(root)
        self.save()

    def save(self, content: dict[str, Any] | None = None, name: str = "instances.json") -> None:
        (self.root / name).parent.mkdir(exist_ok=True)
        (self.root / name).write_text(json.dumps(content or self.content))


@contextmanager
def reads_little(bytes_: int = 20_000_000) -> Iterator[None]:
    """Fail if Python or NumPy takes more memory than this at any moment."""
    tracemalloc.start()
    try:
        yield
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < bytes_, f"{peak:,} bytes"


def leave_undrawn(patch: pytest.MonkeyPatch) -> None:
    """Leave the report empty: to draw it takes longer than the short runs of most tests."""
    from maskloss.lab.results import report

    def write(folder: Path, _: object) -> list[Path]:
        (folder / "report.html").write_text("not drawn")
        return [folder / "report.html"]

    patch.setattr(report, "write", write)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_undrawn(monkeypatch)


def run_once(config: Any, folder: Path) -> Path:
    """A run that several tests look at, not drawn."""
    from maskloss.lab.loop.progress import Listener
    from maskloss.lab.loop.run import train

    with pytest.MonkeyPatch.context() as patched:
        leave_undrawn(patched)
        return train(config, folder, Listener.silent()).folder


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path / "shapes")


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "cells")


def write_cells(root: Path, count: int = 6, side: int = 64, discs: int = 5) -> Path:
    """Write 16-bit images of discs beside label maps; return their folder."""
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    y, x = np.mgrid[:side, :side]
    for number in range(count):
        labels = np.zeros((side, side), dtype=np.uint16)
        pixels = random.normal(300, 20, (side, side))
        for disc in range(discs):
            radius, (top, left) = random.integers(5, 9), random.integers(4, side - 4, 2)
            inside = ((y - top) ** 2 + (x - left) ** 2 < radius**2) & (labels == 0)
            labels[inside] = 10 * disc + 7
            pixels[inside] += 900
        tifffile.imwrite(root / f"{number}.tif", pixels.astype(np.uint16))
        tifffile.imwrite(root / f"{number}_masks.tif", labels)
    return root


def write_panoptic(root: Path, count: int = 4) -> Path:
    """Write COCO panoptic annotations as COCO lays them out: a box, the sky around it, a crowd and a void."""
    maps, images = root / "annotations" / "panoptic_train2017", root / "train2017"
    maps.mkdir(parents=True)
    images.mkdir()
    listed, annotations = [], []
    for number in range(count):
        ids = np.full((30, 44), 700, dtype=np.int64)
        ids[8:20, 10:30], ids[22:28, 2:12], ids[:2] = 70_001 + number, 9, 0
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(colors).save(maps / f"{number}.png")
        Image.fromarray((colors // 2 + 60).astype(np.uint8)).save(images / f"{number}.jpg", quality=95)
        listed.append({"id": number, "file_name": f"{number}.jpg", "height": 30, "width": 44})
        segments = [
            {"id": 70_001 + number, "category_id": 1, "iscrowd": 0},
            {"id": 700, "category_id": 180, "iscrowd": 0},
            {"id": 9, "category_id": 1, "iscrowd": 1},
        ]
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    categories = [{"id": 1, "name": "box", "isthing": 1}, {"id": 180, "name": "sky", "isthing": 0}]
    content = {"images": listed, "annotations": annotations, "categories": categories}
    (root / "annotations" / "panoptic_train2017.json").write_text(json.dumps(content))
    return root


def _write_images(root: Path) -> dict[str, Any]:
    """Write images; return their annotations."""
    random = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for number, (height, width) in enumerate(SIZES):
        pixels = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
        y, x = np.mgrid[:height, :width]
        disc = (y - 14) ** 2 + (x - 14) ** 2 < 81
        box = (y >= 22) & (y < 32) & (x >= 20) & (x < 38)
        pixels[disc], pixels[box] = (230, 90, 60), (60, 200, 220)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        images.append({"id": 100 + number, "file_name": f"{number}.png", "height": height, "width": width})
        rle = codec.encode(np.asfortranarray(disc.astype(np.uint8)))
        segmentations = (
            (7, {"size": [height, width], "counts": rle["counts"].decode()}, 0),
            (3, [[20, 22, 38, 22, 38, 32, 20, 32]], 0),
        )
        if number == 4:
            crowd = np.zeros((height, width), dtype=np.uint8)
            crowd[40:50, 10:30] = 1
            runs = [int(run) for run in np.diff(np.flatnonzero(np.diff(crowd.T.ravel(), prepend=2, append=2)))]
            segmentations += ((7, {"size": [height, width], "counts": runs}, 1),)
        for category, segmentation, crowded in segmentations:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + number,
                    "category_id": category,
                    "segmentation": segmentation,
                    "iscrowd": crowded,
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "disc"}, {"id": 3, "name": "box"}],
    }
