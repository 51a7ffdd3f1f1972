"""COCO instances: every assumption is checked, since people write such files by scripts and labeling tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from maskloss.errors import Cause, MaskLossError, describe
from maskloss.lab.data.catalog import BOX, CROWD, OBJECT, Entry, Instance, Part
from maskloss.lab.data.images import read_size
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import DECIDED, MENDED, SUSPICIOUS, Problems
from maskloss.lab.data.readers.coco_forms import is_instances, mask_of, usual
from maskloss.lab.data.readers.segmentation import Frame, box_of, integer, number, overlap, segmentation
from maskloss.lab.data.tree import OTHER_FILES, Tree, part_of
from maskloss.lab.data.truth import decode

INSTANCES = "annotations must be COCO instances"
LONGEST_SIDE = 1 << 20
# As many files as every reader looks into are kept in memory.
_LOOKED_AT = 6
# Files of these names are taken before others; those of the second list never are.
_SURE, _PREFERRED = ("instances", "_annotations.coco"), ("annotations", "coco")
_OTHERS = ("captions", "person_keypoints", "panoptic", "stuff", "image_info")
# With more crowds than this among all instances, run lengths are those of a brush.
_MANY_CROWDS = 0.1
# Masks that are compared with their boxes, the sides of a box that says enough, and the IoU that is too little.
_COMPARED, _SMALL, _ELSEWHERE = 50, 4, 0.5
# What a category is called that only stands for "nothing" or for the whole data set.
_NOTHING = frozenset({"background", "_background_", "__background__", "bg", "__ignore__", "ignore"})


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find files of COCO instances, one for each part."""
    parts, files = [], []
    for path in _files(tree, options):
        file = CocoFile(tree, path, problems, INSTANCES)
        idle = frozenset(number for number, name in file.categories.items() if _is_idle(file, number, name))
        entries = list(read_images(file))
        how = f"COCO instances: {path}"
        parts.append(Part(part_of(path, stem=True), list(file.categories.items()), entries, how, idle))
        files.append(file)
    _check_pixels(tree, parts)
    for file in files:
        _check_boxes(file)
    return _crowds(parts, options, problems) if parts else None


def _check_pixels(tree: Tree, parts: list[Part]) -> None:
    """Raise if all polygons are within one pixel: they are fractions of the image, as YOLO has them."""
    sources = [each.source for part in parts for entry in part.entries for each in entry.objects]
    largest = max((max(polygon) for source in sources if isinstance(source, list) for polygon in source), default=2)
    if largest <= 1 and all(isinstance(source, list) for source in sources):
        what = f"no coordinate in {tree.root} is larger than {largest:g}"
        raise Cause(INSTANCES, what, "multiply them by the width and the height of the image: COCO counts pixels")


def _check_boxes(file: CocoFile) -> None:
    """Ask if most masks lie elsewhere than their boxes: then their runs are counted otherwise, or of another image."""
    apart = [
        what for what, mask, box in file.boxes if overlap(mask, box) < _ELSEWHERE > overlap(mask, _of_corners(box))
    ]
    if 2 * len(apart) > len(file.boxes) > 1:
        what = f"{len(apart)} of the first {len(file.boxes)} do not, such as {apart[0]}"
        hint = "are run lengths counted row by row, not column by column? If the boxes are wrong, remove them"
        file.problems.ask(Cause("masks must lie in their boxes", f"{file.tree.path(file.path)}: {what}", hint))


def _of_corners(box: Sequence[float]) -> list[float]:
    """Take a box for two corners, as some tools write it; with the same corner where that cannot be."""
    return [box[0], box[1], max(0.0, box[2] - box[0]), max(0.0, box[3] - box[1])]


def _mask_box(source: Any, entry: Entry) -> list[float] | None:
    """Return the box around a mask; None: it is empty."""
    if isinstance(source, list):
        return box_of(None, source)
    mask = decode(source, entry.height, entry.width)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return [float(each) for each in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)]


def _files(tree: Tree, options: DataOptions) -> list[str]:
    if options.annotations is not None:
        if options.annotations.lower().endswith(OTHER_FILES):
            return []
        return [options.annotations] if is_instances(tree.json(options.annotations, INSTANCES)) else []
    names = [path for path in tree.whole_jsons if not Path(path).name.lower().startswith(_OTHERS)]
    # The keypoints of persons come with their masks: where nothing else is there, they are meant.
    names = names or [path for path in tree.whole_jsons if Path(path).name.lower().startswith("person_keypoints")]
    # A file that says by its name what it is must be right; of others, those are taken that are.
    found = [path for path in names if _must_be(tree, path)]
    covered = {part_of(path, stem=True) for path in found}
    more = [
        path for path in names if path not in found and (not found or part_of(path, stem=True) not in covered | {""})
    ]
    for place, path in enumerate(more):
        if _may_be(tree, path):
            found.append(path)
        elif place >= _LOOKED_AT:
            tree.forget(path)
    by_part: dict[str, list[str]] = {}
    for path in found:
        by_part.setdefault(part_of(path, stem=True), []).append(path)
    for several in by_part.values():
        if len(several) > 1:
            raise Cause(
                "there must be one file of annotations for each part of the data",
                f"{tree.root} has {', '.join(several)}",
                "name one with --annotations, move the others away, or merge them",
            )
    return found


def _must_be(tree: Tree, path: str) -> bool:
    """Whether a file is taken before others; one that is called instances is, even if it is broken."""
    name = Path(path).name.lower()
    return name.startswith(_SURE) or (name.startswith(_PREFERRED) and is_instances(tree.json(path, INSTANCES)))


def _may_be(tree: Tree, path: str) -> bool:
    with suppress(MaskLossError):  # a file that nobody named, and that is no JSON, is not the data
        return is_instances(tree.json(path))
    return False


def _is_idle(file: CocoFile, number: int, name: str) -> bool:
    """Whether a category without instances is a placeholder, as exporters write them before the true ones."""
    kind = str(file.category(number).get("supercategory")).lower()
    return len(file.categories) > 1 and (number == 0 or kind == "none" or name.lower() in _NOTHING)


# ------------------------------------------------------------------------------------------------------------ the file


class CocoFile:
    """What a COCO file says."""

    def __init__(self, tree: Tree, path: str, problems: Problems, rule: str) -> None:
        self.tree, self.path, self.problems, self.rule = tree, path, problems, rule
        content = usual(tree.json(path, rule), lambda what: problems.note(MENDED, what, path))
        if not isinstance(content, Mapping):
            raise Cause(rule, f"{tree.path(path)} holds a {type(content).__name__}", "is it the right file?")
        self.content = {**content}
        for key in ("images", "annotations", "categories"):
            if isinstance(content.get(key), Mapping):
                problems.note(MENDED, f'"{key}" as a dict instead of a list', path)
                self.content[key] = list(content[key].values())
            if not isinstance(self.content.get(key), list):
                raise self.wrong(f'it has no list "{key}"', "export the data set as COCO")
        self._listed = {as_id(each.get("id")): each for each in self.content["categories"] if isinstance(each, Mapping)}
        self.categories = self._categories()
        self.labels = {number: label for label, number in enumerate(self.categories)}
        self._images: list[Any] = self.content["images"]
        listed = [each for each in self._images if isinstance(each, Mapping)]
        self._ids = {as_id(each.get("id")) for each in listed}
        # Of the first masks: what they are, the box around the mask, and the box that is annotated.
        self.boxes: list[tuple[str, list[float], list[float]]] = []
        self._named = {each["file_name"]: as_id(each.get("id")) for each in listed if _is_text(each.get("file_name"))}

    def category(self, number: int) -> Mapping[str, Any]:
        """Return all that the file says of a category."""
        found: Mapping[str, Any] = self._listed[number]
        return found

    def wrong(self, what: str, hint: str) -> Cause:
        """Make an error that names the file."""
        return Cause(self.rule, f"{self.tree.path(self.path)}: {what}", hint)

    def _categories(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for category in self.content["categories"]:
            number = as_id(category.get("id")) if isinstance(category, Mapping) else None
            if not isinstance(number, int):
                raise self.wrong(f"a category is {describe(category)}", "give each an integer id and a name")
            name = str(number if category.get("name") is None else category["name"])
            if names.setdefault(number, name) != name:
                raise self.wrong(
                    f"the category id {number} stands for {names[number]!r} and for {name!r}",
                    "give each category a number of its own",
                )
        if not names:
            raise self.wrong("it lists no categories", 'add them to "categories"')
        return {number: names[number] for number in sorted(names)}

    def images(self) -> Iterator[tuple[list[Any], Path, int, int]]:
        """List the images: the ids under which annotations name it, its file, height and width.

        A file that is listed under several ids, as merged data sets have it, is one image with the annotations of all.
        """
        of_file: dict[str, tuple[list[Any], tuple[int, int] | None]] = {}
        owner: dict[Any, str] = {}
        for image in self._images:
            with self.problems.tolerated():
                name, number, size = self._image(image)
                if owner.setdefault(number, name) != name:
                    raise self.wrong(
                        f"the image id {number!r} stands for {owner[number]!r} and for {name!r}",
                        "give each image an id of its own",
                    )
                known = of_file.setdefault(name, ([], size))
                if known[1] != size:
                    raise self.wrong(f"{name!r} is listed with two sizes", "keep the one that is right")
                if number not in known[0]:
                    known[0].append(number)
        for name, (numbers, size) in of_file.items():
            with self.problems.tolerated():
                file = self.tree.find(name, self.path, self.problems)
                if size is None:
                    self.problems.note(MENDED, "sizes of images left out, taken from their files", name)
                    size = read_size(file)
                yield numbers, file, *size

    def _image(self, image: Any) -> tuple[str, Any, tuple[int, int] | None]:
        if not isinstance(image, Mapping):
            raise self.wrong(f"an image is {describe(image)}", "each is a dict with id, file_name, height and width")
        name, number = image.get("file_name"), as_id(image.get("id"))
        if name is None:
            name = next((image[each] for each in ("path", "filename", "coco_url") if image.get(each)), None)
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise self.wrong(f"the file_name of image {number!r} is {describe(name)}", "name a file")
        if number is None:
            raise self.wrong(f"the id of image {name!r} is {describe(image.get('id'))}", "give each image a number")
        if image.get("not_exhaustive_category_ids"):
            what = (
                "images in which instances of a class are not all annotated (LVIS): the others are taken for background"
            )
            self.problems.note(SUSPICIOUS, what, name)
        if isinstance(image.get("id"), str) and isinstance(number, int):
            self.problems.note(MENDED, "ids as strings", f"image {number}")
        sides = [_side(image.get(side)) for side in ("height", "width")]
        if all(side in (None, 0) for side in sides):
            return name, number, None
        height, width = sides
        whole = isinstance(height, int) and isinstance(width, int)
        if not whole or min(height, width) < 0 or max(height, width) > LONGEST_SIDE:
            what = f"the size of {name!r} is {image.get('height')!r} x {image.get('width')!r}"
            raise self.wrong(what, "give its pixels")
        return name, number, (height, width) if height * width else None

    def by_image(self) -> dict[Any, list[Mapping[str, Any]]]:
        """Sort the annotations by the id of their image."""
        found: dict[Any, list[Mapping[str, Any]]] = {}
        for annotation in self.content["annotations"]:
            with self.problems.tolerated():
                number = as_id(annotation.get("image_id")) if isinstance(annotation, Mapping) else None
                if number not in self._ids and number in self._named:
                    self.problems.note(MENDED, "images of annotations by their names", which(annotation))
                    number = self._named[number]
                if number is None or number not in self._ids:
                    raise self.wrong(
                        f"{which(annotation)} belongs to image {describe(number)}, which is not listed",
                        'add the image to "images"',
                    )
                if _is_text(annotation["image_id"]) and annotation["image_id"] not in self._named:
                    self.problems.note(MENDED, "ids as strings", which(annotation))
                found.setdefault(number, []).append(annotation)
        return found

    def label_of(self, part: Mapping[str, Any], what: str) -> int:
        """Return the label of an annotation or a segment."""
        value = part.get("category_id")
        number = as_id(value)
        if number is None and len(self.labels) == 1:
            self.problems.note(MENDED, "annotations without a category, of which there is one", what)
            return 0
        named = [each for each, name in self.categories.items() if name == value]
        if number not in self.labels and len(named) == 1:
            self.problems.note(MENDED, "categories of annotations by their names", what)
            return self.labels[named[0]]
        if number not in self.labels:
            raise self.wrong(
                f"{what} has the category {describe(value)}, which is not listed", 'add it to "categories"'
            )
        return self.labels[number]

    def is_crowd(self, part: Mapping[str, Any], what: str) -> bool:
        """Whether an annotation is a crowd."""
        value = part.get("iscrowd", 0)
        value = {"0": 0, "1": 1, "": 0, "false": 0, "true": 1}.get(value.lower(), value) if _is_text(value) else value
        if value not in (0, 1, None):
            raise self.wrong(f"iscrowd of {what} is {describe(value)}", "it is 0 or 1")
        return bool(value)


def as_id(value: Any) -> int | str | None:
    """Return an id in the one form in which ids are compared: whole numbers, whatever they were written as."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.lstrip("-").isdecimal() and text.isascii() and len(text) < 20 else text or None
    return integer(value)


def _side(value: Any) -> Any:
    """Return the side of an image as a whole number, whatever it was written as; what is none stays as it is."""
    found = number(value)
    return value if found is None else integer(found)


def which(annotation: Any) -> str:
    """Return what to call an annotation."""
    number = annotation.get("id") if isinstance(annotation, Mapping) else None
    return "an annotation" if number is None else f"annotation {describe(number)}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# ------------------------------------------------------------------------------------------------------------ instances


def read_images(file: CocoFile) -> Iterator[Entry]:
    """Read the images of a file with their instances."""
    images = list(file.images())
    annotations = file.by_image()
    for numbers, path, height, width in images:
        mine = [each for number in numbers for each in annotations.pop(number, [])]
        entry = Entry(str(path), height, width, [], None, numbers[0])
        if all(_add(entry, annotation, file) for annotation in mine):
            yield entry


def _add(entry: Entry, annotation: Mapping[str, Any], file: CocoFile) -> bool:
    """Add an annotation; return whether the image can be used."""
    problems, what = file.problems, f"{which(annotation)} of {entry.name}"
    value = mask_of(annotation, lambda mended: problems.note(MENDED, mended, what))
    box = box_of(annotation.get("bbox"))
    try:
        label, crowd = file.label_of(annotation, what), file.is_crowd(annotation, what)
    except MaskLossError as error:
        # What is there is not known: to go on without it would be to call it background.
        problems.tolerate(error)
        return False
    try:
        source = segmentation(value, Frame(entry.height, entry.width, f"{what} ({file.path})", problems))
        box = box or box_of(None, value)
        if source is None and box is None:
            raise Cause(
                "every annotation must have a segmentation",
                f"{what} has {describe(value)}",
                "masks are learned from masks: give polygons or RLE",
            )
    except MaskLossError as error:
        problems.tolerate(error)
        if box is None:
            return False
        problems.note(DECIDED, "broken masks made ignore regions of their boxes", what)
        source = None
    if source is None:
        problems.note(DECIDED, "instances with a box only made ignore regions of that box", what)
        entry.instances.append(Instance({"box": box}, label, BOX))
    else:
        entry.instances.append(Instance(source, label, CROWD if crowd else OBJECT))
        if box is not None and len(file.boxes) < _COMPARED and min(box[2:]) >= _SMALL:
            with suppress(MaskLossError):  # a mask that cannot be decoded is told when its image is read
                around = _mask_box(source, entry)
                file.boxes += [] if around is None else [(what, around, box)]
    return True


def _crowds(parts: list[Part], options: DataOptions, problems: Problems) -> list[Part]:
    """Decide what crowds are: regions of many objects, as in COCO, or what a brush has painted, as in CVAT."""
    masks = [each for part in parts for entry in part.entries for each in entry.instances if each.kind != BOX]
    runs = [each for each in masks if isinstance(each.source, dict)]
    crowds = [each for each in masks if each.kind == CROWD]
    if not crowds:
        return parts
    brush = [each for each in runs if each.kind == CROWD]
    like_a_brush = len(brush) == len(runs) and len(brush) > _MANY_CROWDS * len(masks)
    if options.crowd == "instances" or (options.crowd is None and like_a_brush):
        why = "as --crowd asks" if options.crowd else "since all run lengths are, as CVAT's brush writes them"
        only = "run lengths with iscrowd 1" if options.crowd is None else "annotations with iscrowd 1"
        problems.note(
            DECIDED if options.crowd else SUSPICIOUS,
            f"{only} counted as instances, {why}; --crowd ignore makes them regions",
            "",
            len(crowds),
        )
        chosen = {id(each) for each in (crowds if options.crowd else brush)}
        return [part._replace(entries=[_turned(entry, chosen) for entry in part.entries]) for part in parts]
    problems.note(
        DECIDED,
        "annotations with iscrowd 1 made ignore regions; --crowd instances makes them instances",
        "",
        len(crowds),
    )
    return parts


def _turned(entry: Entry, chosen: set[int]) -> Entry:
    changed = [each._replace(kind=OBJECT) if id(each) in chosen else each for each in entry.instances]
    return entry._replace(instances=changed)
