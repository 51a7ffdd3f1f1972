"""From the logits of a query model to instances: their scores, classes and masks at the size of the image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from maskloss import _inputs
from maskloss._numbers import check_integer, check_number
from maskloss._tracing import outside
from maskloss.errors import Cause, check_device, check_layout, describe, reported, require
from maskloss.factors import MaskFactors
from maskloss.layers import Layer
from maskloss.targets import MaskTargets
from maskloss.targets.bits import pack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]
    # Top and left of a mask's box, and the mask within it.
    Crop = tuple[int, int, Mask]

CLASSIFICATIONS, CLASSES, OVERLAPS = ("softmax", "focal"), ("best", "all"), ("keep", "resolve")
# Where overlaps are resolved, an instance goes if better ones cover more than 1 - this share of it.
VISIBLE = 0.5
# Pixels of masks that are enlarged at once, unless a single mask has more.
_AT_ONCE = 1 << 23


@dataclass(frozen=True, eq=False, repr=False)
class FoundInstances:
    """What a model found in one image, best first.

    Attributes:
        scores: `[K]`, falling, in [0, 1].
        labels: int64 `[K]`, the classes.
        queries: int64 `[K]`, the query that each instance comes from.
        masks: K packed masks of one image, in the form of targets: with `labels` they can be trained on.
        size: height and width of the image.
    """

    scores: Tensor
    labels: Tensor
    queries: Tensor
    masks: MaskTargets
    size: tuple[int, int]

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.scores)

    def dense(self) -> Tensor:
        """Unpack the masks: bool `[K, H, W]`."""
        return self.masks.dense()

    def to(self, device: torch.device | str | int) -> FoundInstances:
        """Move to a device."""
        masks = self.masks.to(device)
        scores, labels, queries = (each.to(masks.device) for each in (self.scores, self.labels, self.queries))
        return replace(self, scores=scores, labels=labels, queries=queries, masks=masks)

    def select(self, keep: Sequence[int] | Tensor) -> FoundInstances:
        """Keep some of the instances, by a bool tensor `[K]` or by their numbers."""
        chosen = torch.as_tensor(keep, device=self.scores.device)
        chosen = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen.long()
        scores, labels, queries = (each[chosen] for each in (self.scores, self.labels, self.queries))
        return replace(self, scores=scores, labels=labels, queries=queries, masks=self.masks.select([chosen]))

    def crops(self) -> list[Crop]:
        """Cut each mask to its box: top, left, and the mask within the box, a bool array."""
        return [tight(mask.numpy(), top, left) for mask, top, left in self.masks.to("cpu").crops()]

    def boxes(self) -> Tensor:
        """Return left, top, right and bottom of each mask, int64 `[K, 4]`, in pixels; right and bottom lie outside."""
        found = [(left, top, left + mask.shape[1], top + mask.shape[0]) for top, left, mask in self.crops()]
        return torch.tensor(found, dtype=torch.int64, device=self.scores.device).reshape(-1, 4)

    def label_map(self) -> Tensor:
        """Number the pixels: int32 `[H, W]`, 1 + the place of their instance, 0 for the background.

        Where instances overlap, the best one wins. One of which less than half is then left is not shown.
        """
        numbered, numbers = number_pixels(self.size, self.crops())
        places = np.zeros(max(numbers, default=0) + 1, dtype=np.int32)
        for place, number in enumerate(numbers, start=1):
            places[number] = place if number else 0
        return torch.from_numpy(places[numbered]).to(self.scores.device)

    def rle(self) -> list[dict[str, Any]]:
        """Return the run lengths of each mask as COCO writes them: {"size": [H, W], "counts": "..."}.

        Raises:
            MissingExtraError: pycocotools is not installed (extra `coco`).
        """
        return [run_lengths(mask.numpy()) for mask in self.dense().cpu()]

    def __repr__(self) -> str:
        best = f", best score {float(self.scores.max()):.3f}" if len(self) else ""
        return f"FoundInstances({len(self)} in {self.size[0]} x {self.size[1]} pixels{best})"


@reported("find_instances")
@outside
@torch.no_grad()
def find_instances(
    class_logits: Tensor,
    mask_logits: Layer,
    *,
    size: Any = None,
    canvas: Any = None,
    threshold: float = 0.5,
    max_instances: int = 100,
    classification: str = "softmax",
    classes: str = "best",
    mask_quality: bool = True,
    overlaps: str = "keep",
) -> list[FoundInstances]:
    """Turn the logits of a query model into instances, image by image.

    Of query q with class logits `c` and mask logits `m`:

        p       = softmax(c)[:-1]                            # "focal": sigmoid(c)
        z       = interpolate(m, canvas, mode="bilinear")[:H, :W]
        mask    = z > 0
        quality = sigmoid(z)[mask].mean()
        label, score = p.argmax(), p.max() * quality

    Only the `max_instances` queries with the highest `p` are looked at. An empty mask is no instance.

    Args:
        class_logits: `[B, Q, C + 1]`, "no object" last; `[B, Q, C]` with the classification "focal". Of the final
            layer.
        mask_logits: `[B, Q, h, w]`, or `MaskFactors`, of which only the masks that are looked at are formed.
        size: (height, width) of the images, or one such pair for each. Default: that of the mask logits.
        canvas: (height, width) of what the logits cover, in pixels of the images, or one such pair for each: more than
            the image where it was padded on the right and at the bottom. Default: the image fills it.
        threshold: the least score that is kept, in [0, 1]. Average precision needs low scores too: 0.
        max_instances: the most of an image.
        classification: "softmax" (default) or "focal", as in `MaskCriterion`.
        classes: "best" (default): an instance is a query, with its best class. "all": an instance is a pair of a query
            and a class, so that a query can occur several times, as COCO's scores of Mask2Former are computed.
        mask_quality: whether the mean probability inside the mask is part of the score. Default True.
        overlaps: "keep" (default), or "resolve": a pixel of several masks goes to the best of them, and an instance of
            which less than half is left is dropped.

    Returns:
        One `FoundInstances` for each image, on the device of the logits. No gradient flows. On a device this waits
        for it.

    Raises:
        MaskLossError: shapes that do not pair up, logits that are not finite, a canvas smaller than its image, or an
            option that is none.

    Source:
        `instance_inference` of Mask2Former (Cheng et al., 2022), which takes "all" classes.

    Example:
        >>> class_logits = torch.tensor([[[4.0, 0.0, 0.0], [0.0, 0.0, 4.0]]])  # a "0", and "no object"
        >>> mask_logits = torch.full((1, 2, 4, 4), -8.0)
        >>> mask_logits[0, :, :2, :2] = 8.0
        >>> [found] = find_instances(class_logits, mask_logits, size=(8, 8))
        >>> found
        FoundInstances(1 in 8 x 8 pixels, best score 0.942)
        >>> found.labels.tolist(), found.boxes().tolist(), int(found.dense().sum())
        ([0], [[0, 0, 4, 4]], 16)
    """
    options = (
        ("classification", classification, CLASSIFICATIONS),
        ("classes", classes, CLASSES),
        ("overlaps", overlaps, OVERLAPS),
    )
    for name, value, choices in options:
        _inputs.check_choice(name, value, choices)
    check_number("threshold", threshold, 0, 1, hint="0 keeps all, 0.5 is the default")
    max_instances = check_integer("max_instances", max_instances, 1, hint="100 is the default")
    _check_logits(class_logits, mask_logits, classification)
    batch = len(class_logits)
    sizes = _sizes("size", size, batch, [(int(mask_logits.shape[2]), int(mask_logits.shape[3]))] * batch)
    canvases = _sizes("canvas", canvas, batch, sizes)
    for one, frame in zip(sizes, canvases, strict=True):
        if frame[0] < one[0] or frame[1] < one[1]:
            raise Cause("canvas must hold the image", f"it is {list(frame)}, the image {list(one)}", "leave it out")
    logits = _inputs.accumulated(class_logits)
    probability = logits.softmax(-1)[..., :-1] if classification == "softmax" else logits.sigmoid()
    found = []
    for image in range(batch):
        best, queries, labels = _candidates(probability[image], classes, max_instances, threshold)
        # A query that occurs several times has one mask.
        own, place = queries.unique(return_inverse=True)
        packed, quality, areas = _masks(mask_logits, image, own, sizes[image], canvases[image])
        scores = best * quality[place] if mask_quality else best
        kept = ((areas[place] > 0) & (scores >= threshold)).nonzero().flatten()
        kept = kept[scores[kept].argsort(descending=True, stable=True)]
        each = _packed(scores[kept], labels[kept], queries[kept], packed[place[kept]], sizes[image])
        found.append(each if overlaps == "keep" else _resolved(each))
    return found


def number_pixels(size: tuple[int, int], crops: Iterable[Crop]) -> tuple[NDArray[np.int32], list[int]]:
    """Number the pixels of an image by instance, 0 for the background; where instances overlap, the first one wins.

    Args:
        size: height and width of the image.
        crops: top, left and mask of each instance, best first.

    Returns:
        The map, int32 `[H, W]`, and the number of each instance, counted from 1; 0 for one of which less than the share
        `VISIBLE` is left, which is not shown.
    """
    out, numbers, count = np.zeros(size, dtype=np.int32), [], 0
    for top, left, mask in crops:
        there = out[top : top + mask.shape[0], left : left + mask.shape[1]]
        free = mask & (there == 0)
        shown = bool(free.any()) and free.sum() >= VISIBLE * mask.sum()
        if shown:
            count += 1
            there[free] = count
        numbers.append(count if shown else 0)
    return out, numbers


def tight(mask: Mask, top: int = 0, left: int = 0) -> Crop:
    """Cut a mask that is not empty to its box; `top` and `left` are where it lies in a larger image."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    first, start = int(rows[0]), int(columns[0])
    inside = mask[first : int(rows[-1]) + 1, start : int(columns[-1]) + 1].copy()
    return top + first, left + start, inside


def run_lengths(mask: Mask) -> dict[str, Any]:
    """Return the run lengths of a mask `[H, W]` as COCO writes them to a file."""
    run = require("pycocotools.mask", "coco").encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in run["size"]], "counts": run["counts"].decode("ascii")}


def _check_logits(class_logits: Tensor, mask_logits: Layer, classification: str) -> None:
    no_object = classification == "softmax"
    shape = "[B, Q, C + 1]" if no_object else "[B, Q, C]"
    if not isinstance(mask_logits, MaskFactors):
        check_layout("mask_logits", mask_logits)
        _inputs.check_maps("mask_logits", mask_logits, "[B, Q, h, w]")
    check_layout("class_logits", class_logits)
    fits = isinstance(class_logits, Tensor) and class_logits.ndim == 3 and class_logits.is_floating_point()
    if not fits or class_logits.shape[:2] != mask_logits.shape[:2] or class_logits.shape[2] < 1 + no_object:
        raise Cause(
            f"class_logits must be float {shape} with B and Q of the mask logits",
            f"got {describe(class_logits)}, B and Q are {list(mask_logits.shape[:2])}",
            'the last class is "no object"' if no_object else 'there is no "no object" among the classes',
        )
    check_device("class_logits", class_logits.device, mask_logits.device)
    _check_finite("class_logits", class_logits)


def _check_finite(name: str, logits: Tensor) -> None:
    if not bool(logits.isfinite().all()):
        raise Cause(f"{name} must be finite", "they hold nan or infinite values", "the model has diverged")


def _sizes(name: str, given: Any, batch: int, default: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return a size for each image, from one pair or from one for each."""
    if given is None:
        return default
    try:
        listed = given.tolist() if isinstance(given, (Tensor, np.ndarray)) else list(given)
        pairs = [tuple(pair) for pair in ([listed] * batch if np.ndim(listed[0]) == 0 else listed)] if listed else []
    except (TypeError, ValueError):
        pairs = [()]
    if len(pairs) != batch or any(len(pair) != 2 for pair in pairs):
        cause = f"got {describe(given)} for {batch} images"
        raise Cause(f"{name} must be (height, width), or one pair for each image", cause, f"{name}=(480, 640)")
    hint = "in pixels"
    return [(check_integer(name, high, 1, hint=hint), check_integer(name, wide, 1, hint=hint)) for high, wide in pairs]


def _candidates(probability: Tensor, classes: str, most: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return probability, query and label of what is looked at in an image, the most probable first."""
    if classes == "best":
        best, labels = probability.max(-1)
        queries = torch.arange(len(best), device=best.device)
    else:
        count = probability.shape[1]
        best = probability.flatten()
        places = torch.arange(len(best), device=best.device)
        queries, labels = places // count, places % count
    order = best.argsort(descending=True, stable=True)[:most]
    # No score is above its probability.
    order = order[best[order] >= threshold]
    return best[order], queries[order], labels[order]


def _masks(
    mask_logits: Layer, image: int, queries: Tensor, size: tuple[int, int], canvas: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Form the masks of some queries: their bits `[K, H, ceil(W / 8)]`, their quality and their area, `[K]`."""
    height, width = size
    factors = mask_logits.operands() if isinstance(mask_logits, MaskFactors) else None
    at_once = max(1, _AT_ONCE // (canvas[0] * canvas[1]))
    bits = [torch.zeros(0, height, (width + 7) // 8, dtype=torch.uint8, device=mask_logits.device)]
    quality = [torch.zeros(0, device=mask_logits.device)]
    areas = [torch.zeros(0, dtype=torch.int64, device=mask_logits.device)]
    for chosen in queries.split(at_once) if len(queries) else ():
        if factors is None:
            logits = mask_logits[image, chosen]  # type: ignore[index]
        else:
            embeddings, features, bias = factors
            logits = torch.einsum("qd,dhw->qhw", embeddings[image, chosen], features[image])
            logits = logits if bias is None else logits + bias[image, chosen][:, None, None]
        logits = _inputs.accumulated(logits)
        _check_finite("mask_logits", logits)
        sharp = interpolate(logits[None], canvas, mode="bilinear")[0, :, :height, :width]
        masks = sharp > 0
        area = masks.flatten(1).sum(1)
        bits.append(pack(masks))
        quality.append((sharp.sigmoid() * masks).flatten(1).sum(1) / area.clamp(min=1))
        areas.append(area)
    return torch.cat(bits), torch.cat(quality), torch.cat(areas)


def _resolved(found: FoundInstances) -> FoundInstances:
    """Give each pixel to the best of its instances, and drop those of which little is left."""
    numbered, numbers = number_pixels(found.size, found.crops())
    kept = [place for place, number in enumerate(numbers) if number]
    labels = torch.from_numpy(numbered)
    bits = [pack((labels == number)[None]) for number in range(1, len(kept) + 1)]
    packed = torch.cat([torch.zeros(0, found.size[0], (found.size[1] + 7) // 8, dtype=torch.uint8), *bits])
    left = found.select(kept)
    return _packed(left.scores, left.labels, left.queries, packed.to(left.scores.device), found.size)


def _packed(scores: Tensor, labels: Tensor, queries: Tensor, packed: Tensor, size: tuple[int, int]) -> FoundInstances:
    return FoundInstances(scores, labels, queries, MaskTargets.from_packed(packed, size[1]), size)
