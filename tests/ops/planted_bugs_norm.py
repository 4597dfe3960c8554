"""Bugs for the norm kernels. `check` must find each of them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from helpers.emulated import FORWARD_RTOL, assert_close, executed
from helpers.float64 import to64
from metal_cpu import Launch
from planting import Bug

from mlx_rgemma import ops

NORM, ADD = "rms_norm.metal", "add_rms_norm.metal"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

BUGS = (
    Bug("no barrier", "checked", NORM, BARRIER, ""),
    Bug("barrier for the wrong memory", "checked", NORM, "mem_threadgroup", "mem_none"),
    Bug("every lane stores the sum", "checked", NORM, "if (lane == 0)", "if (true)"),
    Bug("no eps", "numbers", NORM, " + eps[0]", ""),
    Bug(
        "factor without 1",
        "numbers",
        NORM,
        "1.0f + static_cast<float>(weight[n])",
        "static_cast<float>(weight[n])",
    ),
    Bug("sum, not mean", "numbers", NORM, "square / static_cast<float>(width)", "square"),
    Bug("channels past the row", "checked", NORM, "n < width", "n <= width", 1),
    Bug("one simdgroup is not added", "numbers", NORM, "s < simdgroups", "s + 1 < simdgroups"),
    Bug(
        "rows share their memory",
        "checked",
        NORM,
        "threadgroup_position_in_grid.x) * width",
        "threadgroup_position_in_grid.x)",
    ),
    Bug("half of the threads", "numbers", NORM, "n += threads", "n += 2 * threads", 0),
    Bug("no barrier", "checked", ADD, BARRIER, ""),
    Bug("delta is not added", "numbers", ADD, " + static_cast<float>(delta[at])", ""),
    Bug(
        "norm of the stream, not of the sum",
        "numbers",
        ADD,
        "static_cast<float>(sum[at]) * scale",
        "static_cast<float>(x[at]) * scale",
    ),
    Bug(
        "mean of the stream, not of the sum",
        "numbers",
        ADD,
        "square += static_cast<float>(value) * static_cast<float>(value)",
        "square += static_cast<float>(x[at]) * static_cast<float>(x[at])",
    ),
    Bug(
        "sum rounded to the norm's type",
        "numbers",
        ADD,
        "static_cast<S>(static_cast<float>(x[at]) + static_cast<float>(delta[at]))",
        "static_cast<S>(static_cast<T>(static_cast<float>(x[at]) + static_cast<float>(delta[at])))",
    ),
    Bug("sum is not stored", "checked", ADD, "sum[at] = value;", ""),
    Bug(
        "factor without 1",
        "numbers",
        ADD,
        "1.0f + static_cast<float>(weight[n])",
        "static_cast<float>(weight[n])",
    ),
    Bug("channels past the row", "checked", ADD, "n < width", "n <= width", 0),
    Bug(
        "implicit rounding", "static", ADD, "normalized[at] = static_cast<T>(", "normalized[at] = ("
    ),
)

EPS = 1e-6


def check(file: str, mode: str) -> list[Launch]:
    """Run a kernel, and compare with float64."""
    launches: list[Launch] = []
    for width, scale in ((300, 1e-3), (37, 1.0)):
        rng = np.random.default_rng(width)
        x, delta = (mx.array(rng.standard_normal((3, width), np.float32)) * scale for _ in range(2))
        delta = delta.astype(mx.bfloat16)
        weight = mx.array(rng.standard_normal(width, np.float32)).astype(mx.bfloat16)
        with executed(mode) as launched:
            if file == NORM:
                y = ops.rms_norm(x, weight, EPS, dtype=mx.bfloat16)
            else:
                total, y = ops.add_rms_norm(x, delta, weight, EPS)
                x = x + delta.astype(mx.float32)
                assert mx.array_equal(total, x)
            mx.eval(y)
        launches += launched
        z = to64(x)
        exact = z / np.sqrt(np.square(z).mean(axis=-1, keepdims=True) + EPS) * (1 + to64(weight))
        assert_close("y", y, exact, FORWARD_RTOL)
    return launches
