"""`maskloss predict`: instances of images that nobody annotated, as files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause, MaskLossError, require
from maskloss.lab import files
from maskloss.lab.data.images import SUFFIXES
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.scenes import in_color
from maskloss.lab.data.tree import without_masks
from maskloss.lab.results import pictures
from maskloss.lab.results.inference import FOUND, Prediction
from maskloss.lab.results.lettering import Lettering
from maskloss.lab.results.trained import Slide, load_run
from maskloss.lab.runfolder import Facts

RESULTS, IMAGES = "predictions.json", "images.json"
# Not `_masks`, by which training knows the truth beside an image.
LABEL_MAP, OVERLAY = "_found.tif", "_overlay.png"
# Overlays of images that are read in pieces are reduced to this side.
_LARGEST_PICTURE = 4096
_WRITTEN_BY = "maskloss predict"


def predict_images(
    run: Path,
    images: Sequence[Path],
    out: Path,
    *,
    threshold: float = FOUND,
    least: float = 0.0,
    ids: Path | None = None,
    tile: int | None = None,
    device: str | None = None,
    on_error: str = "stop",
    done: Callable[[Path, int], None] = lambda *_: None,
    advance: Callable[[int, int], None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Path], list[str]]:
    """Find instances in images, and write label maps, overlays and COCO results; see the help of `maskloss predict`.

    `done` is told each image and how many instances it shows, `advance` how many images were looked at and how many
    there are, `say` what a person should know of what is written.

    Returns:
        What was written, and what was left out.
    """
    for name, score in (("--threshold", threshold), ("--least-score", least)):
        if not 0 <= score <= 1:
            raise Cause(f"{name} must be a score from 0 to 1", f"got {score:g}", "leave it out")
    problems = Problems(on_error)
    listed = _list_images(images, problems)
    names = file_names(listed)
    numbers = list(range(1, len(listed) + 1)) if ids is None else _known_ids(ids, listed)
    trained = load_run(run, device=device, tile=tile)
    facts, letters = trained.facts, Lettering(trained.facts.classes, trained.facts.category_ids)
    if letters.note:
        say(letters.note)
    earlier = _own_files(out)
    planned = [RESULTS, IMAGES, *(name + ending for name in names for ending in (LABEL_MAP, OVERLAY))]
    _check_free(out, planned, earlier, facts.config.data)
    made = files.make_folder(out, "--out")
    content = _listing(run, facts, {*planned, *earlier})
    written: list[Path] = []
    results: list[dict[str, Any]] = []
    try:
        for place, (number, path, name) in enumerate(zip(numbers, listed, names, strict=True)):
            advance(place, len(listed))
            with problems.tolerated():
                image = trained.read(path)
                [prediction] = trained.predictor([image])
                if not written:
                    # Before the first of them: whatever happens, the next call knows what is its own.
                    files.write_json(out / IMAGES, content)
                labels, shown = prediction.label_map(threshold)
                visible = [each for each in prediction.instances if each.score >= threshold]
                _write_map(out / (name + LABEL_MAP), labels)
                drawn = visible
                if isinstance(image, Slide):
                    step = -(-max(image.shape) // _LARGEST_PICTURE)
                    image, drawn = image.overview(step), [small for each in visible if (small := each.reduced(step))]
                pictures.write_pixels(pictures.overlay(in_color(image), drawn, letters), out / (name + OVERLAY))
                written += [out / (name + LABEL_MAP), out / (name + OVERLAY)]
                size = {"height": prediction.height, "width": prediction.width}
                files_of = {"label_map": name + LABEL_MAP, "overlay": name + OVERLAY}
                entries = coco_results(number, path.name, prediction, facts.category_ids)
                results += [
                    {**entry, "label_map_number": in_map}
                    for entry, in_map in zip(entries, shown, strict=True)
                    if entry["score"] >= least
                ]
                content["images"].append({"id": number, "file_name": path.name, **size, **files_of})
                done(path, len(visible))
        files.write_json(out / IMAGES, content)
        write_list(out / RESULTS, results)
    finally:
        files.unmake(made)
    return [*written, out / RESULTS, out / IMAGES], problems.skipped


def _listing(run: Path, facts: Facts, names: set[str]) -> dict[str, Any]:
    """Begin images.json, which says what is in the folder, and what of it is ours."""
    categories = zip(facts.category_ids, facts.classes, strict=True)
    return {
        "written_by": _WRITTEN_BY,
        "run": str(run.absolute()),
        "images": [],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "files": sorted(names),
    }


def _own_files(out: Path) -> set[str]:
    """Return the names of the files in a folder that earlier calls wrote."""
    try:
        content = files.read_json(out / IMAGES, "")
    except MaskLossError:
        return set()  # there is none, or not one of ours: then nothing in the folder is
    names = content.get("files")
    if content.get("written_by") != _WRITTEN_BY or not isinstance(names, list):
        return set()
    return {str(name) for name in names}


def _check_free(out: Path, planned: Iterable[str], own: set[str], data: str | None) -> None:
    """Raise if a file would be written over that is not ours, or beside images that are somebody's data."""
    hint = "name another folder with --out"
    for name in planned:
        if name not in own and os.path.lexists(out / name):
            raise Cause("predict writes over nothing but its own files", f"{out / name} is not one of them", hint)
    if data is not None and os.path.realpath(out) == os.path.realpath(data):
        raise Cause("--out must be a folder apart from data", f"the run learned from {out}", hint)
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.suffix.lower() in SUFFIXES and path.name not in own:
            raise Cause("--out must be a folder apart from images", f"{path} lies in it", hint)


def _write_map(path: Path, labels: NDArray[np.int32]) -> None:
    """Write a label map as TIFF, in sixteen bits where they do: that is what other programs read."""
    tifffile = require("tifffile", "train")
    fitting = labels.astype(np.uint16) if labels.max(initial=0) < 1 << 16 else labels
    files.write_whole(
        path, lambda partial: tifffile.imwrite(partial, fitting, compression="zlib", photometric="minisblack")
    )


def write_list(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write COCO results whole, one in a line."""
    files.write_text(path, "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")


def coco_results(
    image_id: int | str, file_name: str, prediction: Prediction, category_ids: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Return the instances of an image as COCO results, without those of classes that have no number."""
    out = []
    for each in prediction.instances:
        if category_ids[each.label] is None:
            continue
        top, left, bottom, right = each.box
        out.append(
            {
                "image_id": image_id,
                "file_name": file_name,
                "category_id": category_ids[each.label],
                "segmentation": each.run_lengths(prediction.height, prediction.width),
                "bbox": [left, top, right - left, bottom - top],
                "score": each.score,
            }
        )
    return out


def _known_ids(path: Path, images: Sequence[Path]) -> list[int | str]:
    """Look up the ids of images by their file names in annotations of COCO's form."""
    rule = "--ids must be annotations in COCO's form that list every image"
    listed = files.read_json(path, rule).get("images")
    entries = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    named: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if isinstance(entry.get("file_name"), str) and isinstance(entry.get("id"), (int, str)):
            file = entry["file_name"].replace("\\", "/")
            named.setdefault(file.rpartition("/")[2], {})[file] = entry["id"]
    ids: list[int | str] = []
    for image in images:
        found = named.get(image.name, {})
        # Several of one name: the one whose folders are those of the image.
        exact = {file: number for file, number in found.items() if image.absolute().as_posix().endswith(f"/{file}")}
        chosen = set(found.values()) if len(set(found.values())) == 1 else set(exact.values())
        if len(chosen) != 1:
            cause = f"{path} has {len(found) or 'no'} images of the name {image.name}"
            raise Cause(rule, cause, "without --ids images are counted from 1")
        ids += chosen
    if len(set(ids)) < len(ids):
        raise Cause(rule, f"two of the images have one id in {path}", "name each image once")
    return ids


def _list_images(paths: Sequence[Path], problems: Problems) -> list[Path]:
    """List the images that are named, and those of the folders that are, without the truth that lies beside them."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            names = sorted(each.name for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
            inside = [path / name for name in without_masks(names)]
            maps = sorted({*names} - {each.name for each in inside})
            if maps:
                problems.skipped.append(
                    f"{len(maps)} label maps such as {path / maps[0]}, which lie beside their images"
                )
            if not inside:
                raise Cause("a folder of images must hold some", f"{path} holds none", "PNG, JPEG or TIFF")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise Cause("every image must be there", f"there is no file {path}", "check the path")
    return found


def file_names(paths: Sequence[Path]) -> list[str]:
    """Name what is written after the images; images of one name are numbered. Letter case makes no difference."""
    names: dict[str, str] = {}
    for path in paths:
        name, count = path.stem, 1
        while name.casefold() in names:
            count += 1
            name = f"{path.stem}-{count}"
        names[name.casefold()] = name
    return list(names.values())
