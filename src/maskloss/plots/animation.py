"""The points of a training run as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from maskloss._palette import GRAY, INK
from maskloss.errors import Cause, describe, reported, require
from maskloss.plots.canvas import new_figure
from maskloss.plots.instances import draw_points

FORMATS = (".gif", ".apng", ".png", ".webp")


class Frame(Protocol):
    """What one picture of the animation shows; `maskloss.lab` makes such snapshots.

    Attributes:
        step: of the training run.
        logits: of the instances that are followed, `[N, h, w]`.
        points: of their loss, `[N, P, 2]`, the uncertain ones first.
        num_uncertain: how many of them are uncertain.
    """

    @property
    def step(self) -> int:
        """Which step it was."""

    @property
    def logits(self) -> Tensor:
        """The predictions."""

    @property
    def points(self) -> Tensor:
        """Where the loss looked."""

    @property
    def num_uncertain(self) -> int:
        """How many of the points are uncertain."""


@reported("animate_points")
def animate_points(
    snapshots: Sequence[Frame],
    path: Path | str,
    *,
    targets: Tensor | None = None,
    instances: Sequence[int] | None = None,
    seconds: float = 0.45,
    dpi: int = 100,
) -> Path:
    """Draw how the points of a few instances move while a model learns, one picture for each snapshot.

    Args:
        snapshots: in the order of their steps.
        path: where to write: .gif, .webp, or .apng (or .png, which is the same format).
        targets: `[N, H, W]`, bool or float; their outlines are drawn. Default: none.
        instances: which to show. Default: the first three.
        seconds: how long a picture stays; the last one stays five times as long. Default 0.45.
        dpi: pixels per inch. Default 100.

    Returns:
        The path.

    Raises:
        MaskLossError: no snapshots, or an ending that is not one of these.
        MissingExtraError: matplotlib or Pillow is not installed (extra `plots`).
    """
    if isinstance(snapshots, (str, Path)) or not isinstance(path, (str, Path)):
        raise Cause("the path comes second", f"got {describe(snapshots)} first", "animate_points(snapshots, path)")
    path = Path(path)
    if path.suffix not in FORMATS:
        raise Cause("the path must end in .gif, .webp or .apng", f"got {path.name}", "points.gif")
    if not snapshots:
        raise Cause("there must be snapshots", "the list is empty", "take one every few steps")
    images = require("PIL.Image", "plots")
    shown = list(range(min(3, len(snapshots[0].logits)))) if instances is None else list(instances)
    last = snapshots[-1].step
    frames = [_picture(images, each, last, shown, targets, dpi) for each in snapshots]
    milliseconds = [round(1000 * seconds)] * (len(frames) - 1) + [round(5000 * seconds)]
    common: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
    if path.suffix == ".gif":
        palette = _palette_of(images, frames)
        frames = [each.quantize(palette=palette, dither=images.Dither.NONE) for each in frames]
        frames[0].save(path, **{**common, "append_images": frames[1:]}, optimize=True)
    else:
        kind = "WEBP" if path.suffix == ".webp" else "PNG"
        frames[0].save(path, format=kind, **common)
    return path


def _palette_of(images: Any, frames: Sequence[Any]) -> Any:
    """Choose 128 colors for all pictures together, or they would flicker; white stays white."""
    width, height = frames[0].size
    strip = images.new("RGB", (width, height * len(frames)))
    for place, each in enumerate(frames):
        strip.paste(each, (0, place * height))
    palette = strip.quantize(128)
    colors = np.array(palette.getpalette()).reshape(-1, 3)
    colors[colors.sum(1).argmax()] = 255
    palette.putpalette(colors.flatten().tolist())
    return palette


def _picture(images: Any, shot: Frame, last: int, shown: Sequence[int], targets: Tensor | None, dpi: int) -> Any:
    figure = new_figure(3.1 * len(shown), 3.55)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, instance in zip(panels, shown, strict=True):
        target = None if targets is None else targets[instance]
        draw_points(axes, shot.logits[instance], shot.points[instance], shot.num_uncertain, target=target)
    figure.suptitle(f"Step {shot.step:,}", x=0.015, ha="left", fontsize=13, fontweight="bold", color=INK)
    bar = figure.add_axes((0.0, 0.0, 1.0, 0.012))
    bar.set_in_layout(False)
    bar.axis("off")
    bar.barh(0, shot.step / max(last, 1), color=GRAY)
    bar.set_xlim(0, 1)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    with images.open(buffer) as opened:
        return images.fromarray(np.asarray(opened.convert("RGB")))
