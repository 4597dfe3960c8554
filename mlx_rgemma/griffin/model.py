"""RecurrentGemma as one model class that follows mlx-lm's model interface."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.griffin.cache import (
    AttentionCache,
    GriffinCache,
    RecurrentCache,
    check_state_memory,
    state_nbytes,
)
from mlx_rgemma.griffin.checks import as_count, refuse_forked_process, safe_token_ids
from mlx_rgemma.griffin.config import RECURRENT, GriffinConfig
from mlx_rgemma.griffin.layers import ResidualBlock, RMSNorm
from mlx_rgemma.griffin.sequence_info import SequenceInfo
from mlx_rgemma.ops import backend, inference_mode, rotary_frequencies, soft_cap

MAX_BATCH = 1 << 16
"""Largest batch size of a state."""

COMPARE_BYTES = 1 << 24
"""Bytes of a file's head that are compared with the embedding at a time."""


class Griffin(nn.Module):
    """Embedding, residual blocks and final norm."""

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [ResidualBlock(config, kind) for kind in config.layer_types]
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.window = config.past_window
        # The released models were trained with the scale rounded to bfloat16.
        scale = mx.array(math.sqrt(config.hidden_size)).astype(mx.bfloat16).item()
        self.embedding_scale = scale if config.embeddings_scale_by_sqrt_dim else 1.0
        self._frequencies = rotary_frequencies(config.rotary_dims, config.rope_theta)

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[GriffinCache] | None = None,
        segment_pos: mx.array | None = None,
        *,
        last_only: bool = False,
    ) -> mx.array:
        batch, length = tokens.shape
        tokens = safe_token_ids(tokens, self.vocab_size)
        info = SequenceInfo(batch, length, cache, segment_pos, self.window, self._frequencies)
        x = self.embed_tokens(tokens).astype(mx.float32) * self.embedding_scale
        last = len(self.layers) - 1 if last_only else None
        for i, layer in enumerate(self.layers):
            x = layer(x, info, None if cache is None else cache[i], last_only=i == last)
        for c in cache or ():
            c.advance(length, info.next_positions)
        return self.final_norm(x)


class Model(nn.Module):
    """RecurrentGemma: tokens to logits, with a state of constant size.

    Args:
        config: Sizes and constants.
    """

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        refuse_forked_process()
        self.args = config
        self.model_type = config.model_type
        self.group: mx.distributed.Group | None = None
        self.model = Griffin(config)
        self.dequantized_nbytes = 0

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[GriffinCache] | None = None,
        *,
        segment_pos: mx.array | None = None,
    ) -> mx.array:
        """Return the logits of the next token at every position.

        Token ids are checked unless that would make a decode step wait for the device: see
        `checks.safe_token_ids`.

        Args:
            tokens: (B, L), int.
            cache: From `make_cache`; updated in place. The tokens continue its sequences.
            segment_pos: (B, L), int. Position of each token in its document, 0 where a packed
                document starts. Positions continue those of the cache when omitted.

        Returns:
            (B, L, vocab_size), fp32, soft-capped.

        Raises:
            ValueError: If the tokens, positions or cache have the wrong shape or dtype, or hold an
                unknown token or a negative position.
        """
        if segment_pos is None and (logits := self._decode(tokens, cache)) is not None:
            return logits
        return self.head(self._hidden(tokens, cache, segment_pos))

    def last_logits(self, tokens: mx.array, cache: Sequence[GriffinCache]) -> mx.array:
        """Return the logits after the last token only.

        Args:
            tokens: (B, L), int, without padding.
            cache: As for a call; updated in place.

        Returns:
            (B, vocab_size), fp32, soft-capped.

        Raises:
            ValueError: If the tokens or the cache have the wrong shape.
        """
        if (logits := self._decode(tokens, cache, last_only=True)) is not None:
            return logits[:, 0]
        return self.head(self._hidden(tokens, cache, None, last_only=True)[:, -1])

    def prefill(self, tokens: mx.array, cache: Sequence[GriffinCache]) -> None:
        """Advance a state by a chunk of a prompt, without computing logits.

        Args:
            tokens: (B, L), int, without padding.
            cache: As for a call; updated in place.

        Raises:
            ValueError: If the tokens or the cache have the wrong shape.
        """
        if self._decode(tokens, cache, last_only=True) is None:
            self._hidden(tokens, cache, None, last_only=True)

    def _decode(
        self,
        tokens: mx.array,
        cache: Sequence[GriffinCache] | None,
        *,
        last_only: bool = False,
    ) -> mx.array | None:
        """Return logits by the backend's decoder, (B, L or 1, vocab_size); None without one."""
        refuse_forked_process()
        if cache is None or self.training or self.group is not None or tokens.ndim != 2:
            return None
        decoder = backend.decoder(self)
        return None if decoder is None else decoder(tokens, cache, last_only=last_only)

    def _hidden(
        self,
        tokens: mx.array,
        cache: Sequence[GriffinCache] | None,
        segment_pos: mx.array | None,
        *,
        last_only: bool = False,
    ) -> mx.array:
        if segment_pos is not None:
            segment_pos = mx.array(segment_pos)
        self._check(tokens, cache, segment_pos)
        # In evaluation mode with a cache, no gradient is needed.
        generating = cache is not None and not self.training
        with inference_mode() if generating else nullcontext():
            return self.model(tokens, cache, segment_pos, last_only=last_only)

    def head(self, x: mx.array) -> mx.array:
        """Return the logits of hidden states: (..., hidden_size) -> (..., vocab_size), fp32."""
        return tied_head(x, self.model.embed_tokens, self.args.logits_soft_cap)

    @property
    def layers(self) -> list[ResidualBlock]:
        return self.model.layers

    @property
    def dtype(self) -> mx.Dtype:
        """dtype of the activations, that of the weights."""
        return self.model.final_norm.weight.dtype

    @property
    def state_width(self) -> int:
        """Channels of the recurrence on this process: all, unless the model is sharded."""
        return self.args.lru_width // (1 if self.group is None else self.group.size())

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Keep this rank's shard of the model (tensor parallelism), for inference only.

        Args:
            group: The ranks that share the model; MLX's default group when omitted. All must call
                the model with the same tokens.

        Raises:
            UserError: If the world size does not divide the model; the message lists valid ones.
            ValueError: If the model is sharded already.
        """
        if self.group is not None:
            raise ValueError("[shard] the model is sharded already.")
        group = group or mx.distributed.init()
        if group.size() > 1:
            from mlx_rgemma.griffin.sharding import shard_model

            shard_model(self, group)
            self.group = group

    def make_cache(self, batch_size: int = 1) -> list[GriffinCache]:
        """Return the state of `batch_size` empty sequences, one cache per layer.

        Raises:
            ValueError: If the batch size is out of range.
            UserError: If the state does not fit into memory.
        """
        c, dtype = self.args, self.dtype
        if not 1 <= as_count("[cache] batch_size", batch_size) <= MAX_BATCH:
            raise ValueError(f"[cache] batch_size is {batch_size}, expected 1 to {MAX_BATCH}.")
        cache = [
            RecurrentCache(self.state_width, c.conv1d_width, dtype, batch_size)
            if kind == RECURRENT
            else AttentionCache(c.past_window, c.head_dim, dtype, batch_size)
            for kind in c.layer_types
        ]
        check_state_memory(state_nbytes(cache), batch_size)  # nothing is allocated yet
        return cache

    def fuse_projections(self) -> None:
        """Concatenate projections of the same input, so that a decode step has fewer products.

        No weight is stored twice. Layers that training or adapters replace later run separately
        again.
        """
        for layer in self.layers:
            layer.fuse_projections()

    def prepare_for_inference(self, **options: Any) -> None:
        """Evaluate the weights of a model that was just loaded, laid out for the active backend.

        Projections are fused before they are evaluated, so that each layer's buffers are reused by
        the next.

        Args:
            **options: Of the backend, see `mlx_rgemma.ops.backend.prepare`.
        """
        self.fuse_projections()
        mx.eval(self.parameters())
        self.dequantized_nbytes = backend.prepare(self, **options)

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Convert names and layouts of a file to those of this class; idempotent.

        Raises:
            CheckpointError: If the file has a head that differs from the embedding in any bit.
        """
        c = self.args
        conv_shape = (c.lru_width, c.conv1d_width, 1)
        sanitized = {}
        for name, weight in weights.items():
            if name.startswith("lm_head."):
                check_tied_head(name, weight, weights.get(f"model.embed_tokens.{name[8:]}"))
                continue
            if name.endswith("conv_1d.weight") and weight.shape != conv_shape:
                weight = weight.moveaxis(2, 1)
            sanitized[name] = weight
        return sanitized

    def quant_predicate(self, path: str, module: nn.Module) -> bool:
        """Return whether a module is quantized: the projections and the embedding are."""
        return hasattr(module, "to_quantized")

    def check_cache(self, cache: Sequence[Any]) -> None:
        """Refuse a cache of another model, window or shape.

        Raises:
            ValueError: Naming the first layer that does not match.
        """
        c = self.args
        kinds = c.layer_types
        if len(cache) != len(kinds):
            raise ValueError(f"[cache] the model has {len(kinds)} layers, the cache {len(cache)}.")
        for i, (kind, layer) in enumerate(zip(kinds, cache, strict=True)):
            if kind == RECURRENT:
                expected: tuple[Any, ...] = (RecurrentCache, self.state_width, c.conv1d_width - 1)
            else:
                expected = (AttentionCache, c.past_window, c.head_dim)
            found = getattr(layer, "signature", (type(layer),))
            if found != expected:
                raise ValueError(
                    f"[cache] layer {i} needs {_describe(expected)}, the cache holds"
                    f" {_describe(found)}: it belongs to another model or window."
                )

    def _check(
        self, tokens: mx.array, cache: Sequence[Any] | None, segment_pos: mx.array | None
    ) -> None:
        if tokens.ndim != 2 or tokens.size == 0:
            raise ValueError(f"[model] tokens must be (B, L) with L > 0, not {tokens.shape}.")
        if segment_pos is not None and segment_pos.shape != tokens.shape:
            raise ValueError(
                f"[model] segment_pos has shape {segment_pos.shape}, tokens {tokens.shape}."
            )
        if cache is not None:
            self.check_cache(cache)
            if cache[0].batch_size != tokens.shape[0]:
                each = state_nbytes(cache) // max(cache[0].batch_size, 1)
                check_state_memory(each * tokens.shape[0], tokens.shape[0])
            for layer in cache:
                layer.resize(tokens.shape[0])


def tied_head(x: mx.array, embedding: nn.Module, cap: float) -> mx.array:
    """Return logits by the input embedding, which is the head as well.

    Args:
        x: (..., hidden_size), after the final norm.
        embedding: Dense or quantized.
        cap: Soft cap of the logits; 0 for none.

    Returns:
        (..., vocab_size), fp32.
    """
    logits: mx.array = embedding.as_linear(x)
    if not cap:
        return logits.astype(mx.float32)
    capped: mx.array = soft_cap(logits, mx.array(cap))
    return capped


def check_tied_head(name: str, head: mx.array, embedding: mx.array | None) -> None:
    """Refuse a tensor of a head that differs from the embedding's in dtype, shape or any bit.

    Args:
        name: Name of the tensor: `lm_head.weight`; `.scales` and `.biases` if quantized.
        head: The tensor.
        embedding: The same parameter of the embedding; None if it has none.

    Raises:
        CheckpointError: Naming the tensor.
    """
    same = embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same and embedding is not None:
        left, right = head.reshape(-1), embedding.reshape(-1)
        step = COMPARE_BYTES // head.itemsize
        same = all(
            mx.array_equal(left[i : i + step].view(mx.uint8), right[i : i + step].view(mx.uint8))
            for i in range(0, head.size, step)
        )
    if not same:
        raise CheckpointError(
            f"{name} differs from model.embed_tokens; RecurrentGemma's head is its embedding, a"
            " model with another head is not supported."
        )


def _describe(signature: tuple[Any, ...]) -> str:
    kind, *sizes = signature
    names = {
        RecurrentCache: "a recurrent state (width {}, {} convolution inputs)",
        AttentionCache: "a ring (window {}, head_dim {})",
    }
    return names[kind].format(*sizes) if kind in names else kind.__name__
