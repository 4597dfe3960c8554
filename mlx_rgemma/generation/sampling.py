"""A sampler that exposes its distribution, for the rejection sampling of speculative decoding."""

from __future__ import annotations

import mlx.core as mx

from mlx_rgemma.ops.sums import log_softmax


class Sampler:
    """mlx-lm's sampler (`mlx_lm.sample_utils.make_sampler`) with access to its distribution.

    Args:
        temp: Temperature; 0 takes the most probable token.
        top_p: Keep the most probable tokens of this total probability; 0 or 1 for all.
        min_p: Keep tokens of at least this share of the highest probability; 0 for all.
        min_tokens_to_keep: Tokens that `min_p` keeps in any case.
        top_k: Keep this many of the most probable tokens; 0 for all.
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
        """Whether the most probable token is always taken."""
        return self.temp == 0

    def distribution(self, logprobs: mx.array) -> mx.array:
        """Return the log-probabilities that tokens are drawn from, (N, V), fp32, normalized."""
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

        if 0 < self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p:
            logprobs = apply_min_p(logprobs, self.min_p, self.min_tokens_to_keep)
        if 0 < self.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, self.top_k)
        return log_softmax(logprobs.astype(mx.float32) / self.temp)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draw a token per distribution: (N, V) to (N,)."""
        if self.greedy:
            return mx.argmax(logprobs, axis=-1)
        return mx.random.categorical(self.distribution(logprobs))
