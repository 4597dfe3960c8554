"""Documents of any length laid into rows of one length.

A document of n tokens is n - 1 steps: a token to read, and the one after it to predict. No step
lies across two documents, and `segment_pos` falls back to 0 where a piece begins: convolution,
recurrence and attention then see nothing of what came before. So the loss of a packed row is the
sum of the losses of its pieces alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_rgemma.tuner.data.batch import Batch


@dataclass(frozen=True)
class Documents:
    """Texts in tokens, end to end.

    Attributes:
        ids: (total,), int32.
        offsets: (documents + 1,), int64. Where each begins; its end is where the next begins.
        first_targets: (documents,), int64. The first token of each that is to be predicted; those
            before it (a prompt) are read only.
    """

    ids: np.ndarray
    offsets: np.ndarray
    first_targets: np.ndarray

    @classmethod
    def of(
        cls, documents: Sequence[Sequence[int]], first_targets: Sequence[int] | None = None
    ) -> Documents:
        """From lists of tokens; those with fewer than two tokens have nothing to predict."""
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
        """(documents,), int64. Tokens of each that can be predicted."""
        return np.maximum(np.diff(self.offsets) - 1, 0)


@dataclass(frozen=True)
class Span:
    """Steps `start` to `stop` of a document."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def best_fit_pack(steps: Sequence[int] | np.ndarray, row_length: int) -> list[list[Span]]:
    """Rows that keep documents whole: longer ones are cut, the pieces packed by best fit.

    Args:
        steps: How many steps each document has.
        row_length: Steps of a row.

    Returns:
        The pieces of each row. Rows are nearly full; what is left over is padding.
    """
    pieces = [
        Span(document, start, min(start + row_length, int(count)))
        for document, count in enumerate(steps)
        for start in range(0, int(count), row_length)
    ]
    pieces.sort(key=len, reverse=True)  # stable: equal lengths stay in order
    rows: list[list[Span]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    for piece in pieces:
        room = next((r for r in range(len(piece), row_length + 1) if by_room[r]), None)
        if room is None:
            rows.append([])
            room, row = row_length, len(rows) - 1
        else:
            row = by_room[room].pop()
        rows[row].append(piece)
        by_room[room - len(piece)].append(row)
    return rows


def cut_row(order: np.ndarray, ends: np.ndarray, number: int, row_length: int) -> list[Span]:
    """One row of documents laid end to end and cut wherever a row is full.

    Args:
        order: (documents,), int. The order that they are laid in.
        ends: (documents,), int64. Steps up to the end of each, in that order.
        number: Which row; every row but the last is full.
        row_length: Steps of a row.
    """
    return slice_spans(order, ends, number * row_length, (number + 1) * row_length)


def slice_spans(order: np.ndarray, ends: np.ndarray, at: int, stop: int) -> list[Span]:
    """Steps `at` to `stop` of documents laid end to end; `order` and `ends` as for `cut_row`."""
    pieces = []
    place = int(np.searchsorted(ends, at, side="right"))
    while at < stop and place < len(order):
        begins = int(ends[place - 1]) if place else 0
        until = min(stop, int(ends[place]))
        if until > at:
            pieces.append(Span(int(order[place]), at - begins, until - begins))
        at, place = until, place + 1
    return pieces


def build_row(documents: Documents, pieces: Sequence[Span], row_length: int) -> np.ndarray:
    """A row's arrays.

    Returns:
        (4, row_length), int32: tokens, targets, which targets count, positions.
    """
    row = np.zeros((4, row_length), np.int32)
    at = 0
    for piece in pieces:
        first = int(documents.offsets[piece.document]) + piece.start
        steps = slice(at, at + len(piece))
        row[0, steps] = documents.ids[first : first + len(piece)]
        row[1, steps] = documents.ids[first + 1 : first + len(piece) + 1]
        # Step i of a document predicts its token i + 1.
        predicted = np.arange(piece.start + 1, piece.stop + 1)
        row[2, steps] = predicted >= documents.first_targets[piece.document]
        row[3, steps] = np.arange(len(piece))
        at += len(piece)
    row[3, at:] = np.arange(row_length - at)
    return row


def stack_rows(rows: Sequence[np.ndarray]) -> Batch:
    """A batch of rows of one length."""
    import mlx.core as mx

    tokens, targets, mask, positions = np.stack(rows, axis=1)
    return Batch(
        mx.array(tokens), mx.array(targets), mx.array(mask.astype(bool)), mx.array(positions)
    )


def stack_documents(rows: Sequence[np.ndarray]) -> Batch:
    """A batch of rows of one length, each of which holds one document, from its beginning."""
    return replace(stack_rows(rows), segment_pos=None)
