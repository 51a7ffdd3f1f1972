"""COCO annotations, of instances and panoptic: every assumption is checked, since people write them by scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskloss.errors import Cause, describe
from maskloss.lab.data.catalog import Entry
from maskloss.lab.data.problems import Problems
from maskloss.lab.files import check_file, explain, read_json

INSTANCES = "annotations must be COCO instances"
PANOPTIC = "annotations must be COCO panoptic"
# Farther off than this, a coordinate is a mistake.
FARTHEST = 1 << 20
LONGEST_SIDE = 1 << 20


class CocoFile:
    """What a COCO file says.

    Args:
        path: the JSON file.
        problems: what to do about annotations that are wrong.
        rule: what the file must be, for messages.

    Attributes:
        class_names: in the order of the labels, which is that of the category numbers.
    """

    def __init__(self, path: Path, problems: Problems, rule: str) -> None:
        self.path, self.problems, self.rule = path, problems, rule
        self.content = read_json(path, rule)
        for key in ("images", "annotations", "categories"):
            if not isinstance(self.content.get(key), list):
                raise self._wrong(f'it has no list "{key}"', "export the data set as COCO")
        self.label, self.class_names = self._categories()

    @property
    def categories(self) -> dict[int, str]:
        """Number to name, in the order of the labels."""
        return dict(zip(self.label, self.class_names, strict=True))

    def _wrong(self, what: str, hint: str) -> Cause:
        return Cause(self.rule, f"{self.path}: {what}", hint)

    def _categories(self) -> tuple[dict[int, int], list[str]]:
        names: dict[int, str] = {}
        for category in self.content["categories"]:
            number = _integer(category.get("id")) if isinstance(category, Mapping) else None
            if number is None:
                raise self._wrong(f"a category is {describe(category)}", "give each an integer id and a name")
            name = str(category.get("name", number))
            if names.setdefault(number, name) != name:
                raise self._wrong(
                    f"the category id {number} stands for {names[number]!r} and for {name!r}",
                    "give each category a number of its own",
                )
        if not names:
            raise self._wrong("it lists no categories", 'add them to "categories"')
        order = sorted(names)
        return {number: label for label, number in enumerate(order)}, [names[number] for number in order]

    def images(self, folders: Sequence[Path]) -> Iterator[tuple[list[Any], Path, int, int]]:
        """List the images: the ids under which annotations name it, its file, height and width.

        A file that is listed under several ids, as merged data sets have it, is one image with the annotations of all.
        """
        of_file: dict[str, tuple[list[Any], int, int]] = {}
        owner: dict[Any, str] = {}
        for image in self.content["images"]:
            with self.problems.tolerated():
                name, number, height, width = self._image(image)
                if owner.setdefault(number, name) != name:
                    raise self._wrong(
                        f"the image id {number!r} stands for {owner[number]!r} and for {name!r}",
                        "give each image an id of its own",
                    )
                known = of_file.setdefault(name, ([], height, width))
                if known[1:] != (height, width):
                    raise self._wrong(f"{name!r} is listed with two sizes", "keep the one that is right")
                if number not in known[0]:
                    known[0].append(number)
        self.known_ids = set(owner)
        find = _finder(folders)
        for name, (numbers, height, width) in of_file.items():
            with self.problems.tolerated():
                yield numbers, find(name), height, width

    def _image(self, image: Any) -> tuple[str, Any, int, int]:
        if not isinstance(image, Mapping):
            raise self._wrong(f"an image is {describe(image)}", "each is a dict with id, file_name, height and width")
        name, number = image.get("file_name"), image.get("id")
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise self._wrong(f"the file_name of image {number!r} is {describe(name)}", "name a file")
        if not isinstance(number, (int, str)) or isinstance(number, bool):
            raise self._wrong(f"the id of image {name!r} is {describe(number)}", "give each image a number")
        height, width = _integer(image.get("height")), _integer(image.get("width"))
        if height is None or width is None or not 1 <= min(height, width) <= max(height, width) <= LONGEST_SIDE:
            raise self._wrong(
                f"the size of {name!r} is {image.get('height')!r} x {image.get('width')!r}", "give its pixels"
            )
        return name, number, height, width

    def by_image(self) -> dict[Any, list[Mapping[str, Any]]]:
        """Sort the annotations by the id of their image."""
        known = self.known_ids
        found: dict[Any, list[Mapping[str, Any]]] = {}
        for annotation in self.content["annotations"]:
            with self.problems.tolerated():
                number = annotation.get("image_id") if isinstance(annotation, Mapping) else None
                if not isinstance(number, (int, str)) or number not in known:
                    raise self._wrong(
                        f"{_which(annotation)} belongs to image {describe(number)}, which is not listed",
                        'add the image to "images"',
                    )
                found.setdefault(number, []).append(annotation)
        return found

    def class_of(self, part: Mapping[str, Any], what: str) -> int:
        """Return the label of an annotation or a segment.

        Raises:
            Cause: a category that is not listed.
        """
        number = _integer(part.get("category_id"))
        if number is None or number not in self.label:
            raise self._wrong(
                f"{what} has the category {describe(part.get('category_id'))}, which is not listed",
                'add it to "categories"',
            )
        return self.label[number]

    def is_crowd(self, part: Mapping[str, Any], what: str) -> bool:
        """Tell whether an annotation is a crowd.

        Raises:
            Cause: anything else than 0 and 1.
        """
        value = part.get("iscrowd", 0)
        value = {"0": 0, "1": 1}.get(value, value) if isinstance(value, str) else value
        if value not in (0, 1):
            raise self._wrong(f"iscrowd of {what} is {describe(value)}", "it is 0 or 1")
        return bool(value)


def read_instances(path: Path, folders: Sequence[Path], problems: Problems) -> tuple[dict[int, str], list[Entry]]:
    """Read a file of COCO instances.

    Args:
        path: the JSON file.
        folders: where to look for images, in this order.
        problems: what to do about broken images and annotations.

    Returns:
        The categories, number to name, in the order of the labels, and the images with their annotations.
    """
    source = CocoFile(path, problems, INSTANCES)
    images = list(source.images(folders))
    annotations = source.by_image()
    entries = []
    for numbers, file, height, width in images:
        entry = Entry(str(file), height, width, [], [], [], [])
        for annotation in (each for number in numbers for each in annotations.pop(number, [])):
            with problems.tolerated():
                what = f"{_which(annotation)} of {file.name}"
                label, crowd = source.class_of(annotation, what), source.is_crowd(annotation, what)
                segmentation = _segmentation(annotation.get("segmentation"), height, width, f"{path}: {what}")
                (entry.crowds if crowd else entry.segments).append(segmentation)
                (entry.crowd_labels if crowd else entry.labels).append(label)
        entries.append(entry)
    return source.categories, entries


def read_panoptic(
    path: Path, folders: Sequence[Path], maps: Path, problems: Problems
) -> tuple[dict[int, str], list[Entry]]:
    """Read a file of COCO panoptic annotations; every segment, thing or stuff, is an instance.

    Args:
        path: the JSON file.
        folders: where to look for images, in this order.
        maps: the folder with the PNG files of the segments.
        problems: what to do about broken images and annotations.
    """
    source = CocoFile(path, problems, PANOPTIC)
    images = list(source.images(folders))
    annotations = source.by_image()
    find = _finder([maps])
    entries = []
    for numbers, file, height, width in images:
        for annotation in (each for number in numbers for each in annotations.get(number, [])):
            with problems.tolerated():
                name, segments = annotation.get("file_name"), annotation.get("segments_info")
                if not isinstance(name, str) or "\0" in name or not isinstance(segments, list):
                    raise Cause(PANOPTIC, f"{path}: {_which(annotation)} lacks file_name or segments_info", "add them")
                entry = Entry(str(file), height, width, [], [], [], [], str(find(name)), True)
                for segment in segments:
                    what = f"a segment of {name}"
                    number = _integer(segment.get("id")) if isinstance(segment, Mapping) else None
                    if number is None or not 0 < number < 1 << 24:
                        raise Cause(PANOPTIC, f"{path}: the id of {what} is {describe(segment)}", "see COCO's format")
                    crowd = source.is_crowd(segment, what)
                    (entry.crowds if crowd else entry.segments).append(number)
                    (entry.crowd_labels if crowd else entry.labels).append(source.class_of(segment, what))
                entries.append(entry)
    return source.categories, entries


def _finder(folders: Sequence[Path]) -> Callable[[str], Path]:
    """Return a function that finds a file by its name in the first folder that has it, and never outside of them."""

    def find(name: str) -> Path:
        rule = "every image must be there"
        for folder in folders:
            path = folder / name
            try:
                inside = path.resolve().is_relative_to(folder.resolve())
                if inside and path.exists():
                    check_file(path, rule)
                    return path
            except (OSError, RuntimeError) as error:  # of a link that leads to itself, the latter
                raise Cause(rule, f"{describe(name)}: {explain(error)}", "name a file") from None
            if not inside:
                raise Cause(rule, f"{name!r} leads out of the folder {folder}", "name files inside of it")
        looked = " or ".join(str(folder) for folder in folders)
        raise Cause(rule, f"there is no file {name!r} in {looked}", "put the images there, or drop the entry")

    return find


def _which(annotation: Any) -> str:
    number = annotation.get("id") if isinstance(annotation, Mapping) else None
    return "an annotation" if number is None else f"annotation {describe(number)}"


def _integer(value: Any) -> int | None:
    """Return a whole number, which some tools write as 128.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else None
    return value


def _segmentation(value: Any, height: int, width: int, what: str) -> Any:
    """Check a segmentation; what is left to check needs decoding."""
    if isinstance(value, Mapping):
        return _run_lengths(value, height, width, what)
    if not isinstance(value, list) or not value:
        raise Cause(
            "every annotation must have a segmentation",
            f"{what} has {describe(value)}",
            "masks are learned from masks: give polygons or RLE, boxes alone do not do",
        )
    for polygon in value:
        fits = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        if not fits or not all(_is_coordinate(each) for each in polygon):
            raise Cause(
                "a polygon must list x and y of at least three corners",
                f"{what} has {describe(polygon)}",
                f"coordinates are numbers below {FARTHEST:,}",
            )
    return [[float(each) for each in polygon] for polygon in value]


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -FARTHEST < value < FARTHEST


def _run_lengths(value: Mapping[str, Any], height: int, width: int, what: str) -> dict[str, Any]:
    counts, size = value.get("counts"), value.get("size")
    sides = [_integer(side) for side in size] if isinstance(size, list) else None
    if sides != [height, width]:
        raise Cause(
            "the size of an RLE must be that of its image",
            f"{what} has the size {describe(size)}, the image is {height} x {width}",
            "size is [height, width]",
        )
    if isinstance(counts, str):
        if counts.isascii():
            return {"size": [height, width], "counts": counts}
    elif isinstance(counts, list):
        whole = all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in counts)
        if whole and sum(counts) == height * width:
            return {"size": [height, width], "counts": counts}
    raise Cause(
        "the counts of an RLE must be whole numbers that add up to the pixels of its image",
        f"{what} has {describe(counts)}",
        "the counts alternate between outside and inside, column by column",
    )
