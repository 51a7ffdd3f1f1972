"""The pictures of a run: its curves, predictions beside the truth, and the points that the loss chose on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from maskloss import plots
from maskloss.criterion import MaskCriterion
from maskloss.errors import require
from maskloss.functional import uncertain_points
from maskloss.training.data import Scene, SceneSource
from maskloss.training.evaluate import FOUND, Evaluation, Prediction
from maskloss.training.model import QueryNet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEED = 1  # of the points in pictures
SHOWN = 8  # scenes in the picture of predictions
FOLLOWED = 2  # instances in the picture of points
DPI = 120


class Snapshot(NamedTuple):
    """What the loss looked at in one scene, at one step.

    Attributes:
        step: how many steps the model had taken.
        scene: which held-out scene.
        logits: of the query matched with each target, float32 `[T, h, w]`.
        points: which the loss chose on them, `[T, P, 2]`.
        num_uncertain: how many of them are uncertain; they come first.
    """

    step: int
    scene: int
    logits: Tensor
    points: Tensor
    num_uncertain: int


@torch.no_grad()
def snapshot(
    model: QueryNet, criterion: MaskCriterion, source: SceneSource, step: int, device: torch.device
) -> Snapshot:
    """Let the criterion match one held-out scene, and draw the points of its loss again.

    Only the final layer of one image is given, whose points are those that `uncertain_points` draws from its seed.
    """
    number = telling(source.held_out)
    scene = source.held_out[number]
    training = model.training
    model.eval()
    output = model(scene.image[None].to(device))
    model.train(training)
    logits = output.mask_logits[-1]
    entry = {"masks": scene.targets.to(device), "labels": scene.labels.to(device)}
    out = criterion(output.class_logits[-1], logits, [entry], seed=SEED)
    [(queries, targets)] = out.matches.pairs()
    matched = torch.empty(len(targets), *logits.shape[2:], device=device)
    matched[targets.to(device)] = logits[0, queries.to(device)].float()
    sampling = criterion.mask_loss.sampling
    points = uncertain_points(matched, sampling=sampling, seed=out.seed)
    return Snapshot(step, number, matched.cpu(), points.cpu(), sampling.num_uncertain)


def telling(scenes: Sequence[Scene]) -> int:
    """Choose the scene to follow: the most crowded one of the first few."""
    return max(range(min(len(scenes), 16)), key=lambda number: (len(scenes[number].labels), -number))


def draw_all(
    folder: Path,
    source: SceneSource,
    predictions: Sequence[Prediction],
    history: Sequence[Mapping[str, Any]],
    snapshots: Sequence[Snapshot],
    evaluation: Evaluation,
) -> dict[str, Path]:
    """Write all pictures into a folder; return name to path."""
    chosen = show_first(source.held_out)
    shown = [(source.held_out[number], predictions[number]) for number in chosen]
    drawings: dict[str, Callable[[], Figure]] = {
        "overview": lambda: overview(shown, source.class_names, history, snapshots[-1], source.held_out),
        "curves": lambda: curves(history, evaluation),
        "predictions": lambda: scenes(shown, source.class_names),
        "points": lambda: points(snapshots, source.held_out),
    }
    files = {}
    for name, draw in drawings.items():
        files[name] = folder / f"{name}.png"
        draw().savefig(files[name], dpi=DPI, metadata={"Software": None})
    return files


def show_first(held_out: Sequence[Scene]) -> list[int]:
    """Choose scenes to show: the first ones with anything in them, never the ones that turned out best."""
    return [number for number, scene in enumerate(held_out) if len(scene.labels)][:SHOWN]


def scenes(shown: Sequence[tuple[Scene, Prediction]], class_names: Sequence[str]) -> Figure:
    """Draw scenes in threes: the image, the truth, and what was found."""
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = plots.new_figure(6.8 * columns, 2.38 * rows)
    # A narrow empty column after each three keeps neighbouring scenes apart.
    grid = figure.add_gridspec(rows, 4 * columns, width_ratios=[1, 1, 1, 0.04] * columns)
    for place, (scene, prediction) in enumerate(shown):
        row, column = divmod(place, columns)
        axes = [figure.add_subplot(grid[row, 4 * column + part]) for part in range(3)]
        _three(axes, scene, prediction, class_names, 7.5)
    return figure


def points(snapshots: Sequence[Snapshot], held_out: Sequence[Scene]) -> Figure:
    """Draw how the points of a few instances move to the outline while the model learns."""
    scene = held_out[snapshots[0].scene]
    masks = scene.targets.dense()
    followed = _largest(masks)[:FOLLOWED]
    figure = plots.new_figure(2.75 * (len(snapshots) + 1), 2.9 * len(followed) + 0.35)
    grid = figure.subplots(len(followed), len(snapshots) + 1, squeeze=False)
    for row, target in zip(grid, followed, strict=True):
        image = scene.image
        plots.draw_instances(row[0], image, masks[target][None], [""], [plots.COLORS[1]])
        for axes, shot in zip(row[1:], snapshots, strict=True):
            plots.draw_points(
                axes, shot.logits[target], shot.points[target], shot.num_uncertain, target=masks[target], size=7
            )
    grid[0][0].set_title("The instance", fontsize=11, fontweight="bold")
    for axes, shot in zip(grid[0][1:], snapshots, strict=True):
        axes.set_title(f"Step {shot.step}", fontsize=11, fontweight="bold")
    _legend(figure)
    return figure


def curves(history: Sequence[Mapping[str, Any]], evaluation: Evaluation) -> Figure:
    """Draw the terms of the loss, the scores on held-out scenes, and AP50 of each class."""
    figure = plots.new_figure(14, 3.7)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.1, 1, 1])
    _draw_losses(left, history)
    _draw_scores(middle, history)
    names, values = list(evaluation.class_ap50), list(evaluation.class_ap50.values())
    right.bar(names, values, color=plots.TEAL, width=0.7)
    for place, value in enumerate(values):
        if not math.isnan(value):
            right.text(place, value + 0.015, f"{value:.2f}", ha="center", fontsize=8, color=plots.INK)
    right.set_title("AP50 by class, all held-out scenes", fontsize=12, fontweight="bold", loc="left", pad=10)
    right.set(ylim=(0, 1.08), yticks=[])
    right.tick_params(colors=plots.INK, labelsize=9, length=0, rotation=0 if len(names) <= 12 else 90)
    for side, spine in right.spines.items():
        spine.set(visible=side == "bottom", color=plots.PALE)
    return figure


def overview(
    shown: Sequence[tuple[Scene, Prediction]],
    class_names: Sequence[str],
    history: Sequence[Mapping[str, Any]],
    last: Snapshot,
    held_out: Sequence[Scene],
) -> Figure:
    """Draw a run at a glance, wide: scenes, the truth and what was found, the points, and the scores over time."""
    figure = plots.new_figure(14.4, 4.1)
    grid = figure.add_gridspec(2, 9, width_ratios=[1, 1, 1, 0.04, 1, 1, 1, 1.05, 1.05])
    for place, (scene, prediction) in enumerate(shown[:4]):
        row, column = divmod(place, 2)
        _three(
            [figure.add_subplot(grid[row, 4 * column + part]) for part in range(3)], scene, prediction, class_names, 6
        )
    masks = held_out[last.scene].targets.dense()
    for side, target in enumerate(_largest(masks)[:2]):
        axes = figure.add_subplot(grid[0, 7 + side])
        plots.draw_points(
            axes, last.logits[target], last.points[target], last.num_uncertain, target=masks[target], size=4
        )
        axes.set_title("Points of the loss", fontsize=9, pad=4)
    _draw_scores(figure.add_subplot(grid[1, 7:]), history)
    return figure


def _three(
    axes: Sequence[Axes], scene: Scene, prediction: Prediction, class_names: Sequence[str], text_size: float
) -> None:
    """Draw a scene, its truth, and what was found in it."""
    picture = scene.picture()
    plots.draw_image(axes[0], picture)
    truth = scene.labels.tolist()
    names = [class_names[label] for label in truth]
    plots.draw_instances(axes[1], picture, scene.masks(), names, _colours(truth), text_size=text_size)
    found = prediction.scores >= FOUND
    # Drawn worst first, so that the best lie on top.
    masks, labels, scores = (each[found].flip(0) for each in prediction)
    colours = _colours(labels.tolist())
    names = [f"{class_names[label]} · {100 * score:.0f}" for label, score in zip(labels, scores, strict=True)]
    plots.draw_instances(axes[2], picture, masks, names, colours, text_size=text_size)
    for each, title in zip(axes, ("Scene", "Truth", "Prediction"), strict=True):
        each.set_title(title, fontsize=9, pad=4)


def _colours(labels: Sequence[int]) -> list[str]:
    return [plots.COLORS[label % len(plots.COLORS)] for label in labels]


def _largest(masks: Tensor) -> list[int]:
    """Order the instances of a scene by area, the largest first."""
    return masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist()


def _draw_losses(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    lines = [entry for entry in history if "total" in entry]
    steps = [entry["step"] for entry in lines]
    terms = {"class": "loss_class", "mask": "loss_mask", "Dice": "loss_dice"}
    smooth = {name: (steps, _smooth([entry[key] for entry in lines])) for name, key in terms.items()}
    plots.draw_curves(axes, smooth, title="Loss terms of the final layer, unweighted")
    axes.set_ylim(bottom=0)


def _draw_scores(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    # No scores without instances to find.
    lines = [entry for entry in history if "held_out" in entry and entry["held_out"]["ap"] is not None]
    steps = [entry["step"] for entry in lines]
    names = {"AP50": "ap50", "mean IoU": "mean_iou", "AP": "ap"}
    scores = {name: (steps, [entry["held_out"][key] for entry in lines]) for name, key in names.items()}
    plots.draw_curves(axes, scores, title="Scores on held-out scenes", markers=True)
    axes.set_ylim(0, 1)


def _smooth(values: Sequence[float], share: float = 0.8) -> list[float]:
    """Smooth exponentially, with the bias towards the first value taken out."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + 1 - share
        out.append(mean / weight)
    return out


def _legend(figure: Figure) -> None:
    lines = require("matplotlib.lines", "train")
    entries = (
        (plots.ORANGE, "o", "", "uncertain points"),
        (plots.GRAY, "o", "", "uniform points"),
        (plots.INK, "", "--", "outline of the truth"),
    )
    handles = [
        lines.Line2D([], [], color=colour, marker=marker, markersize=5, linestyle=style, label=label)
        for colour, marker, style, label in entries
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
