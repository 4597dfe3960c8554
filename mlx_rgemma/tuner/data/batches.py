"""In which order a training run reads: a pure function of the seed and the step.

So a run that is resumed needs to know its step and nothing else, however many processes share the
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.data.batch import Batch
from mlx_rgemma.tuner.data.packing import (
    Documents,
    Span,
    best_fit_pack,
    build_row,
    cut_row,
    stack_documents,
    stack_rows,
)


class Batches(Protocol):
    """Batches without end: `batches[step]`."""

    def __getitem__(self, step: int) -> Batch: ...


class Rows(Protocol):
    """Rows without end: `rows[number]` is (4, row_length), see `build_row`."""

    def __getitem__(self, number: int) -> np.ndarray: ...


class ConcatDataset:
    """Full rows: in each epoch the documents are shuffled, laid end to end and cut.

    Args:
        documents: What is read.
        row_length: Steps of a row.
        seed: Of the order.

    Raises:
        UserError: If the documents do not fill a row.
    """

    def __init__(self, documents: Documents, row_length: int, seed: int) -> None:
        self.documents, self.row_length, self.seed = documents, row_length, seed
        total = int(documents.steps.sum())
        self.rows_per_epoch = total // row_length
        if not self.rows_per_epoch:
            raise UserError(
                f"the training text has {total} tokens, fewer than one row of {row_length}; give"
                " more text or a smaller --context-length."
            )
        self._epoch = -1

    def __getitem__(self, number: int) -> np.ndarray:
        epoch, row = divmod(number, self.rows_per_epoch)
        if epoch != self._epoch:
            self._begin(epoch)
        pieces = cut_row(self._order, self._ends, row, self.row_length)
        return build_row(self.documents, pieces, self.row_length)

    def _begin(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        self._order = rng.permutation(len(self.documents))
        self._ends = np.cumsum(self.documents.steps[self._order])
        self._epoch = epoch


class PackedDataset:
    """Rows that keep documents whole where they fit; in each epoch the rows are shuffled."""

    def __init__(self, documents: Documents, row_length: int, seed: int) -> None:
        self.documents, self.row_length, self.seed = documents, row_length, seed
        self.pieces: list[list[Span]] = best_fit_pack(documents.steps, row_length)
        if not self.pieces:
            raise UserError("the training text has no token to predict.")
        self._epoch = -1

    @property
    def rows_per_epoch(self) -> int:
        """How many rows hold all documents once."""
        return len(self.pieces)

    def __getitem__(self, number: int) -> np.ndarray:
        epoch, row = divmod(number, self.rows_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pieces))
            self._epoch = epoch
        return build_row(self.documents, self.pieces[int(self._order[row])], self.row_length)


class MixtureDataset:
    """Rows of several sources in given shares.

    Args:
        sources: The sources.
        weights: The share of each; they are divided by their sum.
        seed: Of the order in which they take turns.
    """

    PERIOD = 1000
    """Rows in which every source gets its share exactly (to a thousandth)."""

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], seed: int) -> None:
        self.sources = list(sources)
        shares = np.cumsum(weights) / np.sum(weights)
        borders = np.round(np.concatenate([[0.0], shares]) * self.PERIOD).astype(int)
        turns = np.repeat(np.arange(len(self.sources)), np.diff(borders))
        self._turns = np.random.default_rng([seed, len(turns)]).permutation(turns)
        self._counts = np.diff(borders)
        self._before = np.zeros(self.PERIOD, int)
        for source in range(len(self.sources)):
            chosen = self._turns == source
            self._before[chosen] = np.arange(chosen.sum())

    def __getitem__(self, number: int) -> np.ndarray:
        period, place = divmod(number, self.PERIOD)
        source = int(self._turns[place])
        return self.sources[source][period * int(self._counts[source]) + int(self._before[place])]


class DataLoader:
    """Batches of `batch_size` rows, in the order of the rows."""

    def __init__(self, rows: Rows, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size

    def __getitem__(self, step: int) -> Batch:
        first = step * self.batch_size
        return stack_rows([self.rows[first + i] for i in range(self.batch_size)])


class PaddedBatches:
    """One document a row, rows of like length together, as mlx-lm has it.

    Documents are sorted by length and cut into batches once; each epoch shuffles the batches.
    Rows are padded on the right to one more than a multiple of 32 tokens; documents longer than
    `max_length` are cut off. The last batch is filled up with documents of the one before it.

    Args:
        documents: What is read.
        batch_size: Rows of a batch.
        max_length: Most tokens of a row.
        seed: Of the order.

    Raises:
        UserError: If there are fewer documents than rows in a batch.
    """

    PAD_TO = 32

    def __init__(self, documents: Documents, batch_size: int, max_length: int, seed: int) -> None:
        if len(documents) < batch_size:
            raise UserError(
                f"the data set has {len(documents)} examples, fewer than the batch size"
                f" {batch_size}; give more, or a smaller --batch-size."
            )
        self.documents, self.seed = documents, seed
        self.max_steps = max_length - 1
        order = np.argsort(documents.steps, kind="stable")
        starts = [min(i, len(order) - batch_size) for i in range(0, len(order), batch_size)]
        self.batches = [order[i : i + batch_size] for i in starts]

    @property
    def batches_per_epoch(self) -> int:
        """How many batches hold all documents."""
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.batches_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.batches_per_epoch)
        chosen = self.batches[int(order[place])]
        steps = np.minimum(self.documents.steps[chosen], self.max_steps)
        length = min(self.PAD_TO * -(-int(steps.max()) // self.PAD_TO), self.max_steps)
        pieces = [Span(int(d), 0, int(n)) for d, n in zip(chosen, steps, strict=True)]
        return stack_documents([build_row(self.documents, [piece], length) for piece in pieces])
