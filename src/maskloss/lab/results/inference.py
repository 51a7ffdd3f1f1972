"""From logits to instances of an image, whatever its size: whole images, or tiles whose instances are merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss.errors import Cause, require
from maskloss.instances import find_instances, number_pixels, tight
from maskloss.lab.data.scenes import fit
from maskloss.lab.models.learners import Learner

# A prediction of at least this score counts as found: in pictures, label maps and mean IoU. AP needs no such threshold.
FOUND = 0.5
# Instances of an image that are kept, as COCO's evaluation does, unless an image can have more.
MOST = 100
# Tiles overlap by this share of their side; an image that is larger than a tile by less than this factor is not cut.
OVERLAP, SLACK = 0.25, 1.5
# In the region that two tiles share, two instances of this IoU are one.
SAME = 0.5
# What a tile's edge cut off gives way to whole instances of other tiles that cover this share of it.
INSIDE = 0.75

Mask = NDArray[np.bool_]


class Instance(NamedTuple):
    """Something that was found."""

    top: int  # of the box, pixels of the image
    left: int  # of the box
    mask: Mask  # bool, the pixels of the box
    label: int  # its class
    score: float  # in [0, 1]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Top, left, bottom, right."""
        return self.top, self.left, self.top + self.mask.shape[0], self.left + self.mask.shape[1]

    def run_lengths(self, height: int, width: int) -> dict[str, Any]:
        """Return the run lengths in an image of this size as COCO writes them, without the mask of all of it."""
        padded = np.pad(self.mask.T, ((0, 0), (1, 1)))
        columns, rows = np.nonzero(padded[:, 1:] != padded[:, :-1])
        # Where one column ends at the bottom and the next begins at the top, the run goes on.
        ends, times = np.unique((self.left + columns) * height + self.top + rows, return_counts=True)
        edges = np.concatenate([[0], ends[times == 1], [height * width]])
        run = require("pycocotools.mask", "train").frPyObjects(
            {"size": [height, width], "counts": np.diff(edges).tolist()}, height, width
        )
        return {"size": [height, width], "counts": run["counts"].decode("ascii")}

    def reduced(self, step: int) -> Instance | None:
        """Return the pixels whose row and column are multiples of `step`; None: there are none."""
        mask = self.mask[-self.top % step :: step, -self.left % step :: step]
        return self._replace(top=-(-self.top // step), left=-(-self.left // step), mask=mask) if mask.any() else None

    def whole(self, height: int, width: int) -> Mask:
        """Return the mask of the whole image."""
        out = np.zeros((height, width), dtype=bool)
        top, left, bottom, right = self.box
        out[top:bottom, left:right] = self.mask
        return out


class Prediction(NamedTuple):
    """What a model found in one image, best first."""

    height: int  # of the image
    width: int  # of the image
    instances: list[Instance]  # found in it

    def label_map(self, threshold: float = FOUND) -> tuple[NDArray[np.int32], list[int]]:
        """Number the pixels of the instances that score at least `threshold`; see `number_pixels`.

        Returns:
            The map `[H, W]`, and the number of each instance in it; 0 for one that is not in it.
        """
        crops = [(each.top, each.left, each.mask) for each in self.instances if each.score >= threshold]
        labels, numbers = number_pixels((self.height, self.width), crops)
        return labels, numbers + [0] * (len(self.instances) - len(numbers))


class Tile(NamedTuple):
    """A square part of an image."""

    top: int
    left: int
    bottom: int
    right: int


class Pixels(Protocol):
    """An image `[C, H, W]` in [0, 1] of which parts are taken."""

    @property
    def shape(self) -> torch.Size:
        """Its sides."""

    def __getitem__(self, part: tuple[slice, slice, slice], /) -> Tensor: ...


class Predictor:
    """Predicts images of any size, shown to the model as squares of `size` pixels; of each, `most` instances are kept.

    Larger images are cut into squares of `tile` pixels: with `cut`, as where a model was trained on crops, all that are
    larger than a tile, else only those that are much larger.
    """

    def __init__(self, learner: Learner, size: int, tile: int, cut: bool, most: int = MOST) -> None:
        self.learner, self.size, self.tile, self.cut, self.most = learner, size, tile, cut, most

    def tiles(self, height: int, width: int) -> list[Tile]:
        """Cut an image of this size; one tile if it is not to be cut."""
        longest = max(height, width)
        if longest <= self.tile * (1 if self.cut else SLACK):
            return [Tile(0, 0, height, width)]
        return [
            Tile(top, left, min(top + self.tile, height), min(left + self.tile, width))
            for top in _starts(height, self.tile)
            for left in _starts(width, self.tile)
        ]

    @torch.no_grad()
    def __call__(self, images: Sequence[Pixels]) -> list[Prediction]:
        """Predict images, each `[C, H, W]` in [0, 1], with the model as it is in evaluation."""
        jobs = [(number, tile) for number, image in enumerate(images) for tile in self.tiles(*image.shape[1:])]
        found: list[list[tuple[Tile, list[Instance]]]] = [[] for _ in images]
        training = self.learner.training
        self.learner.eval()
        at_once = max(1, (1 << 20) // self.size**2)
        try:
            for start in range(0, len(jobs), at_once):
                some = jobs[start : start + at_once]
                for (number, tile), instances in zip(some, self._look(images, some), strict=True):
                    found[number].append((tile, instances))
        finally:
            self.learner.train(training)
        out = []
        for image, parts in zip(images, found, strict=True):
            instances = parts[0][1] if len(parts) == 1 else merge(parts)
            instances.sort(key=lambda each: -each.score)
            most = self.most * len(parts)
            out.append(Prediction(int(image.shape[1]), int(image.shape[2]), instances[:most]))
        return out

    def _look(self, images: Sequence[Pixels], jobs: Sequence[tuple[int, Tile]]) -> list[list[Instance]]:
        inputs, windows, sizes, frames = [], [], [], []
        for number, (top, left, bottom, right) in jobs:
            part = images[number][:, top:bottom, left:right]
            height, width = part.shape[1:]
            whole = (height, width) == tuple(images[number].shape[1:])
            frame = max(height, width) if whole and not self.cut else max(height, width, self.tile)
            inputs.append(fit(part, frame, self.size))
            windows.append([0.0, 0.0, width / frame, height / frame])
            sizes.append((height, width))
            frames.append((frame, frame))
        device = next(self.learner.network.parameters()).device
        output = self.learner.predict(torch.stack(inputs).to(device), torch.tensor(windows, device=device))
        if not all(bool(logits.isfinite().all()) for logits in output):
            raise Cause(
                "what a model predicts must be finite", "it predicts nan or infinity", "train with a lower --lr"
            )
        found = find_instances(
            output.class_logits,
            output.mask_logits,
            size=sizes,
            canvas=frames,
            threshold=0,
            max_instances=self.most,
            classification=self.learner.classification,
        )
        return [
            [
                Instance(tile.top + top, tile.left + left, mask, label, score)
                for (top, left, mask), label, score in zip(
                    each.crops(), each.labels.tolist(), each.scores.tolist(), strict=True
                )
            ]
            for each, (_, tile) in zip(found, jobs, strict=True)
        ]


def cropped(mask: Mask, label: int, score: float = 1.0) -> Instance:
    """Cut a mask `[H, W]` that is not empty down to its box."""
    return Instance(*tight(mask), label, score)


def _starts(length: int, tile: int) -> list[int]:
    """Place tiles along a side, evenly and with at least the usual overlap."""
    if length <= tile:
        return [0]
    count = 1 + -(-(length - tile) // max(1, round(tile * (1 - OVERLAP))))
    return [round(place * (length - tile) / (count - 1)) for place in range(count)]


def merge(parts: Sequence[tuple[Tile, list[Instance]]]) -> list[Instance]:
    """Merge the instances of overlapping tiles.

    An instance that no edge of its tile cuts is whole: of those that agree where both tiles look, the best one stays,
    and what was cut gives way to it. What is left was cut in every tile: pieces that agree are joined.
    """
    flat = [(tile, instance) for tile, instances in parts for instance in instances]
    flat.sort(key=lambda each: -each[1].score)
    bottom, right = (max(tile[side] for tile, _ in parts) for side in (2, 3))
    pieces = [_is_cut(instance, tile, bottom, right) for tile, instance in flat]
    boxes, side = [instance.box for _, instance in flat], max(tile.bottom - tile.top for tile, _ in parts)
    kept, before = _Grid(boxes, side), _Grid(boxes, side)
    for number, piece in enumerate(pieces):
        if not piece and not any(_agree(flat[number], flat[other]) for other in kept.near(number)):
            kept.add(number)
    cut = [
        number
        for number, piece in enumerate(pieces)
        if piece and not _is_covered(flat[number], [flat[other] for other in kept.near(number)])
    ]
    group = {number: number for number in cut}

    def root(number: int) -> int:
        while group[number] != number:
            number = group[number]
        return number

    for number in cut:
        for other in before.near(number):
            if _agree(flat[number], flat[other]):
                group[root(number)] = root(other)
        before.add(number)
    members: dict[int, list[Instance]] = {}
    for number in cut:
        members.setdefault(root(number), []).append(flat[number][1])
    return [flat[number][1] for number in kept.numbers] + [_union(each) for each in members.values()]


class _Grid:
    """Some of the boxes by the squares that they touch: a slide has too many to compare each with all."""

    def __init__(self, boxes: Sequence[tuple[int, int, int, int]], side: int) -> None:
        self.boxes, self.side = boxes, side
        self.numbers: list[int] = []
        self._squares: dict[tuple[int, int], list[int]] = {}

    def _touched(self, number: int) -> Iterator[tuple[int, int]]:
        top, left, bottom, right = (edge // self.side for edge in self.boxes[number])
        return product(range(top, bottom + 1), range(left, right + 1))

    def add(self, number: int) -> None:
        self.numbers.append(number)
        for square in self._touched(number):
            self._squares.setdefault(square, []).append(number)

    def near(self, number: int) -> list[int]:
        """Return those whose boxes overlap the box of this number."""
        some = {other for square in self._touched(number) for other in self._squares.get(square, ())}
        return [other for other in sorted(some) if _overlap(self.boxes[number], self.boxes[other])]


def _overlap(one: Sequence[int], other: Sequence[int]) -> tuple[int, int, int, int] | None:
    top, left = max(one[0], other[0]), max(one[1], other[1])
    bottom, right = min(one[2], other[2]), min(one[3], other[3])
    return (top, left, bottom, right) if top < bottom and left < right else None


def _agree(one: tuple[Tile, Instance], other: tuple[Tile, Instance]) -> bool:
    """Whether what two tiles saw is one instance, by the region that both of them see."""
    (tile, instance), (its_tile, its_instance) = one, other
    shared = None if tile == its_tile else _overlap(tile, its_tile)
    if shared is None or instance.label != its_instance.label:
        return False
    mine, its = _window(instance, shared), _window(its_instance, shared)
    both = int((mine & its).sum())
    return both > SAME * (int(mine.sum()) + int(its.sum()) - both)


def _is_covered(piece: tuple[Tile, Instance], wholes: Sequence[tuple[Tile, Instance]]) -> bool:
    """Whether whole instances that other tiles saw cover most of what was cut off, each or together."""
    tile, instance = piece
    others = [each for its_tile, each in wholes if its_tile != tile and each.label == instance.label]
    covered = np.logical_or.reduce([_window(each, instance.box) for each in others]) if others else np.False_
    return int((instance.mask & covered).sum()) > INSIDE * int(instance.mask.sum())


def _is_cut(instance: Instance, tile: Tile, bottom: int, right: int) -> bool:
    """Whether an instance ends at an edge of its tile that is no edge of the image."""
    inner = (tile.top > 0, tile.left > 0, tile.bottom < bottom, tile.right < right)
    return any(there and mine == edge for there, mine, edge in zip(inner, instance.box, tile, strict=True))


def _window(instance: Instance, region: tuple[int, int, int, int]) -> Mask:
    """Return the part of a mask that lies in a region."""
    top, left, bottom, right = region
    out = np.zeros((bottom - top, right - left), dtype=bool)
    part = _overlap(instance.box, region)
    if part is not None:
        y0, x0, y1, x1 = part
        out[y0 - top : y1 - top, x0 - left : x1 - left] = instance.mask[
            y0 - instance.top : y1 - instance.top, x0 - instance.left : x1 - instance.left
        ]
    return out


def _union(members: Sequence[Instance]) -> Instance:
    if len(members) == 1:
        return members[0]
    boxes = np.array([each.box for each in members])
    top, left = (int(side) for side in boxes[:, :2].min(0))
    bottom, right = (int(side) for side in boxes[:, 2:].max(0))
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for each in members:
        y0, x0, y1, x1 = each.box
        mask[y0 - top : y1 - top, x0 - left : x1 - left] |= each.mask
    best = max(members, key=lambda each: each.score)
    return Instance(top, left, mask, best.label, best.score)
