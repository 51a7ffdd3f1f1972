"""The shapes and dtypes of the operations, checked at run time on every call that a test makes, for every backend.

One signature per operation serves `reference.py`, `cpu.py` and `gpu.py`: they have functions of the same names and
arguments. A dimension's name means one size throughout a call.
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

Run = Callable[..., Any]
Layers = Sequence[Tensor]
shaped = jaxtyped(typechecker=beartype)


def _check_layers(logits: Layers) -> None:
    assert logits, "at least one decoder layer"
    for layer in logits:
        assert isinstance(layer, Float[Tensor, "B Q _ _"]), f"logits {list(layer.shape)} {layer.dtype}"


def _check_targets(targets: Sequence[Tensor], encoding: str) -> None:
    data, table, images, windows, ignore = targets
    assert encoding in {"bits", "labels", "values"}
    assert isinstance(data, Float[Tensor, " D"] if encoding == "values" else Shaped[Tensor, " D"])
    assert encoding != "bits" or data.dtype == torch.uint8
    assert isinstance(table, Int64[Tensor, "T 9"])
    assert isinstance(images, Int64[Tensor, "B 11"])
    assert isinstance(windows, Float32[Tensor, "B 4"])
    assert isinstance(ignore, UInt8[Tensor, " I"])


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
    run: Run,
    logits: Layers,
    index: Int64[Tensor, "N 4"],
    layer_sizes: Sequence[int],
    windows: Float32[Tensor, "B 4"],
    image_ids: Int64[Tensor, " B"],
    seed: Int64[Tensor, ""],
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    padding: str,
) -> Float32[Tensor, "N {num_points} 2"]:
    _check_layers(logits)
    assert len(layer_sizes) == len(logits)
    assert sum(layer_sizes) == len(index)
    sizes = (num_points, num_candidates, num_uncertain)
    return run(logits, index, layer_sizes, windows, image_ids, seed, *sizes, padding)


@shaped
def mask_loss(
    run: Run,
    logits: Layers,
    index: Int64[Tensor, "N 4"],
    layer_sizes: Sequence[int],
    targets: Sequence[Tensor],
    encoding: str,
    image_ids: Int64[Tensor, " B"],
    seed: Int64[Tensor, ""],
    points: Float[Tensor, "N {num_points} 2"] | None,
    num_points: int,
    num_candidates: int,
    num_uncertain: int,
    *options: Any,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], UInt8[Tensor, "N choice"], Shaped[Tensor, "N {num_points}"]]:
    _check_layers(logits)
    _check_targets(targets, encoding)
    assert len(layer_sizes) == len(logits)
    assert sum(layer_sizes) == len(index)
    sizes = (num_points, num_candidates, num_uncertain)
    return run(logits, index, layer_sizes, targets, encoding, image_ids, seed, points, *sizes, *options)


@shaped
def mask_loss_backward(
    run: Run,
    grad_ce: Float[Tensor, " N"],
    grad_dice: Float[Tensor, " N"],
    chosen: UInt8[Tensor, "N choice"],
    corners: Shaped[Tensor, "N P"],
    needs_grad: Sequence[bool],
    logits: Layers,
    index: Int64[Tensor, "N 4"],
    *inputs: Any,
) -> list[Tensor]:
    _check_layers(logits)
    gradients = run(grad_ce, grad_dice, chosen, corners, needs_grad, logits, index, *inputs)
    for layer, gradient, needed in zip(logits, gradients, needs_grad, strict=True):
        assert gradient.dtype == layer.dtype
        assert not needed or gradient.shape == layer.shape
    return gradients


@shaped
def match_cost(
    run: Run,
    logits: Layers,
    targets: Sequence[Tensor],
    encoding: str,
    num_targets: Sequence[int],
    image_ids: Int64[Tensor, " B"],
    seed: Int64[Tensor, ""],
    num_points: int,
    *options: Any,
) -> tuple[Float[Tensor, "L B Q width"], Float[Tensor, "L B Q width"]]:
    _check_layers(logits)
    _check_targets(targets, encoding)
    ce, dice = run(logits, targets, encoding, num_targets, image_ids, seed, num_points, *options)
    assert ce.shape[0] == len(logits)
    assert ce.shape[3] == max(num_targets, default=0)
    return ce, dice


OPERATIONS = (
    point_sample,
    point_sample_backward,
    uncertain_points,
    mask_loss,
    mask_loss_backward,
    match_cost,
)


@contextmanager
def checked(backend: ModuleType) -> Iterator[None]:
    """Check every call of a backend's operations until the end of the block."""
    originals = {operation.__name__: getattr(backend, operation.__name__) for operation in OPERATIONS}
    for operation in OPERATIONS:
        original = originals[operation.__name__]
        setattr(backend, operation.__name__, functools.wraps(original)(functools.partial(operation, original)))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(backend, name, original)
