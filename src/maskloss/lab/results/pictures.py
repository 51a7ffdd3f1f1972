"""The pictures of a run: predictions beside the truth, and the points that the loss chose.

Each is small and carries no caption: the report sets them side by side and writes its text itself, so that both can be
read on a telephone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss import plots
from maskloss._palette import class_color
from maskloss.errors import require
from maskloss.lab.data.scenes import Probe, Scene
from maskloss.lab.files import write_whole
from maskloss.lab.results import charts
from maskloss.lab.results.evaluate import Evaluation
from maskloss.lab.results.gallery import Shown
from maskloss.lab.results.inference import FOUND, Instance, Prediction, cropped
from maskloss.lab.results.lettering import Lettering, literal, short
from maskloss.lab.results.snapshots import Hard, Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = plots.COLORS
FOLLOWED = 2  # instances in the pictures of points
DPI = 120
PANEL = 3.4  # inches
# More names than this would cover the picture.
_NAMED = 12
# An overlay is enlarged until its longer side has this many pixels, so that outlines can be seen.
_OVERLAY = 512
# A picture of an instance shows this many times its box, and at least this share of the scene.
_MARGIN, _LEAST = 2.2, 0.12


def panels(shown: Shown, class_names: Sequence[str]) -> list[Figure]:
    """Draw a scene, its truth, and what was found in it: three pictures."""
    figures = []
    for part in range(3):
        figure, axes = _panel(shown.scene.height / shown.scene.width)
        _draw_part(axes, part, shown, class_names, 8.5)
        figures.append(figure)
    return figures


def points(shots: Sequence[Snapshot], probe: Probe) -> list[list[Figure]]:
    """Draw how the points of a few instances move to the outline while the model learns.

    Returns:
        For each followed instance: a picture of it, and one for each snapshot.
    """
    masks = probe.masks.dense()
    rows = []
    for target in _largest(masks)[:FOLLOWED]:
        figure, axes = _panel()
        plots.draw_instances(axes, probe.picture, masks[target][None], [""], [PALETTE[1]])
        zoom(axes, masks[target])
        row = [figure]
        for shot in shots:
            figure, axes = _panel()
            _draw_points(axes, shot, target, masks[target])
            row.append(figure)
        rows.append(row)
    return rows


def hard(found: Hard) -> list[Figure]:
    """Draw an instance with a high loss, and the points of its loss: two pictures."""
    mask = found.probe.masks.dense()[found.target]
    first, axes = _panel()
    plots.draw_instances(axes, found.probe.picture, mask[None], [""], [PALETTE[1]])
    zoom(axes, mask)
    second, axes = _panel()
    _draw_points(axes, found.shot, found.target, mask)
    return [first, second]


def overview(
    shown: Sequence[Shown],
    class_names: Sequence[str],
    history: Sequence[Mapping[str, Any]],
    shots: Sequence[Snapshot],
    probe: Probe | None,
) -> Figure:
    """Draw a run at a glance, wide: scenes, the truth and what was found, the points, and the scores over time."""
    figure = plots.new_figure(14.4, 4.1)
    grid = figure.add_gridspec(2, 9, width_ratios=[1, 1, 1, 0.04, 1, 1, 1, 1.05, 1.05])
    for place, each in enumerate(shown[:4]):
        row, column = divmod(place, 2)
        for part, title in enumerate(("Scene", "Truth", "Prediction")):
            axes = figure.add_subplot(grid[row, 4 * column + part])
            _draw_part(axes, part, each, class_names, 6)
            axes.set_title(title, fontsize=9, pad=4)
    if shots and probe is not None:
        masks = probe.masks.dense()
        for side, target in enumerate(_largest(masks)[:2]):
            axes = figure.add_subplot(grid[0, 7 + side])
            _draw_points(axes, shots[-1], target, masks[target], size=4)
            axes.set_title("Points of the loss", fontsize=9, pad=4)
    charts.draw_scores(figure.add_subplot(grid[1, 7:]), history)
    return figure


def overlay(
    image: Tensor, instances: Sequence[Instance], letters: Lettering, *, scores: bool = True
) -> NDArray[np.uint8]:
    """Color instances over an image, with their names and scores: `[H, W, 3]`, enlarged if it is small.

    Where there are many, only those that are as wide as their names have one.
    """
    times = max(1, -(-_OVERLAY // max(image.shape[1:])))
    large = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
    enlarged = [
        each._replace(
            top=times * each.top, left=times * each.left, mask=np.kron(each.mask, np.ones((times, times), dtype=bool))
        )
        for each in instances
    ]
    classes = len(letters.names)
    colors = _colors([each.label for each in instances], classes)
    colored = np.asarray((255 * _colored(large, enlarged, colors, dim=0.85)).round().astype(np.uint8))
    drawn = require("PIL.Image", "train").fromarray(colored)
    draw = require("PIL.ImageDraw", "train").Draw(drawn)
    size = max(11, max(drawn.size) // 55)
    # The best last, on top.
    for instance, color in zip(reversed(enlarged), reversed(colors), strict=True):
        parts = [short(letters.names[instance.label])] if classes > 1 else []
        text = " ".join([*parts, f"{100 * instance.score:.0f}"] if scores else parts)
        wide, high = letters.width(text, size) + 6, size + 6
        if not text or (len(instances) > _NAMED and wide > instance.mask.shape[1]):
            continue
        left = max(0, min(instance.left, drawn.width - wide))
        top = max(0, min(instance.top, drawn.height - high))
        background = plots.rgb(color)
        draw.rectangle(
            (left, top, left + wide - 1, top + high - 1), fill=tuple(round(255 * each) for each in background)
        )
        # As bright as the background is to the eye.
        dark = float(background @ np.array([0.299, 0.587, 0.114])) > 0.55
        letters.write(draw, (left + 3, top + high / 2), text, size, "black" if dark else "white")
    return np.asarray(drawn)


def compared(scene: Scene, prediction: Prediction, letters: Lettering) -> NDArray[np.uint8]:
    """Color the truth and what was found, side by side: `[H, W, 3]`."""
    picture = scene.picture()
    truth = zip(scene.masks().numpy(), scene.labels.tolist(), strict=True)
    listed = [cropped(mask, label) for mask, label in truth if mask.any()]
    found = [each for each in prediction.instances if each.score >= FOUND]
    left, right = overlay(picture, listed, letters, scores=False), overlay(picture, found, letters)
    return np.concatenate([left, np.full((len(left), 8, 3), 255, dtype=np.uint8), right], axis=1)


def write_pixels(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write a picture of pixels whole."""
    drawn = require("PIL.Image", "train").fromarray(pixels)
    write_whole(path, lambda partial: drawn.save(partial, format="PNG"))


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole."""
    with quiet():
        write_whole(path, lambda partial: figure.savefig(partial, dpi=DPI, format="png", metadata={"Software": None}))


@contextmanager
def quiet() -> Iterator[None]:
    """Draw names in any script: a font without a glyph shows a box, which is no reason to stop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


def zoom(axes: Axes, mask: Tensor) -> None:
    """Show the surroundings of a mask `[H, W]` only, a square of [0, 1]^2."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return
    height, width = mask.shape
    y = (int(rows[0]) / height, (int(rows[-1]) + 1) / height)
    x = (int(columns[0]) / width, (int(columns[-1]) + 1) / width)
    side = min(1.0, max(_LEAST, _MARGIN * max(y[1] - y[0], x[1] - x[0])))
    left = min(max(sum(x) / 2 - side / 2, 0), 1 - side)
    top = min(max(sum(y) / 2 - side / 2, 0), 1 - side)
    axes.set(xlim=(left, left + side), ylim=(top + side, top))


def _panel(aspect: float = 1.0) -> tuple[Figure, Axes]:
    figure = plots.new_figure(PANEL, PANEL * min(max(aspect, 0.5), 2.0))
    figure.set_layout_engine("none")
    return figure, figure.add_axes((0.005, 0.005, 0.99, 0.99))


def _draw_part(axes: Axes, part: int, shown: Shown, class_names: Sequence[str], text_size: float) -> None:
    scene, prediction = shown
    picture, classes = scene.picture(), len(class_names)
    if part == 0:
        plots.draw_image(axes, picture)
        return
    if part == 1:
        labels = scene.labels.tolist()
        listed = [cropped(mask, label) for mask, label in zip(scene.masks().numpy(), labels, strict=True) if mask.any()]
        names = [literal(class_names[each.label]) for each in listed]
    else:
        # Drawn worst first, so that the best lie on top.
        listed = [each for each in reversed(prediction.instances) if each.score >= FOUND]
        names = [f"{literal(class_names[each.label])} · {100 * each.score:.0f}" for each in listed]
    colors = _colors([each.label for each in listed], classes)
    if len(listed) > _NAMED or classes == 1:
        # Names would cover the picture, or say nothing.
        colored = _colored(picture, listed[::-1], colors[::-1], dim=0.6)
        plots.draw_image(axes, torch.from_numpy(colored).permute(2, 0, 1))
        return
    size = (scene.height, scene.width)
    masks = np.stack([each.whole(*size) for each in listed]) if listed else np.zeros((0, *size), dtype=bool)
    plots.draw_instances(axes, picture, torch.from_numpy(masks), names, colors, text_size=text_size)


def _colored(image: Tensor, instances: Sequence[Instance], colors: Sequence[str], dim: float) -> NDArray[np.float32]:
    """Color many instances over a gray picture, the first on top: `[H, W, 3]` in [0, 1].

    One pass over the pixels of each instance; a layer of the whole picture for each would take minutes for a thousand.
    """
    gray = dim * image.mean(0).numpy().astype(np.float32)
    out = np.repeat(gray[..., None], 3, axis=2)
    for instance, color in zip(reversed(instances), reversed(colors), strict=True):
        top, left, bottom, right = instance.box
        region, mask = out[top:bottom, left:right], instance.mask
        inside = np.pad(mask, 1)
        inner = mask & inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        paint = plots.rgb(color).astype(np.float32)
        region[inner] = 0.6 * region[inner] + 0.4 * paint
        region[mask & ~inner] = paint
    return out


def _draw_points(axes: Axes, shot: Snapshot, target: int, mask: Tensor, size: float = 7) -> None:
    plots.draw_points(axes, shot.logits[target], shot.points[target], shot.num_uncertain, target=mask, size=size)
    zoom(axes, mask)


def _colors(labels: Sequence[int], classes: int) -> list[str]:
    """Color by class, or one instance after the other where there is one class."""
    if classes > 1:
        return [class_color(label) for label in labels]
    return [PALETTE[number % len(PALETTE)] for number in range(len(labels))]


def _largest(masks: Tensor) -> list[int]:
    """Order the instances of a scene by area, the largest first."""
    return masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist()


def draw_all(
    folder: Path,
    shown: Sequence[Shown],
    letters: Lettering,
    history: Sequence[Mapping[str, Any]],
    evaluation: Evaluation,
    shots: Sequence[Snapshot],
    probe: Probe | None,
    hardest: Sequence[Hard],
) -> dict[str, Path]:
    """Write all pictures into a folder; return name to path."""
    with letters.used():
        folder.mkdir(exist_ok=True)
        figures: dict[str, Figure] = {"losses": charts.losses(history), "scores": charts.scores(history)}
        if evaluation.matching:
            figures["matching"] = charts.matching(evaluation)
        figures |= charts.in_detail(evaluation, letters.names)
        for number, each in enumerate(shown):
            for part, figure in zip(("image", "truth", "found"), panels(each, letters.names), strict=True):
                figures[f"scene-{number}-{part}"] = figure
        if shots and probe is not None:
            for number, row in enumerate(points(shots, probe)):
                for place, figure in enumerate(row):
                    figures[f"points-{number}-{place}"] = figure
        for number, found in enumerate(hardest):
            for part, figure in zip(("image", "points"), hard(found), strict=True):
                figures[f"hard-{number}-{part}"] = figure
        figures["overview"] = overview(shown, letters.names, history, shots, probe)
        paths = {}
        for name, figure in figures.items():
            paths[name] = folder / f"{name}.png"
            save(figure, paths[name])
        if shots and probe is not None:
            paths["points"] = _animation(folder / "points.gif", shots, probe)
        return paths


def _animation(path: Path, shots: Sequence[Snapshot], probe: Probe) -> Path:
    """Write how the points of the largest instances move, as an animation."""
    masks = probe.masks.dense()
    with quiet():
        return plots.animate_points(shots, path, targets=masks, instances=_largest(masks)[:3])
