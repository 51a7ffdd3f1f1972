"""Finding out what a folder holds, and dividing it into images to train on and images to score on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from maskloss.errors import Cause
from maskloss.lab.data import split
from maskloss.lab.data.catalog import Catalog, Entry, Found, Instance, Part
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LEFT_OUT, MENDED, SUSPICIOUS, Problems
from maskloss.lab.data.readers import FORMATS, READERS, Reader
from maskloss.lab.data.sizes import checked
from maskloss.lab.data.tree import TEST, TRAIN, VAL, Tree

LAYOUT = "see the table of what is read in the documentation of training, or name the annotations with --annotations"
# Polygons whose images reach this far, as a share, are all in one corner; two sides of this many images tell.
_CORNER, _TELLING = 0.52, 10
# That this many polygons have four corners each, and maybe the first one again, is no accident.
_MANY = 20


# What people have that nothing reads, and what to do about it.
_UNREAD = {
    ".zip .tar .tgz .tar.gz .7z .rar": "unpack it first",
    ".heic .heif .dng .cr2 .nef": "convert the images to PNG or JPEG",
    ".nii .nii.gz .mha .nrrd .dcm": "volumes are not trained on: write their planes as TIFF, labels alike",
    ".svs .ndpi .mrxs .czi .nd2 .lif": "write the regions that are annotated as TIFF or PNG",
    ".npz .npy .h5 .hdf5 .mat .parquet .arrow .tfrecord": "write each image and each label map into a file of its own",
    ".geojson": "GeoJSON must be in pixels, as QuPath writes it, and be named after its image",
    ".xml": "XML of CVAT, ImageScope and LabelMe is read; PASCAL VOC's holds boxes, and masks are learned from masks",
    ".csv": "VIA's CSV is read; write others as COCO JSON, since run lengths may go by rows or by columns",
}


class _Merged(NamedTuple):
    """The parts of a data set, with one list of classes."""

    reader: Reader
    classes: list[tuple[int, str]]
    parts: dict[str, list[Entry]]
    how: list[str]


def recognize(
    folder: Path,
    options: DataOptions,
    problems: Problems,
    score: str | None = None,
    classes: Sequence[str] | None = None,
) -> Found:
    """Find the data set in a folder and divide it.

    Args:
        folder: what a labeling tool leaves, or a benchmark has.
        options: what a person said of it.
        problems: what to do about broken images and annotations; told of everything else.
        score: "all", or the name of a part: these images are to be scored on, and none to be trained on; None: the
            folder is divided for training.
        classes: those of a trained model, in their order; None: those of the data.
    """
    merged = _merge(*_find(Tree(folder, _images(folder, options)), options, problems), problems)
    merged = merged._replace(parts={part: checked(some, options, problems) for part, some in merged.parts.items()})
    everything = [entry for some in merged.parts.values() for entry in some]
    if not any(entry.objects for entry in everything):
        raise _no_instances("image", folder, everything, problems)
    if score is not None:
        train: list[Entry] = []
        held_out, how = split.chosen(merged.parts, score, folder)
    elif options.val is not None and split.is_place(options.val):
        other = _other(folder, options, problems)
        both, (parts, others) = _together(merged, other)
        merged = merged._replace(classes=both, parts=parts)
        train, _, how = split.divide(merged.parts, None, folder, problems, alone=True)
        held_out = [entry for some in others.values() for entry in some]
        how = [*how, *(f"{each} (held out, --val)" for each in other.how)]
    else:
        train, held_out, how = split.divide(merged.parts, options.val, folder, problems)
    for name, each in (("training image", train), ("held-out image", held_out)):
        wanted = (each or not problems.asked) and not (score is not None and each is train)
        if wanted and not any(entry.objects for entry in each):
            problems.ask(_no_instances(name, folder, each, problems))
    _suspect(everything, merged.classes, problems)
    if train and held_out:
        _compare(train, held_out, merged.classes, problems)
    names, numbers = [name for _, name in merged.classes], [number for number, _ in merged.classes]
    if classes is not None:
        train, held_out = (_as_known(part, names, classes) for part in (train, held_out))
        names, numbers = list(classes), [dict(zip(names, numbers, strict=True)).get(name, -1) for name in classes]
    microscopy = merged.reader.microscopy and len(names) == 1
    how = [*merged.how, *how]
    return Found(merged.reader.name, how, names, numbers, Catalog(train), Catalog(held_out), microscopy)


def _find(tree: Tree, options: DataOptions, problems: Problems) -> tuple[Reader, list[Part]]:
    if options.annotations is not None:
        options = options._replace(annotations=_inside(tree, options.annotations))
    for reader in READERS:
        if options.format in (None, reader.name):
            parts = reader.find(tree, options, problems)
            if parts:
                for what in tree.broken.values():
                    if not any(what in each for each in problems.skipped):
                        problems.note(LEFT_OUT, "broken files that nothing needed", what)
                tree.forget()
                return reader, parts
    wanted = "images with annotations" if options.format is None else f"a data set of the format {options.format!r}"
    kinds = Counter(PurePosixPath(path).suffix.lower() or "no ending" for path in tree.files)
    holds = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(5)) or "nothing"
    hint = next((hint for endings, hint in _UNREAD.items() if tree.ending(*endings.split())), LAYOUT)
    lost = "".join(f"; {what}" for what in islice(tree.broken.values(), 3))
    raise Cause(f"the folder must hold {wanted}", f"none was found in {tree.root}, which holds {holds}{lost}", hint)


def _inside(tree: Tree, annotations: str) -> str:
    """Return the path of a file of annotations relative to the folder, or all of it if it lies elsewhere."""
    for path in (tree.root / annotations, Path(annotations)):
        if path.exists() and path.resolve().is_relative_to(tree.root.resolve()):
            return path.resolve().relative_to(tree.root.resolve()).as_posix()
    if Path(annotations).exists():
        return Path(annotations).absolute().as_posix()
    raise Cause(
        "--annotations must be a file", f"there is no {annotations}, neither here nor in {tree.root}", "name it"
    )


def _images(folder: Path, options: DataOptions) -> Path | None:
    """Return the folder of --images, which may be named from the data or from here."""
    if options.images is None:
        return None
    inner = folder / options.images
    return inner if inner.is_dir() else Path(options.images)


def _other(folder: Path, options: DataOptions, problems: Problems) -> _Merged:
    """Read the other folder, or the other file, that --val names."""
    place = Path(str(options.val))
    annotations = None
    if place.is_file():
        inside = place.resolve().is_relative_to(folder.resolve())
        root, annotations = (folder, str(place)) if inside else (place.parent, place.name)
    else:
        root = place
    options = options._replace(val=None, annotations=annotations)
    merged = _merge(*_find(Tree(root, _images(root, options)), options, problems), problems)
    return merged._replace(parts={part: checked(some, options, problems) for part, some in merged.parts.items()})


# ------------------------------------------------------------------------------------------------------------- classes


def _merge(reader: Reader, parts: list[Part], problems: Problems) -> _Merged:
    """Give the parts of a data set one list of classes: equal names are one class, whatever their numbers are."""
    parts = sorted(parts, key=lambda part: ("", TRAIN, VAL, TEST).index(part.name))
    used = {
        part.classes[each.label]
        for part in parts
        for entry in part.entries
        for each in entry.instances
        if each.label >= 0
    }
    idle = {(number, name) for part in parts for number, name in part.classes if number in part.idle} - used
    for _, name in sorted(idle):
        problems.note(MENDED, "placeholder categories without instances left out", repr(name))
    classes: dict[str, int] = {}
    for part in parts:
        kept = [each for each in part.classes if each not in idle]
        named = Counter(name for _, name in kept)
        for number, name in kept:
            if name in classes:
                continue
            if named[name] > 1:
                problems.note(MENDED, "categories of one name merged", repr(name))
            if part is not parts[0]:
                problems.note(MENDED, "classes that only one part lists", repr(name))
            classes[name] = number
    return _renumbered(reader, parts, classes)


def _renumbered(reader: Reader, parts: list[Part], classes: dict[str, int]) -> _Merged:
    """Number the labels of all parts by the names of their classes."""
    place = {name: label for label, name in enumerate(classes)}
    merged: dict[str, list[Entry]] = {}
    for part in parts:
        new = [place.get(name, -1) for _, name in part.classes]
        for entry in part.entries:
            entry.instances[:] = _relabeled(entry, new)
        merged.setdefault(part.name, []).extend(part.entries)
    return _Merged(
        reader,
        [(number, name) for name, number in classes.items()],
        merged,
        list(dict.fromkeys(part.how for part in parts)),
    )


def _together(
    merged: _Merged, other: _Merged
) -> tuple[list[tuple[int, str]], tuple[dict[str, list[Entry]], dict[str, list[Entry]]]]:
    """Give two data sets one list of classes."""
    both = [[Part(name, each.classes, some, "") for name, some in each.parts.items()] for each in (merged, other)]
    classes = {name: number for each in (other, merged) for number, name in each.classes}
    ordered = {name: classes[name] for each in (merged, other) for _, name in each.classes}
    found = [_renumbered(merged.reader, parts, ordered) for parts in both]
    return found[0].classes, (found[0].parts, found[1].parts)


def _as_known(entries: list[Entry], names: list[str], classes: Sequence[str]) -> list[Entry]:
    """Number the labels of images as a trained model does."""
    used = sorted(
        {names[each.label] for entry in entries for each in entry.instances if each.label >= 0} - set(classes)
    )
    if used:
        raise Cause(
            "the data must have the classes of the run",
            f"the run knows {', '.join(classes)}; the data have {', '.join(used)} as well",
            "name the classes alike",
        )
    new = [list(classes).index(name) if name in classes else -1 for name in names]
    return [entry._replace(instances=_relabeled(entry, new)) for entry in entries]


def _relabeled(entry: Entry, new: Sequence[int]) -> list[Instance]:
    return [each._replace(label=new[each.label] if each.label >= 0 else -1) for each in entry.instances]


def _suspect(entries: Sequence[Entry], classes: list[tuple[int, str]], problems: Problems) -> None:
    """Note what is likely to be meant otherwise, as can be seen of all images together only."""
    reach = (
        max(max(polygon[place::2]) / side for each in entry.objects for polygon in each.source)
        for entry in entries
        if entry.objects and all(isinstance(each.source, list) for each in entry.objects)
        for place, side in ((0, entry.width), (1, entry.height))
    )
    few = list(islice(reach, _TELLING))
    if len(few) == _TELLING and all(share < _CORNER for share in chain(few, reach)):
        what = "all polygons lie in the top left quarter of their images: are they those of smaller ones?"
        problems.note(SUSPICIOUS, what, "", 0)
    sources = [each.source for entry in entries for each in entry.objects]
    if len(sources) >= _MANY and all(isinstance(each, list) and [*map(len, each)] in ([8], [10]) for each in sources):
        problems.note(SUSPICIOUS, "all polygons have four corners: are they boxes, and no masks?", "", len(sources))
    of_name: dict[str, dict[int, int]] = {}
    for label, (_, name) in enumerate(classes):
        found = re.fullmatch(r"(.*\D)(\d+)", name)
        if found:
            of_name.setdefault(found[1], {})[int(found[2])] = label
    # Classes that are counted anew in each image, and of which none has a second instance.
    for name, labels in of_name.items():
        counts = (Counter(each.label for each in entry.objects) for entry in entries)
        rows = ([count[labels[number]] for number in sorted(labels)] for count in counts)
        if len(labels) > 1 and all(row == sorted(row, reverse=True) and max(row) < 2 for row in rows):
            what = "classes that are numbered anew in each image: are they instances of one class?"
            problems.note(SUSPICIOUS, what, f"{name}{min(labels)} to {name}{max(labels)}", len(labels))


def _compare(
    train: Sequence[Entry], held_out: Sequence[Entry], classes: list[tuple[int, str]], problems: Problems
) -> None:
    """Note what one of the two parts has and the other lacks, and what both have."""
    counts = [Counter(each.label for entry in part for each in entry.objects) for part in (train, held_out)]
    for label, (_, name) in enumerate(classes):
        seen = [bool(count[label]) for count in counts]
        if seen == [False, True]:
            problems.note(SUSPICIOUS, "classes without an instance to learn from", repr(name))
        elif seen == [True, False]:
            problems.note(SUSPICIOUS, "classes without a held-out instance", repr(name))
        elif not any(seen):
            problems.note(SUSPICIOUS, "classes without any instance", repr(name))
    both = {entry.file for entry in train} & {entry.file for entry in held_out}
    for file in sorted(both):
        problems.note(SUSPICIOUS, "images in both parts: scores on them mean nothing", Path(file).name)


def _no_instances(name: str, folder: Path, entries: Sequence[Entry], problems: Problems) -> Cause:
    why = ""
    regions = Counter(each.kind for entry in entries for each in entry.regions)
    if regions["crowd"]:
        why = f"; {regions['crowd']} annotations have iscrowd 1, and --crowd instances makes them instances"
    elif regions["box"]:
        why = f"; {regions['box']} have a box only, and masks are learned from masks"
    elif problems.skipped:
        shown = "; ".join(problems.skipped[:3])
        why = f"; {len(problems.skipped)} images or annotations were left out: {shown}"
    elif not entries:
        why = ": there are none"
    return Cause(
        "there must be instances to learn and to find",
        f"no {name} in {folder} has one{why}",
        LAYOUT,
    )


__all__ = ["FORMATS", "LAYOUT", "recognize"]
