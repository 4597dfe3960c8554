"""The causal convolution: a Numba kernel for a prompt, the reference at once in training."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_rgemma.cpu import numba_runtime
from mlx_rgemma.cpu.arrays import empty, materialize
from mlx_rgemma.cpu.eager import eager
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.ops.causal_conv1d import CAUSAL_CONV1D, last_inputs


@CAUSAL_CONV1D.implementation(Backend.CPU, supports=numba_runtime.is_long, gradient="none")
def causal_conv1d(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    state: mx.array,
    segment_pos: mx.array | None,
    lengths: mx.array | None,
) -> Any:
    batch, length, width = x.shape
    inputs = mx.concatenate([state, x], axis=1)
    if segment_pos is not None:
        segment_pos = mx.broadcast_to(segment_pos, x.shape[:2])
    pos = mx.array(weight.shape[1]) if segment_pos is None else segment_pos
    views = materialize(
        inputs,
        weight[..., 0].T,
        mx.zeros((width,)) if bias is None else bias,
        mx.broadcast_to(pos, (batch, length)).astype(mx.int32),
    )
    if views is None:
        return NotImplemented
    y, out = empty(x.shape)
    numba_runtime.run("causal_conv1d", batch * length, *views, out)
    return y.astype(x.dtype), last_inputs(inputs, state.shape[1], segment_pos, lengths)


CAUSAL_CONV1D.implementation(Backend.CPU, gradient="own")(eager()(CAUSAL_CONV1D.reference))
