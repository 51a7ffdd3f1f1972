"""The step of clips and volumes as the copies of Mask2Former's criterion have it: float masks, and `grid_sample`.

Each video and occupancy model has such a copy: of a clip it reads each frame of an instance at points of its own, of a
volume it reads five dimensions. What they compute is written down here once more, from the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, grid_sample

from maskloss import PointSampling
from maskloss.criterion import NO_OBJECT_WEIGHT
from maskloss.lab.bench.cases import Case
from maskloss.lab.bench.inputs import Inputs
from maskloss.lab.bench.measure import Timed, wrap
from maskloss.options import CLASS_WEIGHT, DICE_WEIGHT, MASK_WEIGHT

# Matched queries and targets of an image.
Pair = tuple[Tensor, Tensor]
WEIGHTS = {"loss_class": CLASS_WEIGHT, "loss_mask": MASK_WEIGHT, "loss_dice": DICE_WEIGHT}


class Computed(NamedTuple):
    """A step: the weighted total, its terms by `CriterionOutput.as_dict`'s names, and the pairs of each layer."""

    total: Tensor
    terms: dict[str, Tensor]
    pairs: list[list[Pair]]


class DenseArm:
    """Matching, classification and mask loss of every layer, on float masks, as they are prepared for it.

    Args:
        case: the sizes of the step, of clips or volumes.
        device: where it runs.
    """

    name = "dense"
    takes_masks = False

    def __init__(self, case: Case, device: torch.device) -> None:
        self.volumes, self.sampling = case.unit == "volume", PointSampling(num_points=case.points)
        self.class_weights = torch.ones(case.classes + 1, device=device)
        self.class_weights[-1] = NO_OBJECT_WEIGHT

    def prepare(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Make the masks float."""
        return [each.float() for each in masks]

    def forward(self, inputs: Inputs, targets: Sequence[Tensor], seed: int) -> Tensor:
        """Compute the weighted total; the points come from torch's default generator, which is seeded."""
        torch.manual_seed(seed)
        return self.compute(inputs, targets).total

    def compute(self, inputs: Inputs, targets: Sequence[Tensor]) -> Computed:
        """Compute the step, with its terms and pairs."""
        terms, pairs, last = {}, [], len(inputs.class_logits) - 1
        for layer, (classes, masks) in enumerate(zip(inputs.class_logits, inputs.dense(), strict=True)):
            classes, masks = classes.float(), masks.float()
            matched = [
                self.match(classes[image], masks[image], targets[image], inputs.labels[image])
                for image in range(len(targets))
            ]
            suffix = "" if layer == last else f"_{layer}"
            terms[f"loss_class{suffix}"] = self.classify(classes, inputs.labels, matched)
            terms[f"loss_mask{suffix}"], terms[f"loss_dice{suffix}"] = self.mask_terms(masks, targets, matched)
            pairs.append(matched)
        weighted = [WEIGHTS["_".join(name.split("_")[:2])] * value for name, value in terms.items()]
        return Computed(torch.stack(weighted).sum(), terms, pairs)

    @torch.no_grad()
    def match(self, classes: Tensor, masks: Tensor, target: Tensor, labels: Tensor) -> Pair:
        """Match one image, whose queries and targets are read at the same points, those of a clip in every frame."""
        return self.assign(self.costs(classes, masks, target, labels))

    def assign(self, cost: Tensor) -> Pair:
        """Solve the assignment."""
        queries, targets = linear_sum_assignment(cost.cpu().numpy())
        return torch.from_numpy(queries), torch.from_numpy(targets)

    def costs(self, classes: Tensor, masks: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Compute the costs `[Q, N]` of one image."""
        points = torch.rand(1, self.sampling.num_points, 2 + self.volumes, device=masks.device)
        z, t = (self._read(maps, points.expand(len(maps), -1, -1)).flatten(1) for maps in (masks, target))
        on, off = (
            binary_cross_entropy_with_logits(z, torch.full_like(z, side), reduction="none") for side in (1.0, 0.0)
        )
        ce = (on @ t.T + off @ (1 - t).T) / z.shape[1]
        s = z.sigmoid()
        dice = 1 - (2 * (s @ t.T) + 1) / (s.sum(1)[:, None] + t.sum(1) + 1)
        return MASK_WEIGHT * ce + DICE_WEIGHT * dice - CLASS_WEIGHT * classes.softmax(1)[:, labels]

    def classify(self, classes: Tensor, labels: Sequence[Tensor], matched: Sequence[Pair]) -> Tensor:
        """Compute the classification of a layer."""
        wanted = torch.full(classes.shape[:2], classes.shape[2] - 1, device=classes.device)
        for image, (queries, targets) in enumerate(matched):
            wanted[image, queries] = labels[image][targets]
        return cross_entropy(classes.mT, wanted, self.class_weights)

    def mask_terms(self, masks: Tensor, targets: Sequence[Tensor], matched: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Compute cross-entropy and Dice of a layer, divided by the number of instances."""
        count = sum(len(queries) for queries, _ in matched)
        images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(matched)])
        chosen = masks[images, torch.cat([queries for queries, _ in matched])]
        wanted = torch.cat([masks[rows] for masks, (_, rows) in zip(targets, matched, strict=True)])
        if not self.volumes:  # each frame of an instance on its own
            chosen, wanted = chosen.flatten(0, 1)[:, None], wanted.flatten(0, 1)[:, None]
        with torch.no_grad():
            points = self._points(chosen)
            t = self._read(wanted, points).squeeze(1)
        z = self._read(chosen, points).squeeze(1)
        ce = binary_cross_entropy_with_logits(z, t, reduction="none").mean(1)
        s = z.sigmoid()
        dice = 1 - (2 * (s * t).sum(1) + 1) / (s.sum(1) + t.sum(1) + 1)
        return ce.sum() / count, dice.sum() / count

    def _points(self, maps: Tensor) -> Tensor:
        """Draw the points of each map: the most uncertain candidates, then uniform ones."""
        draw, dimensions = self.sampling, 2 + self.volumes
        candidates = torch.rand(len(maps), draw.num_candidates, dimensions, device=maps.device)
        uncertainty = -self._read(maps, candidates).squeeze(1).abs()
        best = uncertainty.topk(draw.num_uncertain, dim=1).indices
        uniform = torch.rand(len(maps), draw.num_random, dimensions, device=maps.device)
        return torch.cat([candidates.gather(1, best[..., None].expand(-1, -1, dimensions)), uniform], dim=1)

    def _read(self, maps: Tensor, points: Tensor) -> Tensor:
        """Read frames `[n, T, h, w]` at points `[n, P, 2]`: `[n, T, P]`; or volumes `[n, d, h, w]`: `[n, 1, P]`."""
        if self.volumes:
            return grid_sample(maps[:, None], 2 * points[:, :, None, None] - 1, align_corners=False).flatten(2)
        return grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False).flatten(2)

    def split(self, timed: Timed) -> None:
        """Time the matching costs, the assignment, the mask loss and the classification."""
        for name, stage in (
            ("costs", "matching cost"),
            ("assign", "assignment"),
            ("mask_terms", "mask loss"),
            ("classify", "classification"),
        ):
            wrap(timed, self, name, stage)
