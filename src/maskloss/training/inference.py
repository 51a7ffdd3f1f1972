"""From logits to instances of an image, whatever its size: whole images, or tiles whose instances are merged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from maskloss.training.data import fit
from maskloss.training.learners import Learner, Output

# A prediction of at least this score counts as found: in pictures, label maps and mean IoU. AP needs no such threshold.
FOUND = 0.5
# Instances of an image that are kept, as COCO's evaluation does, unless an image can have more.
MOST = 100
# Tiles overlap by this share of their side; an image that is larger than a tile by less than this factor is not cut.
OVERLAP, SLACK = 0.25, 1.5
# In the region that two tiles share, two instances of this IoU are one.
SAME = 0.4
# So is one that a tile's edge cuts off, if this share of it lies on the other.
INSIDE = 0.75
# An instance of which better ones leave less than this share is left out of a label map.
VISIBLE = 0.5
# Masks that are enlarged at once.
_CHUNK = 16

Mask = NDArray[np.bool_]


class Instance(NamedTuple):
    """Something that was found.

    Attributes:
        top: of the box, pixels of the image.
        left: of the box.
        mask: bool, the pixels of the box.
        label: its class.
        score: in [0, 1].
    """

    top: int
    left: int
    mask: Mask
    label: int
    score: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Top, left, bottom, right."""
        return self.top, self.left, self.top + self.mask.shape[0], self.left + self.mask.shape[1]

    def whole(self, height: int, width: int) -> Mask:
        """Return the mask of the whole image."""
        out = np.zeros((height, width), dtype=bool)
        top, left, bottom, right = self.box
        out[top:bottom, left:right] = self.mask
        return out


class Prediction(NamedTuple):
    """What a model found in one image, best first.

    Attributes:
        height: of the image.
        width: of the image.
        instances: found in it.
    """

    height: int
    width: int
    instances: list[Instance]

    def label_map(self, threshold: float = FOUND) -> NDArray[np.int32]:
        """Number the instances that score at least `threshold`, from 1; where they overlap, the best one wins."""
        out = np.zeros((self.height, self.width), dtype=np.int32)
        count = 0
        for instance in self.instances:
            if instance.score < threshold:
                break
            top, left, bottom, right = instance.box
            there = out[top:bottom, left:right]
            free = instance.mask & (there == 0)
            if free.sum() >= VISIBLE * instance.mask.sum():
                count += 1
                there[free] = count
        return out


class Tile(NamedTuple):
    """A square part of an image."""

    top: int
    left: int
    bottom: int
    right: int


class Predictor:
    """Predicts images of any size.

    Args:
        learner: the model.
        size: side of the square that the model sees, pixels.
        tile: side of the squares into which larger images are cut, pixels of the image.
        cut: whether any image larger than a tile is cut, as where a model was trained on crops; else only images that
            are much larger.
        most: instances of an image that are kept.
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
    def __call__(self, images: Sequence[Tensor]) -> list[Prediction]:
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

    def _look(self, images: Sequence[Tensor], jobs: Sequence[tuple[int, Tile]]) -> list[list[Instance]]:
        inputs, windows, frames = [], [], []
        for number, (top, left, bottom, right) in jobs:
            part = images[number][:, top:bottom, left:right]
            height, width = part.shape[1:]
            whole = len(self.tiles(*images[number].shape[1:])) == 1
            frame = max(height, width) if whole and not self.cut else max(height, width, self.tile)
            inputs.append(fit(part, frame, self.size))
            windows.append([0.0, 0.0, width / frame, height / frame])
            frames.append(frame)
        device = next(self.learner.network.parameters()).device
        output = self.learner.predict(torch.stack(inputs).to(device), torch.tensor(windows, device=device))
        out = []
        for place, (job, frame) in enumerate(zip(jobs, frames, strict=True)):
            tile = job[1]
            size = (tile.bottom - tile.top, tile.right - tile.left)
            one = Output(output.class_logits[place], output.mask_logits[place])
            out.append(decode(one, frame, size, (tile.top, tile.left), self.most))
        return out


def decode(
    output: Output, frame: int, size: tuple[int, int], offset: tuple[int, int] = (0, 0), most: int = MOST
) -> list[Instance]:
    """Turn the logits of one image into instances, one for each query with a mask that is not empty, best first.

    The score is the probability of the best class times the mean probability of the pixels inside the mask, as in
    Mask2Former. Masks are enlarged to the frame and cut to the image.

    Args:
        output: class logits `[Q, C + 1]`, mask logits `[Q, h, w]`.
        frame: side of the square that the logits cover, pixels of the image.
        size: height and width of the image, in the top left corner of the frame.
        offset: top and left of it within a larger image.
        most: queries to look at, the most probable ones.
    """
    probability, labels = output.class_logits.float().softmax(-1)[:, :-1].max(-1)
    order = probability.argsort(descending=True, stable=True)[:most]
    instances = []
    for start in range(0, len(order), _CHUNK):
        chosen = order[start : start + _CHUNK]
        logits = output.mask_logits[chosen].float()
        sharp = interpolate(logits[None], (frame, frame), mode="bilinear")[0, :, : size[0], : size[1]]
        masks = sharp > 0
        area = masks.flatten(1).sum(1)
        certainty = (sharp.sigmoid() * masks).flatten(1).sum(1) / area.clamp(min=1)
        scores = (probability[chosen] * certainty).cpu().tolist()
        for mask, label, score, pixels in zip(
            masks.cpu().numpy(), labels[chosen].tolist(), scores, area.tolist(), strict=True
        ):
            if pixels:
                instances.append(cropped(mask, label, score, offset))
    instances.sort(key=lambda each: -each.score)
    return instances


def cropped(mask: Mask, label: int, score: float = 1.0, offset: tuple[int, int] = (0, 0)) -> Instance:
    """Cut a mask `[H, W]` that is not empty down to its box; `offset` is where it lies in a larger image."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    inside = mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].copy()
    return Instance(top + offset[0], left + offset[1], inside, label, score)


def _starts(length: int, tile: int) -> list[int]:
    """Place tiles along a side, evenly and with at least the usual overlap."""
    if length <= tile:
        return [0]
    count = 1 + -(-(length - tile) // max(1, round(tile * (1 - OVERLAP))))
    return [round(place * (length - tile) / (count - 1)) for place in range(count)]


def merge(parts: Sequence[tuple[Tile, list[Instance]]]) -> list[Instance]:
    """Merge the instances of overlapping tiles: those that agree where both tiles look are one.

    Args:
        parts: each tile and what was found in it.
    """
    flat = [instance for _, instances in parts for instance in instances]
    first = np.cumsum([0, *(len(instances) for _, instances in parts)])
    group = list(range(len(flat)))

    def root(number: int) -> int:
        while group[number] != number:
            group[number] = group[group[number]]
            number = group[number]
        return number

    boxes = np.array([each.box for each in flat], dtype=np.int64).reshape(-1, 4)
    for (a, (tile_a, _)), (b, (tile_b, _)) in combinations(enumerate(parts), 2):
        shared = _overlap(tile_a, tile_b)
        if shared is None:
            continue
        mine = _touching(boxes, range(first[a], first[a + 1]), shared)
        others = _touching(boxes, range(first[b], first[b + 1]), shared)
        for one in mine:
            near = [other for other in others if _overlap(flat[one].box, flat[other].box) is not None]
            for other in near:
                if flat[one].label == flat[other].label and _agree(flat[one], flat[other], shared, tile_a, tile_b):
                    group[root(one)] = root(other)
    members: dict[int, list[Instance]] = {}
    for number, instance in enumerate(flat):
        members.setdefault(root(number), []).append(instance)
    return [_union(each) for each in members.values()]


def _touching(boxes: NDArray[Any], numbers: range, region: tuple[int, int, int, int]) -> list[int]:
    some = boxes[numbers.start : numbers.stop]
    top, left, bottom, right = region
    inside = (some[:, 0] < bottom) & (some[:, 2] > top) & (some[:, 1] < right) & (some[:, 3] > left)
    return [numbers.start + int(place) for place in np.flatnonzero(inside)]


def _overlap(one: Sequence[int], other: Sequence[int]) -> tuple[int, int, int, int] | None:
    top, left = max(one[0], other[0]), max(one[1], other[1])
    bottom, right = min(one[2], other[2]), min(one[3], other[3])
    return (top, left, bottom, right) if top < bottom and left < right else None


def _agree(one: Instance, other: Instance, shared: tuple[int, int, int, int], tile_a: Tile, tile_b: Tile) -> bool:
    area_one, area_other = _window(one, shared), _window(other, shared)
    both = int((area_one & area_other).sum())
    if not both:
        return False
    sizes = int(area_one.sum()), int(area_other.sum())
    if both > SAME * (sum(sizes) - both):
        return True
    cut = (_is_cut(one, tile_a, shared), _is_cut(other, tile_b, shared))
    return any(is_cut and both > INSIDE * size for is_cut, size in zip(cut, sizes, strict=True))


def _is_cut(instance: Instance, tile: Tile, shared: tuple[int, int, int, int]) -> bool:
    """Tell whether an instance ends at an edge of its tile that lies inside the region shared with the other."""
    edges = zip(instance.box, tile, shared, strict=True)
    return any(mine == edge == region for mine, edge, region in edges)


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
