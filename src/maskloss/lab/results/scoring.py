"""`maskloss evaluate`: the scores of a run, and on request all that they were computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maskloss.errors import Cause
from maskloss.lab import files
from maskloss.lab.data.folder import FolderScenes
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.scenes import Scene, Source
from maskloss.lab.data.split import ALL
from maskloss.lab.models.registry import open_source
from maskloss.lab.results import charts, pictures
from maskloss.lab.results.evaluate import Evaluation, evaluate, truth_entries
from maskloss.lab.results.inference import Prediction
from maskloss.lab.results.lettering import Lettering
from maskloss.lab.results.predict import RESULTS, coco_results, file_names, write_list
from maskloss.lab.results.trained import load_run
from maskloss.lab.runfolder import PICTURES, SUMMARY, kept_step, read_facts, steps_of

SCORES, TRUTH = "scores.json", "truth.json"


def evaluate_run(
    run: Path,
    data: str | None = None,
    *,
    split: str | None = None,
    device: str | None = None,
    out: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
    advance: Callable[[int, int], None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Evaluation, list[tuple[str, str]], list[str]]:
    """Score the model of a run on held-out images; see the help of `maskloss evaluate`.

    `note` is told what is being done, `advance` how many images were looked at and how many there are, `say` what a
    person should know of what is written.

    Returns:
        The scores, what the data are, and what was left out.
    """
    if out is not None and out.is_dir() and any(out.iterdir()):
        raise Cause("--out must be a new folder", f"{out} is not empty", "name another one")
    trained = load_run(run, device=device)
    facts = trained.facts
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
    detail = None if out is None else _Detail(out, source, facts.category_ids)

    def each(number: int, scene: Scene, prediction: Prediction) -> None:
        if detail is not None:
            detail.add(number, scene, prediction)
        advance(number + 1, len(scenes))

    scores = evaluate(
        trained.predictor,
        scenes,
        facts.classes,
        one_class_maps=source.one_class_maps,
        problems=problems,
        each=each,
    )
    assert scores is not None
    if detail is not None:
        note("Writing what was found")
        detail.finish(scores)
        for text in detail.notes:
            say(text)
    return scores, source.facts, problems.skipped


def unfinished(run: Path) -> str | None:
    """Say how far a run is that has not come to its end, and which step is scored; None: it is finished."""
    config, steps = read_facts(run).config, steps_of(run)
    if (run / SUMMARY).is_file() or not steps:
        return None
    kept = kept_step(run, config)
    return f"not finished, at step {steps[-1]:,} of {config.steps:,}: these are the scores of step {kept:,}"


class _Detail:
    """Writes pictures of the scenes as they are scored, and then everything else."""

    def __init__(self, out: Path, source: Source, category_ids: Sequence[int]) -> None:
        self.out, self.names = out, list(source.class_names)
        files.make_folder(out / PICTURES, "--out")
        # A class that the data do not have has no number there; what is found of it cannot be right.
        self.numbers = [number if number >= 0 else None for number in source.category_ids]
        self.ids, self.notes = _image_ids(source)
        listed = [Path(name) for name in _scene_files(source)]
        self.pictures = file_names(listed)
        self.files = [path.as_posix() for path in listed]
        self.letters = Lettering(self.names, category_ids)
        self.notes += [self.letters.note] if self.letters.note else []
        self.images: list[dict[str, Any]] = []
        self.truth: list[dict[str, Any]] = []
        self.found: list[dict[str, Any]] = []

    def add(self, number: int, scene: Scene, prediction: Prediction) -> None:
        """Take a scene and what was found in it."""
        name, image = self.files[number], self.ids[number]
        self.images.append({"id": image, "file_name": name, "height": scene.height, "width": scene.width})
        for entry in truth_entries(scene):
            numbered = {"id": len(self.truth) + 1, "image_id": image, **entry}
            self.truth.append({**numbered, "category_id": self.numbers[entry["category_id"]]})
        self.found += coco_results(image, name, prediction, self.numbers)
        pixels = pictures.compared(scene, prediction, self.letters)
        pictures.write_pixels(pixels, self.out / PICTURES / f"{self.pictures[number]}.png")

    def finish(self, scores: Evaluation) -> None:
        """Write scores, predictions, the truth, and charts."""
        files.write_json(self.out / SCORES, scores.as_dict(whole=True))
        write_list(self.out / RESULTS, self.found)
        numbered = zip(self.numbers, self.names, strict=True)
        categories = [{"id": number, "name": name} for number, name in numbered if number is not None]
        truth = {"images": self.images, "annotations": self.truth, "categories": categories}
        files.write_json(self.out / TRUTH, truth)
        with self.letters.used():
            for name, figure in charts.in_detail(scores, self.letters.names).items():
                pictures.save(figure, self.out / f"{name}.png")


def _scene_files(source: Source) -> list[str]:
    """Return the files of the scenes, relative to the folder of the data; made-up ones are numbered."""
    if isinstance(source, FolderScenes):
        return source.held_out_files
    return [f"{number}.png" for number in range(len(source.held_out))]


def _image_ids(source: Source) -> tuple[list[int | str], list[str]]:
    """Return the ids of the scenes in their data, or numbers from 1, and a sentence that says so."""
    count = len(source.held_out)
    if isinstance(source, FolderScenes):
        catalog = source.found.held_out
        ids = [entry.id for entry in map(catalog.__getitem__, range(count))]
        known = [each for each in ids if each is not None]
        if len(set(known)) == count:
            return known, []
    return list(range(1, count + 1)), [f"the data have no ids of images: {RESULTS} and {TRUTH} count them from 1"]
