"""The page of `maskloss check`: what there is of what, what is suspicious, and masks as the loss reads them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from maskloss import functional
from maskloss._abi import IGNORE_H, IGNORE_STRIDE, IGNORE_W
from maskloss._palette import COLORS, class_color
from maskloss.errors import MaskLossError, require
from maskloss.lab.data import truth
from maskloss.lab.data.folder import FolderScenes
from maskloss.lab.data.problems import SUSPICIOUS, Finding
from maskloss.lab.data.scenes import in_color
from maskloss.lab.data.survey import LEAST_SEEN, Place, Survey, class_table, magnification, part_table
from maskloss.lab.data.truth import Box, View
from maskloss.lab.results.page import embedded, write_page
from maskloss.lab.terminal import count
from maskloss.targets import MaskTargets

GENERATOR = "maskloss check"
# Longer side of a picture, pixels; pictures of usual images; classes in the legend.
_SIDE, _USUAL, _LEGEND = 440, 12, 24
# Names of files with more characters are shortened under their pictures.
_LONGEST = 32
# A picture of an instance shows this many times its box, and at least this many pixels.
_AROUND, _LEAST_AROUND = 4, 24
_BINS = 24


def write(path: Path, source: FolderScenes, seen: Survey, command: str) -> None:
    """Write the page."""
    findings = source.findings
    suspicious = sum(each.kind == SUSPICIOUS for each in findings)
    classes = class_table(source, seen)
    found = source.found
    write_page(
        path,
        "check.html",
        generator=GENERATOR,
        name=source.root.resolve().name,
        title=f"What training would see of {source.root.resolve().name}",
        lead="; ".join(found.how) + ".",
        cards={
            "suspicious": str(suspicious),
            "images": f"{len(found.train) + len(found.held_out):,}",
            "instances": f"{int(found.train.counts.sum() + found.held_out.counts.sum()):,}",
            "classes": f"{len(source.class_names):,}",
        },
        raised=["suspicious"] if suspicious else [],
        findings=_with_pictures(source, seen, findings),
        usual=list(_pictures(source, _usual(source))),
        legend=[(name, class_color(label)) for label, name in enumerate(source.class_names)][:_LEGEND]
        if len(source.class_names) > 1
        else [],
        parts=part_table(source, seen),
        classes=classes if len(classes) > 2 else [],
        charts=_charts(source, seen),
        values=dict(source.facts),
        command=command,
        skipped=source.problems.skipped,
    )


# ------------------------------------------------------------------------------------------------------------- pictures


def _with_pictures(source: FolderScenes, seen: Survey, findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Say where each finding is to be seen, and show what is suspicious."""
    named: dict[str, Place] = {}
    for held_out in (True, False):
        catalog = source.found.part(held_out)
        named |= {Path(file).name: Place(held_out, number) for number, file in enumerate(catalog.files)}
    listed = []
    for each in findings:
        places = seen.places.get(each.what, [])
        if each.kind == SUSPICIOUS and not places:
            # Found before any pixel was read: an example is an image, or something of one.
            names = [example.rsplit(" of ", 1)[-1] for example in each.examples]
            places = [named[name] for name in names if name in named]
        text = each.what + (f": {each.times:,}" if each.times else "")
        listed.append(
            {
                "kind": each.kind,
                "text": text,
                "examples": each.examples,
                "pictures": list(_pictures(source, places)) if each.kind == SUSPICIOUS else [],
            }
        )
    return listed


def _usual(source: FolderScenes) -> list[Place]:
    """Choose images of both parts evenly, with instances."""
    chosen = []
    for held_out, share in ((False, 2), (True, 1)):
        full = np.flatnonzero(source.found.part(held_out).counts)
        most = min(len(full), _USUAL * share // 3)
        chosen += [Place(held_out, int(full[place])) for place in np.linspace(0, len(full) - 1, most).astype(int)]
    return chosen


def _pictures(source: FolderScenes, places: Sequence[Place]) -> Iterable[tuple[str, str]]:
    """Draw images; those that cannot be read are told elsewhere."""
    for place in dict.fromkeys(places):
        entry = source.found.part(place.held_out)[place.number]
        try:
            picture = draw(source, place)
        except MaskLossError:
            continue
        part = "held out" if place.held_out else "training"
        yield embedded(picture, "webp"), f"{_short(entry.name)} · {part} · {count(len(entry.objects), 'instance')}"


class _Window(NamedTuple):
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


def draw(source: FolderScenes, place: Place) -> bytes:
    """Draw an image at the resolution that the model sees, and its masks as the loss reads them, point by point."""
    entry, reading = source.found.part(place.held_out)[place.number], source.reading
    loaded = truth.load(entry)
    window = around = _window(entry.height, entry.width, place.box, reading.crop)
    scale = magnification(entry, reading)
    # What the model sees of this part: as many pixels, no more.
    frame = max(window.height, window.width)
    seen = reading._replace(size=max(1, round(frame * scale)))
    shown = in_color(seen.image(loaded, View(*window), frame))
    height, width = (max(1, round(side * _SIDE / frame)) for side in (window.height, window.width))
    sides = [max(1, round(side * shown.shape[1] / frame)) for side in (window.height, window.width)]
    pixels = shown[:, : sides[0], : sides[1]].permute(1, 2, 0).numpy()
    pillow = require("PIL.Image", "train")
    small = pillow.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))
    # Sharp pixels where there are few, so that one sees how few.
    way = pillow.Resampling.NEAREST if max(sides) < _SIDE // 2 else pillow.Resampling.BILINEAR
    canvas = np.asarray(small.resize((width, height), way)).astype(np.float32)
    if reading.crop is None:
        view, most = View.whole(entry.height, entry.width), reading.most
    else:
        # What a crop shows counts against the queries, and not the whole image.
        view, most = View(*window), reading.most if place.box is None else None
        window = _Window(0, 0, window.height, window.width)
    packed = loaded.pack(view, view.size, most)
    one_class = len(source.class_names) == 1
    for number, label in enumerate(packed.labels.tolist()):
        color = COLORS[number % len(COLORS)] if one_class else class_color(label)
        _paint(canvas, packed.masks.select([[number]]).dense()[0], window, color)
    _hatch(canvas, _ignored(packed.masks), window)
    if place.box is not None:
        _point_at(canvas, place.box, around)
    buffer = io.BytesIO()
    pillow.fromarray(canvas.round().clip(0, 255).astype(np.uint8)).save(buffer, "WEBP", quality=88)
    return buffer.getvalue()


def _window(height: int, width: int, box: Box | None, crop: int | None) -> _Window:
    """Choose what of an image is shown: the surroundings of an instance, a crop of its middle, or all of it."""
    if box is None and crop is None:
        return _Window(0, 0, height, width)
    middle, side = (height // 2, width // 2), crop or max(height, width)
    if box is not None:
        top, left, bottom, right = box
        middle = ((top + bottom) // 2, (left + right) // 2)
        side = max(_LEAST_AROUND, _AROUND * max(bottom - top, right - left))
    rows, columns = min(side, height), min(side, width)
    top, left = (
        int(np.clip(center - length // 2, 0, whole - length))
        for center, length, whole in zip(middle, (rows, columns), (height, width), strict=True)
    )
    return _Window(top, left, rows, columns)


def _paint(canvas: NDArray[np.float32], mask: torch.Tensor, window: _Window, color: str) -> None:
    """Color an instance: what the loss reads at the middle of each pixel of the picture."""
    rows, columns = (torch.nonzero(mask.any(axis)).flatten() for axis in (1, 0))
    if not len(rows):
        return
    # A margin of one pixel, as the loss reads between a pixel and its neighbors.
    top, bottom = max(0, int(rows[0]) - 1), min(mask.shape[0], int(rows[-1]) + 2)
    left, right = max(0, int(columns[0]) - 1), min(mask.shape[1], int(columns[-1]) + 2)
    y, first_row = _inside(window.top, window.height, canvas.shape[0], top, bottom)
    x, first_column = _inside(window.left, window.width, canvas.shape[1], left, right)
    if not len(y) or not len(x):
        return
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, -1, 2)
    cut = mask[top:bottom, left:right].float()[None]
    inside = (functional.point_sample(cut, points) >= 0.5).reshape(len(y), len(x)).numpy()
    region = canvas[first_row : first_row + len(y), first_column : first_column + len(x)]
    framed = np.pad(inside, 2)
    core = inside.copy()
    for down, across in ((0, 2), (4, 2), (2, 0), (2, 4)):
        core &= framed[down : down + len(y), across : across + len(x)]
    paint = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)], dtype=np.float32)
    region[core] = 0.7 * region[core] + 0.3 * paint
    region[inside & ~core] = paint


def _inside(start: int, length: int, count: int, first: int, last: int) -> tuple[torch.Tensor, int]:
    """Return the middles of those of `count` pixels that lie between two, as shares of the way, and the first."""
    middles = start + (torch.arange(count) + 0.5) * length / count
    numbers = torch.nonzero((middles >= first) & (middles <= last)).flatten()
    return (middles[numbers] - first) / (last - first), int(numbers[0]) if len(numbers) else 0


def _ignored(masks: MaskTargets) -> NDArray[np.bool_]:
    """Unpack the region in which nothing is asked for."""
    row = masks.images[0].tolist()
    stored = masks.ignore.numpy()[: row[IGNORE_H] * row[IGNORE_STRIDE]].reshape(row[IGNORE_H], row[IGNORE_STRIDE])
    return np.unpackbits(stored, axis=1, count=row[IGNORE_W], bitorder="little").astype(bool)


def _hatch(canvas: NDArray[np.float32], ignored: NDArray[np.bool_], window: _Window) -> None:
    """Hatch what weighs nothing."""
    if not ignored.size:
        return
    height, width = canvas.shape[:2]
    rows = window.top + ((np.arange(height) + 0.5) * window.height / height).astype(int)
    columns = window.left + ((np.arange(width) + 0.5) * window.width / width).astype(int)
    inside = ignored[np.ix_(rows, columns)]
    stripes = (np.add.outer(np.arange(height), np.arange(width)) // 5) % 2 == 0
    canvas[inside & stripes] = 200
    canvas[inside & ~stripes] = 0.5 * canvas[inside & ~stripes] + 30


def _point_at(canvas: NDArray[np.float32], box: Box, window: _Window) -> None:
    """Frame what a finding is about: white, and dark around it, to be seen on everything."""
    scale = canvas.shape[0] / window.height
    top, bottom = (scale * (side - window.top) for side in box[::2])
    left, right = (scale * (side - window.left) for side in box[1::2])
    for away, width, color in ((9, 4, 0), (8, 2, 255)):
        outer = [max(0, int(top - away)), max(0, int(left - away)), int(bottom + away) + 1, int(right + away) + 1]
        ring = np.zeros(canvas.shape[:2], dtype=bool)
        ring[outer[0] : outer[2], outer[1] : outer[3]] = True
        ring[outer[0] + width : max(0, outer[2] - width), outer[1] + width : max(0, outer[3] - width)] = False
        canvas[ring] = color


# --------------------------------------------------------------------------------------------------------------- charts


def _charts(source: FolderScenes, seen: Survey) -> list[dict[str, Any]]:
    counts = np.concatenate([source.found.train.counts, source.found.held_out.counts])
    shown = np.sqrt(np.concatenate([seen.train.shown, seen.held_out.shown]))
    areas = np.concatenate([source.found.train.sizes, source.found.held_out.sizes]).max(1)
    least = np.maximum(shown, 0.25)
    charts = [
        _histogram("side of the instances as the model sees them, pixels", least, few=LEAST_SEEN**0.5, by_ratio=True),
        _histogram("instances in an image", counts),
        _histogram("longer side of the images, pixels", areas),
    ]
    return [each for each in charts if each is not None]


def _histogram(
    title: str, values: NDArray[Any], few: float | None = None, *, by_ratio: bool = False
) -> dict[str, Any] | None:
    """Describe a histogram; with `by_ratio` its columns are of equal ratios. None: all values are the same."""
    if not len(values) or values.min() == values.max():
        return None
    low, high = float(values.min()), float(values.max())
    whole = np.issubdtype(values.dtype, np.integer)
    bins = min(_BINS, max(4, round(2 * len(values) ** 0.5)))
    if whole:
        # Columns of equal numbers of whole numbers.
        width = math.ceil((high - low + 1) / bins)
        edges = np.arange(low, high + width + 1, width)
    else:
        edges = np.geomspace(low, high, bins + 1) if by_ratio else np.linspace(low, high, bins + 1)
    found, _ = np.histogram(values, edges)
    most, bound = max(1, int(found.max())), -math.inf if few is None else few * 1.001
    columns = [
        (times / most, upper <= bound, f"{lower:.4g} to {upper - whole:.4g}: {times:,}")
        for times, lower, upper in zip(found.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    return {"title": title, "columns": columns, "first": f"{low:,.4g}", "last": f"{high:,.4g}"}


def _short(name: str) -> str:
    """Leave out the middle of a long name: the numbers of files are at their ends."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 :]}"
