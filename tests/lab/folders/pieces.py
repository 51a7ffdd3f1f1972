"""What folders of data are made of, and the list of them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from PIL import Image
from pycocotools import mask as codec

HEIGHT, WIDTH = 40, 56
# Two bright objects in every image: top, bottom, left, right.
OBJECTS = ((6, 18, 8, 30), (24, 34, 36, 50))
COUNT = 5


class Case(NamedTuple):
    """A folder and what becomes of it.

    Attributes:
        make: writes it.
        group: of the table.
        what: what people have, for the table.
        outcome: what becomes of it, for the table.
        options: of the command.
        refused: what the error says; empty: the folder is read.
        told: what the findings say.
        classes: names that must be found.
        objects: in each image.
        regions: in all images: where nothing is asked for.
        parts: how many images are trained on and held out.
        aligned: whether the masks must lie on the bright objects.
    """

    make: Callable[[Path], None]
    group: str
    what: str
    outcome: str
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    refused: str = ""
    told: Sequence[str] = ()
    classes: Sequence[str] = ("nut",)
    objects: int | None = 2
    regions: int = 0
    parts: tuple[int, int] = (4, 1)
    aligned: bool = True


CASES: dict[str, Case] = {}


def case(
    group: str, what: str, outcome: str, **rest: Any
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Add a folder to the list; a name that is given twice gets a number."""

    def add(make: Callable[[Path], None]) -> Callable[[Path], None]:
        name = make.__name__ if make.__name__ not in CASES else f"{make.__name__}_{len(CASES)}"
        CASES[name] = Case(make, group, what, outcome, **rest)
        return make

    return add


def place(number: int, at: int = 0) -> tuple[int, int, int, int]:
    """Where an object is; `at`, 0 to 5, moves it, so that masks of another image do not fit."""
    top, bottom, left, right = OBJECTS[number]
    down, across = 2 * (at % 3), at
    return top + down, bottom + down, left + across, right + across


def pixels(seed: int, at: int = 0) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 80, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for number in range(2):
        top, bottom, left, right = place(number, at)
        image[top:bottom, left:right] = 230
    return image


def instance_map(dtype: Any = np.uint8, at: int = 0) -> np.ndarray:
    found = np.zeros((HEIGHT, WIDTH), dtype=dtype)
    for number in range(2):
        top, bottom, left, right = place(number, at)
        found[top:bottom, left:right] = number + 1
    return found


def write(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix in {".tif", ".tiff"}:
        tifffile.imwrite(path, array, **options)
    else:
        Image.fromarray(array).save(path, **options)


def images(
    root: Path, names: Sequence[str] = tuple(f"{number}.png" for number in range(COUNT)), **options: Any
) -> None:
    for seed, name in enumerate(names):
        write(root / name, pixels(seed), **options)


def text(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def corners(number: int, at: int = 0) -> list[float]:
    top, bottom, left, right = place(number, at)
    return [left, top, right, top, right, bottom, left, bottom]


def box(number: int, at: int = 0) -> list[int]:
    top, bottom, left, right = place(number, at)
    return [left, top, right - left, bottom - top]


def runs(number: int, *, compressed: bool = False) -> dict[str, Any]:
    mask = (instance_map() == number + 1).astype(np.uint8)
    if compressed:
        run = codec.encode(np.asfortranarray(mask))
        return {"size": [HEIGHT, WIDTH], "counts": run["counts"].decode()}
    steps = np.flatnonzero(np.diff(mask.T.ravel(), prepend=2, append=2))
    return {
        "size": [HEIGHT, WIDTH],
        "counts": [int(step) for step in ([0] * int(mask[0, 0]) + np.diff(steps).tolist())],
    }


def coco(
    names: Sequence[str] = tuple(f"{number}.png" for number in range(COUNT)),
    source: Callable[[int], Any] = lambda number: [corners(number)],
    first: int = 1,
    **more: Any,
) -> dict[str, Any]:
    listed = [
        {"id": first + place, "file_name": name, "height": HEIGHT, "width": WIDTH} for place, name in enumerate(names)
    ]
    annotations = [
        {
            "id": 2 * place + number + 1,
            "image_id": first + place,
            "category_id": 1,
            "segmentation": source(number),
            "bbox": box(number),
            "area": box(number)[2] * box(number)[3],
            "iscrowd": 0,
            **more,
        }
        for place in range(len(names))
        for number in range(2)
    ]
    return {"images": listed, "annotations": annotations, "categories": [{"id": 1, "name": "nut"}]}


def usual(root: Path, content: Mapping[str, Any] | None = None, name: str = "instances.json") -> None:
    images(root / "images")
    text(root / name, content or coco())


def packed(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
