"""The classification of queries: one implementation of each kind, for every criterion.

In images that are annotated partly, a query without a target may lie on an object that nobody annotated. What it is
taught then is decided here: regions and classes that were not annotated teach less of "no object", or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from maskloss._abi import IGNORE_BASE, IGNORE_H, IGNORE_SIZE, IGNORE_STRIDE, IGNORE_W, IMAGE_H, IMAGE_W, Draw
from maskloss._inputs import accumulated
from maskloss._tracing import on_host, plain
from maskloss.errors import Cause, check_device, describe
from maskloss.factors import MaskFactors
from maskloss.layers import Layer, spread, with_masks
from maskloss.ops.reference import formulas
from maskloss.ops.reference.sampling import match_points, sample_planes
from maskloss.ops.reference.storage import ignored
from maskloss.options import CLASS_FOCAL_ALPHA, CLASS_FOCAL_GAMMA
from maskloss.step import IGNORED, Step
from maskloss.targets import bits

KINDS = ("softmax", "focal")


class Partial(NamedTuple):
    """What images that are annotated partly do not teach."""

    # `[L, B, Q]` in [0, 1], how much of each predicted mask lies in an unlabeled region; None: nothing
    shares: Tensor | None = None
    annotated: Tensor | None = None  # bool `[B, C]`, which classes were annotated in an image; None: all

    def taught(self, wanted: Tensor, no_object: int) -> Tensor | None:
        """Return how much each query is taught, `[L, B, Q]`: 1 for one with a target. None: all are taught fully."""
        if self.shares is None:
            return None
        return torch.where(wanted == no_object, 1 - self.shares, 1.0)


WHOLE = Partial()


def softmax_loss(
    class_logits: Tensor,
    wanted: Tensor,
    weights: Tensor,
    total_weight: float | Tensor | None = None,
    partial: Partial = WHOLE,
) -> Tensor:
    """Compute the weighted cross-entropy of all queries of each layer: `[L]`.

        sum_q weights[g_q] * -log softmax(class_logits)[q, g_q] / total_weight

    In an image with classes that were not annotated, a query without a target has `-log` of the sum of the
    probabilities of these classes and of "no object".

    Args:
        class_logits: `[L, B, Q, C + 1]`, float32 or float64; the last class is "no object".
        wanted: int64 `[L, B, Q]`, the class g_q of each query; the sums leave IGNORED ones out.
        weights: `[C + 1]`, the weight of each class.
        total_weight: the sum of the weights of all queries that the loss is averaged over. Default: of these queries.
            0 if there is nothing to divide.
        partial: what the images do not teach.

    Source:
        The sum of probabilities: Cermelli et al. (2020), "Modeling the background", equation 5.
    """
    weights, no_object = weights.to(class_logits), class_logits.shape[-1] - 1
    nll = cross_entropy(class_logits.flatten(0, 2), wanted.flatten(), weights, reduction="none")
    if partial.annotated is not None:
        others = class_logits.masked_fill(pad(partial.annotated, (0, 1))[:, None], -torch.inf)
        nothing = weights[-1] * (class_logits.logsumexp(-1) - others.logsumexp(-1))
        nll = torch.where(wanted == no_object, nothing, nll.view(wanted.shape))
    taught = partial.taught(wanted, no_object)
    nll = nll if taught is None else nll.view(wanted.shape) * taught
    total = weight_sums(wanted, weights, taught) if total_weight is None else total_weight
    # A total of 0 divides only zeros. By 1: the gradient of a division by less can overflow, and 0 times that is NaN.
    bound = torch.where(total > 0, total, 1.0) if isinstance(total, Tensor) else total or 1.0
    return nll.view(len(class_logits), -1).sum(1) / bound


def weight_sums(wanted: Tensor, weights: Tensor, taught: Tensor | None = None) -> Tensor:
    """Sum the weights `[C + 1]` of the classes of all queries of each layer, but for IGNORED ones: `[L]`."""
    found = pad(weights, (0, 1))[wanted.clamp(min=-1)]
    return (found if taught is None else found * taught).flatten(1).sum(1)


def focal_sums(
    class_logits: Tensor,
    wanted: Tensor,
    weights: Tensor | None = None,
    *,
    ignores: bool = False,
    partial: Partial = WHOLE,
) -> Tensor:
    """Sum the sigmoid focal loss of all queries and classes of each layer: `[L]`.

        sum_q sum_c weights[c] * a_t (1 - p_t)^2 bce(class_logits[q, c], [c = g_q]),  a = 0.25

    Classes that were not annotated in an image are left out, but for those of its targets.

    Args:
        class_logits: `[L, B, Q, C]`, float32 or float64; there is no "no object".
        wanted: int64 `[L, B, Q]`, the class g_q of each query, C for one without a target.
        weights: `[C]`, the weight of each class. Default: 1.
        ignores: whether `wanted` has IGNORED ones, which are left out.
        partial: what the images do not teach.
    """
    layers, batch, queries, classes = class_logits.shape
    one_hot = class_logits.new_zeros(layers, batch, queries, classes + 1)
    hot = one_hot.scatter_(3, (wanted.clamp(min=0) if ignores else wanted)[..., None], 1)[..., :-1]
    terms = formulas.focal(class_logits, hot, CLASS_FOCAL_ALPHA, CLASS_FOCAL_GAMMA)
    terms = terms if weights is None else terms * weights.to(terms)
    if partial.annotated is not None:
        terms = terms.masked_fill(~partial.annotated[:, None] & (hot == 0), 0)
    taught = partial.taught(wanted, classes)
    terms = terms if taught is None else terms * taught[..., None]
    return (terms.masked_fill((wanted == IGNORED)[..., None], 0) if ignores else terms).flatten(1).sum(1)


# -------------------------------------------------------------------------------------------- partly annotated images


def partial_of(
    step: Step, layers: Sequence[Layer | None], num_classes: int, num_points: int, layout: str, *, softmax: bool
) -> Partial:
    """Take what is said of images that are annotated partly; `num_points` and `layout` are those of the matching."""
    shares = classes = None
    if step.annotated.unlabeled is not None:
        if any(layer is not None and layer.ndim != 4 for layer in layers):
            raise Cause("unlabeled regions belong to images", "the logits are those of clips", "leave them out")
        if softmax and step.totals is not None:
            raise Cause("give totals or unlabeled, not both", "both were given", "shares depend on the predictions")
        shares = unlabeled_shares(layers, step, num_points, layout)
    if step.annotated.classes is not None:
        classes = annotated_classes(step.annotated.classes, len(step.targets), num_classes, step.device)
    return Partial(shares, classes)


def annotated_classes(given: Any, batch: int, num_classes: int, device: torch.device) -> Tensor:
    """Mark the classes that were annotated in each image, bool `[B, C]`, from their numbers; None: all of an image."""
    if not isinstance(given, Sequence) or len(given) != batch:
        raise Cause(
            "annotated_classes must have one entry for each image",
            f"got {describe(given)} for {batch} images",
            "list the numbers of the classes; None for an image in which all were annotated",
        )
    found = torch.zeros(batch, num_classes, dtype=torch.bool, device="cpu")
    for image, each in enumerate(given):
        numbers = plain(sorted(each) if isinstance(each, (set, frozenset)) else each)
        if numbers is None:
            found[image] = True
            continue
        fits = isinstance(numbers, Tensor) and numbers.ndim == 1 and on_host(numbers)
        fits = fits and (not len(numbers) or not (numbers.is_floating_point() or numbers.dtype == torch.bool))
        if not fits or (len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_classes):
            raise Cause(
                f"annotated_classes must be numbers of classes in [0, {num_classes}), on the CPU",
                f"those of image {image} are {describe(each)}",
                "None for an image in which all were annotated",
            )
        found[image, numbers.long()] = True
    return found.to(device, non_blocking=True)


@torch.no_grad()
def unlabeled_shares(layers: Sequence[Layer | None], step: Step, num_points: int, layout: str) -> Tensor:
    """Compute the share of each predicted mask that lies in the unlabeled region of its image: `[L, B, Q]`.

        sum over points of sigma(z) [inside] / sum over points of sigma(z)

    Args:
        layers: mask logits `[B, Q, h, w]`, or their factors, of each layer; None, without masks, has no share.
        step: the regions, bool `[H, W]` of each image or None, the targets, whose frames they lie in, and what decides
            the points.
        num_points: uniform points, those of the matching.
        layout: see `PointSampling`.
    """
    points = match_points(step.targets.windows, Draw(step.image_ids, step.seed, num_points, layout=layout))
    inside = ignored(points, *_regions(step))[:, None]
    numbers, given = with_masks(layers)
    found = []
    for layer in given:
        probability = _sampled(layer, points).sigmoid()
        tiny = torch.finfo(probability.dtype).tiny
        found.append((probability * inside).sum(-1) / probability.sum(-1).clamp(min=tiny))
    return spread(torch.stack(found), numbers, len(layers))


def _regions(step: Step) -> tuple[Tensor, Tensor]:
    """Pack the regions: `images` of the targets with these for ignore regions, and the packed bytes."""
    targets, given = step.targets, cast("Any", step.annotated.unlabeled)
    if isinstance(given, (Tensor, np.ndarray)) and given.ndim == 3:
        given = list(given)
    if not isinstance(given, Sequence) or len(given) != len(targets):
        raise Cause(
            "unlabeled must have one region for each image",
            f"got {describe(given)} for {len(targets)} images",
            "bool [H, W]; None for an image that is annotated everywhere",
        )
    packed, rows, base = [torch.empty(0, dtype=torch.uint8, device=targets.device)], [], 0
    frames = targets.images[:, [IMAGE_H, IMAGE_W]].tolist() if on_host(targets.images) else None
    unseen = [False] * len(targets)
    for image, each in enumerate(given):
        region = plain(each)
        if region is None:
            rows.append((0, 0, 0, 0, 0))
            continue
        if not isinstance(region, Tensor) or region.ndim != 2 or region.dtype not in (torch.bool, torch.uint8):
            raise Cause(
                "an unlabeled region must be bool [H, W], of the size of the masks",
                f"that of image {image} is {describe(each)}",
                "True where objects may be that nobody annotated",
            )
        check_device("unlabeled", region.device, targets.device)
        own = step.annotated.sizes[image] if step.annotated.sizes else None
        # On a device the tables are not looked at; what has a size lies on the canvas that the host knows.
        whole = (own and (step.annotated.canvas or own)) if frames is None else tuple(frames[image])
        if whole not in (None, (1, 1)) and tuple(region.shape) not in (own, whole):
            raise Cause(
                "an unlabeled region must be of the size of the masks, or of their canvas",
                f"that of image {image} is {describe(each)}, its masks or their canvas are {describe(whole)}",
                "resize it with the masks, and pad it to their canvas",
            )
        unseen[image] = whole is None
        packed.append(bits.pack(region != 0).flatten())
        rows.append((len(packed[-1]), base, (region.shape[1] + 7) // 8, *region.shape))
        base += len(packed[-1])
    images = targets.images.clone()
    moved = torch.tensor(rows, device="cpu").to(targets.device, non_blocking=True)
    for place, column in enumerate((IGNORE_SIZE, IGNORE_BASE, IGNORE_STRIDE, IGNORE_H, IGNORE_W)):
        images[:, column] = moved[:, place]  # a list of columns would be copied to the device, which waits
    # An image without masks has a frame of one pixel, in which a region cannot lie: there it has its own size.
    nowhere = (images[:, IMAGE_H] == 1) & (images[:, IMAGE_W] == 1)
    if any(unseen):
        fits = (images[:, IMAGE_H] == images[:, IGNORE_H]) & (images[:, IMAGE_W] == images[:, IGNORE_W])
        hidden = torch.tensor(unseen, device="cpu").to(targets.device, non_blocking=True)
        hint = "resize it with the masks, and pad it to their canvas"
        bits.check_unseen(fits | nowhere | ~hidden, "unlabeled regions must be of the size of the masks", hint)
    for column, size in ((IMAGE_H, IGNORE_H), (IMAGE_W, IGNORE_W)):
        images[:, column] = images[:, column].where(~nowhere, images[:, size].clamp(min=1))
    return images, torch.cat(packed)


def _sampled(layer: Layer, points: Tensor) -> Tensor:
    """Read the logits of all queries at points `[B, P, 2]`: `[B, Q, P]`; of factors their features are read."""
    if not isinstance(layer, MaskFactors):
        return sample_planes(layer, points[:, None], "bilinear", "zeros")
    embeddings, features, bias = layer.operands()
    z = accumulated(embeddings) @ sample_planes(features, points[:, None], "bilinear", "zeros")
    return z if bias is None else z + bias[..., None]
