"""exp, sigmoid and their relatives on a Linux CPU, four times as fast as MLX's own.

MLX computes exp, tanh and sigmoid there with scalar code of its own: 12 to 21 ns an element on a
2.6 GHz x86-64, where a product takes 0.25. `mx.power` is libm's `powf`, 4.5 ns, and exact to the
last bit but one. So powers of two stand for them: ``exp(x) = 2^(x / log 2)``.

Everywhere else, MLX's own operations are the fast ones.
"""

from __future__ import annotations

import math
import sys

import mlx.core as mx

LOG2_E = 1.0 / math.log(2.0)

_LINUX = sys.platform.startswith("linux")
_BELOW_ONE = 1.0 - 2.0**-24
_LEAST = math.exp(-80.0)


def on_linux_cpu() -> bool:
    """Whether operations run on a Linux CPU."""
    return _LINUX and mx.default_device().type == mx.cpu


def _worthwhile(x: mx.array) -> bool:
    """Whether an array is so large that many cheap operations beat one slow one."""
    return x.size >= 4096 and on_linux_cpu()


def exp2(x: mx.array) -> mx.array:
    """``2^x``, in the dtype of `x`."""
    return mx.power(2.0, x)


def sigmoid(x: mx.array) -> mx.array:
    """``1 / (1 + exp(-x))`` of an fp32 array; accurate relative to the result, also near 0."""
    if not _worthwhile(x):
        return mx.sigmoid(x)
    return mx.reciprocal(1.0 + exp2(x * -LOG2_E))


def decay(log_a: mx.array) -> tuple[mx.array, mx.array]:
    """``a = exp(log_a)`` and ``sqrt(1 - a^2)``, without cancellation where a is near 1.

    Args:
        log_a: fp32, not above 0.
    """
    if not _worthwhile(log_a):
        return mx.exp(log_a), mx.sqrt(-mx.expm1(2.0 * log_a))
    # exp(log_a) to the last bit: log_a is small wherever a matters, and so is its rounding.
    a = exp2(log_a * LOG2_E)
    # expm1(y) = (u - 1) y / log(u) for any u near exp(y) (Kahan); the bounds keep u from 0 and 1,
    # where the quotient is not defined, and change no result.
    y = mx.maximum(2.0 * log_a, -80.0)
    u = mx.clip(a * a, _LEAST, _BELOW_ONE)
    return a, mx.sqrt((1.0 - u) / mx.log(u) * y)
