"""Images with label maps beside them, as people have them who use Cellpose or StarDist."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskloss.errors import Cause, MaskLossError
from maskloss.lab.data.catalog import Entry
from maskloss.lab.data.images import SUFFIXES, read_label_map, read_size
from maskloss.lab.data.problems import Problems

# Folders of maps beside images/, and endings of maps beside their images.
MAP_FOLDERS = ("masks", "labels", "label", "mask")
MAP_ENDINGS = ("_masks", "_mask", "_labels", "_label", "_instances")
IMAGE_ENDINGS = ("", "_img", "_image")
CLASS = "instance"


class Pair(NamedTuple):
    """An image and its label map."""

    image: Path
    map: Path


def find_pairs(folder: Path) -> list[Pair]:
    """Find images with label maps in a folder: images/ beside masks/ or labels/, or x.tif beside x_masks.tif."""
    if (folder / "images").is_dir():
        for name in MAP_FOLDERS:
            if (folder / name).is_dir():
                return _across(folder / "images", folder / name)
        return _beside(folder / "images")
    return _beside(folder)


def unpaired(folder: Path) -> int:
    """Count the images of `images/` without a map."""
    images = folder / "images"
    return len(_files(images)) - len(find_pairs(folder)) if images.is_dir() else 0


def read_pairs(pairs: Sequence[Pair], problems: Problems) -> list[Entry]:
    """Look into every map: which instances it has, and whether it fits its image."""
    entries = []
    # Decoding PNG and TIFF leaves the interpreter to other threads.
    with ThreadPoolExecutor() as pool:
        for found in _bounded(pool, pairs):
            with problems.tolerated():
                if isinstance(found, MaskLossError):
                    raise found
                entries.append(found)
    return entries


def _bounded(pool: ThreadPoolExecutor, pairs: Sequence[Pair], ahead: int = 64) -> Iterator[Entry | MaskLossError]:
    """Read pairs in order, a bounded number of them ahead."""
    waiting = iter(pairs)
    futures = [pool.submit(_read, pair) for pair in islice(waiting, ahead)]
    while futures:
        yield futures.pop(0).result()
        futures += [pool.submit(_read, pair) for pair in islice(waiting, 1)]


def _read(pair: Pair) -> Entry | MaskLossError:
    try:
        # Before any pixel is read: a small file may hold a large map.
        (height, width), mapped = read_size(pair.image), read_size(pair.map)
        if mapped != (height, width):
            raise Cause(
                "a label map must have the size of its image",
                f"{pair.map.name} is {mapped[0]} x {mapped[1]}, {pair.image.name} is {height} x {width}",
                "store both at the same resolution",
            )
        labels = read_label_map(pair.map)
    except MaskLossError as error:
        return error
    ids = [int(number) for number in np.unique(labels) if number]
    return Entry(str(pair.image), height, width, ids, [0] * len(ids), [], [], str(pair.map))


def _across(images: Path, maps: Path) -> list[Pair]:
    by_stem = {path.stem: path for path in _files(maps)}
    pairs = []
    for image in _files(images):
        names = [image.stem + ending for ending in ("", *MAP_ENDINGS)]
        names += [_bare(image.stem) + ending for ending in ("", *MAP_ENDINGS)]
        found = next((by_stem[name] for name in names if name in by_stem), None)
        if found is not None:
            pairs.append(Pair(image, found))
    return pairs


def _beside(folder: Path) -> list[Pair]:
    files = _files(folder)
    by_stem = {path.stem: path for path in files}
    maps = {stem for stem in by_stem if stem.endswith(MAP_ENDINGS)}
    pairs = []
    for image in files:
        if image.stem in maps:
            continue
        names = [stem + ending for stem in (image.stem, _bare(image.stem)) for ending in MAP_ENDINGS]
        found = next((by_stem[name] for name in names if name in maps), None)
        if found is not None:
            pairs.append(Pair(image, found))
    return pairs


def _bare(stem: str) -> str:
    return next((stem.removesuffix(ending) for ending in IMAGE_ENDINGS if ending and stem.endswith(ending)), stem)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
