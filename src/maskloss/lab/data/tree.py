"""The files of a folder, and the words in their paths: which part of a data set they belong to, and who means whom."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from maskloss.errors import Cause
from maskloss.lab.data.images import SUFFIXES
from maskloss.lab.data.problems import MENDED, Problems, cause_of
from maskloss.lab.files import explain, read_any_json, read_xml

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

TRAIN, VAL, TEST = "train", "val", "test"
_PARTS = {
    TRAIN: {"train", "training"},
    VAL: {"val", "valid", "validation", "dev", "held", "heldout", "holdout"},
    TEST: {"test", "testing"},
}
# Words in names of files and folders that hold images, and of those that hold masks.
IMAGE_WORDS = frozenset(
    {"image", "images", "img", "imgs", "raw", "rgb", "input", "inputs", "photo", "photos"} | {"jpegimages", "pngimages"}
)
MASK_WORDS = frozenset(
    {"mask", "masks", "label", "labels", "gt", "groundtruth", "truth", "annotation", "annotations", "seg", "segs"}
    | {"instance", "instances", "target", "targets", "labelmap", "labelmaps", "gts", "cp", "segmentation"}
    | {"segmentations", "annots", "annot", "segmentationclass", "segmentationobject", "identities"}
)
# At the beginning of a name, only these mean a mask: mask_001.
_FIRST = frozenset({"mask", "masks", "gt", "label", "labels", "seg", "target"})
# Files of annotations that are no JSON.
OTHER_FILES = (".csv", ".xml", ".yaml", ".yml", ".zip")
# Names of files that programs leave beside the data.
_NOT_DATA = ("__MACOSX", "Thumbs.db", "desktop.ini")
# A run of this package has these; its pictures are no data.
_RUN = {"run.json", "metrics.jsonl"}


def words(text: str) -> list[str]:
    """Split a name into words, in lower case: at what is no letter, and where capitals begin a word."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return [word for word in re.split(r"[\W\d_]+", spaced.lower()) if word]


def part_of(path: str, *, stem: bool = False) -> str:
    """Return which part of a data set the folders of a path name: "train", "val", "test" or ""."""
    pure = PurePosixPath(path)
    # What lies elsewhere is in folders of any name.
    parts = [*(() if pure.is_absolute() else pure.parts[:-1]), *([pure.stem] if stem else [])]
    named = {name for part in parts for word in words(part) for name, known in _PARTS.items() if word in known}
    return named.pop() if len(named) == 1 else ""


def parts_of_name(written: str) -> list[str]:
    """Split a path as somebody wrote it into names in the form in which they are compared."""
    return [folded(part) for part in written.replace("\\", "/").split("/") if part not in {"", ".", ".."}]


def shared_end(path: str, parts: Sequence[str]) -> int:
    """Return how many names, counted from the end, a path shares with one that `parts_of_name` has split."""
    return _alike([folded(part) for part in PurePosixPath(path).parts][::-1], parts[::-1])


def _alike(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def folded(name: str) -> str:
    """Return a name in the form in which it is compared: one Unicode form, no capitals."""
    return unicodedata.normalize("NFC", name).casefold()


class Tree:
    """All files of a folder.

    Args:
        root: the folder.
        images: where the images lie that annotations name, if elsewhere; only images are taken from there.

    Attributes:
        files: relative paths with slashes, sorted; hidden ones and runs of this package are left out.
        broken: what is wrong with files, which other programs may have left there.
    """

    def __init__(self, root: Path, images: Path | None = None) -> None:
        self.root = root
        self.files = sorted(_walk(root))
        if images is not None:
            # Absolute paths stay what they are when they are joined to the root.
            mine = [path for path in self.files if PurePosixPath(path).suffix.lower() not in SUFFIXES]
            self.files = sorted([*mine, *((images.absolute() / path).as_posix() for path in _walk(images))])
        self._read: dict[str, Any] = {}
        self.broken: dict[str, str] = {}

    @cached_property
    def images(self) -> list[str]:
        """The files whose names say that they are images; masks are among them."""
        return [path for path in self.files if PurePosixPath(path).suffix.lower() in SUFFIXES]

    def ending(self, *suffixes: str) -> list[str]:
        """List the files with one of these endings of their names."""
        return [path for path in self.files if path.lower().endswith(suffixes)]

    def folders(self, name: str) -> list[str]:
        """List the folders of a name in any case, as relative paths."""
        return sorted({path for path in self._folders if PurePosixPath(path).name.lower() == name.lower()})

    @cached_property
    def _folders(self) -> set[str]:
        return {parent.as_posix() for path in self.files for parent in PurePosixPath(path).parents}

    @cached_property
    def by_folder(self) -> dict[str, list[str]]:
        """The images of each folder."""
        index: dict[str, list[str]] = defaultdict(list)
        for path in self.images:
            index[PurePosixPath(path).parent.as_posix()].append(path)
        return index

    def under(self, folder: str, files: Iterable[str] | None = None) -> list[str]:
        """List the files anywhere in a folder."""
        start = "" if folder == "." else f"{folder}/"
        return [path for path in (self.images if files is None else files) if path.startswith(start)]

    def path(self, relative: str) -> Path:
        """Return the path of a file."""
        return self.root / relative

    def json(self, relative: str, rule: str = "annotations must be JSON") -> Any:
        """Read a JSON file once."""
        return self._once(read_any_json, relative, rule)

    def xml(self, relative: str, rule: str) -> Element:
        """Read an XML file once."""
        root: Element = self._once(read_xml, relative, rule)
        return root

    def _once(self, read: Callable[[Path, str], Any], relative: str, rule: str) -> Any:
        if relative not in self._read:
            try:
                self._read[relative] = read(self.path(relative), rule)
            except Cause as error:
                self.broken[relative] = cause_of(error)
                raise
        return self._read[relative]

    def forget(self, relative: str | None = None) -> None:
        """Let go of a file that was read, or of all."""
        for path in [*self._read] if relative is None else [relative]:
            self._read.pop(path, None)

    @cached_property
    def whole_jsons(self) -> list[str]:
        """The JSON files that are not those of one image each."""
        return [path for path in self.ending(".json", ".json.gz", ".jsonl", ".ndjson") if path not in self.of_one]

    @cached_property
    def of_one(self) -> set[str]:
        """The files that are named after an image, with or without its ending."""
        stems = ((path, folded(PurePosixPath(path).stem)) for path in self.files)
        return {path for path, stem in stems if stem in self._by_stem or stem in self._by_name}

    # ------------------------------------------------------------------------------------------------------- by names

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        index: dict[str, list[str]] = defaultdict(list)
        for path in self.images:
            index[folded(PurePosixPath(path).name)].append(path)
        return index

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        index: dict[str, list[str]] = defaultdict(list)
        for path in self.images:
            index[folded(PurePosixPath(path).stem)].append(path)
        return index

    @cached_property
    def _any_file(self) -> dict[str, str]:
        return {PurePosixPath(path).name: path for path in reversed(self.files)}

    def find(self, name: str, near: str, problems: Problems) -> Path:
        """Find the image that an annotation names: as it is written, or under its bare name anywhere in the folder.

        Args:
            name: with the slashes, the letter case, the Unicode form and the folders of whoever wrote it.
            near: the file that names it; of several images, the one with the most of its folders is meant.
            problems: told when the name is not that of the file.
        """
        plain = name.replace("\\", "/")
        for written in dict.fromkeys((plain, unquote(plain.rsplit("?d=", 1)[-1]), unquote(plain.split("?", 1)[0]))):
            bare = written.rsplit("/", 1)[-1]
            # Label Studio puts eight characters before the name of a file that was uploaded.
            for each in dict.fromkeys((bare, re.sub(r"^[0-9a-f]{8}-", "", bare))):
                found = self._by_name.get(folded(each)) or []
                if found:
                    return self._choose(found, name, written, near, problems)
        stem = folded(PurePosixPath(plain).stem)
        found = [path for path in self._by_stem.get(stem, []) if not is_mask_place(path)]
        if found:
            return self._choose(found, name, plain, near, problems)
        other = self._any_file.get(plain.rsplit("/", 1)[-1])
        if other is not None:
            raise Cause(
                "every image must be in a format that is read",
                f"{self.path(other)} is not",
                "convert it to PNG or JPEG",
            )
        raise Cause(
            "every image must be there", f"there is no file {name!r} in {self.root}", "put it there, or drop the entry"
        )

    def _choose(self, found: Sequence[str], name: str, written: str, near: str, problems: Problems) -> Path:
        parts = parts_of_name(written)

        def agreement(path: str) -> tuple[int, bool, bool, int]:
            folders = _alike(PurePosixPath(near).parent.parts, PurePosixPath(path).parent.parts)
            same_part = part_of(path) == part_of(near, stem=True)
            return shared_end(path, parts), same_part, not is_mask_place(path), folders

        ranked = sorted(found, key=agreement, reverse=True)
        if len(ranked) > 1 and agreement(ranked[0]) == agreement(ranked[1]):
            raise Cause(
                "a name must mean one image",
                f"{name!r} may be {ranked[0]} or {ranked[1]}",
                "write the folder before the name, as in images/0.png",
            )
        if not f"/{ranked[0]}".endswith(f"/{name}"):
            problems.note(
                MENDED,
                "names of images in another form (slashes, letter case, Unicode form, folders in front)",
                f"{name!r} is {ranked[0]}",
            )
        return self.path(ranked[0])


def _walk(root: Path) -> list[str]:
    """List the files of a folder as relative paths."""
    if not root.is_dir():
        what = f"{root} is a file" if root.exists() else f"there is no folder {root}"
        raise Cause("data must be a folder", what, "name the folder with images and annotations")

    def fail(error: OSError) -> None:
        raise error

    seen, found = set(), []
    try:
        for folder, inner, names in os.walk(root, followlinks=True, onerror=fail):
            real = os.path.realpath(folder)
            if real in seen or set(names) >= _RUN:
                # A link to a folder that was seen before would be followed without end.
                inner.clear()
                continue
            seen.add(real)
            inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in _NOT_DATA)
            start = Path(folder).relative_to(root)
            found += [(start / name).as_posix() for name in names if name[0] != "." and name not in _NOT_DATA]
    except OSError as error:
        raise Cause("data must be a folder that can be read", f"{root}: {explain(error)}", "check it") from None
    return found


def is_mask_place(path: str) -> bool:
    """Whether the folders of a path, or the ends of its name, say that it is a mask and no image."""
    pure = PurePosixPath(re.sub(r"(?i)\.ome(?=\.tiff?$)", "", path))
    stem = words(pure.stem)
    if stem[-1:] and stem[-1] in MASK_WORDS and len(stem) + any(map(str.isdigit, pure.stem)) > 1:
        return True
    if stem[:1] and stem[0] in _FIRST and re.search(r"\d", pure.stem):
        return True
    for part in reversed(pure.parts[:-1]):
        named = {*words(part), part.lower()}
        if named & (MASK_WORDS | IMAGE_WORDS):
            return bool(named & MASK_WORDS) and not named & IMAGE_WORDS
    return stem in (["mask"], ["masks"], ["label"], ["labels"])


def bare_key(path: str) -> tuple[str, ...]:
    """Return what an image and its mask have in common: their folders and name without the words for either."""
    pure = PurePosixPath(path)
    # A mask may be named after the whole name of its image: 0.jpg.png. OME-TIFFs end in .ome.tif.
    stem = PurePosixPath(pure.stem)
    last = stem.stem if stem.suffix.lower() in {*SUFFIXES, ".ome"} else pure.stem
    parts = [bare(part) for part in (*pure.parts[:-1], last)]
    return (*(part for part in parts[:-1] if part), parts[-1])


def without_masks(names: Sequence[str]) -> list[str]:
    """Return the names of images without those that are masks of the others."""
    images = {bare_key(name) for name in names if not is_mask_place(name)}
    return [name for name in names if not (is_mask_place(name) and bare_key(name) in images)]


def bare(name: str) -> str:
    """Return a name without the words for images and masks, as it is compared; "" if it is nothing else."""
    tokens = [token for token in re.split(r"[\s_.\-]+|(?<=[a-zA-Z])(?=\d)|(?<=[a-z\d])(?=[A-Z])", name) if token]
    known = IMAGE_WORDS | MASK_WORDS
    if "".join(tokens).lower() in known:
        return ""
    while tokens and tokens[-1].lower() in known:
        tokens.pop()
    while tokens and tokens[0].lower() in known:
        tokens.pop(0)
    return folded("_".join(tokens))
