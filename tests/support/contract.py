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
    Kept,
    Saved,
    Targets,
    Term,
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


def _check_term(term: Term) -> None:
    assert term.padding in PADDING_MODES
    assert term.target_mode in TARGET_MODES


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


def _kept_values(targets: Targets, draw: Draw) -> int:
    """Target values that are kept of an instance: those of soft masks only."""
    return draw.num_points if targets.encoding == "values" else 0


@shaped
def mask_loss(
    run: Run, instances: Instances, targets: Targets, draw: Draw, term: Term, points: Float[Tensor, "N P 2"] | None
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], UInt8[Tensor, "N choice"], Float[Tensor, "N kept"]]:
    _check_instances(instances)
    _check_targets(targets)
    _check_draw(draw)
    _check_term(term)
    result = run(instances, targets, draw, term, points)
    assert result[3].shape[1] == _kept_values(targets, draw)
    return result


@shaped
def mask_loss_backward(
    run: Run,
    grads: Gradients,
    saved: Saved,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Float[Tensor, "N P 2"] | None,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    _check_instances(instances)
    _check_targets(targets)
    _check_draw(draw)
    _check_term(term)
    for grad in grads:
        assert isinstance(grad, Float[Tensor, " N"])
    assert isinstance(saved.chosen, UInt8[Tensor, "N choice"])
    assert saved.soft.shape[1] == _kept_values(targets, draw)
    gradients = run(grads, saved, instances, targets, draw, term, points, needs_grad)
    _check_gradients(instances, gradients, needs_grad)
    return gradients


def mask_loss_ahead(
    run: Run,
    expected: Gradients,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    for grad in expected:
        assert isinstance(grad, Float[Tensor, " N"])
        assert len(grad) == len(instances.rows)
    gradients: list[Tensor] = []

    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ce, dice, chosen, soft, found = run(expected, *args, needs_grad)
        gradients.extend(found)
        return ce, dice, chosen, soft

    losses = mask_loss(forward, instances, targets, draw, term, points)
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
    run: Run, logits: Layers, num_targets: Sequence[int], targets: Targets, draw: Draw, term: Term
) -> tuple[Float[Tensor, "L B Q width"], Float[Tensor, "L B Q width"]]:
    _check_layers(logits)
    _check_targets(targets)
    _check_draw(draw)
    _check_term(term)
    ce, dice = run(logits, num_targets, targets, draw, term)
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


def mask_loss_keeping(
    run: Run, instances: Instances, targets: Targets, draw: Draw, term: Term, points: Tensor | None
) -> tuple[Tensor, Tensor, Kept]:
    _check_planes(instances)
    _check_targets(targets)
    _check_draw(draw)
    _check_term(term)
    ce, dice, kept = run(instances, targets, draw, term, points)
    count, dtype = len(instances.rows), instances.accumulation_dtype
    for terms in (ce, dice):
        assert terms.shape == (count,)
        assert terms.dtype == dtype
    assert kept.chosen.dtype == torch.uint8
    assert kept.soft.shape == (count, _kept_values(targets, draw))
    assert kept.logits.shape == (count, draw.num_points)
    assert kept.logits.dtype == dtype
    return ce, dice, kept


def plane_gradients(
    run: Run,
    grads: Gradients,
    kept: Kept,
    instances: Instances,
    targets: Targets,
    draw: Draw,
    term: Term,
    points: Tensor | None,
) -> None:
    _check_planes(instances)
    for each in (*grads, *kept):
        assert len(each) == len(instances.rows)
    assert kept.logits.shape == (len(instances.rows), draw.num_points)
    run(grads, kept, instances, targets, draw, term, points)


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
FOR_FACTORS = (mask_loss_keeping, plane_gradients, sample_features, row_costs)
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
