# mypy: allow-untyped-defs
"""Cross-entropy, focal loss and Dice over blocks of points for the CPU kernels, and their derivatives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from maskloss._abi import SOFT, STANDARD

from .compile import helper

_F32 = np.float32
_I32 = np.int32
# exp(r) on |r| <= ln(2) / 2, relative error 2e-9; log1p(e) / e on [0, 1], relative error 5e-9.
_EXP = tuple(_F32(c) for c in (1.0, 1.0, 0.4999999, 0.1666642, 0.041668225, 0.008374816, 0.0013836836))
_LOG = tuple(
    _F32(c)
    for c in (
        1.0,
        -0.4999990165233612,
        0.3332996070384979,
        -0.2495412975549698,
        0.19675922393798828,
        -0.15305542945861816,
        0.10603570193052292,
        -0.056958697736263275,
        0.019851015880703926,
        -0.003243926214054227,
    )
)
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = _EXP
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8, _L9 = _LOG
_LOG2_E = _F32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = _F32(0.693359375), _F32(-2.12194440e-4)
_SMALLEST = _F32(-87.0)


def exp_negative(a: Any) -> Any:
    """exp(a) for a <= 0, accurate to a few units in the last place; NaN stays NaN."""
    raise NotImplementedError


@overload(exp_negative, jit_options={"forceinline": True, "error_model": "numpy", "fastmath": {"contract"}})
def _exp_negative(a: Any) -> Any:
    if a == types.float64:

        def library(a: Any) -> Any:
            return math.exp(a)

        return library

    def polynomial(a: Any) -> Any:
        # exp(a) = 2^k exp(r), written so that LLVM makes vectors of it, which it cannot with a call of the C library.
        a = max(a, _SMALLEST)
        k = _I32(a * _LOG2_E - _F32(0.5))
        r = (a - _F32(k) * _LN2_HIGH) - _F32(k) * _LN2_LOW
        e = _E3 + r * (_E4 + r * (_E5 + r * _E6))
        e = _E0 + r * (_E1 + r * (_E2 + r * e))
        return e * _I32(_I32(k + _I32(127)) << _I32(23)).view(np.float32)

    return polynomial


def log1p_unit(e: Any) -> Any:
    """log(1 + e) for e in [0, 1]."""
    raise NotImplementedError


@overload(log1p_unit, jit_options={"forceinline": True, "error_model": "numpy", "fastmath": {"contract"}})
def _log1p_unit(e: Any) -> Any:
    if e == types.float64:

        def library(e: Any) -> Any:
            return math.log1p(e)

        return library

    def polynomial(e: Any) -> Any:
        p = _L5 + e * (_L6 + e * (_L7 + e * (_L8 + e * _L9)))
        return e * (_L0 + e * (_L1 + e * (_L2 + e * (_L3 + e * (_L4 + e * p)))))

    return polynomial


@helper(forceinline=True, fastmath={"contract"})
def sigmoid_softplus(z):
    """s(z) and max(z, 0) + log1p(exp(-|z|)), both from exp(-|z|), so that neither overflows."""
    # A literal 1 would take the arithmetic to double precision.
    zero, one = type(z)(0), type(z)(1)
    e = exp_negative(-abs(z))
    return (one if z >= zero else e) / (one + e), (max(zero, z)) + log1p_unit(e)


@helper(fastmath={"contract", "reassoc", "nsz"})
def sum_losses(z, t, w, n, s):
    """The sums over a block that an instance's losses consist of: w bce, and those of `sum_areas`; s(z) at each point.

    bce(z, t) = max(z, 0) - z t + log1p(exp(-|z|))
    """
    zero = z.dtype.type(0)
    weight, ce, area, target, both = zero, zero, zero, zero, zero
    for i in range(n):
        share, softplus = sigmoid_softplus(z[i])
        s[i] = share
        weight += w[i]
        ce += w[i] * (softplus - z[i] * t[i])
        area += w[i] * share
        target += w[i] * t[i]
        both += w[i] * share * t[i]
    return ce, (weight, area, target, both)


@helper(fastmath={"contract", "reassoc", "nsz"})
def sum_areas(z, t, w, n, s):
    """The sums over a block that the gradient of Dice needs: w, w s, w t, w s t; and s(z) at each point."""
    zero, one = z.dtype.type(0), z.dtype.type(1)
    weight, area, target, both = zero, zero, zero, zero
    for i in range(n):
        e = exp_negative(-abs(z[i]))
        share = (one if z[i] >= zero else e) / (one + e)
        s[i] = share
        weight += w[i]
        area += w[i] * share
        target += w[i] * t[i]
        both += w[i] * share * t[i]
    return weight, area, target, both


@helper(fastmath={"contract", "reassoc", "nsz"})
def sum_other_areas(t, w, n, s, kind):
    """The last three sums of `sum_areas` for another kind of Dice: w s^2, w t^2, w s t, or w s, w t, w min(s, t)."""
    zero = s.dtype.type(0)
    area, target, both = zero, zero, zero
    if kind == SOFT:
        for i in range(n):
            area += w[i] * s[i] * s[i]
            target += w[i] * t[i] * t[i]
            both += w[i] * s[i] * t[i]
    else:
        for i in range(n):
            area += w[i] * s[i]
            target += w[i] * t[i]
            both += w[i] * min(s[i], t[i])
    return area, target, both


@helper(forceinline=True)
def power(base, exponent):
    """Base ** exponent, fast for the exponents in use."""
    if exponent == 2.0:
        return base * base
    if exponent == 1.0:
        return base
    return type(base)(base**exponent)


@helper(fastmath={"contract"})
def sum_focal(z, t, w, n, alpha, gamma):
    """The sum of w a_t (1 - p_t)^gamma bce over a block."""
    one = z.dtype.type(1)
    a, g = z.dtype.type(alpha), z.dtype.type(gamma)
    total = z.dtype.type(0)
    for i in range(n):
        s, softplus = sigmoid_softplus(z[i])
        miss = one - (s * t[i] + (one - s) * (one - t[i]))
        balance = one if alpha < 0 else a * t[i] + (one - a) * (one - t[i])
        total += w[i] * balance * power(miss, g) * (softplus - z[i] * t[i])
    return total


@helper(fastmath={"contract"})
def loss_gradients(z, t, w, s, n, by_ce, by_dice, area, both, target, kind):
    """Overwrite z with the gradient at each point, from s(z).

    by_ce w (s - t) + by_dice w s (1 - s) (num / den^2 - 2 t / den) + 0 z, with num = 2 both + 1 and
    den = area + target + 1. The last term lets a non-finite logit show in the gradient. For "soft" num is multiplied
    by 2 s; for "semimetric" t becomes 1 where s is smaller, 0 where it is larger, and 1/2 where they are equal.
    """
    one, zero = z.dtype.type(1), z.dtype.type(0)
    den = area + target + 1.0
    flat = z.dtype.type(by_dice * (2.0 * both + 1.0) / (den * den))
    slope = z.dtype.type(by_dice * 2.0 / den)
    ce = z.dtype.type(by_ce)
    if kind == STANDARD:
        for i in range(n):
            grad = ce * (s[i] - t[i]) + s[i] * (one - s[i]) * (flat - slope * t[i])
            z[i] = w[i] * grad + zero * z[i]
        return
    half = z.dtype.type(0.5)
    for i in range(n):
        if kind == SOFT:
            change = (s[i] + s[i]) * flat - slope * t[i]
        else:
            change = flat - slope * (half if s[i] == t[i] else one if s[i] < t[i] else zero)
        grad = ce * (s[i] - t[i]) + s[i] * (one - s[i]) * change
        z[i] = w[i] * grad + zero * z[i]


@helper(fastmath={"contract"})
def add_focal_gradients(z, t, w, n, by_ce, alpha, gamma, grad):
    """Add the gradient of the focal term.

    by_ce w a_t [(1 - p)^gamma (s - t) - gamma (1 - p)^(gamma - 1) (2 t - 1) s (1 - s) bce]
    """
    one, zero = z.dtype.type(1), z.dtype.type(0)
    a, g, ce = z.dtype.type(alpha), z.dtype.type(gamma), z.dtype.type(by_ce)
    for i in range(n):
        s, softplus = sigmoid_softplus(z[i])
        miss = one - (s * t[i] + (one - s) * (one - t[i]))
        balance = one if alpha < 0 else a * t[i] + (one - a) * (one - t[i])
        # miss^(gamma - 1) is infinite at a perfect prediction, where the loss that it multiplies is 0.
        steep = g * power(miss, g - one) if g > zero and miss > zero else zero
        change = steep * (t[i] + t[i] - one) * s * (one - s) * (softplus - z[i] * t[i])
        grad[i] += ce * w[i] * balance * (power(miss, g) * (s - t[i]) - change)
