"""The state of a Griffin model: allocated once, of constant size.

One cache per layer, in mlx-lm's protocol (`mlx_lm.models.cache`), for one sequence or a batch. All
counters are Python integers, so that decoding does not extend a lazy graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_rgemma.griffin.checks import KEPT, as_count, as_index, as_list, read_counts
from mlx_rgemma.griffin.rollback import Rollback
from mlx_rgemma.ops import RingBuffer

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
"""dtypes of activations."""

SMALL_STATE = 1 << 26
"""Bytes up to which a state is allocated without checking the available memory."""


class _StateCache(Rollback):
    """Base of both kinds of cache: positions, and the lengths of right-padded prompts.

    Attributes:
        positions: Per sequence, the position of its next token in its document.
        lengths: Per sequence, the prompt tokens still to read while a right-padded batch is read;
            otherwise None.
    """

    positions: list[int]
    lengths: list[int] | None

    @property
    def batch_size(self) -> int:
        return len(self.positions)

    @property
    def offset(self) -> int:
        """Tokens seen by the longest sequence."""
        return max(self.positions)

    def size(self) -> int:
        """Return the tokens seen by the longest sequence (mlx-lm's name for `offset`)."""
        return self.offset

    def empty(self) -> bool:
        """Return whether no sequence has seen a token."""
        return not any(self.positions)

    def prepare(
        self, *, lengths: Sequence[int] | None = None, right_padding: Any = None, **other: Any
    ) -> None:
        """Announce a right-padded batch: sequence i has `lengths[i]` tokens, then padding."""
        if other.get("left_padding") is not None:
            raise ValueError("[cache] prompts must be padded on the right, not on the left.")
        if lengths is not None:
            counts = [as_count("[cache] a prompt's length", n) for n in as_list(lengths)]
            if len(counts) != self.batch_size:
                self.resize(len(counts))
            self.lengths = counts

    def finalize(self) -> None:
        """End a right-padded batch."""
        self.lengths = None

    def valid(self, length: int) -> list[int] | None:
        """Return how many of the next `length` tokens per sequence are no padding; None if all."""
        if self.lengths is None or all(n >= length for n in self.lengths):
            return None
        return [min(n, length) for n in self.lengths]

    def advance(self, length: int, next_positions: list[int] | None = None) -> None:
        """Count `length` tokens per sequence as read."""
        valid = self.valid(length)
        if next_positions is not None or self.lengths is not None:
            self.clear_history()  # sequences advance by different numbers of tokens
        if next_positions is not None:
            self.positions = list(next_positions)
        elif valid is None:
            self.positions = [p + length for p in self.positions]
        else:
            self.positions = [p + n for p, n in zip(self.positions, valid, strict=True)]
        if self.lengths is not None:
            self.lengths = [max(0, n - length) for n in self.lengths]

    def resize(self, batch_size: int) -> None:
        """Change the batch size of an empty cache.

        Raises:
            ValueError: If it has seen a token, or the batch size is below 1.
        """
        if batch_size == self.batch_size:
            return
        if not self.empty():
            raise ValueError(
                f"[cache] the cache holds {self.batch_size} sequences, the tokens {batch_size}."
            )
        if batch_size < 1:
            raise ValueError(f"[cache] the batch size is {batch_size}, expected at least 1.")
        self.positions = [0] * batch_size
        self.clear_history()
        self._allocate(batch_size)

    def checked_indices(self, batch_indices: Any) -> tuple[list[int], mx.array]:
        """Return checked batch indices, as integers and as an array.

        Raises:
            ValueError: Naming the first index that is out of range.
        """
        indices = [as_index("[cache] sequence", i, self.batch_size) for i in as_list(batch_indices)]
        return indices, mx.array(indices, mx.int32)

    @classmethod
    def same_model(cls, caches: Sequence[Any]) -> None:
        """Refuse caches that cannot be merged.

        Raises:
            ValueError: If there are none, or they belong to different models.
        """
        kinds = {getattr(cache, "signature", type(cache)) for cache in caches}
        if len(kinds) != 1 or not all(isinstance(cache, cls) for cache in caches):
            raise ValueError("[cache] only caches of the same model can be merged.")

    def _allocate(self, batch_size: int) -> None:
        raise AssertionError("each kind of cache allocates its own arrays")

    @property
    def meta_state(self) -> str:
        """Empty: `state` holds everything (mlx-lm before 0.32 reads it)."""
        return ""

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = None) -> Any:
        """Rebuild a cache from `state` (for mlx-lm's prompt-cache files)."""
        cache = cls.__new__(cls)
        cache.lengths = None
        cache.state = state  # type: ignore[attr-defined]
        return cache


class RecurrentCache(_StateCache):
    """State of a recurrent block: the RG-LRU's state in fp32 and the last convolution inputs.

    Attributes:
        h: (B, lru_width), fp32.
        conv: (B, conv1d_width - 1, lru_width), in the dtype of the activations, oldest first.
    """

    def __init__(
        self, lru_width: int, conv1d_width: int, dtype: mx.Dtype, batch_size: int = 1
    ) -> None:
        self.positions = [0] * batch_size
        self.lengths = None
        self.h = mx.zeros((batch_size, lru_width), mx.float32)
        self.conv = mx.zeros((batch_size, conv1d_width - 1, lru_width), dtype)

    def _allocate(self, batch_size: int) -> None:
        self.h = mx.zeros((batch_size, *self.h.shape[1:]), mx.float32)
        self.conv = mx.zeros((batch_size, *self.conv.shape[1:]), self.conv.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return self.h.nbytes + self.conv.nbytes

    @property
    def signature(self) -> tuple[Any, ...]:
        """The type and sizes that a layer requires of its cache."""
        return (RecurrentCache, self.h.shape[1], self.conv.shape[1])

    @property
    def state(self) -> tuple[Any, ...]:
        """h, conv, positions (B,) int64: arrays only, so that every mlx-lm can save it."""
        return self.h, self.conv, mx.array(self.positions, mx.int64)

    @state.setter
    def state(self, state: Any) -> None:
        try:
            h, conv, positions = state
            h_ok = h.ndim == 2 and h.dtype == mx.float32
            conv_ok = conv.ndim == 3 and conv.dtype in DTYPES
            ok = h_ok and conv_ok and (conv.shape[0], conv.shape[2]) == h.shape
            positions = read_counts(positions, h.shape[0])
        except (TypeError, ValueError, AttributeError):
            ok = False
        if not ok:
            raise ValueError("[cache] not the state of a recurrent block.")
        self.h, self.conv, self.positions = h, conv, positions
        self.clear_history()

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep these sequences, in this order."""
        kept, index = self.checked_indices(batch_indices)
        self.h, self.conv = self.h[index], self.conv[index]
        _keep_sequences(self, kept)

    def extend(self, other: RecurrentCache) -> None:
        """Append the sequences of another cache."""
        self.same_model([self, other])
        self.h = mx.concatenate([self.h, other.h])
        self.conv = mx.concatenate([self.conv, other.conv.astype(self.conv.dtype)])
        _append_sequences(self, other)

    def extract(self, idx: int) -> RecurrentCache:
        """Return a cache of one sequence, with arrays of its own."""
        idx = as_index("[cache] sequence", idx, self.batch_size)
        cache = RecurrentCache.__new__(RecurrentCache)
        cache.h = mx.contiguous(self.h[idx : idx + 1])
        cache.conv = mx.contiguous(self.conv[idx : idx + 1])
        cache.positions, cache.lengths = [self.positions[idx]], None
        return cache

    @classmethod
    def merge(cls, caches: Sequence[RecurrentCache]) -> RecurrentCache:
        """Return one batch of the sequences of several caches."""
        cls.same_model(caches)
        cache = cls.__new__(cls)
        cache.h = mx.concatenate([c.h for c in caches])
        cache.conv = mx.concatenate([c.conv for c in caches])
        cache.positions, cache.lengths = [p for c in caches for p in c.positions], None
        return cache


class AttentionCache(_StateCache):
    """State of a local attention block: a ring buffer with the keys and values of one window.

    The ring has ``window + 1`` slots, including the query's own. The newest token of every sequence
    is in slot ``write_pos - 1``. The position of a sequence limits how far back it looks, so slots
    that were never written need no bookkeeping.

    Attributes:
        kv: (B, 2, window + 1, head_dim). Rotated keys, then values.
        write_pos: Slot of the next token.
        window: Past tokens that a query sees, besides its own.
    """

    def __init__(self, window: int, head_dim: int, dtype: mx.Dtype, batch_size: int = 1) -> None:
        self.positions = [0] * batch_size
        self.lengths = None
        self.window = window
        self.write_pos = 0
        self.kv = mx.zeros((batch_size, 2, window + 1, head_dim), dtype)

    def _allocate(self, batch_size: int) -> None:
        self.write_pos = 0
        self.kv = mx.zeros((batch_size, *self.kv.shape[1:]), self.kv.dtype)

    @property
    def ring(self) -> RingBuffer:
        return RingBuffer(self.kv, self.write_pos)

    @ring.setter
    def ring(self, ring: RingBuffer) -> None:
        self.kv, self.write_pos = ring

    def enable_rollback(self, tokens: int) -> None:
        """Let `trim` take back up to `tokens` tokens of later calls.

        Raises:
            ValueError: If the window is shorter.
        """
        if as_count(KEPT, tokens) > self.window:
            raise ValueError(f"[cache] a window of {self.window} cannot keep {tokens} tokens.")
        super().enable_rollback(tokens)

    def save_slots(self, length: int) -> None:
        """Record the slots that a call of `length` tokens is about to overwrite."""
        if self.history is None or length > self.history.limit:
            self.clear_history()
            return
        write_pos, slots = self.write_pos, self.kv.shape[2]
        end = write_pos + length
        old = self.kv[:, :, write_pos : min(end, slots)]
        if end > slots:
            old = mx.concatenate([old, self.kv[:, :, : end - slots]], axis=2)
        old = mx.contiguous(old)
        # Copied before the ring is written, so that it can be written in place.
        (self.kv,) = mx.depends([self.kv], [old])

        def undo(cache: AttentionCache, kept: int) -> None:
            start = RingBuffer(cache.kv, (write_pos + kept) % slots)
            cache.kv, cache.write_pos = start.appended(old[:, :, kept:]).kv, start.write_pos

        self.record_call(length, undo)

    def write(self, kv: mx.array) -> None:
        """Write the keys and values of a call: (B, 2, L, head_dim)."""
        length, slots = kv.shape[2], self.kv.shape[2]
        kv = kv.astype(self.kv.dtype)
        valid = self.valid(length)
        if valid is not None:
            # Sequences end at different tokens: reorder each, so that all end in the last slot.
            history = mx.concatenate([self.ring.in_order(), kv], axis=2)
            index = mx.array(valid)[:, None] + mx.arange(slots)
            self.kv = mx.take_along_axis(history, index[:, None, :, None], axis=2)
            self.write_pos = 0
        elif length >= slots:
            self.kv = mx.contiguous(kv[:, :, length - slots :])
            self.write_pos = 0
        else:
            self.kv, self.write_pos = self.ring.appended(kv)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return self.kv.nbytes

    @property
    def signature(self) -> tuple[Any, ...]:
        """The type and sizes that a layer requires of its cache."""
        return (AttentionCache, self.window, self.kv.shape[3])

    @property
    def state(self) -> tuple[Any, ...]:
        """kv, [write_pos, window] (2,) int64, positions (B,) int64: arrays only."""
        ring = mx.array([self.write_pos, self.window], mx.int64)
        return self.kv, ring, mx.array(self.positions, mx.int64)

    @state.setter
    def state(self, state: Any) -> None:
        try:
            kv, ring, positions = state
            write_pos, window = read_counts(ring, 2)
            ok = kv.ndim == 4 and kv.shape[1] == 2 and kv.shape[2] == window + 1
            ok = ok and write_pos <= window and kv.dtype in DTYPES
            positions = read_counts(positions, kv.shape[0])
        except (TypeError, ValueError, AttributeError):
            ok = False
        if not ok:
            raise ValueError("[cache] not the state of an attention block.")
        self.kv, self.write_pos, self.window, self.positions = kv, write_pos, window, positions
        self.clear_history()

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep these sequences, in this order."""
        kept, index = self.checked_indices(batch_indices)
        self.kv = self.kv[index]
        _keep_sequences(self, kept)

    def extend(self, other: AttentionCache) -> None:
        """Append the sequences of another cache."""
        self.same_model([self, other])
        if self.write_pos != other.write_pos:
            self.kv, self.write_pos = self.ring.in_order(), 0
            other_kv = other.ring.in_order()
        else:
            other_kv = other.kv
        self.kv = mx.concatenate([self.kv, other_kv.astype(self.kv.dtype)])
        _append_sequences(self, other)

    def extract(self, idx: int) -> AttentionCache:
        """Return a cache of one sequence, with arrays of its own."""
        idx = as_index("[cache] sequence", idx, self.batch_size)
        cache = AttentionCache.__new__(AttentionCache)
        cache.kv = mx.contiguous(self.kv[idx : idx + 1])
        cache.write_pos, cache.window = self.write_pos, self.window
        cache.positions, cache.lengths = [self.positions[idx]], None
        return cache

    @classmethod
    def merge(cls, caches: Sequence[AttentionCache]) -> AttentionCache:
        """Return one batch of the sequences of several caches."""
        cls.same_model(caches)
        cache = cls.__new__(cls)
        cache.kv = mx.concatenate([c.ring.in_order() for c in caches])
        cache.write_pos, cache.window = 0, caches[0].window
        cache.positions, cache.lengths = [p for c in caches for p in c.positions], None
        return cache


GriffinCache = RecurrentCache | AttentionCache


def state_nbytes(cache: Sequence[GriffinCache]) -> int:
    """Return the bytes of a model's whole state, which never change."""
    return sum(c.nbytes for c in cache)


def check_state_memory(nbytes: int, batch_size: int) -> None:
    """Refuse a state larger than the available memory, which MLX would crash on.

    Raises:
        UserError: If less memory is available.
    """
    if nbytes > SMALL_STATE:
        from mlx_rgemma.io.memory import check_memory

        texts = "1 sequence" if batch_size == 1 else f"{batch_size} sequences"
        remedy = "use fewer sequences, or a model with a smaller attention_window_size"
        check_memory(f"the state of {texts}", nbytes, remedy)


def _keep_sequences(cache: _StateCache, kept: list[int]) -> None:
    cache.clear_history()
    cache.positions = [cache.positions[i] for i in kept]
    if cache.lengths is not None:
        cache.lengths = [cache.lengths[i] for i in kept]


def _append_sequences(cache: _StateCache, other: _StateCache) -> None:
    cache.clear_history()
    if cache.lengths is not None or other.lengths is not None:
        mine = cache.lengths or [0] * cache.batch_size
        cache.lengths = mine + (other.lengths or [0] * other.batch_size)
    cache.positions = cache.positions + other.positions
