"""Scenes from a folder of one's own: images, and COCO annotations.

    folder/
      images/                 PNG, JPEG or whatever Pillow reads
      instances.json          COCO annotations: polygons or RLE
      instances_val.json      held-out scenes; without it, one image in five is held out

Images are resized to fit a square and padded; masks stay as they were annotated, packed to bits, since the loss reads
predictions and targets each at its own resolution. Points are drawn inside the image only, and crowds weigh nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskloss.errors import Cause, MaskLossError, reported, require
from maskloss.targets import MaskTargets
from maskloss.training.data import Batch, Scene, share, step_generator

ANNOTATIONS, HELD_OUT_ANNOTATIONS = "instances.json", "instances_val.json"
_LAYOUT = f"the folder holds images/ and {ANNOTATIONS}, and if need be {HELD_OUT_ANNOTATIONS}"
# The split is the same in every run, so that runs can be compared.
_SPLIT_SEED = 20


class FolderScenes:
    """Scenes from a folder with images and COCO annotations; all are read at once and kept.

    Args:
        folder: laid out as this module's description says.
        size: side of the square that images are brought to, pixels.

    Raises:
        MaskLossError: a file that is missing or is not what it should be; the message names it.
        MissingExtraError: pycocotools or Pillow is not installed (extra `train`).
    """

    @reported("training data")
    def __init__(self, folder: str, size: int) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise Cause("data must be a folder", f"there is no folder {root}", _LAYOUT)
        annotated = _read_annotations(root / ANNOTATIONS)
        self.title = f"images of {root.resolve().name}"
        self.class_names: Sequence[str] = annotated.class_names
        scenes = [_read_scene(root, entry, annotated.label, size) for entry in annotated.entries]
        apart = root / HELD_OUT_ANNOTATIONS
        if apart.exists():
            others = _read_annotations(apart)
            if others.label != annotated.label:
                raise Cause("both files must have the same categories", f"{apart.name} has others", "copy the list")
            train, held_out = scenes, [_read_scene(root, each, annotated.label, size) for each in others.entries]
        else:
            order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
            count = max(1, len(scenes) // 5)
            held_out, train = [scenes[i] for i in order[:count]], [scenes[i] for i in order[count:]]
        for name, part in (("training", train), ("held-out", held_out)):
            if not any(len(scene.labels) for scene in part):
                raise Cause("there must be instances to learn and to find", f"no {name} image has one", _LAYOUT)
        self.held_out: Sequence[Scene] = held_out
        self._train = train
        self.most_instances = max(len(scene.labels) for scene in (*train, *held_out))

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Take a step's images: every image comes up once before any comes up again."""
        count = len(self._train)
        positions = range(step * batch_size, (step + 1) * batch_size)
        epochs = {place // count for place in positions}
        order = {epoch: torch.randperm(count, generator=step_generator(seed, epoch)) for epoch in epochs}
        scenes = [self._train[int(order[place // count][place % count])] for place in positions]
        targets = [{"masks": scene.targets, "labels": scene.labels} for scene in scenes]
        return Batch(torch.stack([scene.image for scene in scenes]), targets)


class Entry(NamedTuple):
    """An image of a COCO file, and its annotations."""

    file_name: str
    height: int
    width: int
    annotations: list[Mapping[str, Any]]


class Annotated(NamedTuple):
    """What a COCO file says: the labels of its category numbers, the names of the classes, and the images."""

    label: dict[int, int]
    class_names: list[str]
    entries: list[Entry]


def _read_annotations(path: Path) -> Annotated:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Cause("annotations must be there", f"there is no file {path}", _LAYOUT) from None
    except ValueError as error:
        raise Cause("annotations must be JSON", f"{path}: {error}", "export them as COCO instances") from None
    try:
        categories = sorted(content["categories"], key=lambda category: category["id"])
        of_image = defaultdict(list)
        label = {category["id"]: number for number, category in enumerate(categories)}
        for annotation in content["annotations"]:
            if annotation["category_id"] not in label:
                raise Cause(
                    "every category must be listed",
                    f"{path}: annotation {annotation.get('id')} has category {annotation['category_id']}",
                    'add it to "categories"',
                )
            of_image[annotation["image_id"]].append(annotation)
        entries = [
            Entry(image["file_name"], image["height"], image["width"], of_image.pop(image["id"], []))
            for image in content["images"]
        ]
        names = [str(category["name"]) for category in categories]
    except (KeyError, TypeError) as error:
        raise Cause(
            "annotations must be COCO instances",
            f"{path}: {type(error).__name__} {error}",
            'it is a dict with the lists "images", "annotations" and "categories"',
        ) from None
    if of_image:
        raise Cause(
            "every annotation must belong to a listed image",
            f"{path}: there is no image {next(iter(of_image))!r}",
            'add it to "images"',
        )
    if len(entries) < 2:
        raise Cause("there must be at least two images", f"{path} lists {len(entries)}", "one is held out, one is not")
    return Annotated(label, names, entries)


def _read_scene(root: Path, entry: Entry, label: Mapping[int, int], size: int) -> Scene:
    image = _read_image(root / "images" / entry.file_name, entry, size)
    frame = max(entry.height, entry.width)
    crowds = [each for each in entry.annotations if each.get("iscrowd", 0)]
    single = [each for each in entry.annotations if not each.get("iscrowd", 0)]
    try:
        crowd = MaskTargets.from_coco([each["segmentation"] for each in crowds], entry.height, entry.width)
        targets = MaskTargets.from_coco(
            [each["segmentation"] for each in single],
            entry.height,
            entry.width,
            canvas=(frame, frame),
            ignore=crowd.dense().any(0) if crowds else None,
            valid=(0, 0, entry.height, entry.width),
        )
    except KeyError:
        raise Cause(
            'every annotation must have a "segmentation"',
            f"one of {entry.file_name} has none",
            "masks are learnt from masks; boxes alone do not do",
        ) from None
    except MaskLossError as error:
        rule, cause, hint = error.parts or (str(error), "", "")
        raise Cause(rule, f"{entry.file_name}: {cause}", hint) from None
    return Scene(
        image=image,
        targets=targets,
        labels=_labels(single, label),
        crowd=crowd,
        crowd_labels=_labels(crowds, label),
        height=entry.height,
        width=entry.width,
        name=entry.file_name,
    )


def _labels(annotations: Sequence[Mapping[str, Any]], label: Mapping[int, int]) -> Tensor:
    return torch.tensor([label[each["category_id"]] for each in annotations], dtype=torch.int64)


def _read_image(path: Path, entry: Entry, size: int) -> Tensor:
    """Read, resize to fit into the square, and pad with the mean colour: float32 `[3, size, size]`."""
    pillow = require("PIL.Image", "train")
    try:
        with pillow.open(path) as opened:
            image = opened.convert("RGB")
    except FileNotFoundError:
        raise Cause("every image must be there", f"there is no file {path}", _LAYOUT) from None
    except OSError as error:
        raise Cause("every image must be readable", f"{path}: {error}", "Pillow has to know its format") from None
    if image.size != (entry.width, entry.height):
        raise Cause(
            "annotations must give the size of the image",
            f"{path} is {image.height} x {image.width}, annotated as {entry.height} x {entry.width}",
            "annotate the image as it is stored",
        )
    frame = max(entry.height, entry.width)
    width, height = share(entry.width, frame, size), share(entry.height, frame, size)
    resized = np.asarray(image.resize((width, height), pillow.Resampling.BILINEAR, reducing_gap=3.0))
    pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1).float() / 255
    square = pixels.mean((1, 2), keepdim=True).expand(3, size, size).clone()
    square[:, :height, :width] = pixels
    return square
