"""Sampling whose probabilities can be asked for, as rejection sampling needs them."""

from __future__ import annotations

import mlx.core as mx

from mlx_rgemma.ops.sums import log_softmax


class Sampler:
    """mlx-lm's sampler (`mlx_lm.sample_utils.make_sampler`), with its distribution at hand.

    Args:
        temp: Temperature; 0 takes the most likely token.
        top_p: Keep the likeliest tokens of so much probability together; 0 or 1 for all.
        min_p: Keep tokens of at least so much of the likeliest one's probability.
        min_tokens_to_keep: Tokens that `min_p` keeps in any case.
        top_k: Keep so many of the likeliest tokens; 0 for all.
    """

    def __init__(
        self,
        temp: float = 0.0,
        top_p: float = 0.0,
        min_p: float = 0.0,
        min_tokens_to_keep: int = 1,
        top_k: int = 0,
    ) -> None:
        self.temp = temp
        self.top_p = top_p
        self.min_p = min_p
        self.min_tokens_to_keep = min_tokens_to_keep
        self.top_k = top_k

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temp == 0

    def distribution(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities that tokens are drawn with: (N, V) to (N, V), fp32, normalized."""
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

        if 0 < self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p:
            logprobs = apply_min_p(logprobs, self.min_p, self.min_tokens_to_keep)
        if 0 < self.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, self.top_k)
        return log_softmax(logprobs.astype(mx.float32) / self.temp)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draw a token a row: (N, V) to (N,)."""
        if self.greedy:
            return mx.argmax(logprobs, axis=-1)
        return mx.random.categorical(self.distribution(logprobs))
