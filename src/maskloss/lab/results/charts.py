"""Charts of a run: losses and scores over its steps, precision over recall, and what is taken for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from maskloss import plots
from maskloss.lab.results.details import RECALLS
from maskloss.lab.results.evaluate import Evaluation
from maskloss.lab.results.lettering import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Curves in one picture, and classes up to which a table of them has numbers.
_CURVES, _COUNTED = 8, 26


def losses(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the terms of the loss."""
    figure, axes = _chart()
    _draw_losses(axes, history)
    return figure


def scores(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the scores on held-out scenes during training."""
    figure, axes = _chart()
    draw_scores(axes, history)
    return figure


def matching(evaluation: Evaluation) -> Figure:
    """Draw the AP of microscopy over IoU thresholds."""
    figure, axes = _chart()
    thresholds = [float(threshold) for threshold in evaluation.matching]
    plots.draw_curves(
        axes, {"AP": (thresholds, list(evaluation.matching.values()))}, title="TP / (TP + FP + FN)", markers=True
    )
    axes.set(ylim=(0, 1), xlabel="IoU threshold")
    return figure


def in_detail(evaluation: Evaluation, class_names: Sequence[str]) -> dict[str, Figure]:
    """Draw what there is to see of classes: precision over recall, and of several classes what is taken for what."""
    figures = {"precision-recall": precision_recall(evaluation, class_names)} if evaluation.curves else {}
    if len(class_names) > 1:
        figures["confusion"] = confusion(evaluation, class_names)
    return figures


def precision_recall(evaluation: Evaluation, names: Sequence[str]) -> Figure:
    """Draw precision over recall at IoU 0.50: of the classes with most instances, and the mean over all."""
    figure, axes = _chart()
    recalls = RECALLS.tolist()
    shown = zip(names, evaluation.by_class.items(), strict=True)
    curves = [(label, evaluation.curves[name], each) for label, (name, each) in shown if name in evaluation.curves]
    curves.sort(key=lambda each: -each[2].instances)
    several = len(curves) > 1
    drawn = {literal(label): (recalls, curve) for label, curve, _ in curves[: _CURVES - several]}
    if several:
        drawn["all"] = (recalls, np.mean([curve for _, curve, _ in curves], axis=0).tolist())
    colors = [plots.INK if several and place == len(drawn) - 1 else plots.COLORS[place] for place in range(len(drawn))]
    plots.draw_curves(axes, drawn, title="Precision over recall, at IoU 0.5", colors=colors)
    axes.set(ylim=(0, 1.02), xlim=(0, 1), xlabel="recall")
    return figure


def confusion(evaluation: Evaluation, names: Sequence[str]) -> Figure:
    """Draw what is taken for what: shares of the instances of a class, and of the false alarms."""
    counts = np.array(evaluation.confusion, dtype=np.int64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(12.0, 2.2 + 0.45 * len(counts))
    figure = plots.new_figure(side, side)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Greens", vmin=0, vmax=1)
    labels = [literal(name) for name in names]
    places = range(len(counts))
    axes.set_xticks(places, [*labels, "missed"], rotation=90)
    axes.set_yticks(places, [*labels, "false alarm"])
    axes.set(xlabel="found to be", ylabel="truth")
    axes.tick_params(labelsize=8, length=0)
    if len(counts) <= _COUNTED:
        for row, column in zip(*counts.nonzero(), strict=True):
            color = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=7.5, color=color)
    return figure


def draw_scores(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw the scores on held-out scenes during training onto axes."""
    # No scores without instances to find.
    lines = [entry for entry in history if "held_out" in entry and entry["held_out"]["ap"] is not None]
    steps = [entry["step"] for entry in lines]
    names = {"AP50": "ap50", "mean IoU": "mean_iou", "AP": "ap"}
    found = {name: (steps, [entry["held_out"][key] for entry in lines]) for name, key in names.items()}
    if lines:
        plots.draw_curves(axes, found, title="Scores on held-out scenes", markers=True)
    axes.set_ylim(0, 1)


def _chart() -> tuple[Figure, Axes]:
    figure = plots.new_figure(4.7, 3.3)
    return figure, figure.subplots()


def _draw_losses(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    lines = [entry for entry in history if "total" in entry]
    steps = [entry["step"] for entry in lines]
    terms = {"class": "loss_class", "mask": "loss_mask", "Dice": "loss_dice"}
    smooth = {
        name: (steps, _smooth([entry[key] for entry in lines]))
        for name, key in terms.items()
        if lines and all(entry.get(key) is not None for entry in lines)
    }
    if smooth:
        plots.draw_curves(axes, smooth, title="Loss terms of the final layer, unweighted")
        axes.set_ylim(bottom=0)


def _smooth(values: Sequence[float], share: float = 0.8) -> list[float]:
    """Smooth exponentially, with the bias towards the first value taken out."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + 1 - share
        out.append(mean / weight)
    return out
