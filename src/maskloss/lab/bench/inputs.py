"""Inputs that look like training: blobs of natural sizes, and predictions that know a part of them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from maskloss.factors import MaskFactors
from maskloss.lab.bench.cases import Case
from maskloss.layers import Layer


@dataclass
class Inputs:
    """The inputs of one step."""

    # Those of clips and volumes have one more dimension before h, and masks one before H.
    class_logits: list[Tensor]  # L tensors `[B, Q, C + 1]`; `[B, Q, C]` where queries are in groups
    mask_logits: list[Layer]  # L tensors `[B, Q, h, w]`, or factors of them; these share their features but in groups
    masks: list[Tensor]  # B tensors bool `[T, H, W]`
    labels: list[Tensor]  # B tensors int64 `[T]`
    # L tensors `[B, Q, 4]`, center and size as fractions of the image; none without groups
    boxes: list[Tensor] = field(default_factory=list)
    target_boxes: list[Tensor] = field(default_factory=list)  # B tensors `[T, 4]`

    @property
    def leaves(self) -> list[Tensor]:
        """What the masks are made of, and a gradient flows to: the logits, or embeddings and then the features."""
        dense = [layer for layer in self.mask_logits if isinstance(layer, Tensor)]
        factors = [layer for layer in self.mask_logits if isinstance(layer, MaskFactors)]
        features = {id(layer.features): layer.features for layer in factors}
        return [*dense, *(layer.embeddings for layer in factors), *features.values()]

    @property
    def logits(self) -> list[Tensor]:
        """All that a gradient flows to."""
        return [*self.class_logits, *self.boxes, *self.leaves]

    def dense(self) -> list[Tensor]:
        """Form the mask logits of all layers: where there is a head, this product is a part of the step."""
        return [layer.dense() if isinstance(layer, MaskFactors) else layer for layer in self.mask_logits]

    def drop_gradients(self) -> None:
        """Set every gradient to None, as an optimizer does before a step."""
        for logits in self.logits:
            logits.grad = None

    def digest(self) -> str:
        """Return a fingerprint of every value: processes that agree on it have the same inputs."""
        seen = hashlib.sha256()
        for tensor in (*self.logits, *self.masks, *self.labels, *self.target_boxes):
            seen.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return seen.hexdigest()[:16]


def make_inputs(case: Case, *, seed: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw the inputs of a case.

    Targets are smooth closed shapes whose sizes are spread evenly on a logarithmic scale. In every layer, each target
    has a query that predicts it, better in later layers; the other queries predict background, or a target that
    another query has already.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = [_draw_masks(case, generator) for _ in range(case.batch)]
    labels = [torch.randint(case.classes, (case.targets,), generator=generator) for _ in range(case.batch)]
    owners = [_draw_owners(case, generator) for _ in range(case.batch)]
    boxes: list[list[Tensor]] = [[], []]
    if case.groups > 1:
        wanted = [_boxes_of(each) for each in masks]
        drawn = [_draw_boxes(case, wanted, owners, layer, generator) for layer in range(case.layers)]
        boxes = [[each.to(device, dtype).requires_grad_() for each in drawn], [each.to(device) for each in wanted]]
    if case.channels:
        factors = _draw_factors(case, masks, owners, generator, dtype, device)
        classes = [_draw_classes(case, labels, owners, layer, generator) for layer in range(case.layers)]
        leaves = [each.to(device, dtype).requires_grad_() for each in classes]
        return Inputs(leaves, factors, *_moved(masks, labels, device), *boxes)
    known = torch.stack([_known(case, *pair) for pair in zip(masks, owners, strict=True)])
    class_logits: list[Tensor] = []
    logits: list[Layer] = []
    for layer in range(case.layers):
        noisy = _noise(case, generator).add_(known, alpha=(layer + 1) / case.layers)
        logits.append(noisy.to(device, dtype).requires_grad_())
        scores = _draw_classes(case, labels, owners, layer, generator)
        class_logits.append(scores.to(device, dtype).requires_grad_())
    return Inputs(class_logits, logits, *_moved(masks, labels, device), *boxes)


def _moved(masks: list[Tensor], labels: list[Tensor], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    return [each.to(device) for each in masks], [each.to(device) for each in labels]


def _draw_classes(
    case: Case, labels: list[Tensor], owners: list[Tensor], layer: int, generator: torch.Generator
) -> Tensor:
    classes = torch.randn(case.batch, case.queries, case.classes + 1, generator=generator)
    for image, owner in enumerate(owners):
        wanted = torch.cat([labels[image], torch.tensor([case.classes])])[owner]
        classes[image, torch.arange(case.queries), wanted] += 3 * (layer + 1) / case.layers
    # Sigmoids have no class "no object", and are low where there is none.
    return classes[..., :-1] - 3 if case.groups > 1 else classes


def _boxes_of(masks: Tensor) -> Tensor:
    """Return the boxes around masks, `[T, 4]`: center and size as fractions of the image."""
    height, width = masks.shape[1:]
    spans = []
    for part, size in ((masks.any(1), width), (masks.any(2), height)):
        first = part.float().argmax(1)
        last = size - part.flip(1).float().argmax(1)
        spans.append(((first + last) / (2 * size), (last - first) / size))
    (x, w), (y, h) = spans
    return torch.stack([x, y, w, h], 1)


def _draw_boxes(
    case: Case, wanted: list[Tensor], owners: list[Tensor], layer: int, generator: torch.Generator
) -> Tensor:
    """Draw boxes near those of the queries' targets, nearer in later layers, and anywhere for queries without one."""
    boxes = 0.1 + 0.3 * torch.rand(case.batch, case.queries, 4, generator=generator)
    boxes[..., :2] *= 2
    for image, owner in enumerate(owners):
        near = torch.cat([wanted[image], wanted[image].new_zeros(1, 4)])[owner]
        # Never the very box: a loss that is 0 but for rounding says nothing about who computes it right.
        share = (owner < case.targets).float()[:, None] * 0.95 * (layer + 1) / case.layers
        boxes[image].lerp_(near, share)
    return boxes


def _draw_factors(
    case: Case,
    masks: list[Tensor],
    owners: list[Tensor],
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Layer]:
    """Draw embeddings and features whose products look like the logits of the other presets.

    The first channels are what perfect predictions of the targets and of nothing look like; the embedding of a query
    picks its target's. The others are noise, smooth and of each pixel, which every embedding mixes anew.
    """
    everyone = torch.arange(case.targets + 1)
    known = torch.stack([_known(case, each, everyone) for each in masks])
    layers: list[Layer] = []
    for layer in range(case.layers):
        if case.groups > 1 or not layers:
            noise = _noise(replace(case, queries=case.channels - case.targets - 1), generator)
            features = torch.cat([known, noise], 1).to(device, dtype).requires_grad_()
        picked = torch.nn.functional.one_hot(torch.stack(owners), case.targets + 1) * (layer + 1) / case.layers
        mixed = torch.randn(case.batch, case.queries, noise.shape[1], generator=generator) / noise.shape[1] ** 0.5
        embeddings = torch.cat([picked.float(), mixed], 2).to(device, dtype).requires_grad_()
        layers.append(MaskFactors(embeddings, features))
    return layers


def _draw_masks(case: Case, generator: torch.Generator) -> Tensor:
    masks = torch.zeros(case.targets, *case.target_shape, dtype=torch.bool)
    for mask in masks:
        u = torch.rand(8, generator=generator).tolist()
        if not case.unit:
            _draw_blob(mask, case.extent, u)
            continue
        # Through the slices of a volume a blob grows and shrinks. In a clip it moves, and is away now and then.
        middle, away = (torch.rand(count, generator=generator) for count in (1, case.frames))
        reach = 0.6 * case.extent[0] * (case.extent[1] / case.extent[0]) ** u[0]
        for number, frame in enumerate(mask):
            if case.unit == "volume":
                scale = 1 - (((number + 0.5) / case.frames - float(middle)) / reach) ** 2
                if scale > 0:
                    _draw_blob(frame, case.extent, u, math.sqrt(scale))
            elif away[number] > 0.2:
                moved = [where + 0.02 * number * (turn - 0.5) for where, turn in zip(u[2:4], u[4:6], strict=True)]
                _draw_blob(frame, case.extent, [*u[:2], *moved, *u[4:]])
    return masks


def _draw_blob(mask: Tensor, extent: tuple[float, float], u: list[float], scale: float = 1.0) -> None:
    """Draw an ellipse with a wavy edge, whose centre lies in the image, from eight numbers in [0, 1)."""
    height, width = mask.shape
    side = scale * math.sqrt(height * width) * extent[0] * (extent[1] / extent[0]) ** u[0]
    stretch = math.exp(u[1] - 0.5)
    radii = [max(side * factor / math.sqrt(math.pi), 1.0) for factor in (stretch, 1 / stretch)]
    centre = [u[2] * height, u[3] * width]
    spans = [
        slice(max(int(middle - 1.5 * radius), 0), min(int(middle + 1.5 * radius) + 2, size))
        for middle, radius, size in zip(centre, radii, (height, width), strict=True)
    ]
    y, x = (
        (torch.arange(span.start, span.stop) + 0.5 - middle) / radius
        for span, middle, radius in zip(spans, centre, radii, strict=True)
    )
    angle = torch.atan2(y[:, None], x[None])
    edge = 1 + 0.2 * u[4] * torch.cos(2 * angle + 6.3 * u[5]) + 0.2 * u[6] * torch.cos(3 * angle + 6.3 * u[7])
    mask[spans[0], spans[1]] = torch.hypot(y[:, None], x[None]) <= edge


def _draw_owners(case: Case, generator: torch.Generator) -> Tensor:
    """Give every query its target; T stands for none. In each group the first T of a random order have one each."""
    if case.groups > 1:
        one = replace(case, queries=case.queries // case.groups, groups=1)
        return torch.cat([_draw_owners(one, generator) for _ in range(case.groups)])
    order = torch.randperm(case.queries, generator=generator)
    spare = torch.randint(2 * case.targets, (case.queries,), generator=generator).clamp(max=case.targets)
    first = torch.arange(case.queries)
    owner = torch.empty(case.queries, dtype=torch.int64)
    owner[order] = torch.where(first < case.targets, first, spare)
    return owner


def _known(case: Case, masks: Tensor, owner: Tensor) -> Tensor:
    """Return what a perfect prediction of each query's target looks like, `[Q, h, w]`: from -6 to 6."""
    shares = torch.zeros(case.targets + 1, *case.logit_shape)
    for share, mask in zip(shares, masks, strict=False):
        planes = mask.view(-1, *case.target_size).float()
        share.copy_(adaptive_avg_pool2d(planes, case.logit_size).view(share.shape))
    return shares.mul_(12).sub_(6)[owner]


def _noise(case: Case, generator: torch.Generator) -> Tensor:
    """Draw errors of predictions: smooth ones, and a little of its own for each pixel."""
    shape = case.logit_shape
    smooth = torch.randn(case.batch, case.queries, *(max(size // 16, 2) for size in shape), generator=generator)
    noise = torch.randn(case.batch, case.queries, *shape, generator=generator).mul_(0.25)
    return noise.add_(interpolate(smooth, shape, mode="trilinear" if case.unit else "bilinear"), alpha=2.0)
