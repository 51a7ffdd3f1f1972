"""The report of a run: one HTML page that carries its pictures along and can be read on a telephone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskloss._palette import class_color
from maskloss.lab.data.scenes import Probe
from maskloss.lab.results import pictures
from maskloss.lab.results.evaluate import Evaluation
from maskloss.lab.results.gallery import Shown
from maskloss.lab.results.inference import FOUND
from maskloss.lab.results.lettering import Lettering
from maskloss.lab.results.page import embedded, write_page
from maskloss.lab.results.snapshots import Hard, Snapshot
from maskloss.lab.runfolder import PICTURES, REPORT, Facts
from maskloss.lab.terminal import count, number, say

_PART_NAMES = {
    "data": "reading data",
    "model": "model, forward and backward",
    "matching": "matching",
    "loss": "loss, forward and backward",
    "optimizer": "optimizer",
}
# Classes whose color the legend explains.
_LEGEND = 24


class Material(NamedTuple):
    """What a report is made of."""

    facts: Facts  # of the run
    title: str  # what the scenes show
    summary: Mapping[str, Any]  # numbers of the run
    evaluation: Evaluation  # scores on all held-out scenes
    history: Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl
    shown: Sequence[Shown]  # scenes with predictions
    shots: Sequence[Snapshot]  # what the loss looked at in one scene
    probe: Probe | None  # that scene
    hardest: Sequence[Hard]  # instances with the highest loss


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
    classes = _bars((name, each.ap50) for name, each in evaluation.by_class.items())
    names = [facts.classes[int(each.probe.labels[each.target])] for each in made_of.hardest]
    path = folder / REPORT
    write_page(
        path,
        "report.html",
        generator="maskloss train",
        title=f"Learning from {made_of.title}",
        name=folder.resolve().name,
        lead=f"{summary['steps']:,} steps in {summary['training_seconds']:.0f} seconds; {summary['model']}. Kept: "
        f"{summary['kept']}. Scored on {count(evaluation.scenes, 'held-out image')} with "
        f"{count(evaluation.instances, 'instance')}.",
        cards={name: number(value) for name, value in cards.items()},
        raised=["AP50"],
        pictures={name: embedded(path.read_bytes(), path.suffix[1:]) for name, path in paths.items()},
        summary=summary,
        findings=[{"examples": (), "pictures": (), **each} for each in summary["findings"]],
        shown=made_of.shown,
        sizes=_bars(sizes.items()),
        cautions=evaluation.cautions,
        classes=sorted(classes, key=lambda each: -each[1]),
        unseen=[name for name, each in evaluation.by_class.items() if math.isnan(each.ap50)],
        legend=_legend(facts.classes, made_of.shown),
        followed=sum(f"points-{place}-0" in paths for place in range(pictures.FOLLOWED)),
        steps=[shot.step for shot in made_of.shots],
        hardest=[(f"{name}, {each.probe.name}", each.loss) for name, each in zip(names, made_of.hardest, strict=True)],
        parts=_PART_NAMES,
        command=facts.config.command,
        options=_options(facts),
        versions={"maskloss": facts.version, **summary["machine"]},
    )
    return [path, *paths.values()]


def _bars(values: Iterable[tuple[str, float]]) -> list[tuple[str, float, str]]:
    """Return bars of scores; what has none has no bar."""
    return [(name, value, number(value)) for name, value in values if not math.isnan(value)]


def _legend(classes: Sequence[str], shown: Sequence[Shown]) -> list[tuple[str, str]]:
    """Return the colors of the classes in the pictures, where there is more than one."""
    if len(classes) == 1:
        return []
    seen = {int(label) for each in shown for label in each.scene.labels}
    seen |= {found.label for each in shown for found in each.prediction.instances if found.score >= FOUND}
    return [(classes[label], class_color(label)) for label in sorted(seen)][:_LEGEND]


def _options(facts: Facts) -> dict[str, Any]:
    """Return the options that were in force; those of digits mean nothing for a folder."""
    options = facts.config.as_dict()
    if facts.config.data is not None:
        del options["held_out"]
    return options
