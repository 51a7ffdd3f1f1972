"""The loss of matched instances on CUDA and ROCm tensors, and its gradient: the launches of its kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maskloss._abi import ENCODINGS, Draw, Gradients, Instances, Kept, Saved, Targets, Term

from .choose import choose, chosen_bits, row_bytes
from .launch import (
    BLOCK,
    OPTIONS,
    Sampling,
    Span,
    cdiv,
    empty,
    focal_options,
    geometry,
    make_sampling,
    on_device,
    runs,
    spans,
)
from .loss_kernels import NUM_SUMS, finish_losses, loss_terms
from .scatter import LossGradient, Scatter


def mask_loss(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy `[N]`, Dice `[N]`, and `Saved`: chosen candidates as bits, and soft targets at the points."""
    sampling = make_sampling(draw, targets.windows, term.padding, points)
    work = spans(instances.logits, instances.layer_sizes, row_bytes(sampling, instances.accumulation_dtype))
    ce, dice, kept = _forward(work, instances, sampling, targets, term, keep=False)
    return ce, dice, kept.chosen, kept.soft


def mask_loss_keeping(
    instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[Tensor, Tensor, Kept]:
    """As `mask_loss`, of instances with a plane each, and with the logits at the points to go backward without it."""
    sampling = make_sampling(draw, targets.windows, term.padding, points)
    work = _own_planes(instances).parts(row_bytes(sampling, instances.accumulation_dtype))
    return _forward(work, instances, sampling, targets, term, keep=True)


def _own_planes(instances: Instances) -> Span:
    """One launch for instances with a plane each, numbered by QUERY: all layers and images have the same planes."""
    return Span((instances.logits[0],), 0, 0, len(instances.rows), 0, 1)


def _forward(
    work: Sequence[Span], instances: Instances, sampling: Sampling, targets: Targets, term: Term, *, keep: bool
) -> tuple[Tensor, Tensor, Kept]:
    encoding, data, table, images, _, ignore = targets
    index, device, dtype = instances.rows.contiguous(), instances.rows.device, instances.accumulation_dtype
    num_points = sampling.num_points
    ce, dice = empty((len(index),), dtype, device), empty((len(index),), dtype, device)
    soft = empty((len(index), num_points if encoding == "values" else 0), dtype, device)
    chosen = chosen_bits(index, sampling)
    logits = empty((len(index), num_points if keep else 0), dtype, device)
    blocks, options = cdiv(num_points, BLOCK), focal_options(term.gamma, bounded=keep and term.gamma >= 0)
    sums = empty((len(index), blocks, NUM_SUMS.value), dtype, device)
    with on_device(index):
        for span in work:
            rows = span.rows
            choice = choose(span, index, sampling, chosen)
            loss_terms[(span.count * blocks,)](
                span.layers, span.first, index[rows], data, table, images,
                ignore if ignore.numel() else None, *sampling.source, sampling.given(span), *choice,
                soft[rows] if encoding == "values" else None, logits[rows] if keep else None, sums[rows],
                num_points, sampling.num_uncertain, blocks,
                *geometry(span.layers[0]), *sampling.strides,
                LAYERS=len(span.layers), ENCODING=ENCODINGS[encoding], NEAREST=term.nearest, BORDER=sampling.border,
                ALPHA=term.alpha, GAMMA=term.gamma, BLOCK=BLOCK, **options,
            )  # fmt: skip
        if len(index):
            finish_losses[(cdiv(len(index), 32),)](
                sums, ce, dice, len(index), blocks, BLOCK=32, **{**OPTIONS, "num_warps": 1}
            )
    return ce, dice, Kept(chosen, soft, logits)


def mask_loss_backward(
    grads: Gradients,
    saved: Saved,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """Dense gradients of the logits; an empty tensor for each layer that needs none."""
    logits, index, layer_sizes = instances
    sampling = make_sampling(draw, targets.windows, term.padding, points)
    index = index.contiguous()
    found = [empty((0,), layer.dtype, layer.device) for layer in logits]
    loss = LossGradient(Gradients(*(grad.contiguous() for grad in grads)), saved, targets, term)
    with on_device(index):
        for run in runs(logits, layer_sizes, needs_grad):
            work = Scatter(index, layer_sizes, run, sampling, False, loss)
            found[run.first : run.first + len(run.layers)] = work.gradients()
    return found


def plane_gradients(
    grads: Gradients,
    kept: Kept,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
) -> None:
    """Overwrite the planes of instances, which have one each, with their gradients; see `mask_loss_keeping`."""
    index, run = instances.rows.contiguous(), _own_planes(instances)
    sampling = make_sampling(draw, targets.windows, term.padding, points)
    loss = LossGradient(Gradients(*(grad.contiguous() for grad in grads)), kept, targets, term)
    with on_device(index):
        Scatter(index, [run.count], run, sampling, False, loss).overwrite(run.layers[0][0])
