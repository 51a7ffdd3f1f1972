"""No worse than the reference: how the results of kernels are judged, on every device."""

from __future__ import annotations

from torch import Tensor


def assert_no_worse(found: Tensor, plain: Tensor, exact: Tensor, tolerance: float, *, everywhere: bool) -> None:
    """The error may not exceed the reference's own in that precision by more than a tolerance.

    Args:
        found: what a kernel computed.
        plain: what the reference computed in the same dtype.
        exact: what the reference computed in float64.
        tolerance: relative to the largest value.
        everywhere: whether errors are compared element by element; otherwise the largest ones are.
    """
    assert found.shape == plain.shape
    assert found.dtype == plain.dtype
    assert (found.isfinite() == plain.isfinite()).all()
    if not found.numel():
        return
    exact = exact.double()
    scale = float(exact.abs().nan_to_num(posinf=0, nan=0).max()) or 1.0
    ours, theirs = (value.double().sub(exact).abs().nan_to_num(nan=0.0) for value in (found, plain))
    if not everywhere:
        ours, theirs = ours.max(), theirs.max()
    assert bool((ours <= theirs + tolerance * scale).all()), (float(ours.max()), float(theirs.max()), scale)
