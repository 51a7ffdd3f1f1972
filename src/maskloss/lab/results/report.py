"""The report of a run: one HTML page that carries its pictures along and can be read on a telephone."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from maskloss.lab.data.scenes import Probe
from maskloss.lab.files import write_whole
from maskloss.lab.loop.runfolder import PICTURES, REPORT, Facts
from maskloss.lab.results import pictures
from maskloss.lab.results.evaluate import Evaluation
from maskloss.lab.results.gallery import Shown
from maskloss.lab.results.snapshots import Hard, Snapshot, of_one_scene

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
        shots: what the loss looked at.
        probe: the scene of the snapshots.
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
    paths = pictures.draw_all(
        folder / PICTURES,
        made_of.shown,
        facts.classes,
        made_of.history,
        evaluation,
        made_of.shots,
        made_of.probe,
        made_of.hardest,
    )
    page = Template(files("maskloss.lab.results").joinpath("report.html").read_text(encoding="utf-8"))
    sections = [
        _section("What was learned from", "", _facts(summary["data"], "wide")),
        _predictions(made_of, paths),
        _scores_section(evaluation, paths),
        _points(made_of, paths),
        _hardest(made_of, paths),
        _curves(paths),
        _time(summary),
        _section("What it was run with", "", _facts({**facts.config.as_dict(), **summary["machine"]})),
    ]
    text = page.substitute(
        title=html.escape(f"Learning from {made_of.title}"),
        name=html.escape(folder.resolve().name),
        lead=html.escape(_lead(facts, summary, evaluation)),
        scores=_cards(evaluation),
        sections="\n".join(section for section in sections if section),
    )
    path = folder / REPORT
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return [path, *paths.values()]


def _lead(facts: Facts, summary: Mapping[str, Any], evaluation: Evaluation) -> str:
    return (
        f"{facts.config.steps:,} steps in {summary['training_seconds']:.0f} seconds; {summary['model']}; scored on "
        f"{evaluation.scenes:,} held-out scenes with {evaluation.instances:,} instances."
    )


def _cards(evaluation: Evaluation) -> str:
    shown = {"AP50": evaluation.ap50, "AP": evaluation.ap, "AP75": evaluation.ap75, "mean IoU": evaluation.mean_iou}
    if evaluation.matching:
        shown["microscopy AP at 0.5"] = evaluation.matching["0.50"]
    return "\n".join(f"<div><b>{_number(value)}</b><span>{name}</span></div>" for name, value in shown.items())


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _section(title: str, text: str, content: str) -> str:
    if not content:
        return ""
    told = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{told}\n{content}\n</section>"


def _facts(values: Mapping[str, Any], kind: str = "") -> str:
    rows = (
        f"<div><dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in values.items()
        if value is not None
    )
    return f'<dl class="{kind}">' + "\n".join(rows) + "</dl>"


def _image(path: Path, caption: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    told = html.escape(caption)
    source = f"data:image/{path.suffix[1:]};base64,{content}"
    return f'<figure><img alt="{told}" src="{source}"><figcaption>{told}</figcaption></figure>'


def _grid(kind: str, images: Iterable[str]) -> str:
    return f'<div class="{kind}">' + "\n".join(images) + "</div>"


def _predictions(made_of: Material, paths: Mapping[str, Path]) -> str:
    rows = []
    for number, shown in enumerate(made_of.shown):
        names = {"image": shown.scene.name, "truth": "truth", "found": "prediction"}
        rows.append(_grid("three", [_image(paths[f"scene-{number}-{part}"], text) for part, text in names.items()]))
    return _section(
        "What was found",
        "Held-out scenes, the first ones and not the best: the image, the truth, and every prediction that scores at "
        "least 50 out of 100.",
        "\n".join(rows),
    )


def _scores_section(evaluation: Evaluation, paths: Mapping[str, Path]) -> str:
    sizes = {"small": evaluation.ap_small, "medium": evaluation.ap_medium, "large": evaluation.ap_large}
    parts = ["<h3>AP by size of the instance</h3>", _bars(sizes)]
    if len(evaluation.class_ap50) > 1:
        ordered = sorted(evaluation.class_ap50.items(), key=lambda each: (math.isnan(each[1]), -each[1]))
        parts += ["<h3>AP50 by class</h3>", _bars(dict(ordered))]
    if "matching" in paths:
        parts += [
            _grid(
                "two",
                [
                    _image(
                        paths["matching"], "AP of microscopy, TP / (TP + FP + FN), over the IoU that a match must have"
                    )
                ],
            )
        ]
    return _section(
        "How good it is where",
        "On all held-out scenes. Small is below 32 x 32 pixels, large above 96 x 96.",
        "\n".join(parts),
    )


def _bars(values: Mapping[str, float]) -> str:
    rows = []
    for name, value in values.items():
        width = 0 if math.isnan(value) else 100 * value
        rows.append(
            f"<div><span>{html.escape(name)}</span>"
            f'<i><b style="width:{width:.1f}%"></b></i><em>{_number(value)}</em></div>'
        )
    return '<div class="bars">' + "\n".join(rows) + "</div>"


def _points(made_of: Material, paths: Mapping[str, Path]) -> str:
    shots = of_one_scene(made_of.shots)
    rows = []
    for number in range(pictures.FOLLOWED):
        if f"points-{number}-0" not in paths:
            continue
        texts = ["the instance", *(f"step {shot.step:,}" for shot in shots)]
        rows.append(
            _grid("many", [_image(paths[f"points-{number}-{place}"], text) for place, text in enumerate(texts)])
        )
    if "points" in paths:
        rows.append(_grid("wide", [_image(paths["points"], "the largest instances in motion")]))
    return _section(
        "Where the loss looked",
        "Instances of one held-out scene and the points of their loss during training: orange are the most uncertain "
        "of many candidates, gray are uniform ones. Teal is what the model took for the instance, the dashed line is "
        "the truth.",
        "\n".join(rows),
    )


def _hardest(made_of: Material, paths: Mapping[str, Path]) -> str:
    images = []
    for number, found in enumerate(made_of.hardest):
        name = made_of.facts.classes[int(found.probe.labels[found.target])]
        images.append(_image(paths[f"hard-{number}-image"], f"{name}, {found.probe.name}"))
        images.append(_image(paths[f"hard-{number}-points"], f"loss {found.loss:.2f}"))
    return _section(
        "What is hardest",
        "The held-out instances with the highest loss, and its points. Look here for wrong annotations first.",
        _grid("many", images) if images else "",
    )


def _curves(paths: Mapping[str, Path]) -> str:
    captions = {
        "losses": "terms of the final layer's loss during training",
        "scores": "scores on the first held-out scenes during training",
    }
    return _section("How it learned", "", _grid("two", [_image(paths[name], text) for name, text in captions.items()]))


def _time(summary: Mapping[str, Any]) -> str:
    shares = summary["time_shares"]
    if not shares:
        return ""
    bar = "".join(f'<b class="{name}" style="width:{100 * value:.2f}%"></b>' for name, value in shares.items())
    legend = "\n".join(
        f'<li><i class="{name}"></i>{_PART_NAMES[name]} <b>{100 * value:.1f}%</b></li>'
        for name, value in shares.items()
        if value
    )
    return _section(
        "Where the time went",
        f"{summary['images_per_second']:g} images a second. Every tenth step was measured in its parts.",
        f'<div class="stack">{bar}</div><ul class="legend">{legend}</ul>',
    )
