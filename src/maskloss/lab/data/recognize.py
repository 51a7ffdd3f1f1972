"""Finding out what a folder holds: COCO instances, COCO panoptic, or images with label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from maskloss.errors import Cause
from maskloss.lab.data import coco, labelmaps
from maskloss.lab.data.catalog import Catalog, Entry, Found
from maskloss.lab.data.images import read_size
from maskloss.lab.data.problems import Problems
from maskloss.lab.files import explain

FORMATS = ("coco", "panoptic", "labels")
LAYOUT = (
    "a data set is images/ with instances.json, COCO's annotations/ beside train2017/, images/ with masks/ or labels/, "
    "or x.tif beside x_masks.tif"
)
# Folders and parts of names by which held-out images are known.
HELD_OUT = ("val", "valid", "validation", "test", "held_out")
# The split is the same in every run, so that runs can be compared.
_SPLIT_SEED = 20
# More heads of files than this are not read before training; workers check the rest as they come to it.
_HEADS = 2000

# Categories (number to name, in the order of the labels), images, and how they were recognized.
Part = tuple[dict[int, str], list[Entry], str]


def recognize(folder: Path, format: str | None, problems: Problems) -> Found:  # noqa: A002 (the option's name)
    """Find the data set in a folder and split it.

    Args:
        folder: laid out as `LAYOUT` says.
        format: "coco", "panoptic" or "labels"; None: the first of these that is there.
        problems: what to do about broken images and annotations.

    Raises:
        Cause: no folder, nothing that is known, or nothing to learn from.
    """
    try:
        if not folder.is_dir():
            raise Cause("data must be a folder", f"there is no folder {folder}", LAYOUT)
        parts = find(folder, format, problems)
    except OSError as error:
        raise Cause("data must be a folder that can be read", f"{folder}: {explain(error)}", LAYOUT) from None
    kind, train, held_out = parts
    how = [train[2]]
    entries = _checked(train[1], problems, kind)
    if held_out is not None:
        if held_out[0] != train[0]:
            raise Cause(
                "both parts must have the same categories",
                f"{held_out[2]} has others than {train[2]}",
                "copy the list of categories",
            )
        how.append(f"{held_out[2]} (held out)")
        others = _checked(held_out[1], problems, kind)
    else:
        entries, others = _split(entries, folder)
        how.append("one image in five is held out")
    for name, each in (("training", entries), ("held-out", others)):
        if not any(entry.labels for entry in each):
            raise Cause("there must be instances to learn and to find", f"no {name} image in {folder} has one", LAYOUT)
    return Found(
        kind, how, list(train[0].values()), list(train[0]), Catalog(entries), Catalog(others), problems.skipped
    )


def find(folder: Path, format: str | None, problems: Problems) -> tuple[str, Part, Part | None]:  # noqa: A002
    """Read a data set as it lies in a folder, before it is split: its kind, the images for training, those held out."""
    for kind in FORMATS if format is None else (format,):
        search = {"coco": _find_instances, "panoptic": _find_panoptic, "labels": _find_labels}[kind]
        found = search(folder, problems)
        if found is not None:
            return kind, *found
    wanted = "images with annotations" if format is None else f"a data set of the format {format!r}"
    raise Cause(f"the folder must hold {wanted}", f"none was found in {folder}", LAYOUT)


# ---------------------------------------------------------------------------------------------------------------- COCO


def _find_instances(folder: Path, problems: Problems) -> tuple[Part, Part | None] | None:
    names = ("instances", "annotations", "_annotations", "coco")
    train, held_out = _annotation_files(folder, names)
    if train is None:
        return None

    def read(path: Path) -> Part:
        classes, entries = coco.read_instances(path, _image_folders(folder, path), problems)
        return classes, entries, f"COCO instances: {path.relative_to(folder)}"

    return read(train), None if held_out is None else read(held_out)


def _find_panoptic(folder: Path, problems: Problems) -> tuple[Part, Part | None] | None:
    train, held_out = _annotation_files(folder, ("panoptic",))
    if train is None:
        return None

    def read(path: Path) -> Part:
        maps = next(
            (each for each in (path.with_suffix(""), folder / path.stem, folder / "panoptic") if each.is_dir()), None
        )
        if maps is None:
            raise Cause(
                "panoptic annotations must have their PNG files beside them",
                f"there is no folder {path.with_suffix('')}",
                "it has the name of the JSON file",
            )
        classes, entries = coco.read_panoptic(path, _image_folders(folder, path), maps, problems)
        return classes, entries, f"COCO panoptic: {path.relative_to(folder)} with {maps.relative_to(folder)}/"

    return read(train), None if held_out is None else read(held_out)


def _annotation_files(folder: Path, names: Sequence[str]) -> tuple[Path | None, Path | None]:
    """Find the annotations for training and those for scoring."""
    places = [folder, folder / "annotations", folder / "train", *(folder / name for name in HELD_OUT)]
    files = [path for place in places if place.is_dir() for path in sorted(place.glob("*.json"))]
    files = [path for path in files if path.name.lower().startswith(tuple(names))]
    apart = [path for path in files if _is_held_out(path, folder)]
    train = [path for path in files if path not in apart]
    for found in (train, apart):
        if len(found) > 1:
            raise Cause(
                "there must be one file of annotations for training, and one at most for scoring",
                f"{folder} has {', '.join(str(path.relative_to(folder)) for path in found)}",
                "move the others away, or merge them",
            )
    return train[0] if train else None, apart[0] if apart else None


def _is_held_out(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    words = [word for part in parts for word in part.lower().replace(".", "_").replace("-", "_").split("_")]
    return any(word.rstrip("0123456789") in HELD_OUT for word in words)


def _image_folders(folder: Path, annotations: Path) -> list[Path]:
    """List where the images of an annotation file may be, the most specific first."""
    part = annotations.stem.split("_", 1)[1] if "_" in annotations.stem.strip("_") else ""
    candidates = [annotations.parent / "images", folder / "images"]
    if part:
        candidates = [folder / part, folder / "images" / part, *candidates]
    candidates += [annotations.parent, folder]
    found = [each for each in dict.fromkeys(candidates) if each.is_dir()]
    return found or [folder]


# ---------------------------------------------------------------------------------------------------------- label maps


def _find_labels(folder: Path, problems: Problems) -> tuple[Part, Part | None] | None:
    train = folder / "train" if (folder / "train").is_dir() else folder
    pairs = labelmaps.find_pairs(train)
    if not pairs:
        return None
    missing = labelmaps.unpaired(train)
    if missing > 0:
        problems.skipped.append(f"{missing} images without a label map")
    first = pairs[0]
    how = (
        f"label maps: {len(pairs)} pairs such as {first.image.relative_to(folder)} and {first.map.relative_to(folder)}"
    )
    part = ({1: labelmaps.CLASS}, labelmaps.read_pairs(pairs, problems), how)
    for name in HELD_OUT:
        others = labelmaps.find_pairs(folder / name) if (folder / name).is_dir() else []
        if others:
            read = labelmaps.read_pairs(others, problems)
            return part, ({1: labelmaps.CLASS}, read, f"label maps: {len(others)} pairs in {name}/")
    return part, None


# ------------------------------------------------------------------------------------------------------- both of them


def _checked(entries: list[Entry], problems: Problems, kind: str) -> list[Entry]:
    """Compare the annotated sizes with the heads of the files."""
    if kind == "labels":
        return entries
    kept = []
    for number, entry in enumerate(entries):
        with problems.tolerated():
            if number < _HEADS:
                check_size(entry, read_size(Path(entry.file)))
            kept.append(entry)
    return kept


def check_size(entry: Entry, size: tuple[int, int]) -> None:
    """Compare the size of an image with the annotated one.

    Raises:
        Cause: they differ.
    """
    if size != (entry.height, entry.width):
        raise Cause(
            "annotations must give the size of the image",
            f"{entry.file} is {size[0]} x {size[1]}, annotated as {entry.height} x {entry.width}",
            "annotate the image as it is stored",
        )


def _split(entries: list[Entry], folder: Path) -> tuple[list[Entry], list[Entry]]:
    if len(entries) < 2:
        raise Cause(
            "there must be at least two images", f"{folder} has {len(entries)} that can be used", "one is held out"
        )
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
    count = max(1, len(entries) // 5)
    return [entries[i] for i in order[count:]], [entries[i] for i in order[:count]]
