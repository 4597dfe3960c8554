"""Inputs for the decode step of the recurrent block, and what it must give, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from helpers.float64 import NORMAL, PADDING, RESET, Array, sigmoid, to64
from mlx_rgemma.ops import RecurrentWeights

WEIGHTS = RecurrentWeights._fields


@dataclass
class Case:
    """One call of `recurrent_decode`.

    Attributes:
        batch, steps, heads, block, taps: Sizes.
        token_type: (1 or B, steps), or None.
        dtype: Of the activations.
        weight_dtype: Of the weights; that of the activations when omitted.
        seed: Of the numbers.
    """

    batch: int = 1
    steps: int = 1
    heads: int = 2
    block: int = 16
    taps: int = 4
    token_type: list[list[int]] | None = None
    dtype: mx.Dtype = mx.float32
    weight_dtype: mx.Dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        width, square = self.heads * self.block, (self.heads, self.block, self.block)
        weight_dtype = self.weight_dtype or self.dtype

        def normal(shape, dtype, scale=1.0):
            return mx.array(rng.standard_normal(shape) * scale).astype(dtype)

        def eighths(shape, dtype):
            # Sums of their products are exact, and so the convolution is rounded the same way
            # in float32 and in float64.
            return mx.array(np.round(rng.standard_normal(shape) * 8) / 8).astype(dtype)

        self.y_branch = normal((self.batch, self.steps, width), self.dtype, 2.0)
        self.x_branch = eighths((self.batch, self.steps, width), self.dtype)
        self.weights = RecurrentWeights(
            conv_weight=eighths((width, self.taps, 1), weight_dtype),
            conv_bias=eighths((width,), weight_dtype),
            input_weight=normal(square, weight_dtype, self.block**-0.5),
            input_bias=normal((self.heads, self.block), weight_dtype),
            recurrent_weight=normal(square, weight_dtype, self.block**-0.5),
            recurrent_bias=normal((self.heads, self.block), weight_dtype),
            # Short memories and long ones: from softplus(-9), where a is close to 1.
            a_param=mx.array(rng.uniform(-9.0, 1.0, width)).astype(weight_dtype),
        )
        self.conv_state = eighths((self.batch, self.taps - 1, width), self.dtype)
        self.h0 = normal((self.batch, width), mx.float32)

    @property
    def arrays(self):
        """Arguments of `recurrent_decode`."""
        types = None if self.token_type is None else mx.array(self.token_type, mx.uint8)
        return self.y_branch, self.x_branch, self.weights, self.conv_state, self.h0, types

    def expected(self) -> dict[str, Array]:
        """out, conv_state and h: the definition, one token of one row after the other."""
        w = RecurrentWeights(*(to64(x) for x in self.weights))
        y, x, h0 = to64(self.y_branch), to64(self.x_branch), to64(self.h0)
        state = to64(self.conv_state)
        types = np.broadcast_to(
            [[NORMAL]] if self.token_type is None else self.token_type, x.shape[:2]
        )
        out, h = np.zeros_like(x), h0.copy()
        for b in range(self.batch):
            for t in range(self.steps):
                token_type = types[b, t]
                if token_type == RESET:
                    state[b] = 0.0
                inputs = np.concatenate([state[b], x[b, t : t + 1]])
                u = (inputs * w.conv_weight[:, :, 0].T).sum(axis=0) + w.conv_bias
                u = to64(mx.array(u).astype(self.dtype))
                if token_type != PADDING:
                    h[b] = self._recurrence(u, h[b], w, token_type)
                    state[b] = inputs[1:]
                curve = np.tanh(np.sqrt(2.0 / np.pi) * (y[b, t] + 0.044715 * y[b, t] ** 3))
                out[b, t] = 0.5 * y[b, t] * (1.0 + curve) * h[b]
        return {"out": out, "conv_state": state, "h": h}

    def _recurrence(self, u: Array, h: Array, w: RecurrentWeights, token_type: int) -> Array:
        heads = u.reshape(self.heads, 1, self.block)
        i = sigmoid((heads @ w.input_weight)[:, 0] + w.input_bias).reshape(-1)
        r = sigmoid((heads @ w.recurrent_weight)[:, 0] + w.recurrent_bias).reshape(-1)
        log_a = -8.0 * np.logaddexp(w.a_param, 0.0) * r
        if token_type == RESET:
            return i * u
        return np.exp(log_a) * h + np.sqrt(-np.expm1(2.0 * log_a)) * i * u
