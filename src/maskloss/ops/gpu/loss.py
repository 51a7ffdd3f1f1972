"""The loss of matched instances on CUDA and ROCm tensors, and its gradient: the launches of its kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maskloss._abi import ENCODINGS, Gradients, Instances, Job, Saved, Stack

from .choose import choose, row_bytes
from .launch import (
    BLOCK,
    OPTIONS,
    Span,
    cdiv,
    empty,
    focal_options,
    geometry,
    on_device,
    runs,
    sampling_of,
    slices,
    spans,
)
from .loss_kernels import NUM_SUMS, finish_losses, loss_terms
from .scatter import LossGradient, Scatter


def mask_loss(
    instances: Instances, job: Job, stack: Stack | None = None, *, keep: bool = False
) -> tuple[Tensor, Tensor, Saved]:
    """Cross-entropy `[N]`, Dice `[N]`, and what the backward pass needs.

    `keep`: of instances with a plane each, and so that the backward pass needs no planes. `stack` is how volumes, and
    clips as a whole, are read.
    """
    sampling, (encoding, data, table, images, _, ignore), term = sampling_of(job, stack), job.targets, job.term
    index, device, dtype = instances.rows.contiguous(), instances.rows.device, instances.accumulation_dtype
    size = row_bytes(sampling, dtype)
    work = _own_planes(instances).parts(size) if keep else spans(instances.logits, instances.layer_sizes, size)
    ce, dice, saved = job.new_losses(len(index), dtype, device, keep=keep)
    chosen, soft, logits = saved
    num_points = sampling.num_points
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
                *geometry(span.layers[0]), *slices(span.layers[0]), *sampling.strides,
                LAYERS=len(span.layers), ENCODING=ENCODINGS[encoding], NEAREST=term.nearest, BORDER=sampling.border,
                LINEAR=sampling.linear, ALPHA=term.alpha, GAMMA=term.gamma, DICE=term.dice_kind, BLOCK=BLOCK, **options,
            )  # fmt: skip
        if len(index):
            finish_losses[(cdiv(len(index), 32),)](
                sums, ce, dice, len(index), blocks, BLOCK=32, **{**OPTIONS, "num_warps": 1}
            )
    return ce, dice, saved


def _own_planes(instances: Instances) -> Span:
    """One launch for instances with a plane each, numbered by QUERY: all layers and images have the same planes."""
    return Span((instances.logits[0],), 0, 0, len(instances.rows), 0, 1)


def mask_loss_backward(
    grads: Gradients,
    saved: Saved,
    instances: Instances,
    job: Job,
    needs_grad: Sequence[bool],
    stack: Stack | None = None,
) -> list[Tensor]:
    """Dense gradients of the logits; an empty tensor for each layer that needs none."""
    logits, index, layer_sizes = instances
    sampling, index = sampling_of(job, stack), index.contiguous()
    found = [empty((0,), layer.dtype, layer.device) for layer in logits]
    loss = LossGradient(Gradients(*(grad.contiguous() for grad in grads)), saved, job.targets, job.term)
    with on_device(index):
        for run in runs(logits, layer_sizes, needs_grad):
            work = Scatter(index, layer_sizes, run, sampling, False, loss)
            found[run.first : run.first + len(run.layers)] = work.gradients()
    return found


def plane_gradients(grads: Gradients, saved: Saved, instances: Instances, job: Job) -> None:
    """Overwrite the planes of instances, which have one each, with their gradients; see `mask_loss`."""
    index, run, sampling = instances.rows.contiguous(), _own_planes(instances), sampling_of(job)
    loss = LossGradient(Gradients(*(grad.contiguous() for grad in grads)), saved, job.targets, job.term)
    with on_device(index):
        Scatter(index, [run.count], run, sampling, False, loss).overwrite(run.layers[0][0])
