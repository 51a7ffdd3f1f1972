"""A small data set in COCO's format, to train on in tests: discs and boxes on noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as codec

# Landscape, portrait, and square.
SIZES = ((40, 60), (60, 40), (48, 48), (33, 57), (64, 64), (50, 51))


class CocoFolder:
    """A folder with images, and annotations that a test may change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = _write_images(root)
        self.save()

    def save(self, content: dict[str, Any] | None = None, name: str = "instances.json") -> None:
        (self.root / name).write_text(json.dumps(content or self.content))


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path / "shapes")


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
