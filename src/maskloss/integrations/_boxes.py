"""Boxes (cx, cy, w, h), as DETR has them: what they add to the matching cost and to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class BoxTerms(NamedTuple):
    """Terms of pairs of boxes, `[...]`: the sum of absolute differences, 1 - GIoU, and the IoU."""

    l1: Tensor
    giou: Tensor
    iou: Tensor


def box_terms(boxes: Tensor, targets: Tensor) -> BoxTerms:
    """Compare boxes (cx, cy, w, h) `[..., 4]` with targets `[..., 4]` (the leading dimensions broadcast).

    Source:
        GIoU: Rezatofighi et al. (2019). Boxes without an area have IoU 0, and a negative width counts as 0: a crash
        in the matching would hide the non-finite loss that a gradient scaler looks for.
    """
    l1 = (boxes - targets).abs().sum(-1)
    (low, high), (low_t, high_t) = _corners(boxes), _corners(targets)
    overlap = (torch.minimum(high, high_t) - torch.maximum(low, low_t)).clamp(min=0).prod(-1)
    tiny = torch.finfo(boxes.dtype).tiny
    union = (boxes[..., 2:].clamp(min=0).prod(-1) + targets[..., 2:].prod(-1) - overlap).clamp(min=tiny)
    hull = (torch.maximum(high, high_t) - torch.minimum(low, low_t)).clamp(min=0).prod(-1).clamp(min=tiny)
    iou = overlap / union
    return BoxTerms(l1, 1 - iou + (hull - union) / hull, iou)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return center - half, center + half


@torch.no_grad()
def box_costs(boxes: Tensor, targets: Sequence[Tensor], l1_weight: float, giou_weight: float) -> Tensor:
    """Compute the boxes' part of the matching cost: `[..., B, Q, T_max]` from boxes `[..., B, Q, 4]`, targets `[T, 4]`.

        l1_weight * sum |box - target| - giou_weight * GIoU

    Columns beyond an image's targets are meaningless.
    """
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    padded = pad_sequence(list(targets), batch_first=True).to(boxes)
    terms = box_terms(boxes.unsqueeze(-2), padded.unsqueeze(-3))
    return l1_weight * terms.l1 + giou_weight * (terms.giou - 1)
