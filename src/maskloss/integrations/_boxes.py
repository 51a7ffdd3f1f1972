"""Boxes (cx, cy, w, h), as DETR has them: what they add to the matching cost and to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maskloss import ops
from maskloss._tracing import active, on_host, watched


class BoxTerms(NamedTuple):
    """Terms of pairs of boxes, `[...]`: the sum of absolute differences, 1 - GIoU, and the IoU."""

    l1: Tensor
    giou: Tensor
    iou: Tensor


def box_terms(boxes: Tensor, targets: Tensor) -> BoxTerms:
    """Compare boxes (cx, cy, w, h) `[..., 4]` with targets of as many dimensions, which broadcast.

    Source:
        GIoU: Rezatofighi et al. (2019). Boxes without an area have IoU 0, and a negative width counts as 0: a crash
        in the matching would hide the non-finite loss that a gradient scaler looks for.
    """
    # A coordinate at a time: with the four of a box side by side, there would be nothing to vectorize.
    boxes, targets = boxes.movedim(-1, 0).contiguous(), targets.movedim(-1, 0).contiguous()
    l1 = (boxes - targets).abs_().sum(0)
    (low, high), (low_t, high_t) = _corners(boxes), _corners(targets)
    overlap = _area(torch.minimum(high, high_t).sub_(torch.maximum(low, low_t)))
    tiny = torch.finfo(boxes.dtype).tiny
    union = (_area(boxes[2:]) + _area(targets[2:]) - overlap).clamp_(min=tiny)
    hull = _area(torch.maximum(high, high_t).sub_(torch.minimum(low, low_t))).clamp_(min=tiny)
    iou = overlap / union
    return BoxTerms(l1, 1 - iou + (hull - union) / hull, iou)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    center, half = boxes[:2], boxes[2:] / 2
    return center - half, center + half


def _area(sizes: Tensor) -> Tensor:
    width, height = sizes.clamp(min=0).unbind()
    return width * height


@torch.no_grad()
def box_costs(boxes: Tensor, targets: Sequence[Tensor], l1_weight: float, giou_weight: float) -> Tensor:
    """Compute the boxes' part of the matching cost: `[..., B, Q, T_max]` from boxes `[..., B, Q, 4]`, targets `[T, 4]`.

        l1_weight * sum |box - target| - giou_weight * GIoU

    Columns beyond an image's targets are meaningless.
    """
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    padded = pad_sequence(list(targets), batch_first=True).to(boxes)
    if on_host(boxes) and type(boxes) is Tensor and ops.has_host_kernels() and not active() and not watched():
        return ops.box_costs(boxes, padded, l1_weight, giou_weight)
    padded = padded[(None,) * (boxes.ndim - padded.ndim)]
    terms = box_terms(boxes.unsqueeze(-2), padded.unsqueeze(-3))
    return (l1_weight * terms.l1).add_(terms.giou - 1, alpha=giou_weight)
