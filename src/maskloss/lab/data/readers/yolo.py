"""YOLO: a text file for each image, a class and the corners of a polygon in each line, as fractions of the image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from maskloss.errors import Cause, MaskLossError, describe
from maskloss.lab.data.catalog import BOX, Entry, Instance, Part, numbered
from maskloss.lab.data.images import read_size
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import DECIDED, LEFT_OUT, MENDED, Problems, cause_of
from maskloss.lab.data.readers import names
from maskloss.lab.data.readers.segmentation import Frame, box_of, polygons
from maskloss.lab.data.tree import TEST, TRAIN, VAL, Tree, folded, is_mask_place, part_of, parts_of_name, shared_end

_RULE = "a line of a YOLO file must be a class and a polygon"
_HINT = "as in `0 0.1 0.2 0.5 0.2 0.5 0.6`: x and y of each corner, as fractions of the image"
_KEYS = {TRAIN: TRAIN, VAL: VAL, "valid": VAL, "validation": VAL, TEST: TEST}
_BOX = 5
# Farther out than this, a number is no fraction of the image but pixels.
_LARGEST = 2


class _Folder(NamedTuple):
    """What a folder of YOLO holds besides images."""

    # the text file of each image, by folders and stem without the words "images" and "labels"
    labels: dict[tuple[str, ...], str]
    parts: dict[str, list[str]]  # the images of each part
    names: dict[int, str]  # of the classes
    how: str  # what names them
    poses: bool  # whether keypoints follow the boxes


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find images with text files of the same names, and the YAML file that says which belong to which part."""
    if options.annotations is not None and not options.annotations.lower().endswith((".yaml", ".yml")):
        return None
    named = [path for path in _described(tree) if options.annotations in (None, path)]
    # Without a YAML file, text files must lie in a folder of labels, or beside their images.
    stems = {_key(path) for path in tree.images if not is_mask_place(path) or "labels" not in path}
    texts = [path for path in tree.ending(".txt") if PurePosixPath(path).name.lower() not in names.LISTS]
    labels = {_key(path): path for path in texts if _key(path) in stems}
    if not named and not (labels and _are_labels(tree, labels)):
        return None
    unread = [path for path in tree.ending(".yaml", ".yml") if path in tree.broken]
    if unread and not named:
        names.read_text(tree, unread[0])  # raises what is wrong with it
    description = names.read_yaml(tree, named[0]) if named else {}
    classes = _classes(description.get("names"), tree, named[0] if named else "")
    poses = "kpt_shape" in description or _are_poses(tree, labels)
    how = named[0] if named else "labels/*.txt"
    folder = _Folder(labels, _parts(tree, description, labels, problems), classes, how, poses)
    found = {part: list(_read(tree, paths, folder, problems)) for part, paths in folder.parts.items()}
    return numbered(found, folder.names, f"YOLO polygons: {folder.how}")


def _described(tree: Tree) -> list[str]:
    """List YAML files that may describe a data set of YOLO."""
    found = []
    for path in tree.ending(".yaml", ".yml"):
        name = PurePosixPath(path).name.lower()
        if name.startswith(("data", "dataset", "coco", "config")) or "/" not in path:
            try:
                text = names.read_text(tree, path)
            except MaskLossError as error:  # it may be of anything
                tree.broken[path] = cause_of(error)
                continue
            if "names" in text and ("train" in text or "val" in text):
                found.append(path)
    return found


def _are_labels(tree: Tree, labels: dict[tuple[str, ...], str]) -> bool:
    """Whether text files hold what YOLO writes."""
    lines = _some_lines(tree, labels)
    return bool(lines) and all(len(line) >= _BOX and all(map(_number_or_none, line)) for line in lines)


def _are_poses(tree: Tree, labels: dict[tuple[str, ...], str]) -> bool:
    """Whether each line has a box and the same number of keypoints, whose third number says if they can be seen."""
    lines = [line[_BOX:] for line in _some_lines(tree, labels)]
    if len({len(line) for line in lines}) != 1 or not lines[0] or len(lines[0]) % 3:
        return False
    return all(float(each) in {0, 1, 2} for line in lines for each in line[2::3] if _number_or_none(each))


def _some_lines(tree: Tree, labels: dict[tuple[str, ...], str]) -> list[list[str]]:
    some = [line for path in list(labels.values())[:20] for line in names.read_text(tree, path).splitlines()]
    return [line.split() for line in some if line.strip()][:100]


def _number_or_none(text: str) -> str | None:
    try:
        float(text)
    except ValueError:
        return None
    return text


def _key(path: str) -> tuple[str, ...]:
    """Return what an image and its text file have in common."""
    pure = PurePosixPath(path)
    return tuple(folded(part) for part in (*pure.parts[:-1], pure.stem) if part.lower() not in {"images", "labels"})


def _classes(listed: Any, tree: Tree, where: str) -> dict[int, str]:
    if isinstance(listed, list):
        return {number: str(name) for number, name in enumerate(listed)}
    if isinstance(listed, dict):
        if not all(str(number).isdecimal() for number in listed):
            raise Cause("the names of YOLO must be a list", f"{where} has {describe(listed)}", "number them from 0")
        return {int(number): str(name) for number, name in listed.items()}
    return dict(enumerate(names.listed(tree)))


def _parts(
    tree: Tree, description: dict[str, Any], labels: dict[tuple[str, ...], str], problems: Problems
) -> dict[str, list[str]]:
    """Say which images belong to which part: as the YAML file says, or as their folders are called."""
    images = [path for path in tree.images if not (is_mask_place(path) and _key(path) not in labels)]
    parts: dict[str, list[str]] = {}
    by_folder: dict[str, list[str]] = {}
    for path in images:
        by_folder.setdefault(part_of(path), []).append(path)
    lost = False
    for key, part in _KEYS.items():
        places = description.get(key)
        for place in places if isinstance(places, list) else [places]:
            if isinstance(place, str) and place.strip():
                found = _under(tree, place, images)
                if not found and part != TEST:
                    lost = True
                    problems.note(MENDED, "folders that the YAML file names but that are not there", f"{key}: {place}")
                parts[part] = list(dict.fromkeys([*parts.get(part, []), *found]))
    # Where the YAML file is of folders that were nested or called otherwise, their names say what is what.
    both = set(parts.get(TRAIN, [])) & set(parts.get(VAL, []))
    if both:
        instead = "what their folders are called counts" if VAL in by_folder else "a share is held out"
        problems.note(DECIDED, f"train and val of the YAML file have the same images: {instead}", min(both), len(both))
    wrong = not parts.get(TRAIN) or (lost and VAL in by_folder) or bool(both)
    return by_folder if wrong else {part: paths for part, paths in parts.items() if paths}


def _under(tree: Tree, place: str, images: Sequence[str]) -> list[str]:
    """List the images of a folder, or of a list of paths, as a YAML file names them: often from somewhere else."""
    parts = [part for part in place.replace("\\", "/").split("/") if part not in {"", ".", ".."}]
    for start in range(len(parts) + 1):
        tail = "/".join(parts[start:])
        if tail.lower().endswith(".txt") and tail in tree.files:
            return _listed(names.read_text(tree, tail).splitlines(), images)
        inside = [path for path in images if path.startswith(f"{tail}/")] if tail else []
        if inside:
            return inside
    return []


def _listed(wanted: Sequence[str], images: Sequence[str]) -> list[str]:
    """List the images that a list of paths names: of images of one name, those that share most of its folders."""
    by_name: dict[str, list[str]] = {}
    for path in images:
        by_name.setdefault(folded(PurePosixPath(path).name), []).append(path)
    found = []
    for parts in map(parts_of_name, map(str.strip, wanted)):
        known = {path: shared_end(path, parts) for path in by_name.get(parts[-1], [])} if parts else {}
        found += [path for path, shared in known.items() if shared == max(known.values())]
    return list(dict.fromkeys(found))


def _read(tree: Tree, paths: Sequence[str], folder: _Folder, problems: Problems) -> Iterator[Entry]:
    for path in paths:
        with problems.tolerated():
            label = folder.labels.get(_key(path))
            height, width = read_size(tree.path(path))
            entry = Entry(str(tree.path(path)), height, width, [])
            if label is None:
                problems.note(LEFT_OUT, "images without a text file, taken for images without instances", path)
                yield entry
                continue
            lines = enumerate(names.read_text(tree, label).splitlines(), start=1)
            full = ((number, " ".join(line.split()[: _BOX if folder.poses else None])) for number, line in lines)
            if all(_add(entry, line, f"{label}, line {number}", problems) for number, line in full if line):
                yield entry


def _add(entry: Entry, line: str, what: str, problems: Problems) -> bool:
    """Add the instance of a line, its class for its label; return whether the image can be used."""
    try:
        entry.instances.append(_instance(entry, line, what, problems))
    except MaskLossError as error:
        problems.tolerate(error)
        return False
    return True


def _instance(entry: Entry, line: str, what: str, problems: Problems) -> Instance:
    values = [float(text) if _number_or_none(text) else math.nan for text in line.split()]
    if len(values) < _BOX or not all(map(math.isfinite, values)) or values[0] < 0 or values[0] % 1:
        raise Cause(_RULE, f"{what} is {describe(line)}", _HINT)
    label, numbers = int(values[0]), values[1:]
    if len(numbers) == _BOX - 1:
        x, y, width, height = numbers
        box = [
            (x - width / 2) * entry.width,
            (y - height / 2) * entry.height,
            width * entry.width,
            height * entry.height,
        ]
        problems.note(DECIDED, "instances with a box only made ignore regions of that box", what)
        return Instance({"box": box}, label, BOX)
    if len(numbers) % 2:
        raise Cause(_RULE, f"{what} has {len(numbers)} numbers after the class", _HINT)
    if max(numbers) > _LARGEST:
        raise Cause(_RULE, f"{what} has {max(numbers):g}, which is no fraction of the image", _HINT)
    scaled = [each * (entry.width, entry.height)[place % 2] for place, each in enumerate(numbers)]
    source = polygons([scaled], Frame(entry.height, entry.width, what, problems))
    return Instance({"box": box_of(None, scaled)}, label, BOX) if source is None else Instance(source, label)
