"""A data set in COCO's form, with Pillow and pycocotools: what the other recipes train on."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from maskloss import MaskTargets

# The mean and the standard deviation of ImageNet's pixels, with which the backbones were trained.
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class CocoFolder(Dataset[dict[str, Any]]):
    """Images of a folder and the instances of an annotation file.

    The image is resized to a square, and the masks are not: the loss reads both at points given as fractions of the
    image, each at its own resolution. Packing them here, in a worker, leaves one bit per pixel to pass around.

    Args:
        images: folder of the images.
        annotations: the JSON file.
        size: side of the square that the model sees, pixels.
    """

    def __init__(self, images: str | Path, annotations: str | Path, size: int = 512) -> None:
        content = json.loads(Path(annotations).read_text(encoding="utf-8"))
        self.folder, self.size, self.images = Path(images), size, content["images"]
        self.names = [category["name"] for category in content["categories"]]
        self.labels = {category["id"]: label for label, category in enumerate(content["categories"])}
        self.instances = defaultdict(list)
        for annotation in content["annotations"]:
            # A crowd is a region of many instances that nobody told apart: no target for one query.
            if not annotation.get("iscrowd", 0):
                self.instances[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict[str, Any]:
        image = self.images[number]
        instances = self.instances[image["id"]]
        with Image.open(self.folder / image["file_name"]) as file:
            pixels = np.array(file.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR))
        shapes = [instance["segmentation"] for instance in instances]
        return {
            "pixel_values": ((torch.from_numpy(pixels) / 255 - MEAN) / STD).permute(2, 0, 1),
            "mask_labels": MaskTargets.from_coco(shapes, image["height"], image["width"]),
            "class_labels": torch.tensor([self.labels[i["category_id"]] for i in instances], dtype=torch.int64),
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor | list[Any]]:
    """Stack the images; masks and labels stay lists with one entry per image, as the models take them."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "mask_labels": [sample["mask_labels"] for sample in samples],
        "class_labels": [sample["class_labels"] for sample in samples],
    }
