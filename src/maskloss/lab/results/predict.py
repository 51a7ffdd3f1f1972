"""`maskloss predict` and `maskloss evaluate`: using the folder that a run leaves."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskloss.errors import Cause, MaskLossError, require
from maskloss.instances import run_lengths
from maskloss.lab import files
from maskloss.lab.config import TrainConfig
from maskloss.lab.data.images import SUFFIXES, read_image, to_channels, to_unit
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.scenes import in_color
from maskloss.lab.data.split import ALL
from maskloss.lab.data.tree import without_masks
from maskloss.lab.models.registry import load_learner, open_source
from maskloss.lab.results import pictures
from maskloss.lab.results.evaluate import Evaluation, evaluate
from maskloss.lab.results.inference import MOST, Prediction, Predictor
from maskloss.lab.runfolder import Facts, read_facts

RESULTS, IMAGES = "predictions.json", "images.json"
# Not `_masks`, by which training knows the truth beside an image.
LABEL_MAP, OVERLAY = "_found.tif", "_overlay.png"
_WRITTEN_BY = "maskloss predict"


def open_run(run: Path, device: str | None, tile: int | None = None) -> tuple[Facts, Predictor]:
    """Load the model of a run, ready to predict.

    Args:
        run: folder that `maskloss train` wrote.
        device: "cpu" or "cuda"; None: cuda where there is a device.
        tile: side of the tiles, pixels; None: as in training.

    Raises:
        Cause: no run, or weights that are missing or damaged.
    """
    facts = read_facts(run)
    where = TrainConfig(device=device).torch_device
    learner = load_learner(run, facts, where)
    if tile is not None and tile < 16:
        raise Cause("--tile must be at least 16 pixels", f"got {tile}", "leave it out to take that of the run")
    cut = tile is not None or facts.config.crop is not None
    predictor = Predictor(learner, facts.config.size or 0, tile or facts.tile, cut, max(MOST, learner.num_queries))
    return facts, predictor


def evaluate_run(
    run: Path,
    data: str | None = None,
    *,
    split: str | None = None,
    device: str | None = None,
    note: Callable[[str], None] = lambda _: None,
    advance: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Evaluation, list[tuple[str, str]], list[str]]:
    """Score the model of a run on held-out images.

    Args:
        run: folder that `maskloss train` wrote.
        data: other data, scored on as a whole; None: those of the run.
        split: the part to score on, or "all"; None: what the run held out, or all of other data.
        device: "cpu" or "cuda".
        note: is told what is being done.
        advance: is told how many images were looked at, and how many there are.

    Returns:
        The scores, what the data are, and what was left out.

    Raises:
        Cause: no run, data that cannot be read, or that have other classes.
    """
    facts, predictor = open_run(run, device)
    note("Reading the data")
    # Other data may come in another format; how images are brought to the model must not change.
    normalize = "percentile" if facts.percentile else "range"
    config = facts.config
    if data is not None:
        # All of them are new to the model.
        config = dataclasses.replace(config, data=data, format=None, annotations=None, images=None, val=None)
        split = split or ALL
    source = open_source(dataclasses.replace(config, normalize=normalize), score=split, classes=facts.classes)
    note("Looking at the images" if split else "Looking at the held-out images")
    problems = Problems(facts.config.on_error)
    scenes = source.held_out
    scores = evaluate(
        predictor,
        scenes,
        facts.classes,
        one_class_maps=source.one_class_maps,
        problems=problems,
        each=lambda number, *_: advance(number + 1, len(scenes)),
    )
    assert scores is not None
    return scores, source.facts, problems.skipped


def predict_images(
    run: Path,
    images: Sequence[Path],
    out: Path,
    *,
    threshold: float = 0.5,
    tile: int | None = None,
    device: str | None = None,
    on_error: str = "stop",
    done: Callable[[Path, int], None] = lambda *_: None,
) -> tuple[list[Path], list[str]]:
    """Find instances in images, and write label maps, overlays and COCO results.

    Args:
        run: folder that `maskloss train` wrote.
        images: files, or folders of them.
        out: where to write.
        threshold: least score of what is shown, in [0, 1].
        tile: side of the tiles, pixels; None: as in training.
        device: "cpu" or "cuda".
        on_error: "stop" or "skip", at an image that cannot be read.
        done: is told each image and how many instances were found in it.

    Returns:
        What was written, and what was left out.

    Raises:
        Cause: no run, images that cannot be read, or a file in the way that an earlier call did not write.
    """
    if not 0 <= threshold <= 1:
        raise Cause("--threshold must be a score from 0 to 1", f"got {threshold:g}", "0.5 is usual")
    problems = Problems(on_error)
    listed = _list_images(images, problems)
    names = _names(listed)
    facts, predictor = open_run(run, device, tile)
    earlier = _own_files(out)
    planned = [RESULTS, IMAGES, *(name + ending for name in names for ending in (LABEL_MAP, OVERLAY))]
    _check_free(out, planned, earlier, facts.config.data)
    made = files.make_folder(out, "--out")
    content: dict[str, Any] = {
        "written_by": _WRITTEN_BY,
        "run": str(run.absolute()),
        "images": [],
        "categories": [
            {"id": number, "name": name} for number, name in zip(facts.category_ids, facts.classes, strict=True)
        ],
        "files": sorted({*planned, *earlier}),
    }
    written: list[Path] = []
    results: list[dict[str, Any]] = []
    try:
        for number, (path, name) in enumerate(zip(listed, names, strict=True), start=1):
            with problems.tolerated():
                pixels = to_unit(to_channels(read_image(path), facts.channels, path), facts.percentile)
                image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
                [prediction] = predictor([image])
                kept = [each for each in prediction.instances if each.score >= threshold]
                prediction = prediction._replace(instances=kept)
                if not written:
                    # Before the first of them: whatever happens, the next call knows what is its own.
                    files.write_json(out / IMAGES, content)
                written += _write(out, name, image, prediction, facts, threshold)
                results += _results(number, path, prediction, facts.category_ids)
                content["images"].append(
                    {
                        "id": number,
                        "file_name": path.name,
                        "height": prediction.height,
                        "width": prediction.width,
                        "label_map": name + LABEL_MAP,
                        "overlay": name + OVERLAY,
                    }
                )
                done(path, len(kept))
        files.write_json(out / IMAGES, content)
        text = json.dumps(results, indent=1) + "\n"
        files.write_whole(out / RESULTS, lambda partial: partial.write_text(text, encoding="utf-8"))
    finally:
        files.unmake(made)
    return [*written, out / RESULTS, out / IMAGES], problems.skipped


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
    """Raise if a file would be written over that is not ours, or beside images that are somebody's data.

    Args:
        out: the folder; need not be there.
        planned: names of the files to write.
        own: names of those that earlier calls wrote.
        data: folder of the data that the run learned from.
    """
    hint = "name another folder with --out"
    for name in planned:
        if name not in own and os.path.lexists(out / name):
            raise Cause("predict writes over nothing but its own files", f"{out / name} is not one of them", hint)
    if data is not None and os.path.realpath(out) == os.path.realpath(data):
        raise Cause("--out must be a folder apart from data", f"the run learned from {out}", hint)
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.suffix.lower() in SUFFIXES and path.name not in own:
            raise Cause("--out must be a folder apart from images", f"{path} lies in it", hint)


def _write(
    out: Path, name: str, image: torch.Tensor, prediction: Prediction, facts: Facts, threshold: float
) -> list[Path]:
    tifffile = require("tifffile", "train")
    labels, _ = prediction.label_map(threshold)
    # Sixteen bits are what other programs read.
    labels = labels.astype(np.uint16) if labels.max(initial=0) < 1 << 16 else labels
    map_path, overlay_path = out / (name + LABEL_MAP), out / (name + OVERLAY)
    files.write_whole(
        map_path, lambda partial: tifffile.imwrite(partial, labels, compression="zlib", photometric="minisblack")
    )
    drawn = require("PIL.Image", "train").fromarray(
        pictures.overlay(in_color(image), prediction.instances, len(facts.classes))
    )
    files.write_whole(overlay_path, lambda partial: drawn.save(partial, format="PNG"))
    return [map_path, overlay_path]


def _results(number: int, path: Path, prediction: Prediction, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    out = []
    for each in prediction.instances:
        top, left, bottom, right = each.box
        out.append(
            {
                "image_id": number,
                "file_name": path.name,
                "category_id": category_ids[each.label],
                "segmentation": run_lengths(each.whole(prediction.height, prediction.width)),
                "bbox": [left, top, right - left, bottom - top],
                "score": round(each.score, 6),
            }
        )
    return out


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


def _names(paths: Sequence[Path]) -> list[str]:
    """Name what is written after the images; images of one name are numbered. Letter case makes no difference."""
    names: dict[str, str] = {}
    for path in paths:
        name, count = path.stem, 1
        while name.casefold() in names:
            count += 1
            name = f"{path.stem}-{count}"
        names[name.casefold()] = name
    return list(names.values())
