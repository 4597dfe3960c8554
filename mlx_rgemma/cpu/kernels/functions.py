"""The scalar form of `fastmath`, and reductions of a row."""

from __future__ import annotations

import math

import numpy as np

from mlx_rgemma.cpu.fastmath import (
    BIAS,
    COEFFICIENTS,
    MANTISSA_BITS,
    MAX_EXPONENT,
    MIN_EXPONENT,
    ROUND_TO_INT,
    TANH_SATURATION,
)
from mlx_rgemma.cpu.kernels.compiler import kernel, reduction

f32, i32 = np.float32, np.int32
ZERO, ONE, TWO = f32(0), f32(1), f32(2)
LOG2_E = f32(1.0 / math.log(2.0))
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5 = (f32(c) for c in COEFFICIENTS)
_WHOLE, _LOW, _HIGH, _END = (
    f32(ROUND_TO_INT),
    f32(MIN_EXPONENT),
    f32(MAX_EXPONENT),
    f32(TANH_SATURATION),
)
_SHIFT, _ONE_BITS = i32(MANTISSA_BITS), i32(BIAS << MANTISSA_BITS)
_SLOPE, _CUBE = f32(2.0 * math.sqrt(2.0 / math.pi)), f32(0.044715)


@kernel
def exponent_and_fraction(x):
    """The nearest integer of x, as bits of an exponent, and ``2^(the rest) - 1``."""
    whole = x + _WHOLE
    f = x - (whole - _WHOLE)
    q = ((((_Q0 * f + _Q1) * f + _Q2) * f + _Q3) * f + _Q4) * f + _Q5
    return i32(f32(whole).view(np.int32) << _SHIFT), q * f


@kernel
def exp2(x):
    n, fraction = exponent_and_fraction(min(max(x, _LOW), _HIGH))
    return i32(f32(fraction + ONE).view(np.int32) + n).view(np.float32)


@kernel
def sigmoid(x):
    return ONE / (ONE + exp2(x * -LOG2_E))


@kernel
def tanh(x):
    n, fraction = exponent_and_fraction(min(max(x * (TWO * LOG2_E), _LOW), _END))
    power = i32(n + _ONE_BITS).view(np.float32)
    e = (power - ONE) + power * fraction
    return e / (e + TWO)


@kernel
def gate_coefficients(log2_a):
    """-> ``a`` and ``sqrt(1 - a^2)``; log2_a is not above 0."""
    n, fraction = exponent_and_fraction(max(log2_a, _LOW))
    power = i32(n + _ONE_BITS).view(np.float32)
    rest = power * fraction
    a = power + rest
    return a, np.sqrt(((ONE - power) - rest) * (ONE + a))


@kernel
def gelu(x):
    return x * sigmoid(x * (_SLOPE + _SLOPE * _CUBE * (x * x)))


@reduction
def dot(one, other):
    found = ZERO
    for i in range(one.size):
        found += one[i] * other[i]
    return found


@reduction
def mean_square(row):
    found = ZERO
    for i in range(row.size):
        found += row[i] * row[i]
    return found / f32(row.size)


@kernel
def normalize(row, scale, eps, out):
    factor = ONE / np.sqrt(mean_square(row) + eps)
    for d in range(row.size):
        out[d] = row[d] * factor * scale[d]
