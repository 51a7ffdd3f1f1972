"""COCO panoptic: a color for each segment; every segment, thing or stuff, is an instance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from maskloss.errors import Cause, describe
from maskloss.lab.data.catalog import CROWD, OBJECT, Entry, Instance, Map, Part
from maskloss.lab.data.maps import COLORS
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.readers.coco import CocoFile, as_id, which
from maskloss.lab.data.tree import OTHER_FILES, Tree, folded, part_of

PANOPTIC = "annotations must be COCO panoptic"


def find(tree: Tree, options: DataOptions, problems: Problems) -> list[Part] | None:
    """Find files of COCO panoptic annotations with their folders of PNG files."""
    if options.annotations is not None:
        if options.annotations.lower().endswith(OTHER_FILES):
            return None
        files = [options.annotations] if _is_panoptic(tree.json(options.annotations)) else []
    else:
        files = [path for path in tree.whole_jsons if "panoptic" in PurePosixPath(path).name.lower()]
    parts = []
    for path in files:
        file = CocoFile(tree, path, problems, PANOPTIC)
        maps = _maps(tree, path)
        how = f"COCO panoptic: {path} with {maps}/"
        parts.append(Part(part_of(path, stem=True), list(file.categories.items()), list(_read(file, maps)), how))
    return parts or None


def _is_panoptic(content: Any) -> bool:
    some = content.get("annotations") if isinstance(content, Mapping) else None
    return isinstance(some, list) and any(isinstance(each, Mapping) and "segments_info" in each for each in some)


def _maps(tree: Tree, path: str) -> str:
    """Find the folder of PNG files: it has the name of the JSON file."""
    stem = PurePosixPath(path).stem
    found = tree.folders(stem) or tree.folders("panoptic") or tree.folders(stem.replace("panoptic_", ""))
    with_pngs = [each for each in found if tree.under(each, tree.ending(".png"))]
    if not with_pngs:
        raise Cause(
            "panoptic annotations must have their PNG files beside them",
            f"there is no folder {tree.path(path).with_suffix('')}",
            "it has the name of the JSON file",
        )
    return with_pngs[0]


def _read(file: CocoFile, maps: str) -> Iterator[Entry]:
    tree, problems = file.tree, file.problems
    pngs = {folded(PurePosixPath(each).name): each for each in tree.under(maps, tree.ending(".png"))}
    images = list(file.images())
    annotations = file.by_image()
    for numbers, path, height, width in images:
        for annotation in (each for number in numbers for each in annotations.get(number, [])):
            with problems.tolerated():
                name, segments = annotation.get("file_name"), annotation.get("segments_info")
                if not isinstance(name, str) or "\0" in name or not isinstance(segments, list):
                    what = f"{tree.path(file.path)}: {which(annotation)} lacks file_name or segments_info"
                    raise Cause(PANOPTIC, what, "add them")
                png = pngs.get(folded(PurePosixPath(name.replace("\\", "/")).name))
                if png is None:
                    raise Cause(PANOPTIC, f"there is no file {name!r} in {tree.path(maps)}", "put it there")
                instances = [_segment(file, segment, name) for segment in segments]
                mapped = Map(str(tree.path(png)), COLORS, [0])
                yield Entry(str(path), height, width, instances, mapped, numbers[0])


def _segment(file: CocoFile, segment: Any, name: str) -> Instance:
    what = f"a segment of {name}"
    number = as_id(segment.get("id")) if isinstance(segment, Mapping) else None
    if not isinstance(number, int) or not 0 < number < 1 << 24:
        raise Cause(
            PANOPTIC, f"{file.tree.path(file.path)}: the id of {what} is {describe(segment)}", "see COCO's format"
        )
    return Instance(number, file.label_of(segment, what), CROWD if file.is_crowd(segment, what) else OBJECT)
