"""Packing of documents into sequences of one length.

A document of n tokens has n - 1 steps: an input token and the next token as its target. No step
crosses documents, and `segment_pos` restarts at 0 with each span, which resets the convolution, the
recurrence and the attention. So a packed sequence has the summed loss of its spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Batch:
    """A training batch.

    Attributes:
        tokens: (B, L), int32. Input tokens.
        targets: (B, L), int32. The token after each.
        mask: (B, L), bool. Which targets count in the loss.
        segment_pos: (B, L), int32. Position of each token in its document: 0 where a document (or
            a span of one, or padding) begins. None: each sequence is one document, from its
            beginning; padding after it needs no positions.
    """

    tokens: mx.array
    targets: mx.array
    mask: mx.array
    segment_pos: mx.array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Batch size and sequence length."""
        size, length = self.tokens.shape
        return size, length

    def shard(self, rank: int, size: int) -> Batch:
        """Return the sequences of one of `size` ranks: every `size`-th.

        Raises:
            ValueError: If there are fewer sequences than ranks.
        """
        if self.shape[0] < size:
            raise ValueError(f"[batch] {self.shape[0]} sequences cannot be split by {size} ranks.")
        if size == 1:
            return self
        own = slice(rank, None, size)
        positions = None if self.segment_pos is None else self.segment_pos[own]
        return Batch(self.tokens[own], self.targets[own], self.mask[own], positions)


@dataclass(frozen=True)
class Documents:
    """Tokenized documents, concatenated.

    Attributes:
        ids: (total,), int32. Tokens of all documents.
        offsets: (documents + 1,), int64. Start of each document; its end is the next one's start.
        first_targets: (documents,), int64. First token of each document that counts in the loss;
            those before it (a prompt) are inputs only.
    """

    ids: np.ndarray
    offsets: np.ndarray
    first_targets: np.ndarray

    @classmethod
    def of(
        cls, documents: Sequence[Sequence[int]], first_targets: Sequence[int] | None = None
    ) -> Documents:
        """Concatenate lists of tokens; those of fewer than two tokens have no target."""
        lengths = [len(document) for document in documents]
        flat = [np.asarray(document, np.int32) for document in documents]
        return cls(
            np.concatenate(flat) if flat else np.zeros(0, np.int32),
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            np.asarray([1] * len(flat) if first_targets is None else first_targets, np.int64),
        )

    def __len__(self) -> int:
        return len(self.first_targets)

    @property
    def steps(self) -> np.ndarray:
        """Number of steps of each document, (documents,), int64."""
        return np.maximum(np.diff(self.offsets) - 1, 0)


@dataclass(frozen=True)
class Span:
    """Steps `start` to `stop` of a document."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def best_fit_pack(steps: Sequence[int] | np.ndarray, sequence_length: int) -> list[list[Span]]:
    """Pack documents by best fit, whole where they fit; longer ones are split.

    Args:
        steps: Number of steps of each document.
        sequence_length: Steps per sequence.

    Returns:
        The spans of each sequence. Sequences are nearly full; the rest is padding.
    """
    spans = [
        Span(document, start, min(start + sequence_length, int(count)))
        for document, count in enumerate(steps)
        for start in range(0, int(count), sequence_length)
    ]
    spans.sort(key=len, reverse=True)  # stable: equal lengths stay in order
    sequences: list[list[Span]] = []
    by_room: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    for span in spans:
        room = next((r for r in range(len(span), sequence_length + 1) if by_room[r]), None)
        if room is None:
            sequences.append([])
            room, chosen = sequence_length, len(sequences) - 1
        else:
            chosen = by_room[room].pop()
        sequences[chosen].append(span)
        by_room[room - len(span)].append(chosen)
    return sequences


def slice_spans(order: np.ndarray, ends: np.ndarray, start: int, stop: int) -> list[Span]:
    """Return steps `start` to `stop` of concatenated documents.

    Args:
        order: (documents,), int. Order of concatenation.
        ends: (documents,), int64. Steps up to the end of each document, in that order.
        start, stop: The steps.
    """
    spans = []
    index = int(np.searchsorted(ends, start, side="right"))
    while start < stop and index < len(order):
        begins = int(ends[index - 1]) if index else 0
        until = min(stop, int(ends[index]))
        if until > start:
            spans.append(Span(int(order[index]), start - begins, until - begins))
        start, index = until, index + 1
    return spans


def build_sequence(documents: Documents, spans: Sequence[Span], sequence_length: int) -> np.ndarray:
    """Return the arrays of a sequence.

    Returns:
        (4, sequence_length), int32: tokens, targets, mask, positions.
    """
    sequence = np.zeros((4, sequence_length), np.int32)
    at = 0
    for span in spans:
        first = int(documents.offsets[span.document]) + span.start
        steps = slice(at, at + len(span))
        sequence[0, steps] = documents.ids[first : first + len(span)]
        sequence[1, steps] = documents.ids[first + 1 : first + len(span) + 1]
        # Step i of a document predicts its token i + 1.
        predicted = np.arange(span.start + 1, span.stop + 1)
        sequence[2, steps] = predicted >= documents.first_targets[span.document]
        sequence[3, steps] = np.arange(len(span))
        at += len(span)
    sequence[3, at:] = np.arange(sequence_length - at)
    return sequence


def stack_sequences(sequences: Sequence[np.ndarray]) -> Batch:
    """Return a batch of sequences from `build_sequence`, all of one length."""
    tokens, targets, mask, positions = np.stack(sequences, axis=1)
    return Batch(
        mx.array(tokens), mx.array(targets), mx.array(mask.astype(bool)), mx.array(positions)
    )


def stack_documents(sequences: Sequence[np.ndarray]) -> Batch:
    """Return a batch of sequences that hold one document each, from its beginning."""
    return replace(stack_sequences(sequences), segment_pos=None)
