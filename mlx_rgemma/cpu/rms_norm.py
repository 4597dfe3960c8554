"""RMSNorm: a Numba kernel for a prompt, the reference computed at once in training."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.cpu import numba_runtime
from mlx_rgemma.cpu.arrays import empty, materialize
from mlx_rgemma.cpu.eager import eager
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.ops.rms_norm import ADD_RMS_NORM, RMS_NORM


@RMS_NORM.implementation(Backend.CPU, supports=numba_runtime.is_long, gradient="none")
def rms_norm(x: mx.array, weight: mx.array, *, eps: float, dtype: mx.Dtype) -> Any:
    views = materialize(x, 1.0 + weight.astype(mx.float32))
    if views is None:
        return NotImplemented
    y, out = empty((x.size // x.shape[-1], x.shape[-1]))
    rows = views[0].reshape(out.shape)
    numba_runtime.run("rms_norm", len(rows), rows, views[1], np.float32(eps), out)
    return y.reshape(x.shape).astype(dtype)


def _adds_fp32(x: mx.array, *_arrays: Any, **_options: Any) -> bool:
    return x.dtype == mx.float32 and numba_runtime.is_long(x)


@ADD_RMS_NORM.implementation(Backend.CPU, supports=_adds_fp32, gradient="none")
def add_rms_norm(
    x: mx.array, delta: mx.array, weight: mx.array, *, eps: float, dtype: mx.Dtype
) -> Any:
    views = materialize(x, delta, 1.0 + weight.astype(mx.float32))
    if views is None:
        return NotImplemented
    shape = (x.size // x.shape[-1], x.shape[-1])
    total, total_view = empty(shape)
    y, out = empty(shape)
    rows, deltas = (view.reshape(shape) for view in views[:2])
    arrays = (rows, deltas, views[2], np.float32(eps), total_view, out)
    numba_runtime.run("add_rms_norm", len(rows), *arrays)
    return total.reshape(x.shape), y.reshape(x.shape).astype(dtype)


RMS_NORM.implementation(Backend.CPU, gradient="own")(eager()(RMS_NORM.reference))
ADD_RMS_NORM.implementation(Backend.CPU, gradient="own")(eager()(ADD_RMS_NORM.reference))
