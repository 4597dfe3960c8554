"""Cross entropy with its gradient computed along with the loss, from the same exponentials."""

from __future__ import annotations

import mlx.core as mx

from mlx_rgemma.cpu.eager import eager
from mlx_rgemma.cpu.fastmath import LOG2_E, exp2, tanh
from mlx_rgemma.cpu.streams import split_across_streams
from mlx_rgemma.ops.autograd import inference_mode
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.ops.cross_entropy import CROSS_ENTROPIES
from mlx_rgemma.ops.sums import long_sum


@CROSS_ENTROPIES.implementation(Backend.CPU, gradient="own")
def cross_entropies(scores: mx.array, targets: mx.array, *, cap: float) -> mx.array:
    def gradient(primals, cotangents, outputs):
        return ((outputs[1] * cotangents[0][:, None]).astype(primals[0].dtype),)

    @eager(gradient)
    def losses(scores):
        with inference_mode():  # operations with a gradient of their own need not keep for it
            loss, slopes = split_across_streams(rows, scores.astype(mx.float32), targets[:, None])
        return loss[:, 0], slopes

    def rows(scores, wanted):
        logits = tanh(scores * (1.0 / cap)) * cap if cap else scores
        row_max = logits.max(axis=-1, keepdims=True)
        exponentials = exp2((logits - row_max) * LOG2_E)
        row_sum = long_sum(exponentials)
        loss = mx.log(row_sum) + row_max - mx.take_along_axis(logits, wanted, axis=-1)
        # softmax - one-hot, times the slope of the soft cap
        slopes = exponentials * mx.reciprocal(row_sum)
        at_target = mx.take_along_axis(slopes, wanted, axis=-1) - 1.0
        slopes = mx.put_along_axis(slopes, wanted, at_target, axis=-1)
        return loss, slopes * (1.0 - mx.square(logits * (1.0 / cap))) if cap else slopes

    result: mx.array = losses(scores)[0]
    return result
