"""The shapes and dtypes of the operations, checked at run time on every call that a test makes, for every backend.

One signature per operation serves `reference`, `cpu` and `gpu`: they have functions of the same names and arguments. A
dimension's name means one size throughout a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Float, Float32, Int64, Shaped, UInt8, jaxtyped
from torch import Tensor

from maskloss._abi import (
    ENCODINGS,
    IMAGE_COLUMNS,
    INDEX_COLUMNS,
    PADDING_MODES,
    TABLE_COLUMNS,
    TARGET_MODES,
    WINDOW_COLUMNS,
    Draw,
    Gradients,
    Instances,
    Job,
    Saved,
    Targets,
    Term,
    num_bytes,
)

Run = Callable[..., Any]
Layers = Sequence[Tensor]
shaped = jaxtyped(typechecker=beartype)


def _check_layers(logits: Layers) -> None:
    assert logits, "at least one decoder layer"
    for layer in logits:
        assert isinstance(layer, Float[Tensor, "B Q _ _"]), f"logits {list(layer.shape)} {layer.dtype}"


def _check_instances(instances: Instances) -> None:
    _check_layers(instances.logits)
    assert isinstance(instances.rows, Int64[Tensor, f"N {INDEX_COLUMNS}"])
    assert len(instances.layer_sizes) == len(instances.logits)
    assert sum(instances.layer_sizes) == len(instances.rows)


def _check_targets(targets: Targets) -> None:
    encoding, data, table, images, windows, ignore = targets
    assert encoding in ENCODINGS
    assert isinstance(data, Float[Tensor, " D"] if encoding == "values" else Shaped[Tensor, " D"])
    assert encoding != "bits" or data.dtype == torch.uint8
    assert isinstance(table, Int64[Tensor, f"T {TABLE_COLUMNS}"])
    assert isinstance(images, Int64[Tensor, f"B {IMAGE_COLUMNS}"])
    assert isinstance(windows, Float32[Tensor, f"B {WINDOW_COLUMNS}"])
    assert isinstance(ignore, UInt8[Tensor, " I"])


def _check_draw(draw: Draw) -> None:
    assert isinstance(draw.image_ids, Int64[Tensor, " B"])
    assert isinstance(draw.seed, Int64[Tensor, ""])
    assert 0 <= draw.num_uncertain <= draw.num_candidates or draw.num_uncertain == 0


@shaped
def point_sample(
    run: Run,
    maps: Float[Tensor, "M h w"],
    index: Int64[Tensor, " N"],
    points: Float[Tensor, "N P 2"],
    mode: str,
    padding: str,
) -> Float[Tensor, "N P"]:
    return run(maps, index, points, mode, padding)


@shaped
def point_sample_backward(
    run: Run,
    grad: Float[Tensor, "N P"],
    maps: Float[Tensor, "M h w"],
    index: Int64[Tensor, " N"],
    points: Float[Tensor, "N P 2"],
    mode: str,
    padding: str,
) -> Float[Tensor, "M h w"]:
    return run(grad, maps, index, points, mode, padding)


@shaped
def uncertain_points(
    run: Run, instances: Instances, draw: Draw, windows: Float32[Tensor, "B 4"], padding: str
) -> Float32[Tensor, "N P 2"]:
    _check_instances(instances)
    _check_draw(draw)
    points = run(instances, draw, windows, padding)
    assert points.shape[:2] == (len(instances.rows), draw.num_points)
    return points


def _check_job(job: Job, count: int | None = None) -> None:
    _check_targets(job.targets)
    _check_draw(job.draw)
    assert job.term.padding in PADDING_MODES
    assert job.term.target_mode in TARGET_MODES
    if job.points is not None:
        assert isinstance(job.points, Float[Tensor, f"{count} P 2"])


def _check_saved(saved: Saved, instances: Instances, job: Job, *, keep: bool) -> None:
    count, num_points = len(instances.rows), job.draw.num_points
    assert saved.chosen.shape == (count, num_bytes(job.drawn.num_candidates))
    assert saved.chosen.dtype == torch.uint8
    assert saved.soft.shape == (count, num_points if job.targets.encoding == "values" else 0)
    assert saved.logits.shape == (count, num_points if keep else 0)
    assert saved.soft.dtype == saved.logits.dtype == instances.accumulation_dtype


@shaped
def _check_losses(_ce: Float[Tensor, " N"], _dice: Float[Tensor, " N"], _rows: Int64[Tensor, "N _"]) -> None:
    pass


def mask_loss(run: Run, instances: Instances, job: Job, *, keep: bool = False) -> tuple[Tensor, Tensor, Saved]:
    _check_planes(instances) if keep else _check_instances(instances)
    _check_job(job, len(instances.rows))
    ce, dice, saved = run(instances, job, keep=keep)
    _check_losses(ce, dice, instances.rows)
    assert ce.dtype == dice.dtype == instances.accumulation_dtype
    _check_saved(saved, instances, job, keep=keep)
    return ce, dice, saved


def mask_loss_backward(
    run: Run, grads: Gradients, saved: Saved, instances: Instances, job: Job, needs_grad: Sequence[bool]
) -> list[Tensor]:
    _check_instances(instances)
    _check_job(job, len(instances.rows))
    _check_losses(*grads, instances.rows)
    _check_saved(saved, instances, job, keep=False)
    gradients = run(grads, saved, instances, job, needs_grad)
    _check_gradients(instances, gradients, needs_grad)
    return gradients


def mask_loss_ahead(
    run: Run, expected: Gradients, instances: Instances, job: Job, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor, Saved, list[Tensor]]:
    _check_losses(*expected, instances.rows)
    gradients: list[Tensor] = []

    def forward(*args: Any, keep: bool) -> tuple[Tensor, Tensor, Saved]:
        assert not keep
        *losses, found = run(expected, *args, needs_grad)
        gradients.extend(found)
        return losses

    losses = mask_loss(forward, instances, job)
    _check_gradients(instances, gradients, needs_grad)
    return *losses, gradients


def mask_loss_settle(run: Run, ahead: Sequence[Tensor], expected: Gradients, *args: Any) -> None:
    def backward(*inputs: Any) -> list[Tensor]:
        assert run(ahead, expected, *inputs) is None
        return list(ahead)

    mask_loss_backward(backward, *args)


def _check_gradients(instances: Instances, gradients: Sequence[Tensor], needs_grad: Sequence[bool]) -> None:
    for layer, gradient, needed in zip(instances.logits, gradients, needs_grad, strict=True):
        assert gradient.dtype == layer.dtype
        assert not needed or gradient.shape == layer.shape


@shaped
def match_cost(
    run: Run, logits: Layers, num_targets: Sequence[int], job: Job
) -> tuple[Float[Tensor, "L B Q width"], Float[Tensor, "L B Q width"]]:
    _check_layers(logits)
    _check_job(job)
    assert job.points is None
    ce, dice = run(logits, num_targets, job)
    assert ce.shape[0] == len(logits)
    assert ce.shape[3] == max(num_targets, default=0)
    return ce, dice


def _check_planes(instances: Instances) -> None:
    """Instances have a plane each, the same memory for all layers and images."""
    _check_instances(instances)
    first = instances.logits[0]
    assert first.stride(0) == 0 or first.shape[0] == 1
    assert all(layer is first for layer in instances.logits)
    assert first.shape[1] == len(instances.rows)


def plane_gradients(run: Run, grads: Gradients, saved: Saved, instances: Instances, job: Job) -> None:
    _check_planes(instances)
    _check_job(job, len(instances.rows))
    _check_losses(*grads, instances.rows)
    _check_saved(saved, instances, job, keep=True)
    run(grads, saved, instances, job)


@shaped
def sample_features(run: Run, plan: Any, features: Float[Tensor, "B D h w"], term: Term) -> Float[Tensor, "B D P"]:
    return run(plan, features, term)


@shaped
def row_costs(
    run: Run, plan: Any, logits: Float[Tensor, "B R P"], term: Term
) -> tuple[Float[Tensor, "B R width"], Float[Tensor, "B R width"]]:
    return run(plan, logits, term)


OPERATIONS = (
    point_sample,
    point_sample_backward,
    uncertain_points,
    mask_loss,
    mask_loss_backward,
    match_cost,
)
# What backends with kernels do for masks as factors; the reference forms dense logits.
FOR_FACTORS = (plane_gradients, sample_features, row_costs)
# What a backend does that computes gradients ahead of the backward pass.
AHEAD = (mask_loss_ahead, mask_loss_settle)


@contextmanager
def checked(backend: ModuleType) -> Iterator[None]:
    """Check every call of a backend's operations until the end of the block."""
    operations = OPERATIONS + (FOR_FACTORS if hasattr(backend, "plane_gradients") else ())
    operations += AHEAD if hasattr(backend, "mask_loss_ahead") else ()
    originals = {operation.__name__: getattr(backend, operation.__name__) for operation in operations}
    for operation in operations:
        original = originals[operation.__name__]
        setattr(backend, operation.__name__, functools.wraps(original)(functools.partial(operation, original)))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(backend, name, original)
