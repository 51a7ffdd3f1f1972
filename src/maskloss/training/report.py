"""The report of a run: one HTML page that carries its pictures along."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from maskloss.training.config import TrainConfig
from maskloss.training.data import SceneSource
from maskloss.training.evaluate import Evaluation

CAPTIONS = {
    "predictions": (
        "What was found",
        "Held-out scenes, the first ones and not the best: the image, the truth, and every prediction that scores at "
        "least 50 out of 100, with its class and its score.",
    ),
    "points": (
        "Where the loss looked",
        "Two instances of one held-out scene, and the points of their loss during training: three quarters of them are "
        "the most uncertain of many candidates, the rest is uniform. Teal is what the model took for the instance.",
    ),
    "curves": (
        "How it learnt",
        "The terms of the final layer's loss, the scores on the first held-out scenes during training, and AP50 of "
        "each class on all held-out scenes.",
    ),
}


def write(
    folder: Path,
    source: SceneSource,
    config: TrainConfig,
    summary: Mapping[str, Any],
    evaluation: Evaluation,
    pictures: Mapping[str, Path],
) -> Path:
    """Write report.html; return its path."""
    page = Template(files("maskloss.training").joinpath("report.html").read_text(encoding="utf-8"))
    path = folder / "report.html"
    machine = summary["machine"]
    path.write_text(
        page.substitute(
            title=html.escape(f"Learning to find {source.title}"),
            name=html.escape(folder.name),
            steps=f"{config.steps:,}",
            seconds=f"{summary['training_seconds']:.0f}",
            scenes=f"{evaluation.scenes:,}",
            instances=f"{evaluation.instances:,}",
            parameters=f"{summary['parameters']:,}",
            scores=_scores(evaluation),
            figures="\n".join(_figure(pictures[name], *caption) for name, caption in CAPTIONS.items()),
            options=_table({**config.as_dict(), **machine, "scenes per second": summary["scenes_per_second"]}),
        ),
        encoding="utf-8",
    )
    return path


def _scores(evaluation: Evaluation) -> str:
    shown = {
        "AP50": evaluation.ap50,
        "AP": evaluation.ap,
        "AP75": evaluation.ap75,
        "mean IoU": evaluation.mean_iou,
    }
    return "\n".join(f"<div><b>{value:.3f}</b><span>{name}</span></div>" for name, value in shown.items())


def _figure(path: Path, title: str, caption: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f"<section><h2>{html.escape(title)}</h2><p>{html.escape(caption)}</p>"
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{content}"></section>'
    )


def _table(options: Mapping[str, Any]) -> str:
    return "\n".join(
        f"<div><dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in options.items()
        if value is not None
    )
