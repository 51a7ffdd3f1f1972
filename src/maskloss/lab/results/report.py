"""The report of a run: one HTML page that carries its pictures along and can be read on a telephone."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from maskloss.errors import require
from maskloss.lab.data.scenes import Probe
from maskloss.lab.files import write_whole
from maskloss.lab.results import pictures
from maskloss.lab.results.evaluate import Evaluation
from maskloss.lab.results.gallery import Shown
from maskloss.lab.results.lettering import Lettering
from maskloss.lab.results.snapshots import Hard, Snapshot
from maskloss.lab.runfolder import PICTURES, REPORT, Facts
from maskloss.lab.terminal import number, say

_PART_NAMES = {
    "data": "reading data",
    "model": "model, forward and backward",
    "matching": "matching",
    "loss": "loss, forward and backward",
    "optimizer": "optimizer",
}


class Material(NamedTuple):
    """What a report is made of.

    Attributes:
        facts: of the run.
        title: what the scenes show.
        summary: numbers of the run.
        evaluation: scores on all held-out scenes.
        history: the lines of metrics.jsonl.
        shown: scenes with predictions.
        shots: what the loss looked at in one scene.
        probe: that scene.
        hardest: instances with the highest loss.
    """

    facts: Facts
    title: str
    summary: Mapping[str, Any]
    evaluation: Evaluation
    history: Sequence[Mapping[str, Any]]
    shown: Sequence[Shown]
    shots: Sequence[Snapshot]
    probe: Probe | None
    hardest: Sequence[Hard]


def write(folder: Path, made_of: Material) -> list[Path]:
    """Draw the pictures and write report.html; return what was written, the page first."""
    facts, evaluation, summary = made_of.facts, made_of.evaluation, made_of.summary
    letters = Lettering(facts.classes, facts.category_ids)
    if letters.note:
        say(letters.note)
    paths = pictures.draw_all(
        folder / PICTURES,
        made_of.shown,
        letters,
        made_of.history,
        evaluation,
        made_of.shots,
        made_of.probe,
        made_of.hardest,
    )
    cards = {"AP50": evaluation.ap50, "AP": evaluation.ap, "AP75": evaluation.ap75, "mean IoU": evaluation.mean_iou}
    if evaluation.matching:
        cards["microscopy AP at 0.5"] = evaluation.matching["0.50"]
    sizes = {"small": evaluation.ap_small, "medium": evaluation.ap_medium, "large": evaluation.ap_large}
    names = [facts.classes[int(each.probe.labels[each.target])] for each in made_of.hardest]
    text = _page().render(
        title=f"Learning from {made_of.title}",
        name=folder.resolve().name,
        lead=f"{summary['steps']:,} steps in {summary['training_seconds']:.0f} seconds; {summary['model']}. Kept: "
        f"{summary['kept']}. Scored on {evaluation.scenes:,} held-out scenes with {evaluation.instances:,} instances.",
        cards=cards,
        paths=paths,
        summary=summary,
        shown=made_of.shown,
        sizes=sizes.items(),
        cautions=evaluation.cautions,
        classes=sorted(
            ((name, each.ap50) for name, each in evaluation.by_class.items()),
            key=lambda each: (math.isnan(each[1]), -each[1]),
        ),
        followed=sum(f"points-{place}-0" in paths for place in range(pictures.FOLLOWED)),
        steps=[shot.step for shot in made_of.shots],
        hardest=[(f"{name}, {each.probe.name}", each.loss) for name, each in zip(names, made_of.hardest, strict=True)],
        parts=_PART_NAMES,
        options={**facts.config.as_dict(), **summary["machine"]},
    )
    path = folder / REPORT
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return [path, *paths.values()]


def _page() -> Any:
    """Compile the page. What is put into it is escaped, and a name that is missing is an error."""
    jinja = require("jinja2", "train")
    environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined)
    environment.filters |= {"score": number, "embedded": _embedded}
    return environment.from_string(files("maskloss.lab.results").joinpath("report.html").read_text(encoding="utf-8"))


def _embedded(path: Path) -> str:
    """Return the address of a picture that carries its content."""
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
